"""Training on DICOM: the slices of a patient whom the files name are on one side, and his number is written nowhere."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from btray import phantoms, storage
from btray.data.scans import decode
from btray.evaluation.assessment import assess
from btray.evaluation.scoring import score
from btray.training.job import train
from btray.training.prepare import TrainingData, read_source
from btray.training.run import claim_run, is_finished, record_finished
from tests.helpers.dicom_files import IDENTIFIERS, slice_file
from tests.helpers.local_data import run_here
from tests.helpers.privacy import found_in, ray_logs, written
from tests.helpers.tiny_bundle import random_bundle
from tests.helpers.training_helpers import prepared, tiny

pytestmark = pytest.mark.cluster

PATIENTS = 8  # of each class, with three slices each


def write_scans(folder: Path, kind: str) -> tuple[str, dict[str, str]]:
    """Write slices under names that say nothing of the patient, in folders by label or all in one with a manifest.

    Returns the data for training, and the patient of each file.
    """
    names = np.random.default_rng(4).permutation(1000)
    patients, rows = {}, ["uri,label"]
    for number in range(2 * PATIENTS * 3):
        label, patient = ("glioma", "no_tumor")[number % 2], f"PLANTEDID{number % (2 * PATIENTS)}"
        path = folder / (label if kind == "folders" else "all") / f"{names[number]:03d} {number % 7}x"
        pixels = decode(phantoms.encoded_phantom(label, number)).frames[0].astype(np.uint16) * 9
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(slice_file(pixels, PatientID=patient, SOPInstanceUID=f"1.2.3.{number}"))
        patients[str(path)] = patient
        rows.append(f"{path.relative_to(folder)},{label}")
    if kind == "manifest":
        (folder / "manifest.csv").write_text("\n".join(rows))
    return str(folder), patients


def keys_of(data: TrainingData) -> set[str]:
    """Return what stands for the patients."""
    return {str(key) for key in data.source.table["patient_id"].to_pylist()}


@pytest.mark.parametrize("kind", ["folders", "manifest"])
def test_dicom_with_labels_by_folder_or_manifest_is_split_by_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run_here(monkeypatch)
    scans, patients = write_scans(tmp_path / "scans", kind)
    config = tiny(scans, tmp_path / "model", epochs=1, validation=0.3)
    assert set(read_source(config).table["patient_id"].to_pylist()) == {None}, "the source itself names nobody"
    data = prepared(config)
    uris = data.source.table["uri"].to_pylist()
    sides = [
        {patients[uris[row]] for row in data.plan.rows(positions)}
        for positions in (data.plan.train, data.plan.validation)
    ]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[0] | sides[1]) == 2 * PATIENTS
    assert min(map(len, sides)) > 1
    assert len(keys_of(data)) == 2 * PATIENTS
    # as many as intervals are over, wherever these slices are tested
    table = read_source(config).table
    scores = score(random_bundle(classes=("glioma", "no_tumor")), np.arange(len(table)), table["uri"])
    assessment = assess(random_bundle(classes=("glioma", "no_tumor")), table, scores, measured_on="all")
    assert assessment.metrics.by_patients is not None
    assert assessment.metrics.by_patients.groups == 2 * PATIENTS
    claim_run(data)
    record_finished(read_source(config))
    storage.write_text(storage.join(config.out, "bundle.json"), "{}")
    storage.write_text(storage.join(config.out, "config.yaml"), config.to_yaml())
    assert is_finished(read_source(config))


@pytest.mark.parametrize("kind", ["folders", pytest.param("manifest", marks=pytest.mark.soak)])
def test_a_training_on_dicom_names_no_patient(
    ray_session: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    caplog.set_level(logging.INFO)
    scans, _ = write_scans(tmp_path / "scans", kind)
    config = tiny(scans, tmp_path / "model", epochs=1, validation=0.3)
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        keys = keys_of(prepared(config))
    train(config)
    assert (tmp_path / "model" / "bundle.json").is_file()
    texts = [*written(tmp_path / "model"), *ray_logs(), ("output", "".join(capfd.readouterr())), ("log", caplog.text)]
    assert found_in(texts, (*IDENTIFIERS, *keys)) == set()
