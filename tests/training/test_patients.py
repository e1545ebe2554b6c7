"""Training on DICOM: the slices of a patient whom the files name are on one side, and his number is written nowhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from btray import phantoms
from btray.data.scans import decode
from btray.training.job import train
from tests.helpers.dicom_files import IDENTIFIERS, slice_file
from tests.helpers.training_helpers import prepared, tiny

pytestmark = pytest.mark.cluster

PATIENTS = 8  # of each class, with three slices each


def write_scans(folder: Path) -> dict[str, str]:
    """Write slices under names that say nothing of the patient; return the patient of each file."""
    names = np.random.default_rng(4).permutation(1000)
    patients = {}
    for number in range(2 * PATIENTS * 3):
        label, patient = ("glioma", "no_tumor")[number % 2], f"PLANTEDID{number % (2 * PATIENTS)}"
        path = folder / label / f"{names[number]:03d} {number % 7}x"
        pixels = decode(phantoms.encoded_phantom(label, number)).frames[0].astype(np.uint16) * 9
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(slice_file(pixels, PatientID=patient, SOPInstanceUID=f"1.2.3.{number}"))
        patients[str(path)] = patient
    return patients


def test_a_tree_of_dicom_is_split_by_patient_and_trained_on_end_to_end(ray_session: None, tmp_path: Path) -> None:
    patients = write_scans(tmp_path / "scans")
    config = tiny(str(tmp_path / "scans"), tmp_path / "model", epochs=1, validation=0.3)
    data = prepared(config)
    uris = data.source.table["uri"].to_pylist()
    sides = [
        {patients[uris[row]] for row in data.plan.rows(positions)}
        for positions in (data.plan.train, data.plan.validation)
    ]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[0] | sides[1]) == 2 * PATIENTS
    train(config)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert any(path.name == "bundle.json" for path in files)
    written = {path.name: path.read_bytes() for path in files}
    keys = set(data.source.table["patient_id"].to_pylist())
    assert len(keys) == 2 * PATIENTS
    for secret in (*IDENTIFIERS, *map(str, keys)):
        assert [name for name, body in written.items() if secret.encode() in body] == []
