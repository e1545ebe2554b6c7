"""Studies for the tests of reports: files as a scanner writes them, and what a model says of them, without Ray."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from btray.bulk import table
from btray.bulk.clinical.pseudonyms import Pseudonyms
from btray.bulk.clinical.studies import update_studies
from btray.model.classifier import Classifier
from btray.model.studies import Reader, StudyCollector
from btray.pacs.report.answers import StudyAnswer
from btray.pacs.report.sources import Sources, as_dataset
from btray.storage import FileInfo
from tests.helpers.debian import install
from tests.helpers.dicom_files import ENHANCED_MR, item, mr_slice, sequence, write
from tests.helpers.hospital_archive import ROOT, instance, pixels_of
from tests.helpers.table_helpers import write as write_rows

CLASSIFIED_AT = datetime(2026, 11, 29, 3, 4, 5, 678901, UTC)
PLANTED = "PLANTEDNAME^Jürgen"
"""The patient's name in every source instance."""


def classic(study: int = 1, series: int = 1, slices: int = 4, **changed: Any) -> list[bytes]:
    """Return a series of single slices."""
    more: dict[str, Any] = {
        "PatientName": PLANTED, "SliceThickness": 5, "FrameOfReferenceUID": f"{ROOT}.{study}.9", "PatientSex": "F",
    }  # fmt: skip
    return [instance(study, series, number, **more | changed) for number in range(slices)]


def enhanced(study: int = 1, series: int = 2, frames: int = 4, **changed: Any) -> list[bytes]:
    """Return a series that is one instance of several frames (Enhanced MR)."""
    pixels = np.stack([np.roll(pixels_of(0), 8 * number, axis=1) for number in range(frames)])
    plane = {"ImageOrientationPatient": None, "ImagePositionPatient": None, "PixelSpacing": None}
    groups = [
        item(
            PlanePositionSequence=sequence(ImagePositionPatient=[0, 0, 5.0 * number]),
            PlaneOrientationSequence=sequence(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
            PixelMeasuresSequence=sequence(PixelSpacing=[0.5, 0.5], SliceThickness=5),
        )
        for number in range(frames)
    ]
    uids = {
        "SOPClassUID": ENHANCED_MR,
        "StudyInstanceUID": f"{ROOT}.{study}",
        "SeriesInstanceUID": f"{ROOT}.{study}.{series}",
        "SOPInstanceUID": f"{ROOT}.{study}.{series}.1",
        "PatientName": PLANTED,
        "PerFrameFunctionalGroupsSequence": groups,
    }
    return [write(mr_slice(pixels, **plane | uids | changed), pixels)]


def answer_of(files: Sequence[bytes], classifier: Classifier, at: datetime = CLASSIFIED_AT) -> StudyAnswer:
    """Return what a model says of the files of one study."""
    reader = Reader.of(classifier.manifest)
    studies = StudyCollector(reader)
    sources: dict[str | None, tuple[str, str]] = {}
    for number, data in enumerate(files):
        predictions = classifier.predict_decoded(classifier.frames([data]), [str(number)])
        sources[str(number)] = str(predictions[0].series_uid), str(predictions[0].instance_uid)
        studies.add(predictions)
    answer = StudyAnswer.of_decisions(
        list(studies.decisions()), reader, sources=sources, model_id=classifier.model_id, classified_at=at
    )
    assert answer is not None
    return answer


def sources_of(files: Sequence[bytes], answer: StudyAnswer) -> Sources:
    """Return the headers of the sources of an answer, as a PACS gives them."""
    read = (pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True) for data in files)
    headers = {str(header.SOPInstanceUID): as_dataset(header.to_json_dict()) for header in read}
    return Sources({frame.instance_uid: headers[frame.instance_uid] for frame in answer.study.sources})


def complaints(file: bytes, folder: Path) -> list[str]:
    """Return what dciodvfy (dicom3tools) finds wrong in an object."""
    if not install("dicom3tools", "dciodvfy"):
        pytest.skip("DCIODVFY ABSENT: that objects keep to the standard is NOT shown here")
    path = folder / "object.dcm"
    path.write_bytes(file)
    found = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, errors="replace", check=False)
    lines = (found.stdout + found.stderr).splitlines()
    assert lines, "it says at least what kind of object it is"
    return [line for line in lines if line.startswith("Error")]


def dumped(file: bytes, folder: Path) -> str:
    """Return a report as dcmtk's dsrdump prints it."""
    if not install("dcmtk", "dsrdump"):
        pytest.skip("DSRDUMP ABSENT: that others read the reports is NOT shown here")
    path = folder / "report.dcm"
    path.write_bytes(file)
    return subprocess.run(
        ["dsrdump", "+Pl", "+U8", str(path)], capture_output=True, text=True, check=True, errors="replace"
    ).stdout


def groups_of(report: Any) -> Mapping[str, Any]:
    """Return the measurement groups of a report by their names."""
    return {group.tracking_identifier: group for group in report.content.get_image_measurement_groups()}


def read(file: bytes) -> Dataset:
    """Return a file as a dataset."""
    return pydicom.dcmread(io.BytesIO(file))


def write_tables(
    place: str,
    files: Sequence[bytes],
    classifier: Classifier,
    at: datetime = CLASSIFIED_AT,
    pseudonyms: Pseudonyms | None = None,
) -> str:
    """Write what classify writes of the files of some studies, and return its table of studies."""
    rows = []
    for number, data in enumerate(files):
        info = FileInfo(f"s3://b/{number}", len(data), "e", 0.0)
        shown = pseudonyms.conceal(info) if pseudonyms else info
        for prediction in classifier.predict_decoded(classifier.frames([data]), [info.uri]):
            row = table.row_of(prediction, shown, run_id="1", classified_at=at)
            rows.append(pseudonyms.conceal_row(row) if pseudonyms else row)
    write_rows(place, "1", *rows, model=classifier.model_id)
    reader = Reader.of(classifier.manifest)
    update_studies(place, classifier.model_id, f"{place}-studies", reader, any_new=True)
    return f"{place}-studies"
