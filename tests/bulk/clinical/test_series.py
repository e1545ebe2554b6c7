"""`--series` chooses by headers alone, and what it leaves out is settled for the same choice and no other."""

from __future__ import annotations

import gzip
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btray import storage
from btray.bulk.classify import ClassifyJob, classify
from btray.bulk.classify_worker import PartClassifier
from btray.bulk.clinical import headers
from btray.bulk.clinical.headers import HeaderReader, read_header
from btray.bulk.clinical.series import PRESETS, SeriesFilter
from btray.bulk.config import ClassifyConfig
from btray.bulk.listing.archive import Archive
from btray.bulk.listing.new_objects import NewObjects
from btray.bulk.listing.objects import chunks_of
from btray.bulk.listing.tasks import LocalTasks
from btray.bulk.report import PartTally
from btray.bulk.runs import write_part
from btray.bulk.table import SCHEMA, folder
from btray.core.errors import UserError
from btray.data.scans import ScanRejected, SliceInfo
from btray.storage import FileInfo
from tests.helpers.classify_helpers import job, part_classifier, plain_rows, report_of, without_ray
from tests.helpers.dicom_files import IDENTIFIERS, SERIES, element, mr_slice, slice_file, with_element, write
from tests.helpers.nifti_files import write_nifti
from tests.helpers.scan_corpus import good_scans
from tests.helpers.tiny_bundle import saved_bundle

PIXELS = np.random.default_rng(1).integers(0, 4000, (200, 200)).astype(np.uint16)
T1_POST = SliceInfo(modality="MR", plane="axial", sequence="t1", contrast="post", image_kind="original")


def chosen_by(info: SliceInfo | None, *terms: str, preset: str | None = None) -> bool:
    parsed = SeriesFilter.parse(terms, preset)
    assert parsed is not None
    return parsed.matches(info)


def test_all_terms_must_hold_and_one_value_of_each() -> None:
    assert chosen_by(T1_POST, "plane=axial|sagittal", "modality=mr")
    assert not chosen_by(T1_POST, "plane=axial", "modality=CT")
    assert chosen_by(SliceInfo(description="Ax T1 +C"), "description=*t1*", "plane=unknown")
    assert not chosen_by(SliceInfo(description="Ax T2"), "description=*t1*")
    assert chosen_by(SliceInfo(burned_in=False, spacing_mm=0.5), "burned_in=false", "spacing_mm=0.5")
    assert chosen_by(None, "plane=unknown")
    assert not chosen_by(None, "plane=axial")


def test_the_preset_takes_what_may_be_t1_after_contrast_agent_and_no_localizer() -> None:
    (preset,) = PRESETS
    assert chosen_by(T1_POST, preset=preset)
    assert chosen_by(SliceInfo(modality="MR", plane="axial", sequence="t1"), preset=preset)
    for changed in ({"contrast": "pre"}, {"plane": "coronal"}, {"sequence": "t2"}, {"modality": "CT"}, *(
        {"image_kind": kind} for kind in ("localizer", "mosaic", "secondary")
    )):  # fmt: skip
        assert not chosen_by(SliceInfo(**vars(T1_POST) | changed), preset=preset), changed
    assert not chosen_by(T1_POST, "plane=sagittal", preset=preset)


@pytest.mark.parametrize("term", ["plane", "plane=", "=axial", "study_uid=1.2", "PatientName=x", "axial"])
def test_a_term_that_is_none_is_refused_with_the_keys_that_there_are(term: str) -> None:
    with pytest.raises(UserError, match="KEY=VALUE") as caught:
        ClassifyConfig.from_command_line(
            ["--model", "m", "--input", "i", "--output", "o", "--series", term], "classify", others=()
        )
    assert "description" in str(caught.value)


def test_equal_choices_have_equal_reasons_however_they_are_written() -> None:
    one = SeriesFilter.parse(["plane=axial", "sequence=t1|flair"])
    assert one == SeriesFilter.parse(["sequence=FLAIR|T1", "plane=Axial", "plane=axial"])
    assert one
    assert one.reason == "left out by --series plane=axial, sequence=flair|t1"
    assert SeriesFilter.parse([]) is None


