"""An archive of a hospital: studies are decided, and nothing that is written names a patient."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray

from btray.bulk import worklist
from btray.bulk.classify import classify
from btray.bulk.clinical.pseudonyms import Pseudonyms
from btray.core.errors import UserError
from btray.results import current
from btray.storage import lease
from tests.helpers.classify_helpers import (
    QUICK_LEASE,
    actors,
    job,
    keys_of,
    part_files,
    plain_rows,
    report_of,
    start,
    without_ray,
)
from tests.helpers.dicom_files import IDENTIFIERS
from tests.helpers.hospital_archive import ROOT, instance, write_archive, written
from tests.helpers.tiny_bundle import saved_bundle
from tools.processes import until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("bundle") / "model")
    saved_bundle(folder)
    return folder


def test_nothing_that_is_written_names_a_patient_and_pseudonyms_serve_as_names(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    without_ray(monkeypatch)
    count = write_archive(tmp_path / "archive")
    monkeypatch.setattr(worklist, "remove", lambda folder: None)  # what is removed in the end was written, too
    archive, plain, private = (str(tmp_path / name) for name in ("archive", "plain", "private"))
    (key := tmp_path / "key").write_bytes(bytes(range(32)))
    key.chmod(0o600)
    names = Pseudonyms(key.read_bytes())
    settings: dict[str, Any] = {"explain": 30, "metrics_to": str(tmp_path / "private" / "_metrics.prom")}
    hidden = job(model, archive, private, pseudonymize=str(key), **settings)
    classify(hidden)
    (tmp_path / "archive" / "PLANTEDNAME^1" / "new").write_bytes(instance(1, 1, 7))
    classify(hidden)
    report = report_of(private)
    assert (report["objects"], report["unchanged"]) == (1, count)
    (tmp_path / "other").write_bytes(os.urandom(32))
    (tmp_path / "other").chmod(0o600)
    for refused in (str(tmp_path / "other"), None):
        with pytest.raises(UserError, match="--pseudonymize"):
            classify(job(model, archive, private, pseudonymize=refused))

    secrets = (*IDENTIFIERS, ROOT)
    found = {
        (path, secret) for path, text in written(private, f"{private}-studies") for secret in secrets if secret in text
    }
    assert found == set()
    output = "".join(capfd.readouterr())
    assert [secret for secret in secrets if secret in output] == []

    # the same without a key: UIDs and places stand there, and nothing else that names a patient
    classify(job(model, archive, plain, **settings | {"metrics_to": None}))
    rows = {row["uri"]: row for row in current(plain).to_pylist()}
    assert len(rows) == count + 1
    texts = [(path, text.replace("PLANTEDNAME^", "")) for path, text in written(plain, f"{plain}-studies")]
    assert {(path, secret) for path, text in texts for secret in IDENTIFIERS if secret in text} == set()
    assert Counter(row["error_code"] for row in rows.values()) == {None: count - 1, "truncated": 1, "unsupported": 1}
    damaged = rows[str(tmp_path / "archive/PLANTEDNAME^0/0/damaged")]
    assert (damaged["series_uid"], damaged["modality"], damaged["plane"]) == (f"{ROOT}.0.0", "MR", "axial")
    assert "PLANTEDNAME^0/0/burned" not in str([row["uri"] for row in report_of(plain)["least_certain"]])

    # and every row stands in both tables
    answers = {row["uri"]: row for row in current(private).to_pylist()}
    assert answers.keys() == {names.name(uri) for uri in rows}
    for uri, row in rows.items():
        twin = answers[names.name(uri)]
        assert [twin[name] for name in ("label", "error_code", "plane", "position_mm", "burned_in")] == [
            row[name] for name in ("label", "error_code", "plane", "position_mm", "burned_in")
        ]
        for name in ("study_uid", "series_uid", "instance_uid"):
            assert twin[name] == (row[name] and names.uid(row[name]))

    studies = {
        (row["level"], row["study_uid"], row["series_uid"]): row for row in plain_rows(f"{plain}-studies").to_pylist()
    }
    series = [(n, f"{ROOT}.{n}.{m}") for n in range(2) for m in range(2)]
    assert studies.keys() == {
        *(("study", f"{ROOT}.{n}", None) for n in range(2)),
        *(("series", f"{ROOT}.{n}", uid) for n, uid in series),
    }
    first = studies["series", f"{ROOT}.0", f"{ROOT}.0.0"]
    assert (first["frames"], first["rejected"]) == (4, 1)
    assert studies["study", f"{ROOT}.1", None]["frames"] == 7
    twins = plain_rows(f"{private}-studies").to_pylist()
    assert {row["study_uid"] for row in twins} == {names.uid(f"{ROOT}.{n}") for n in range(2)}
    for output_ in (plain, private):
        pages = [path.read_text() for path in Path(output_).rglob("summary.html")]
        assert max(page.count('alt="key frame"') for page in pages) >= 4
        assert all("mean of the top 3 (default: the bundle has no rule)" in page for page in pages)


@pytest.mark.cluster
def test_the_logs_of_ray_name_nobody(ray_session: None, model: str, tmp_path: Path) -> None:
    write_archive(tmp_path / "archive", studies=1)
    (key := tmp_path / "key").write_bytes(bytes(range(32)))
    key.chmod(0o600)
    classify(job(model, str(tmp_path / "archive"), str(tmp_path / "out"), pseudonymize=str(key)))
    logs = list(written(os.path.join(ray._private.worker._global_node.get_session_dir_path(), "logs")))
    assert len(logs) > 5
    assert {(path, secret) for path, text in logs for secret in (*IDENTIFIERS, ROOT) if secret in text} == set()


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_every_frame_series_and_study_stands_once_whatever_is_killed(
    ray_session: None, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "EXPIRY", QUICK_LEASE[1])
    count = write_archive(tmp_path / "archive", studies=80)
    output = str(tmp_path / "killed")
    config = job(model, str(tmp_path / "archive"), output, actors=2)
    chance = random.Random(5)
    for victim in ("worker", "driver", "driver"):
        before = len(part_files(output))
        driver = start(config)
        until(lambda: len(part_files(output)) > before or not driver.is_alive())  # noqa: B023
        time.sleep(chance.random())
        if victim == "worker":
            os.kill(chance.choice(until(actors)), signal.SIGKILL)
            time.sleep(chance.random())
        driver.kill()
        driver.join()
    classify(config)
    frames = keys_of(plain_rows(output))
    assert len(frames) == count == len({uri for uri, _ in frames})
    rows = plain_rows(f"{output}-studies").to_pylist()
    assert Counter((row["level"], row["study_uid"], row["series_uid"]) for row in rows) == Counter(
        [("study", f"{ROOT}.{n}", None) for n in range(80)]
        + [("series", f"{ROOT}.{n}", f"{ROOT}.{n}.{m}") for n in range(80) for m in range(2)]
    )
    assert sum(row["frames"] + row["rejected"] for row in rows if row["level"] == "study") == count - 1
