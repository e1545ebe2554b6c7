"""The settings of the audit job. No heavy import: `--help` must be quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from btray.core.config import JobConfig


class AuditConfig(JobConfig):
    """Find what makes figures untrue in labelled data: duplicates, leakage between splits, label conflicts.

    Writes audit.json, duplicates.parquet, report.html and lists of unreadable files and probable non-MRI images.
    """

    data: str
    """Labelled data, as for training; one class is enough."""
    classes: tuple[str, ...] = ()
    """Class folders, or labels of a manifest, that are meant; all others are left out. Default: all."""
    out: str
    """Folder for the audit; local or s3://."""
    fail_on: tuple[Literal["leak", "conflict", "patient", "duplicate", "not_mri", "unreadable"], ...] = ()
    """Findings that end the job with exit code 3 once all is written, separated by commas: leak (an image of the val \
    or test split has a twin in an earlier split), conflict (one image, several labels), patient (in several splits), \
    duplicate, not_mri, unreadable."""
    report_groups: Annotated[int, Field(ge=0, le=1000)] = 60
    """Maximum number of duplicate groups whose pictures the report shows; conflicts and leaks come first."""