class Ranges:
    """Counts the bytes that are read of files."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.reads: list[int] = []
        real = headers.read_range

        def counted(uri: str, start: int, end: int) -> bytes:
            self.reads.append(end - start)
            return real(uri, start, end)

        patch.setattr(headers, "read_range", counted)


def test_headers_are_read_by_ranges_that_double_and_no_pixel_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = np.zeros((1200, 1200), np.uint16)
    short = slice_file(large)
    long = with_element(short, element(0x0009, 0x1010, "OB", bytes(300_000)))
    ranges = Ranges(monkeypatch)
    for name, data, wanted in (("short", short, [65536]), ("long", long, [65536, 65536, 131072, 262144])):
        (path := tmp_path / name).write_bytes(data)
        ranges.reads.clear()
        info = read_header(str(path))
        assert isinstance(info, SliceInfo)
        assert (info.modality, info.plane) == ("MR", "axial")
        assert ranges.reads == wanted


def test_the_header_says_the_same_wherever_the_bytes_end(tmp_path: Path) -> None:
    data = slice_file(PIXELS)
    whole = headers._info(data)
    assert isinstance(whole, SliceInfo)
    end = len(data) - PIXELS.nbytes
    for size in range(0, end, 7):
        cut = headers._info(data[:size])
        assert cut == whole or (isinstance(cut, ScanRejected) and cut.code in ("truncated", "not_an_image", "empty")), (
            size
        )
    assert headers._info(data[: end + 5]) == whole
    files = {
        "volume": write_nifti(np.zeros((64, 64, 5), np.uint16)),
        "packed volume": gzip.compress(write_nifti(np.zeros((64, 64, 5), np.uint16))),
        "packed slice": gzip.compress(data),
        "picture": good_scans()["jpeg_gray"],
        "report": write(mr_slice(PIXELS, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")),
        "text": b"no image",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = {name: read_header(str(tmp_path / name)) for name in files}
    assert found["picture"] is None
    assert found["packed slice"] == whole
    assert {found[name].plane for name in ("volume", "packed volume")} == {"axial"}  # type: ignore[union-attr]
    assert all(isinstance(found[name], ScanRejected) for name in ("report", "text"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("bundle") / "model")
    saved_bundle(uri)
    return uri


def archive(folder: Path) -> list[FileInfo]:
    files = {
        "axial": slice_file(PIXELS),
        "sagittal": slice_file(PIXELS, ImageOrientationPatient=[0, 1, 0, 0, 0, -1], SeriesInstanceUID="1.2.9"),
        "picture": good_scans()["jpeg_gray"],
        "damaged": slice_file(PIXELS)[:300],
    }
    for name, data in files.items():
        storage.write_bytes(str(folder / name), data)
    return list(storage.list_files(str(folder)))


def classified(processor: PartClassifier, objects: list[FileInfo]) -> dict[str, dict[str, Any]]:
    seconds: defaultdict[str, float] = defaultdict(float)
    rows = [row for lot in processor.lots(objects, seconds) for row in processor.rows(objects, lot, seconds)]
    return {storage.name(row["uri"]): row for row in rows}


def test_what_is_left_out_is_a_row_that_says_so_and_bad_bytes_keep_their_code(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = classified(part_classifier(monkeypatch, model, series=("plane=axial",)), archive(tmp_path))
    assert {name: row["error_code"] for name, row in rows.items()} == {
        "axial": None, "sagittal": "not_selected", "picture": "not_selected", "damaged": "truncated",
    }  # fmt: skip
    assert (rows["sagittal"]["series_uid"], rows["sagittal"]["plane"]) == ("1.2.9", "sagittal")
    assert rows["sagittal"]["error"] == "left out by --series plane=axial"
    assert not rows["sagittal"]["retryable"]


def test_what_was_left_out_is_settled_for_the_same_choice_alone(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects, output = archive(tmp_path / "in"), str(tmp_path / "out")
    rows = classified(part_classifier(monkeypatch, model, series=("plane=axial",)), objects)
    first = ClassifyJob(job(model, str(tmp_path / "in"), output, series=("plane=AXIAL",)))
    uri = storage.join(output, folder(first.group, "2026-11-28"), "1.parquet")
    write_part(uri, list(rows.values()), SCHEMA, PartTally(objects=len(rows)))

    def left(**settings: Any) -> set[str]:
        again = ClassifyJob(job(model, str(tmp_path / "in"), output, **settings))
        scratch = tmp_path / f"scratch {len(list(tmp_path.iterdir()))}"
        scratch.mkdir()
        tasks = LocalTasks(scratch)
        new = NewObjects(again.outcomes(tasks), tasks, str(scratch), worst=again.worst, reason=again.reason)
        return {storage.name(info.uri) for some in new.among(Archive(chunks_of(objects))) for info in some}

    assert left(series=("plane=axial",)) == set()
    assert left() == {"sagittal", "picture"}
    assert left(series=("plane=sagittal",)) == {"sagittal", "picture"}


def test_a_dry_run_lists_series_by_what_is_derived_and_names_nobody(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive(tmp_path / "in")
    classify(
        job(
            model, str(tmp_path / "in"), str(tmp_path / "out"), series=("plane=axial", "description=*t1*"), dry_run=True
        )
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == ["chosen", "left out", "left out", "unreadable"]
    assert "1 objects, modality=MR, plane=axial, image_kind=original, sequence=t1, contrast=post" in lines[0]
    assert not [name for name in (*IDENTIFIERS, "1.2.9") if name in "".join(lines)]
    assert not (tmp_path / "out").exists()


def test_headers_are_read_under_pseudonyms_too(tmp_path: Path) -> None:
    from btray.bulk.clinical.pseudonyms import Pseudonyms

    names = Pseudonyms(bytes(32))
    objects = [names.conceal(info) for info in archive(tmp_path)]
    choice = SeriesFilter.parse(["plane=axial"])
    assert choice
    read = HeaderReader(choice, threads=2, patience=1, pseudonyms=names).read(objects)
    assert [header.plane for header in read if isinstance(header, SliceInfo)] == ["axial", "sagittal"]


def test_what_is_left_out_counts_for_no_limit_and_stands_in_no_study(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    archive(tmp_path / "in")
    output = str(tmp_path / "out")
    settings: dict[str, Any] = {"max_rejected": 0.3}  # one of four is damaged
    classify(job(model, str(tmp_path / "in"), output, series=("plane=axial",), **settings))
    assert report_of(output)["rejected_by_code"] == {"not_selected": 2, "truncated": 1}
    rows = plain_rows(f"{output}-studies").to_pylist()
    assert {(row["level"], row["series_uid"], row["frames"]) for row in rows} == {
        ("series", SERIES, 1),
        ("study", None, 1),
    }
    classify(job(model, str(tmp_path / "in"), output, series=("plane=axial",), **settings))
    assert (report_of(output)["objects"], report_of(output)["unchanged"]) == (0, 4)
    classify(job(model, str(tmp_path / "in"), output, **settings))
    assert report_of(output)["objects"] == 2
    rows = plain_rows(f"{output}-studies").to_pylist()
    assert {row["series_uid"] for row in rows if row["level"] == "series"} == {SERIES, "1.2.9"}
    assert {row["frames"] for row in rows if row["level"] == "study"} == {2}
