"""The settings of all that speaks to a PACS. No heavy import: `--help` must be quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, model_validator

from btray.core.config import FROM_ENVIRONMENT, JobConfig
from btray.core.errors import UserError

Secret = Annotated[SecretStr | None, FROM_ENVIRONMENT, Field(exclude=True)]
File = Annotated[str | None, FROM_ENVIRONMENT, Field(exclude=True)]


class PacsConfig(JobConfig):
    """Settings that the jobs share which read from a PACS or write to one."""

    insecure: bool = False
    """Allow dicomweb+http:// to other machines, which sends scans and password in clear text."""
    pacs_user: Secret = None
    """Of the PACS, from BTRAY_PACS_USER; as all settings of its access it is read from the environment alone."""
    pacs_password: Secret = None
    """Of this user, from BTRAY_PACS_PASSWORD."""
    pacs_token: Secret = None
    """Bearer token instead of user and password, from BTRAY_PACS_TOKEN."""
    pacs_cert: File = None
    """File (PEM) of the client's certificate, from BTRAY_PACS_CERT."""
    pacs_key: File = None
    """File (PEM) of its key, if that is another one, from BTRAY_PACS_KEY."""
    pacs_ca: File = None
    """File (PEM) of the authorities that may have signed the certificate of the PACS, from BTRAY_PACS_CA; default:
    the public ones."""

    def check(self) -> None:
        """Refuse a file that is not there."""
        for name in ("pacs_cert", "pacs_key", "pacs_ca"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise UserError(f"BTRAY_{name.upper()} {path}: no such file; name one in PEM format")

    @model_validator(mode="after")
    def _one_way_in(self) -> Self:
        if (self.pacs_user is None) != (self.pacs_password is None):
            raise ValueError("set both BTRAY_PACS_USER and BTRAY_PACS_PASSWORD, or neither")
        if self.pacs_user and self.pacs_token:
            raise ValueError("set BTRAY_PACS_USER and BTRAY_PACS_PASSWORD, or BTRAY_PACS_TOKEN, not both")
        if self.pacs_key and not self.pacs_cert:
            raise ValueError("BTRAY_PACS_KEY is the key of a certificate: set BTRAY_PACS_CERT too")
        return self
