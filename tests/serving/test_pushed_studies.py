"""A study that a scanner sends to a PACS ends as one report there, whatever grows, dies or is pushed again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from btray.model.classifier import Classifier
from btray.model.studies import Reader, StudyCollector
from btray.pacs.config import PacsConfig
from btray.serving.config import ServiceConfig
from btray.serving.dicomweb.pending import PendingStudies
from btray.serving.dicomweb.studies import PushedStudies
from btray.serving.job import free_port
from tests.conftest import ROOT
from tests.helpers.debian import install
from tests.helpers.hospital_archive import ROOT as UIDS
from tests.helpers.hospital_archive import instance
from tests.helpers.orthanc import Orthanc
from tests.helpers.pushes import reports
from tests.helpers.serving_helpers import Running, running
from tools.processes import until

QUIET = 0.01


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """An Orthanc with the rule of deploy/compose, and the endpoint's address in its settings."""
    port = free_port()
    given = json.loads((ROOT / "deploy/compose/orthanc.json").read_text())["DicomWeb"]["Servers"]["btray"]
    servers = {"btray": given | {"Url": f"http://127.0.0.1:{port}/dicomweb/"}}
    settings = {
        "LuaScripts": [str(ROOT / "deploy/compose/push.lua")],
        "StableAge": 2,
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "Servers": servers},
    }
    with Orthanc(tmp_path_factory.mktemp("pacs"), **settings) as started:
        started.endpoint_port = port  # type: ignore[attr-defined]
        yield started


def settings(pacs: Orthanc, model: str, folder: Path) -> dict[str, Any]:
    waits = {"report_to": pacs.address, "report_after_seconds": QUIET, "pending": str(folder / "pending")}
    return {"model": model, **waits}


@pytest.fixture
def service(pacs: Orthanc, model: str, tmp_path: Path) -> Iterator[Running]:
    with running(port=pacs.endpoint_port, **settings(pacs, model, tmp_path)) as served:  # type: ignore[attr-defined]
        yield served


def scanned(pacs: Orthanc, folder: Path, files: list[bytes]) -> None:
    """Send files to the PACS as a scanner does."""
    if not install("dcmtk", "storescu"):
        pytest.skip("DCMTK ABSENT: what this test shows of C-STORE is NOT shown here")
    names = []
    for number, data in enumerate(files):
        (folder / str(number)).write_bytes(data)
        names.append(str(folder / str(number)))
    command = ["storescu", "-aec", "ORTHANC", "127.0.0.1", str(pacs.dicom_port), *names]
    subprocess.run(command, check=True, env=os.environ | {"TCP_NODELAY": "1"})


def report_what_waits(pacs: Orthanc, model: str, folder: Path) -> PushedStudies:
    """Report until nothing waits."""
    config = ServiceConfig(**settings(pacs, model, folder))
    studies = PushedStudies(config, PacsConfig(**pacs.credentials))

    def nothing_waits() -> bool:
        studies.report_what_is_still()
        return not PendingStudies(str(folder / "pending")).marks()

    until(nothing_waits, seconds=60)
    return studies


def stable_series(pacs: Orthanc) -> int:
    """Return how many series have become stable so far: the rule has been asked for each."""
    changes = pacs.session.get(f"{pacs.url}/changes?limit=1000", timeout=30).json()["Changes"]
    return sum(change["ChangeType"] == "StableSeries" for change in changes)


