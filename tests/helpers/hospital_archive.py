"""The archive of a hospital: studies of DICOM files in folders that name patients."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from btray import phantoms
from btray.data.scans import decode
from tests.helpers.dicom_files import mr_slice, slice_file, write

ROOT = "1.2.826.0.1.3680043.10.543"
"""Of all UIDs here."""


@functools.cache
def pixels_of(seed: int) -> np.ndarray:
    return decode(phantoms.encoded_phantom("glioma", seed)).frames[0].astype(np.uint16) * 16


def instance(study: int, series: int, number: int, **changed: Any) -> bytes:
    uids = {
        "StudyInstanceUID": f"{ROOT}.{study}",
        "SeriesInstanceUID": f"{ROOT}.{study}.{series}",
        "SOPInstanceUID": f"{ROOT}.{study}.{series}.{number}",
        "ImagePositionPatient": [0, 0, 5.0 * number],
    }
    return slice_file(pixels_of(number % 5), **uids | changed)


def write_archive(folder: Path, studies: int = 2) -> int:
    """Write studies of two series, a damaged slice, one with text in it and a report; return how many files."""
    files = {
        f"PLANTEDNAME^{study}/{series}/{number}": instance(study, series, number)
        for study in range(studies)
        for series in range(2)
        for number in range(3)
    }
    files["PLANTEDNAME^0/0/damaged"] = instance(0, 0, 9)[:-5000]
    files["PLANTEDNAME^0/0/burned"] = instance(0, 0, 8, BurnedInAnnotation="YES")
    files["PLANTEDNAME^0/report"] = write(mr_slice(pixels_of(0), SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11"))
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return len(files)
