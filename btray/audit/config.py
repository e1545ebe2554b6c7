"""The settings of the audit job. No heavy import: `--help` must be quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from btray.core.config import JobConfig
from btray.core.uris import Uri


class AuditConfig(JobConfig):
    """Find what makes figures untrue in labelled data: duplicates, leakage between splits, label conflicts.

    Writes audit.json, duplicates.parquet, report.html and lists of unreadable files and probable non-MRI images.
    """

    data: Uri
    """Labelled data, as for training; one class is enough."""
    classes: tuple[str, ...] = ()
    """Class folders, or labels of a manifest, that are meant; all others are left out. Default: all."""
    out: Uri
    """Folder for the audit; local or s3://."""
    overwrite: bool = Field(default=False, exclude=True)
    """Replace the audit at --out if it was made with other settings."""
    fail_on: tuple[Literal["leak", "conflict", "patient", "duplicate", "not_mri", "unreadable"], ...] = ()
    """Findings that end the job with exit code 3 once all is written, separated by commas: leak (an image of the val \
    or test split has a twin in an earlier split), conflict (one image, several labels), patient (in several splits), \
    duplicate, not_mri, unreadable."""
    report_groups: Annotated[int, Field(ge=0, le=1000)] = 60
    """Maximum number of duplicate groups whose pictures the report shows; conflicts and leaks come first."""

    def check(self) -> None:
        """Refuse data that are not there, and an --out that is taken or cannot be written to."""
        from btray import storage

        storage.require_input(self.data, "--data")
        if not self.overwrite:
            storage.require_own(self.out, self.model_dump(mode="json", exclude={"fail_on"}), result="audit.json")
        storage.require_writable(self.out, "--out")
