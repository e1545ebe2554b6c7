"""Every report is in the PACS once, whatever is killed; and a real PACS, Orthanc, takes and gives what is sent."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from highdicom.sr import srread

from btray.core.errors import UserError
from btray.data.frames import Rejection
from btray.model.bundle import load_bundle
from btray.model.classifier import Classifier
from btray.pacs.client import DicomWeb
from btray.pacs.config import PacsConfig
from btray.pacs.own import is_own
from btray.pacs.report.config import ReportConfig
from btray.pacs.report.identity import heat_map_uid, report_uid, series_uid
from btray.pacs.report.job import report
from btray.pacs.report.reporter import OtherContent, Refused, Reporter, as_file
from btray.storage import StorageError
from tests.helpers.orthanc import Orthanc
from tests.helpers.privacy import found_in, written
from tests.helpers.reported import PLANTED, answer_of, classic, complaints, enhanced, read, write_tables
from tests.helpers.tiny_bundle import saved_bundle
from tools.processes import until

ROOT = Path(__file__).resolve().parents[3]
REFUSED = "NOREPORT"


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """Run an Orthanc that takes no report of studies with a certain StudyID."""
    folder = tmp_path_factory.mktemp("orthanc")
    taken = f"return dicom.Modality ~= 'SR' or dicom.StudyID ~= '{REFUSED}'"
    (folder / "filter.lua").write_text(f"function ReceivedInstanceFilter(dicom, origin)\n{taken}\nend\n")
    with Orthanc(folder, LuaScripts=[str(folder / "filter.lua")]) as running:
        yield running


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("model") / "bundle")
    saved_bundle(uri)
    return uri


@pytest.fixture(scope="module")
def classifier(bundle: str) -> Classifier:
    return Classifier(load_bundle(bundle), device="cpu", engine="eager")


@pytest.fixture
def archive(pacs: Orthanc) -> DicomWeb:
    return DicomWeb(pacs.root, PacsConfig(**pacs.credentials))  # type: ignore[arg-type]


def held(pacs: Orthanc) -> int:
    return int(pacs.session.get(f"{pacs.url}/statistics", timeout=30).json()["CountInstances"])


@pytest.mark.parametrize("kind", [classic, enhanced])
def test_a_report_and_its_heat_maps_are_sent_once_and_others_read_them(
    kind: Any, pacs: Orthanc, archive: DicomWeb, classifier: Classifier, tmp_path: Path
) -> None:
    files = [*kind(study=2 if kind is classic else 3), *classic(study=2 if kind is classic else 3, series=5)]
    pacs.upload(files)
    before = held(pacs)
    answer = answer_of(files, classifier)
    reporter = Reporter(archive, classifier.manifest, classifier, heat_maps=3)
    assert [reporter.report(answer) for _ in range(2)] == ["sent", "there"]
    assert held(pacs) == before + 4
    uid = report_uid(answer)
    sent = archive.retrieve_instance(answer.study_uid, series_uid("report", uid), uid)
    report = srread(io.BytesIO(sent))
    named = {str(instance) for _, _, instance, _ in report.get_evidence()}
    for frame in answer.key_frames[:3]:
        picture = heat_map_uid(uid, frame)
        assert picture in named
        file = archive.retrieve_instance(answer.study_uid, series_uid("heat maps", uid), picture)
        assert complaints(file, tmp_path) == []
        capture = read(file)
        assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == frame.instance_uid
        assert str(capture.PatientName) == PLANTED
        shown = capture.pixel_array
        assert shown.shape[2] == 3
        assert np.ptp(shown) > 100, "a slice"
        assert isinstance(classifier.source.from_bytes(file), Rejection), "and no input"
    assert sum(map(is_own, archive.series(answer.study_uid))) == 2
    plain = Reporter(archive, classifier.manifest)
    assert plain.report(answer) == "there", "with the heat maps that it was sent with"
    (of_pacs,) = pacs.session.post(f"{pacs.url}/tools/lookup", data=uid, timeout=30).json()
    pacs.session.delete(f"{pacs.url}/instances/{of_pacs['ID']}", timeout=30).raise_for_status()
    assert reporter.report(answer) == "sent", "as after a kill between heat maps and report"
    assert held(pacs) == before + 4


def test_a_uid_that_is_held_with_other_content_is_an_error(
    pacs: Orthanc, archive: DicomWeb, classifier: Classifier
) -> None:
    files = classic(study=4)
    pacs.upload(files)
    answer = answer_of(files, classifier)
    reporter = Reporter(archive, classifier.manifest, classifier, heat_maps=1)
    assert reporter.report(answer) == "sent"
    uid = report_uid(answer)
    before = held(pacs)
    assert reporter.report(replace(answer, classified_at=datetime(2027, 1, 1, tzinfo=UTC))) == "there"
    with pytest.raises(OtherContent, match=uid):
        reporter.report(replace(answer, study=replace(answer.study, confidence=0.123)))
    forged = read(archive.retrieve_instance(answer.study_uid, series_uid("report", uid), uid))
    forged.SOPInstanceUID = forged.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    pacs.upload([as_file(forged)])
    assert held(pacs) == before + 1


def test_a_report_that_the_pacs_throws_away_is_an_error_whatever_it_answers(
    pacs: Orthanc, archive: DicomWeb, classifier: Classifier
) -> None:
    files = classic(study=9, slices=1, StudyID=REFUSED)
    pacs.upload(files)
    with pytest.raises(Refused, match=r"2\.25\."):
        Reporter(archive, classifier.manifest).report(answer_of(files, classifier))


def test_a_study_of_which_the_pacs_lacks_a_source_is_not_reported(
    pacs: Orthanc, archive: DicomWeb, classifier: Classifier
) -> None:
    files = classic(study=5)
    answer = answer_of(files, classifier)
    named = {frame.instance_uid for frame in answer.study.sources}
    pacs.upload(data for data in files if read(data).SOPInstanceUID in sorted(named)[1:])
    before = held(pacs)
    with pytest.raises(StorageError) as raised:
        Reporter(archive, classifier.manifest).report(answer)
    assert raised.value.code == "not_found"
    assert held(pacs) == before


def command(pacs: Orthanc, studies: str, bundle: str, *more: str) -> list[str]:
    arguments = ["--studies", studies, "--to", pacs.address, "--model", bundle, *more]
    return [sys.executable, str(ROOT / "jobs" / "report.py"), *arguments]


def run(pacs: Orthanc, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | pacs.environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_job_names_no_patient_and_ends_as_its_studies_do(
    pacs: Orthanc, bundle: str, classifier: Classifier, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files, absent = [*classic(study=6), *classic(study=7)], classic(study=8)
    pacs.upload(files)
    studies = write_tables(str(tmp_path / "results"), [*files, *absent], classifier)
    before = held(pacs)
    ended = run(pacs, command(pacs, studies, bundle, "--heat-maps", "1"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["reports: 1 not in the archive, 2 sent", pacs.address]
    assert held(pacs) == before + 4
    assert found_in([("stdout", ended.stdout), ("stderr", ended.stderr)], ["PLANTED", pacs.password]) == set()
    assert found_in(written(tmp_path), ["PLANTED", pacs.password]) == set()

    def again(studies: str) -> str:
        config = ReportConfig(studies=studies, to=pacs.address, model=bundle, **pacs.credentials)  # type: ignore[arg-type]
        return report(config)

    assert again(studies) == pacs.address
    assert capfd.readouterr().out == "reports: 1 not in the archive, 2 there\n"
    later = write_tables(str(tmp_path / "later"), files[:4], classifier, datetime(2027, 1, 1, tzinfo=UTC))
    assert again(later) == pacs.address
    assert capfd.readouterr().out == "reports: 1 there\n"
    only_absent = write_tables(str(tmp_path / "absent"), absent, classifier)
    with pytest.raises(UserError, match="none of these studies"):
        again(only_absent)
    assert held(pacs) == before + 4


def kill_and_resume(folder: Path, kills: int, studies: int) -> None:
    """Report many studies, and kill the job and the PACS again and again while it does."""
    bundle = str(folder / "bundle")
    saved_bundle(bundle)
    classifier = Classifier(load_bundle(bundle), device="cpu", engine="eager")
    files = [data for study in range(studies) for data in classic(study=study, slices=2)]
    table = write_tables(str(folder / "results"), files, classifier)
    pacs = Orthanc(folder / "pacs")
    with pacs:
        pacs.upload(files)
        told = command(pacs, table, bundle)
        for number in range(kills):
            wanted = len(files) + 1 + number * studies // (kills + 2)
            job = subprocess.Popen(told, env=os.environ | pacs.environment, stdout=subprocess.DEVNULL, cwd=ROOT)
            try:
                until(lambda wanted=wanted: held(pacs) >= wanted, "some reports", 120)
                pacs.kill()  # the job waits for it
                pacs.start()
                until(lambda wanted=wanted: held(pacs) > wanted, "another report", 120)
            finally:
                job.kill()
                job.wait()
        ended = run(pacs, told)
        assert ended.returncode == 0, ended.stderr
        assert held(pacs) == len(files) + studies, "each report once"


def test_every_report_is_in_the_pacs_once_though_job_and_pacs_are_killed(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=1, studies=12)


@pytest.mark.soak
def test_every_report_is_in_the_pacs_once_though_job_and_pacs_are_killed_thrice(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=3, studies=120)
