"""What the PACS says of the instances that an answer is made of, and of their patient.

Patient data are read here, from the PACS, and go back into it: nothing quotes them, and no warning of a library does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import pydicom.config
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, MRImageStorage

from btray.pacs.address import Metadata
from btray.pacs.client import DicomWeb
from btray.pacs.report.answers import SourceFrame, StudyAnswer
from btray.storage import StorageError

_IDENTITY: Final = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_LIBRARY: Final = (
    "Modality", "Rows", "Columns", "PixelSpacing", "SliceThickness", "ImageOrientationPatient", "ImagePositionPatient",
)  # fmt: skip


@dataclass(frozen=True)
class Sources:
    """The headers of the source instances of an answer, by their UIDs, in the order in which it names them."""

    headers: Mapping[str, Dataset]

    @classmethod
    def read(cls, archive: DicomWeb, answer: StudyAnswer) -> Sources:
        """Ask the PACS for them. Raises StorageError, not_found too if it has not all of them."""
        series = {frame.instance_uid: frame.series_uid for frame in answer.study.sources}
        headers = {}
        for instance, of_series in series.items():
            found = archive.metadata(answer.study_uid, of_series, instance)
            headers[instance] = as_dataset(found[0]) if found else Dataset()
            if any(name not in headers[instance] for name in _IDENTITY):
                raise StorageError("not_found", instance, "the archive does not have its header")
        return cls(headers)

    @property
    def patient(self) -> Dataset:
        """A header with the data of the patient and the study."""
        return next(iter(self.headers.values()))

    @cached_property
    def references(self) -> list[Dataset]:
        """What they are called, and nothing of the patient."""
        return [reference(header) for header in self.headers.values()]

    @property
    def library(self) -> list[Dataset]:
        """Those that highdicom can describe: single slices, but no instance of several frames."""
        return [
            header
            for header in self.headers.values()
            if header.SOPClassUID in (MRImageStorage, CTImageStorage)
            and all(header.get(name) not in (None, "") for name in _LIBRARY)
            and "NumberOfFrames" not in header
        ]

    def frame_number(self, frame: SourceFrame) -> list[int] | None:
        """Return the number of a frame, from 1, if its instance has several, and None if it is one slice."""
        header = self.headers[frame.instance_uid]
        return [frame.frame + 1] if "NumberOfFrames" in header else None


def reference(header: Dataset) -> Dataset:
    """Return what names an instance, with empty data of a patient: highdicom warns of names, and quotes them."""
    named = Dataset()
    for name in _IDENTITY:
        setattr(named, name, header[name].value)
    for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex"):
        setattr(named, name, "")
    for name in ("AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
        setattr(named, name, "")
    return named


def as_dataset(found: Metadata) -> Dataset:
    """Return DICOM's JSON as a dataset. What cannot be read of it is left out, as are pixels."""
    # whatever stands in a header is taken as it is: pydicom's warnings quote values
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    header = Dataset()
    for tag, element in found.items():
        if "BulkDataURI" in element:
            continue
        try:
            header.update(Dataset.from_json({tag: element}))
        except Exception:  # noqa: S112 - pydicom raises what it likes; one odd element is no reason to end
            continue
    return header
