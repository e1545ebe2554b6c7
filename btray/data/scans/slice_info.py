"""What the header of a medical file says of one slice; pictures such as JPEG and PNG say nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Plane = Literal["axial", "sagittal", "coronal"]
ImageKind = Literal["original", "derived", "secondary", "localizer", "mosaic"]
Weighting = Literal["t1", "t2", "flair", "dwi", "other"]
Contrast = Literal["pre", "post"]


@dataclass(frozen=True, kw_only=True)
class SliceInfo:
    """Facts about one frame of a scan, None if unknown. Those that the results table has are columns of that name."""

    study_uid: str | None = None
    series_uid: str | None = None
    instance_uid: str | None = None
    modality: str | None = None
    """DICOM's code: MR, CT, ..."""
    plane: Plane | None = None
    """The one nearest to the slice."""
    position_mm: float | None = None
    """Of the slice along its normal: to the head (axial), posterior (coronal), or to the right (sagittal)."""
    spacing_mm: float | None = None
    """Between neighbouring pixels of the frame, which are square."""
    image_kind: ImageKind | None = None
    sequence: Weighting | None = None
    contrast: Contrast | None = None
    """Whether the slice was taken before or after contrast agent was given."""
    burned_in: bool | None = None
    """Whether text was drawn into the pixels, which may name the patient: no picture of such a frame may be shown."""

    # In memory alone, to choose series and to split by patient: free text, and what follows from a patient's number.
    body_part: str | None = field(default=None, repr=False)
    description: str | None = field(default=None, repr=False)
    protocol: str | None = field(default=None, repr=False)
    patient_key: str | None = field(default=None, repr=False)
    """A digest of PatientID: the same for all scans of a patient."""