def test_what_a_scanner_sends_is_reported_and_once_more_when_it_has_grown(
    pacs: Orthanc, service: Running, model: str, classifier: Classifier, tmp_path: Path
) -> None:
    study_uid, pending = f"{UIDS}.5", PendingStudies(str(tmp_path / "pending"))
    first, second = ([instance(5, series, place) for place in range(3)] for series in (0, 1))
    scanned(pacs, tmp_path, first)
    until(lambda: pending.marks() and not unfinished(pacs), seconds=60)
    assert set(pending.marks()) == {study_uid}
    report_what_waits(pacs, model, tmp_path)
    (report,) = reports(pacs, study_uid)
    assert report.PatientName == "PLANTEDNAME^A", "it is filed with its study"
    until(lambda: stable_series(pacs) == 2, seconds=60)
    assert pending.marks() == {}, "the report is no study to push"
    scanned(pacs, tmp_path, second)
    until(lambda: pending.marks() and not unfinished(pacs), seconds=60)
    studies = report_what_waits(pacs, model, tmp_path)
    assert len(reports(pacs, study_uid)) == 2
    pending.add(study_uid)  # pushed again as it is
    report_what_waits(pacs, model, tmp_path)
    assert len(reports(pacs, study_uid)) == 2

    collector = StudyCollector(Reader.of(classifier.manifest))
    collector.add(classifier.predict([*first, *second]))
    answer = studies.answer(study_uid)
    assert answer is not None
    for part, decision in zip(answer.parts[1:] + answer.parts[:1], collector.decisions(), strict=True):
        assert (part.series_uid, part.label) == (decision.series_uid, decision.verdict.label)
        assert part.probabilities == pytest.approx(decision.verdict.probabilities, abs=1e-5)


def unfinished(pacs: Orthanc) -> list[str]:
    """Return the jobs of the PACS that have not succeeded: pushes are jobs."""
    jobs = pacs.session.get(f"{pacs.url}/jobs?expand", timeout=30).json()
    return [job["ID"] for job in jobs if job["State"] != "Success"]


_KILLED = """
import json, os, signal, sys, time
from btray.pacs.client import DicomWeb
from btray.pacs.config import PacsConfig
from btray.serving.config import ServiceConfig
from btray.serving.dicomweb.pending import PendingStudies
from btray.serving.dicomweb.studies import PushedStudies

given = json.load(sys.stdin)
codes = []
for owner, name in ((DicomWeb, "retrieve_series"), (DicomWeb, "store"), (PendingStudies, "remove"), (None, "")):
    child = os.fork()
    if child == 0:
        if owner:
            setattr(owner, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        studies = PushedStudies(ServiceConfig(**given["config"]), PacsConfig(**given["access"]))
        for _ in range(3):
            studies.report_what_is_still()
            time.sleep(0.02)
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def test_killed_at_any_step_the_job_goes_on_and_every_report_is_there_once(
    pacs: Orthanc, model: str, tmp_path: Path
) -> None:
    pending = PendingStudies(str(tmp_path / "pending"))
    for study in (6, 7):
        pacs.upload(instance(study, 0, place) for place in range(3))
        pending.add(f"{UIDS}.{study}")
    given = {"config": settings(pacs, model, tmp_path), "access": pacs.credentials}
    ended = subprocess.run(
        [sys.executable, "-c", _KILLED], input=json.dumps(given), capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(ended.stdout) == [-signal.SIGKILL] * 3 + [0], ended.stderr
    assert pending.marks() == {}
    for study in (6, 7):
        assert len(reports(pacs, f"{UIDS}.{study}")) == 1


def test_another_config_does_not_begin_to_wait_anew(pacs: Orthanc, model: str, tmp_path: Path) -> None:
    pending = PendingStudies(str(tmp_path / "pending"))
    pacs.upload(instance(9, 0, place) for place in range(2))
    pending.add(f"{UIDS}.9")
    config = ServiceConfig(**settings(pacs, model, tmp_path))
    studies = PushedStudies(config, PacsConfig(**pacs.credentials))

    def reported() -> bool:
        nonlocal studies
        studies.report_what_is_still()
        studies = PushedStudies(config, PacsConfig(**pacs.credentials), studies)
        return len(reports(pacs, f"{UIDS}.9")) == 1

    until(reported, seconds=60)


def test_a_study_that_the_archive_cannot_give_keeps_waiting_and_holds_up_no_other(
    pacs: Orthanc, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pending = PendingStudies(str(tmp_path / "pending"))
    pacs.upload(instance(8, 0, place) for place in range(2))
    pending.add("1.2.3")
    pending.add(f"{UIDS}.8")
    studies = PushedStudies(ServiceConfig(**settings(pacs, model, tmp_path)), PacsConfig(**pacs.credentials))

    def reported() -> bool:
        studies.report_what_is_still()
        return len(reports(pacs, f"{UIDS}.8")) == 1

    until(reported, seconds=60)
    assert set(pending.marks()) == {"1.2.3"}
    assert "study 1.2.3 is not reported" in caplog.text
