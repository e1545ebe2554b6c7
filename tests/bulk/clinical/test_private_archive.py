"""An archive of a hospital: studies are decided, and nothing that is written names a patient."""

from __future__ import annotations

import logging
import os
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from btray.bulk import worklist
from btray.bulk.classify import classify
from btray.bulk.clinical.pseudonyms import Pseudonyms
from btray.core.errors import UserError
from btray.results import current
from tests.helpers.classify_helpers import (
    classify_killed_thrice,
    job,
    keys_of,
    plain_rows,
    report_of,
    without_ray,
)
from tests.helpers.dicom_files import IDENTIFIERS
from tests.helpers.hospital_archive import ROOT, instance, write_archive
from tests.helpers.privacy import Text, found_in, ray_logs, written
from tests.helpers.tiny_bundle import saved_bundle


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("bundle") / "model")
    saved_bundle(folder)
    return folder


def write_lost_files(folder: Path) -> int:
    """Write a file whose name is not UTF-8, and a link to nowhere, which cannot be read; return how many."""
    Path(os.fsdecode(os.fsencode(folder) + b"/PLANTEDNAME^\xff")).write_bytes(instance(1, 1, 6))
    (folder / "PLANTEDNAME^gone").symlink_to(folder / "PLANTEDNAME^nowhere")
    return 2


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Callable[[], list[Text]]:
    """Return what gives all that was printed and logged."""
    caplog.set_level(logging.DEBUG)
    return lambda: [("output", "".join(capfd.readouterr())), ("log", caplog.text)]


def test_nothing_that_is_written_names_a_patient_and_pseudonyms_serve_as_names(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[Text]]
) -> None:
    without_ray(monkeypatch)
    monkeypatch.setattr(worklist, "remove", lambda folder: None)  # what is removed in the end was written, too
    archive, plain, private = (str(tmp_path / name) for name in ("PLANTEDARCHIVE", "plain", "private"))
    count = write_archive(Path(archive))
    lost = write_lost_files(Path(archive))
    (key := tmp_path / "key").write_bytes(bytes(range(32)))
    key.chmod(0o600)
    names = Pseudonyms(key.read_bytes())
    settings: dict[str, Any] = {"explain": 30, "metrics_to": str(tmp_path / "private" / "_metrics.prom")}
    settings |= {"include": ("PLANTEDNAME^*",), "exclude": ("PLANTEDNAME^9/*",)}
    hidden = job(model, archive, private, pseudonymize=str(key), **settings)
    classify(hidden.model_copy(update={"dry_run": True, "series": ("description=*planted*",)}))
    classify(hidden)
    (Path(archive) / "PLANTEDNAME^1" / "new").write_bytes(instance(1, 1, 7))
    classify(hidden)
    report = report_of(private)
    assert (report["objects"], report["unchanged"]) == (1 + lost, count)
    (tmp_path / "other").write_bytes(os.urandom(32))
    (tmp_path / "other").chmod(0o600)
    for refused in (str(tmp_path / "other"), None):
        with pytest.raises(UserError, match="--pseudonymize"):
            classify(job(model, archive, private, pseudonymize=refused))

    texts = [*written(private, f"{private}-studies"), *said()]
    assert len(texts) > 20
    assert found_in(texts, (*IDENTIFIERS, ROOT, archive)) == set()
    assert "is not UTF-8" in texts[-1][1]

    # the same without a key: UIDs and places stand there, and nothing else that names a patient
    classify(job(model, archive, plain, **settings | {"metrics_to": None}))
    rows = {row["uri"]: row for row in current(plain).to_pylist()}
    assert len(rows) == count + 1 + lost
    texts = [
        (path, text.replace("PLANTEDNAME^", "").replace("PLANTEDARCHIVE", ""))
        for path, text in written(plain, f"{plain}-studies")
    ]
    assert found_in(texts, IDENTIFIERS) == set()
    assert Counter(row["error_code"] for row in rows.values()) == {
        None: count - 1, "truncated": 1, "unsupported": 1, "not_found": lost,
    }  # fmt: skip
    damaged = rows[f"{archive}/PLANTEDNAME^0/0/damaged"]
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


