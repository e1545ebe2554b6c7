"""What a medical file says of one slice, as it is written with the model's answer. No heavy import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

Plane = Literal["axial", "sagittal", "coronal"]
ImageKind = Literal["original", "derived", "secondary", "localizer", "mosaic"]
Weighting = Literal["t1", "t2", "flair", "dwi", "other"]
Contrast = Literal["pre", "post"]
UIDS = ("study_uid", "series_uid", "instance_uid")
"""Facts that name a study, series or slice."""


@dataclass(frozen=True, kw_only=True)
class SliceFacts:
    """Facts about one frame of a scan, None if unknown; pictures such as JPEG and PNG have none."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)

    study_uid: str | None = None
    """DICOM's Study Instance UID."""
    series_uid: str | None = None
    """DICOM's Series Instance UID."""
    instance_uid: str | None = None
    """DICOM's SOP Instance UID."""
    modality: str | None = None
    """DICOM's code: MR, CT, ..."""
    plane: Plane | None = None
    """The one nearest to the slice."""
    position_mm: float | None = None
    """Of the slice along its normal: to the head (axial), posterior (coronal), or to the right (sagittal)."""
    spacing_mm: float | None = None
    """Between neighbouring pixels of the frame, which are square."""
    image_kind: ImageKind | None = None
    """Whether the scanner took it, or what else it is."""
    sequence: Weighting | None = None
    """Which tissues are bright."""
    contrast: Contrast | None = None
    """Whether the slice was taken before or after contrast agent was given."""
    burned_in: bool | None = None
    """Whether text was drawn into the pixels, which may name the patient: no picture of such a frame is shown."""
