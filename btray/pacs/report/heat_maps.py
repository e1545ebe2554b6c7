"""Heat maps for a PACS: what spoke for the answer, over the slices with the most tumor, as RGB secondary captures."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Final

import numpy as np
import numpy.typing as npt
from highdicom.sc import SCImage
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian

from btray.core.notice import NOTICE
from btray.data.frames import Frames, Rejection
from btray.data.slice_facts import Plane
from btray.explain import heat_maps, overlay
from btray.model.classifier import Classifier
from btray.pacs.client import DicomWeb
from btray.pacs.own import SERIES_DESCRIPTION
from btray.pacs.report.answers import SourceFrame, StudyAnswer
from btray.pacs.report.codes import coded
from btray.pacs.report.document import finish, origin
from btray.pacs.report.identity import heat_map_uid, report_uid, series_uid

_SERIES_NUMBER: Final = 9902
_ORIENTATIONS: Final[dict[Plane, tuple[str, str]]] = {
    "axial": ("L", "P"), "coronal": ("L", "F"), "sagittal": ("P", "F"),
}  # fmt: skip
"""Where the rows and columns of a slice run to, as `btray.data.scans.orientation` turns it."""


@dataclass(frozen=True)
class _Slice:
    """A slice that is shown."""

    source: SourceFrame
    header: Dataset
    pixels: npt.NDArray[np.uint8]
    """As the network sees it, [size, size]."""
    plane: Plane | None


def make_heat_maps(
    archive: DicomWeb, answer: StudyAnswer, patient: Dataset, classifier: Classifier, count: int
) -> list[SCImage]:
    """Return heat maps of the `count` slices with the most tumor, of those that can be decoded and may be shown.

    Slices with text burned in are left out, as from all pictures. Raises StorageError.

    Args:
        archive: the PACS that holds the slices.
        answer: names the slices, and the label that the heat is the evidence for.
        patient: a header with the data of the patient and the study.
        classifier: that of the model that answered.
        count: of slices.
    """
    slices = _read(archive, answer, classifier, count)
    if not slices:
        return []
    label = answer.study.label
    heats = heat_maps(classifier, np.stack([shown.pixels for shown in slices]), [label] * len(slices))
    return [
        _capture(answer, patient, shown, overlay(shown.pixels, heat), number)
        for number, (shown, heat) in enumerate(zip(slices, heats, strict=True), start=1)
    ]


def _read(archive: DicomWeb, answer: StudyAnswer, classifier: Classifier, count: int) -> list[_Slice]:
    held: dict[str, tuple[Dataset, Frames | Rejection]] = {}
    slices = []
    for source in answer.key_frames[:count]:
        if source.instance_uid not in held:
            body = archive.retrieve_instance(answer.study_uid, source.series_uid, source.instance_uid)
            header = dcmread(
                BytesIO(body), force=True, stop_before_pixels=True, specific_tags=["SOPClassUID", "NumberOfFrames"]
            )
            held[source.instance_uid] = header, classifier.source.from_bytes(body)
        known, frames = held[source.instance_uid]
        if isinstance(frames, Frames) and source.frame < len(frames) and not frames.names_patient(source.frame):
            info = frames.info(source.frame)
            slices.append(_Slice(source, known, frames[source.frame], info.plane if info else None))
    return slices


def _capture(
    answer: StudyAnswer, patient: Dataset, shown: _Slice, picture: npt.NDArray[np.uint8], number: int
) -> SCImage:
    report = report_uid(answer)
    image = SCImage(
        pixel_array=picture,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=_ORIENTATIONS[shown.plane or "axial"],
        study_instance_uid=answer.study_uid,
        series_instance_uid=series_uid("heat maps", report),
        series_number=_SERIES_NUMBER,
        sop_instance_uid=heat_map_uid(report, shown.source),
        instance_number=number,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **origin(answer, f"{SERIES_DESCRIPTION}, heat maps"),
    )
    if shown.plane is None:
        image.PatientOrientation = []
    image.Laterality = ""  # of a head; dciodvfy misses it
    image.BurnedInAnnotation = "NO"
    image.DerivationDescription = (
        f"Grad-CAM: evidence for {answer.study.label} by model {answer.model_id}, not the border of a lesion. {NOTICE}"
    )
    source = Dataset()
    source.ReferencedSOPClassUID = shown.header.SOPClassUID
    source.ReferencedSOPInstanceUID = shown.source.instance_uid
    if "NumberOfFrames" in shown.header:
        source.ReferencedFrameNumber = shown.source.frame + 1
    source.PurposeOfReferenceCodeSequence = [coded(codes.DCM.SourceImageForImageProcessingOperation)]
    image.SourceImageSequence = [source]
    image.DateOfSecondaryCapture = image.ContentDate
    image.TimeOfSecondaryCapture = image.ContentTime
    finish(image, answer, patient)
    return image
