"""The archive of a PACS is classified as the same files in a folder are; no secret and no name is written."""

from __future__ import annotations

import logging
import random
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from btray.bulk import worklist
from btray.bulk.classify import classify
from btray.bulk.config import ClassifyConfig, EraseConfig
from btray.bulk.erasure.job import erase
from btray.core.errors import UserError
from btray.data.scans import ScanRejected, decode, read_info
from btray.data.scans.dicom import WRITER
from btray.launch import read_config
from btray.pacs.address import Address, InstanceUrl
from btray.pacs.config import PacsConfig
from btray.pacs.own import SERIES_DESCRIPTION
from btray.pacs.source import PacsSource
from btray.results import current
from btray.storage import FileInfo
from tests.helpers.classify_helpers import classify_killed_thrice, job, keys_of, plain_rows, report_of, without_ray
from tests.helpers.dicom_files import ENHANCED_MR, IDENTIFIERS, SECONDARY, mr_slice, sequence, slice_file, write
from tests.helpers.hospital_archive import ROOT, instance, pixels_of
from tests.helpers.orthanc import Orthanc
from tests.helpers.privacy import found_in, ray_logs, written
from tests.helpers.s3_proxy import Request, http_proxy
from tests.helpers.tiny_bundle import saved_bundle

STUDY = 50
"""Of this file; others follow."""
ANSWER = (
    "label",
    "confidence",
    "probabilities",
    "status",
    "error_code",
    "plane",
    "position_mm",
    "sequence",
    "contrast",
)
OF_STUDY = ("label", "confidence", "probabilities", "frames", "rejected", "agreement", "rule")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("bundle") / "model")
    saved_bundle(folder)
    return folder


def study(number: int) -> dict[str, bytes]:
    """Return the files of a study by their UIDs: two series of different planes; one too small; an enhanced one."""
    files = {
        f"{ROOT}.{number}.{series}.{n}": instance(
            number, series, n, SeriesDescription=description, ImageOrientationPatient=directions
        )
        for series, description, directions in (
            (0, "PLANTEDTEXT ax t1 post", [1, 0, 0, 0, 1, 0]), (1, "PLANTEDTEXT cor t2", [1, 0, 0, 0, 0, -1]),
        )
        for n in range(7)
    }  # fmt: skip
    uids = {"StudyInstanceUID": f"{ROOT}.{number}", "SeriesInstanceUID": f"{ROOT}.{number}.0"}
    small = np.zeros((8, 8), np.uint16)
    files[f"{ROOT}.{number}.0.9"] = slice_file(small, SOPInstanceUID=f"{ROOT}.{number}.0.9", **uids)
    files[f"{ROOT}.{number}.2.0"] = enhanced(number)
    return files


