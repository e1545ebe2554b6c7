"""The settings of the report job. No heavy import: `--help` must be quick."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from btray.core.errors import UserError
from btray.core.uris import Uri
from btray.model.config import require_bundle
from btray.model.shipped import SHIPPED, Model
from btray.pacs.address import Address
from btray.pacs.config import PacsConfig


class ReportConfig(PacsConfig):
    """Send what a model says of studies into the PACS that holds their images, as one structured report for each.

    Run again it sends what is new. The PACS is reached with what BTRAY_PACS_* say in the environment.
    """

    studies: Uri
    """Table of series and studies that classify wrote (OUTPUT-studies); local or s3://."""
    to: str
    """The PACS: dicomweb://HOST[:PORT]/ROOT, verified HTTPS; dicomweb+http:// on this machine, or with --insecure."""
    model: Model = SHIPPED
    """Model bundle whose answers are reported: a folder, local or s3://, or the name of the shipped one."""
    model_id: str | None = None
    """Refuse the bundle unless this is its model_id."""
    heat_maps: Annotated[int, Field(ge=0, le=10)] = 0
    """Send pictures of what spoke for the answer (Grad-CAM) over this many slices of each study, with its report."""
    patience: Annotated[float, Field(ge=0)] = 300.0
    """Seconds to wait for a PACS or store that does not answer, before the job fails."""

    def check(self) -> None:
        """Refuse a table or a bundle that is not there."""
        from btray import storage

        super().check()
        require_bundle(self.model)
        storage.require_input(self.studies, "--studies")

    @model_validator(mode="after")
    def _one_service(self) -> Self:
        try:
            address = Address.parse(self.to, insecure=self.insecure)
        except UserError as error:
            raise ValueError(f"--to {error}") from error
        if address.query:
            raise ValueError("--to names a PACS, and no studies: leave out what follows ?")
        return self
