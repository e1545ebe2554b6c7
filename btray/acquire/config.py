"""The settings of the acquire job. No heavy import: `--help` must be quick."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from btray.core.config import JobConfig, Positive
from btray.core.uris import Uri, resolved

_NO_URI = "kaggle:|https?://"


class AcquireConfig(JobConfig):
    """Bring data sets in: download, verify, unpack, merge, and write a manifest."""

    source: Annotated[tuple[Annotated[str, resolved(unless=_NO_URI)], ...], Field(min_length=1)]
    """kaggle:OWNER/NAME, an http(s):// archive (zip, tar, tar.gz, tar.bz2, tar.xz), an archive, folder or manifest, \
    local or s3://; several are merged. A comma separates: put one that holds a comma between double quotes."""
    out: Uri
    """Where images, manifest.parquet and dataset.json are written; local or s3://."""
    classes: tuple[str, ...] = ()
    """Class folders, or labels of a manifest, that are meant; all others are left out. Default: all."""
    sha256: tuple[str, ...] = ()
    """SHA-256 of each archive, in the order of --source; `-` for none."""
    license: tuple[str, ...] = ()
    """Licence of each source, in the order of --source, recorded in dataset.json; one alone holds for all."""
    name: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)], ...] = ()
    """Name of each source, in the order of --source, for folders and the manifest; default: made from the source."""
    cache: Uri | None = None
    """Local folder for downloads, so that an interrupted one is resumed, and for unpacking; default: ~/.cache/btray."""
    archive_encoding: str = "utf-8"
    """Encoding of those names in archives that are not marked as UTF-8, such as gbk, shift_jis or cp437; names that \
    are in another one are left out."""
    max_unpacked_gb: Annotated[float, Field(gt=0)] = 50.0
    """Unpacked size above which an archive is refused as a bomb, in GB."""
    max_files: Positive = 10_000_000
    """Number of files above which an archive is refused as a bomb."""
    max_ratio: Annotated[float, Field(ge=1)] = 200.0
    """Unpacked size, in times the archive's own, above which it is refused as a bomb; 64 MiB are always allowed."""

    @field_validator("sha256")
    @classmethod
    def _hexadecimal(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        lower = tuple(digest.strip().lower() for digest in value)
        for digest in lower:
            if digest != "-" and not (len(digest) == 64 and all(c in "0123456789abcdef" for c in digest)):
                raise ValueError(f"{digest!r} is not a SHA-256: give 64 hexadecimal digits, or - for none")
        return lower

    @field_validator("archive_encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            if b"a/1.jpg".decode(value, "surrogateescape") != "a/1.jpg":
                raise ValueError("of other letters")
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"{value!r} is no encoding that names in archives have: write utf-8, gbk, shift_jis or cp437, say"
            ) from error
        return value

    @field_validator("cache")
    @classmethod
    def _local(cls, value: str | None) -> str | None:
        if value and value.startswith("s3://"):
            raise ValueError("downloads need a local folder")
        return value

    def check(self) -> None:
        """Refuse sources that are not there, and an --out that cannot be written to."""
        from btray import storage

        for source in self.source:
            if not re.match(_NO_URI, source, re.IGNORECASE):
                storage.require_input(source, "--source")
        storage.require_writable(self.out, "--out")

    @model_validator(mode="after")
    def _at_most_one_per_source(self) -> Self:
        for key in ("sha256", "license", "name"):
            if len(getattr(self, key)) > len(self.source):
                raise ValueError(f"--{key} is given {len(getattr(self, key))} times for {len(self.source)} sources")
        return self