def enhanced(number: int) -> bytes:
    pixels = np.stack([np.roll(pixels_of(0), 7 * seed, axis=0) for seed in range(3)])
    frame = sequence(
        PlanePositionSequence=sequence(ImagePositionPatient=[0, 0, 1.5]),
        PlaneOrientationSequence=sequence(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
    )
    uids = {"StudyInstanceUID": f"{ROOT}.{number}", "SeriesInstanceUID": f"{ROOT}.{number}.2"}
    uids["SOPInstanceUID"] = f"{ROOT}.{number}.2.0"
    return write(mr_slice(pixels, SOPClassUID=ENHANCED_MR, SharedFunctionalGroupsSequence=frame, **uids), pixels)


def others(number: int) -> list[bytes]:
    """Return what is no input: a report, and a picture and a report that btray wrote."""
    pixels = pixels_of(0)
    uids = {"StudyInstanceUID": f"{ROOT}.{number}", "SeriesInstanceUID": f"{ROOT}.{number}.7"}
    own = uids | {"SeriesInstanceUID": f"{ROOT}.{number}.8", "SeriesDescription": SERIES_DESCRIPTION}
    report = "1.2.840.10008.5.1.4.1.1.88.34"
    return [
        write(mr_slice(pixels, SOPClassUID=report, Modality="SR", SOPInstanceUID=f"{ROOT}.{number}.7.1", **uids)),
        write(
            mr_slice(
                pixels, SOPClassUID=SECONDARY, Manufacturer=WRITER, Modality="OT",
                SOPInstanceUID=f"{ROOT}.{number}.8.1", **own,
            ),
            pixels,
        ),
        write(mr_slice(pixels, SOPClassUID=report, Modality="SR", SOPInstanceUID=f"{ROOT}.{number}.8.2", **own)),
    ]  # fmt: skip


def upload(server: Orthanc, number: int) -> dict[str, bytes]:
    server.upload([*(files := study(number)).values(), *others(number)])
    return files


def of(server: Orthanc, number: int) -> str:
    return f"{server.address}?StudyInstanceUID={ROOT}.{number}"


def said(row: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    return [dict(row[name] or ()) if name == "probabilities" else row[name] for name in names]


def near(said_of: dict[Any, list[Any]]) -> dict[Any, list[Any]]:
    """Return what equals the same but for the last digits of numbers, which differ as batches do."""
    return {
        key: [pytest.approx(value, abs=1e-5) if isinstance(value, float | dict) else value for value in values]
        for key, values in said_of.items()
    }


def answers(output: str) -> dict[tuple[str, int], Any]:
    """Return what is said of each frame, by instance and frame."""
    rows = current(output).to_pylist()
    return {(row["uri"].rpartition("/")[2], row["frame"]): said(row, ANSWER) for row in rows}


def studies(output: str) -> dict[tuple[str, str | None], Any]:
    rows = plain_rows(f"{output}-studies").to_pylist()
    return {(row["study_uid"], row["series_uid"]): said(row, OF_STUDY) for row in rows}


def test_a_study_gets_the_same_answers_from_the_pacs_and_from_disk_and_is_read_once(
    orthanc: Orthanc, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *,
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    without_ray(monkeypatch)
    monkeypatch.setattr(worklist, "remove", lambda folder: None)  # what is removed in the end was written, too
    caplog.set_level(logging.DEBUG)
    files = upload(orthanc, STUDY)
    for uid, data in files.items():
        (tmp_path / "disk").mkdir(exist_ok=True)
        (tmp_path / "disk" / uid).write_bytes(data)
    disk, pacs = str(tmp_path / "from-disk"), str(tmp_path / "from-pacs")
    paths: list[str] = []

    def behave(request: Request) -> None:
        paths.append(request.path)
        request.forward()

    classify(job(model, str(tmp_path / "disk"), disk))
    with http_proxy(orthanc.url, behave) as url:
        source = of(orthanc, STUDY).replace(f"127.0.0.1:{orthanc.port}", url.rpartition("/")[2])
        settings = job(model, source, pacs, explain=5, **orthanc.credentials)
        classify(settings)
        assert answers(pacs) == near(answers(disk))
        assert len(answers(pacs)) == 7 + 7 + 1 + 3
        assert studies(pacs) == near(studies(disk))
        report = report_of(pacs)
        assert report["not_scans"] == {"a structured report": 1, "an answer of btray": 2}
        for row in plain_rows(pacs).to_pylist():
            uid = row["uri"].rpartition("/")[2]
            assert (
                row["uri"] == f"{url}/dicom-web/studies/{ROOT}.{STUDY}/series/{uid.rpartition('.')[0]}/instances/{uid}"
            )
            assert row["etag"] == uid
        assert sum(path.count("/instances/") for path in paths) < 12, "series come whole; few pictures are read again"

        # again, with a new slice and an answer of btray more: the slice alone is read
        orthanc.upload([instance(STUDY, 0, 11)])
        paths.clear()
        before = studies(pacs)
        classify(settings)
        report = report_of(pacs)
        assert (report["objects"], report["unchanged"]) == (1, len(files))
        retrieved = [path for path in paths if "?" not in path and "/metadata" not in path]
        assert {path.rpartition("/")[2] for path in retrieved} == {f"{ROOT}.{STUDY}.0.11"}
        assert before != studies(pacs)
    output = [("output", "".join(capfd.readouterr())), ("log", caplog.text)]
    texts = [*written(tmp_path / "from-pacs", tmp_path / "from-pacs-studies"), *output]
    assert len(texts) > 20
    assert found_in(texts, (orthanc.password, *IDENTIFIERS)) == set()
    assert any("left out: 1 x a structured report, 2 x an answer of btray" in text for _, text in output)


@pytest.mark.parametrize("series", ["plane=axial", "sequence=t2", "modality=CT"])
def test_a_choice_of_series_is_that_of_the_same_files_and_retrieves_nothing_else(
    orthanc: Orthanc, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, series: str
) -> None:
    without_ray(monkeypatch)
    number = STUDY + 1
    files = upload(orthanc, number)
    (tmp_path / "disk").mkdir()
    for uid, data in files.items():
        (tmp_path / "disk" / uid).write_bytes(data)
    paths: list[str] = []

    def behave(request: Request) -> None:
        paths.append(request.path)
        request.forward()

    disk, pacs = str(tmp_path / "from-disk"), str(tmp_path / "from-pacs")
    classify(job(model, str(tmp_path / "disk"), disk, series=(series,)))
    with http_proxy(orthanc.url, behave) as url:
        source = of(orthanc, number).replace(f"127.0.0.1:{orthanc.port}", url.rpartition("/")[2])
        settings = job(model, source, pacs, series=(series,), **orthanc.credentials)
        classify(settings.model_copy(update={"dry_run": True}))
        classify(settings)
    assert answers(pacs) == near(answers(disk))
    left_out = {uid for (uid, _), answer in answers(pacs).items() if answer[4] == "not_selected"}
    assert len(left_out) > 0
    if left_out == set(files):
        assert not [path for path in paths if "?" not in path and not path.endswith("/metadata")]


def test_a_choice_in_the_query_is_made_before_anything_is_listed(
    orthanc: Orthanc, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    upload(orthanc, STUDY + 2)
    source = of(orthanc, STUDY + 2)
    chosen = f"{source}&SeriesDescription=*COR*&Modality=M*"
    classify(job(model, chosen, str(tmp_path / "out"), **orthanc.credentials))
    uids = plain_rows(str(tmp_path / "out"))["series_uid"].to_pylist()
    assert Counter(uids) == {f"{ROOT}.{STUDY + 2}.1": 7}
    (folder := tmp_path / "key").write_bytes(bytes(range(32)))
    folder.chmod(0o600)
    for nothing in (
        f"{source}&StudyDate=19990101-19991231",
        f"{source}&SeriesDescription=none",
        f"{source}&Modality=SR",
    ):
        with pytest.raises(UserError, match="no image of any study matches"):
            classify(job(model, nothing, str(tmp_path / "empty"), **orthanc.credentials))
    assert not (tmp_path / "empty").exists()


def test_with_pseudonyms_neither_uid_nor_place_is_written_and_the_answers_are_the_same(
    orthanc: Orthanc, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    monkeypatch.setattr(worklist, "remove", lambda folder: None)
    number = STUDY + 3
    files = upload(orthanc, number)
    (key := tmp_path / "key").write_bytes(bytes(range(32)))
    key.chmod(0o600)
    plain, hidden = str(tmp_path / "plain"), str(tmp_path / "hidden")
    classify(job(model, of(orthanc, number), plain, **orthanc.credentials))
    settings = job(model, of(orthanc, number), hidden, pseudonymize=str(key), explain=5, **orthanc.credentials)
    classify(settings)
    classify(settings)
    assert report_of(hidden)["unchanged"] == len(files)
    assert sorted(map(str, answers(hidden).values())) == sorted(map(str, answers(plain).values()))
    secrets = (f"{ROOT}.{number}", orthanc.password, str(orthanc.port), *IDENTIFIERS)
    assert found_in(written(hidden, f"{hidden}-studies"), secrets) == set()


def test_a_study_that_was_erased_is_not_taken_again_from_the_pacs(
    orthanc: Orthanc, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    number, output = STUDY + 5, str(tmp_path / "out")
    orthanc.upload([instance(number, 0, 0), instance(number, 1, 1), instance(number + 1, 0, 0)])
    both = f"{of(orthanc, number)},{ROOT}.{number + 1}"
    settings = job(model, both, output, **orthanc.credentials)
    classify(settings)
    erase(EraseConfig(output=output, study=f"{ROOT}.{number}"))
    orthanc.upload([instance(number + 1, 0, 1)])
    classify(settings)
    report = report_of(output)
    assert (report["objects"], report["unchanged"], report["erased"]) == (1, 1, 2)
    assert set(current(output)["study_uid"].to_pylist()) == {f"{ROOT}.{number + 1}"}


@pytest.mark.parametrize("status", [503, 500])
def test_a_pacs_that_was_waited_for_in_vain_is_not_waited_for_again_and_one_that_answers_is_asked(
    orthanc: Orthanc, access: PacsConfig, status: int
) -> None:
    number = STUDY + 7
    orthanc.upload(files := [instance(number, series, n) for series in range(3) for n in range(2)])
    uids = [(series, f"{ROOT}.{number}.{series}.{n}") for series in range(3) for n in range(2)]
    paths: list[str] = []

    def behave(request: Request) -> None:
        paths.append(request.path)
        first = f"{ROOT}.{number}.0" in request.path
        request.answer(status, b"", {}) if status == 503 or first else request.forward()

    with http_proxy(orthanc.url, behave) as url:
        root = f"{url}/dicom-web"
        source = PacsSource(Address(root), access, patience=0.5)
        uris = [str(InstanceUrl(root, f"{ROOT}.{number}", f"{ROOT}.{number}.{series}", uid)) for series, uid in uids]
        results = dict(source.read(uris))
        headers = source.headers(uris)
    assert len(results) == len(headers) == 6
    if status == 503:
        assert all(f"{ROOT}.{number}.0" in path or "limit=1" in path for path in paths)
        assert {getattr(result, "code", None) for result in (*results.values(), *headers)} == {"throttled"}
    else:
        assert [results[n] for n in range(2, 6)] == files[2:]
        assert [getattr(info, "instance_uid", None) for info in headers] == [None] * 2 + [uid for _, uid in uids[2:]]


def test_a_picture_that_btray_wrote_is_no_scan_from_any_archive() -> None:
    picture = others(1)[1]
    with pytest.raises(ScanRejected, match="an answer of btray") as caught:
        decode(picture)
    assert caught.value.code == "unsupported"
    assert read_info(picture) is not None


def test_parts_hold_whole_series_where_they_can() -> None:
    def cut(objects: list[FileInfo]) -> list[int]:
        return worklist.cut_into_parts(objects, worklist.PartLimits(), listed=len(objects), taper=True)

    uris = [f"https://p/studies/1/series/{series}/instances/{n}" for series in range(20) for n in range(100)]
    parts = cut([FileInfo(uri, 1000, "", 0.0) for uri in uris])
    assert all(len(set(parts[start : start + 100])) == 1 for start in range(0, 2000, 100))
    assert parts[-1] + 1 >= 6
    long = [FileInfo(f"https://p/studies/1/series/1/instances/{n}", 1000, "", 0.0) for n in range(2000)]
    assert max(Counter(cut(long)).values()) == worklist.PART_OBJECTS
    files = [FileInfo(f"/folder/{n}", 1000, "", 0.0) for n in range(2000)]
    assert max(Counter(cut(files)).values()) == 250


# ---- credentials


@pytest.mark.parametrize(
    ("words", "environment", "reason"),
    [
        (["--input", "dicomweb://a:SECRET@pacs/r"], {}, "credentials do not belong in a URI"),
        (["--input", "dicomweb://pacs/r", "--pacs-password", "SECRET"], {}, "set BTRAY_PACS_PASSWORD"),
        (["--input", "dicomweb://pacs/r", "--pacs-token=SECRET"], {}, "set BTRAY_PACS_TOKEN"),
        (["--input", "dicomweb://pacs/r", "--config", "{folder}/file.yaml"], {}, "read from the environment alone"),
        (["--input", "dicomweb://pacs/r"], {"BTRAY_PACS_PASSWORD": "SECRET"}, "set both BTRAY_PACS_USER and"),
        (["--input", "dicomweb+http://pacs/r"], {}, "--insecure"),
        (["--input", "dicomweb://pacs/r"], {"BTRAY_PACS_CA": "/nowhere/ca.pem"}, "BTRAY_PACS_CA /nowhere/ca.pem"),
        (["--input", "dicomweb://pacs/r", "--since", "2026-01-01"], {}, "StudyDate"),
    ],
)
def test_credentials_anywhere_but_in_the_environment_end_with_2_and_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], environment: dict[str, str], reason: str
) -> None:
    (tmp_path / "file.yaml").write_text(yaml.safe_dump({"pacs_password": "SECRET"}))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = [word.format(folder=tmp_path) for word in words]
    with pytest.raises(UserError, match=reason) as caught:
        read_config(ClassifyConfig, ["--output", str(tmp_path / "out"), *words]).check()
    assert caught.value.exit_code == 2
    assert "SECRET" not in "".join(traceback.format_exception_only(caught.value))
    assert "\n" not in str(caught.value)


def test_credentials_in_the_environment_are_taken_and_no_help_shows_a_flag_for_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("USER", "PASSWORD"):
        monkeypatch.setenv(f"BTRAY_PACS_{name}", "SECRET")
    config = read_config(ClassifyConfig, ["--input", "dicomweb://pacs/r", "--output", "out"])
    assert config.pacs_password is not None
    assert config.pacs_password.get_secret_value() == "SECRET"
    with pytest.raises(SystemExit):
        read_config(ClassifyConfig, ["--help"])
    assert "dicomweb://HOST/ROOT" in (shown := capsys.readouterr().out)
    assert "--pacs" not in shown
    assert "SECRET" not in shown


def test_a_config_neither_shows_nor_writes_its_credentials() -> None:
    config = PacsConfig(pacs_user="SECRET", pacs_password="SECRET", pacs_ca="/SECRET.pem")
    assert "SECRET" not in config.to_yaml() + str(config.model_dump())
    assert "SECRET'" not in repr(config)


@pytest.mark.cluster
@pytest.mark.slow
def test_ray_writes_no_credential_down(
    ray_session: None, orthanc: Orthanc, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in orthanc.environment.items():
        monkeypatch.setenv(name, value)
    upload(orthanc, STUDY + 4)
    classify(job(model, of(orthanc, STUDY + 4), str(tmp_path / "out"), verbose=True, **orthanc.credentials))
    assert len(answers(str(tmp_path / "out"))) == 18
    assert found_in([*ray_logs(), *written(tmp_path / "out")], (orthanc.password, *IDENTIFIERS)) == set()


# ---- killing


def test_killed_thrice_every_frame_stands_once(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of the test below: the driver does the work of the actors."""
    kill_and_count(monkeypatch, model, tmp_path, studies=12, uses_ray=False)


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_job_and_pacs_are_each_killed_thrice_and_every_frame_stands_once(
    ray_session: None, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_and_count(monkeypatch, model, tmp_path, studies=60)


def kill_and_count(patch: pytest.MonkeyPatch, model: str, folder: Path, *, studies: int, uses_ray: bool = True) -> None:
    files = {
        f"{ROOT}.{number}.{series}.{n}": instance(number, series, n)
        for number in range(studies)
        for series in range(2)
        for n in range(20)
    }
    chance = random.Random(9)
    with Orthanc(folder / "orthanc") as server:
        server.upload(files.values())
        for name, value in server.environment.items():
            patch.setenv(name, value)
        kills = 0

        def kill_the_pacs() -> None:
            nonlocal kills
            kills += 1
            server.kill()
            time.sleep(chance.random())
            server.start()

        output = str(folder / "out")
        config = job(
            model, f"{server.address}?ModalitiesInStudy=MR", output, actors=2, patience=120, **server.credentials
        )
        classify_killed_thrice(patch, config, kill_the_pacs, uses_ray=uses_ray)
        assert kills == 3
        rows = plain_rows(output)
        assert Counter(rows["status"].to_pylist()) == {"ok": len(files)}
        assert sorted(rows["instance_uid"].to_pylist()) == sorted(files)
        assert len(set(keys_of(rows))) == len(files)
        assert report_of(output)["state"] == "finished"
