"""What the header of a medical file says of one slice; pictures such as JPEG and PNG say nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from btray.data.slice_facts import Contrast, ImageKind, Plane, SliceFacts, Weighting

__all__ = ["Contrast", "ImageKind", "Plane", "SliceInfo", "Weighting"]


@dataclass(frozen=True, kw_only=True)
class SliceInfo(SliceFacts):
    """The facts that are written, and those that stay in memory: free text, and what follows from a patient's number.

    These serve to choose series and to split by patient.
    """

    body_part: str | None = field(default=None, repr=False)
    description: str | None = field(default=None, repr=False)
    protocol: str | None = field(default=None, repr=False)
    patient_key: str | None = field(default=None, repr=False)
    """A digest of PatientID: the same for all scans of a patient."""