def unusable_inputs() -> dict[str, Callable[[Path, pytest.MonkeyPatch], str]]:
    """Return by what is wrong with it what makes an input that is wrong in this way, below a folder."""

    def file(name: str, content: bytes) -> Callable[[Path, pytest.MonkeyPatch], str]:
        def write(folder: Path, patch: pytest.MonkeyPatch) -> str:
            (folder / name).write_bytes(content)
            return str(folder / name)

        return write

    def unlisted(folder: Path, patch: pytest.MonkeyPatch) -> str:
        write_archive(folder, studies=1)
        real = os.scandir

        def scan(path: str) -> Any:
            if path.endswith("PLANTEDNAME^0"):
                raise PermissionError(13, "Permission denied", path)
            return real(path)

        patch.setattr("btray.storage.local.os.scandir", scan)
        return str(folder)

    def nothing(folder: Path, patch: pytest.MonkeyPatch) -> str:
        return str(folder / "PLANTEDNAME^5")

    def empty(folder: Path, patch: pytest.MonkeyPatch) -> str:
        return str(folder)

    return {
        "it is not there": nothing,
        "it is empty": empty,
        "a folder in it cannot be listed": unlisted,
        "nothing that a list names is there": file("PLANTED.txt", b"PLANTEDNAME^1/1\nPLANTEDNAME^1/2\n"),
        "a list has a line that is not UTF-8": file("PLANTED.txt", b"PLANTEDNAME^\xff\n"),
        "a manifest has a row without a URI": file("PLANTED.csv", b"uri,label\n,PLANTEDNAME\n"),
        "a manifest has rows of different lengths": file("PLANTED.csv", b"uri,label\na,b\nPLANTEDNAME,PLANTEDID,c\n"),
        "a manifest has no column uri": file("PLANTED.csv", b"PLANTEDNAME,PLANTEDID\n"),
        "an inventory is none": file("PLANTED-manifest.json", b'{"fileFormat": "PLANTEDNAME"}'),
    }


@pytest.mark.parametrize("wrong", unusable_inputs())
def test_an_input_that_cannot_be_used_is_refused_without_a_name(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[Text]], wrong: str
) -> None:
    without_ray(monkeypatch)
    (folder := tmp_path / "PLANTEDARCHIVE").mkdir()
    source = unusable_inputs()[wrong](folder, monkeypatch)
    (key := tmp_path / "key").write_bytes(bytes(range(32)))
    key.chmod(0o600)
    with pytest.raises(UserError) as caught:
        classify(job(model, source, str(tmp_path / "out"), pseudonymize=str(key)))
    assert "\n" not in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))
    assert found_in([*written(tmp_path / "out"), ("shown", shown), *said()], IDENTIFIERS) == set()


@pytest.mark.cluster
def test_the_logs_of_ray_name_nobody(ray_session: None, model: str, tmp_path: Path) -> None:
    archive = tmp_path / "PLANTEDARCHIVE"
    write_archive(archive, studies=1)
    write_lost_files(archive)
    (key := tmp_path / "key").write_bytes(bytes(range(32)))
    key.chmod(0o600)
    before = ray_logs()
    classify(job(model, str(archive), str(tmp_path / "out"), pseudonymize=str(key)))
    assert found_in(ray_logs(before), (*IDENTIFIERS, ROOT)) == set()


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_every_frame_series_and_study_stands_once_whatever_is_killed(
    ray_session: None, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_and_count(monkeypatch, model, tmp_path, studies=200)


def test_killed_thrice_every_frame_series_and_study_still_stands_once(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample of the test above: the driver does the work of the actors."""
    kill_and_count(monkeypatch, model, tmp_path, studies=80, uses_ray=False)


def kill_and_count(patch: pytest.MonkeyPatch, model: str, folder: Path, *, studies: int, uses_ray: bool = True) -> None:
    count = write_archive(folder / "archive", studies)
    output = str(folder / "killed")
    classify_killed_thrice(patch, job(model, str(folder / "archive"), output, actors=2), uses_ray=uses_ray)
    frames = keys_of(plain_rows(output))
    assert len(frames) == count == len({uri for uri, _ in frames})
    rows = plain_rows(f"{output}-studies").to_pylist()
    assert Counter((row["level"], row["study_uid"], row["series_uid"]) for row in rows) == Counter(
        [("study", f"{ROOT}.{n}", None) for n in range(studies)]
        + [("series", f"{ROOT}.{n}", f"{ROOT}.{n}.{m}") for n in range(studies) for m in range(2)]
    )
    assert sum(row["frames"] + row["rejected"] for row in rows if row["level"] == "study") == count - 1
