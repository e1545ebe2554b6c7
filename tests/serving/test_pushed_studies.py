"""A study that a scanner sends to a PACS ends as one report there, whatever grows, dies or is pushed again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from btray.pacs.config import PacsConfig
from btray.serving.config import ServiceConfig
from btray.serving.dicomweb.pending import PendingStudies
from btray.serving.dicomweb.studies import PushedStudies
from tests.conftest import ROOT
from tests.helpers.hospital_archive import ROOT as UIDS
from tests.helpers.hospital_archive import instance
from tests.helpers.orthanc import Orthanc
from tests.helpers.pushes import reports
from tools.processes import until

QUIET = 0.01


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """Return an Orthanc."""
    with Orthanc(tmp_path_factory.mktemp("pacs")) as started:
        yield started


def settings(pacs: Orthanc, model: str, folder: Path) -> dict[str, Any]:
    waits = {"report_to": pacs.address, "report_after_seconds": QUIET, "pending": str(folder / "pending")}
    return {"model": model, **waits}


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
