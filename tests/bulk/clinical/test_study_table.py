"""The table of studies has every series and study once, whatever order its frames came in and whenever it is killed."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from btray import storage
from btray.bulk import table
from btray.bulk.clinical import studies as module
from btray.bulk.clinical.studies import read_studies, update_studies
from btray.bulk.config import ClassifyConfig
from btray.bulk.report import SHOWN_FRAMES, SHOWN_STUDIES, ClassifiedFrame, PartTally, most_tumor
from btray.bulk.runs import write_part
from btray.core.errors import UserError
from btray.model.manifest import StudyRule
from btray.model.studies import Reader
from tests.helpers.table_helpers import row, write

MODEL = "1e10"
READER = Reader(classes=("glioma", "no_tumor"), rule=StudyRule(top=2), is_default=True, abstain_below=0.5)


def frame(name: str, study: str | None, series: str | None, glioma: float = 0.75, **changes: Any) -> dict[str, Any]:
    facts = {"study_uid": study, "series_uid": series, "instance_uid": f"{series}.{name}"}
    options = {key: changes.pop(key) for key in ("code", "night", "frame") if key in changes}
    made = row(name, options.pop("code", None), **options) | facts | changes
    if made["status"] == "ok":
        label = "glioma" if glioma >= 0.5 else "no_tumor"
        shares = [("glioma", glioma), ("no_tumor", 1 - glioma)]
        made |= {"label": label, "confidence": max(glioma, 1 - glioma), "probabilities": shares}
    return made


def update(place: str, **options: Any) -> Any:
    return update_studies(place, MODEL, f"{place}-studies", options.pop("reader", READER), any_new=True, **options)


def rows_of(place: str) -> list[dict[str, Any]]:
    """What a plain reader sees."""
    return pq.ParquetDataset(f"{place}-studies").read().to_pylist()


def keys_of(rows: list[dict[str, Any]]) -> Counter[tuple[str, str | None, str | None]]:
    return Counter((r["level"], r["study_uid"], r["series_uid"]) for r in rows)


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "results")


def test_each_series_and_study_has_one_row_of_its_current_frames(place: str) -> None:
    write(
        place,
        "1",
        *(frame(f"a{n}", "1.1", "1.1.1", glioma, position_mm=float(-n)) for n, glioma in enumerate((0.1, 0.9, 0.7))),
        frame("b", "1.1", "1.1.2", 0.2, abstained=True, out_of_distribution=True),
        frame("bad", "1.1", "1.1.2", code="truncated"),
        frame("gone", "1.2", "1.2.1", code="throttled"),
        row("picture"),
    )
    write(place, "2", frame("a0", "1.1", "1.1.1", 0.5, night=2), frame("lone", None, "7.1"), frame("free", "8", None))
    counts = update(place)
    rows = {(r["level"], r["study_uid"], r["series_uid"]): r for r in rows_of(place)}
    assert (counts.studies, counts.series, len(rows)) == (3, 4, 7)
    first = rows["series", "1.1", "1.1.1"]
    assert (first["label"], first["frames"], first["rejected"]) == ("glioma", 3, 0)
    assert first["confidence"] == pytest.approx(0.8)
    assert dict(first["probabilities"]) == pytest.approx({"glioma": 0.8, "no_tumor": 0.2})
    assert first["agreement"] == pytest.approx(1.0)
    assert [key["uri"].rpartition("/")[2] for key in first["key_frames"]] == ["a1", "a2", "a0"]
    assert first["key_frames"][0]["tumor"] == pytest.approx(0.9)
    assert first["key_frames"][0]["instance_uid"] == "1.1.1.a1"
    assert first["run_id"] == "20261124", "that of its latest frame"
    assert first["model_id"] == MODEL
    assert first["rule"] == "mean of the top 2 (default: the bundle has no rule)"
    second = rows["series", "1.1", "1.1.2"]
    assert (second["frames"], second["rejected"], second["abstained_frames"], second["ood_frames"]) == (1, 1, 1, 1)
    study = rows["study", "1.1", None]
    assert study["confidence"] == pytest.approx(0.5), "the mean of its series"
    assert (study["frames"], study["rejected"], len(study["key_frames"])) == (4, 1, 4)
    gone = rows["study", "1.2", None]
    assert (gone["label"], gone["probabilities"], gone["key_frames"], gone["abstained"]) == (None, None, [], True)
    assert {("series", None, "7.1"), ("study", "8", None)} <= rows.keys()


def test_of_an_object_that_was_replaced_the_latest_version_counts(place: str) -> None:
    write(place, "1", *(frame("a", "1", "1.1", 0.9, frame=n) for n in range(3)))
    write(place, "2", *(frame("a", "1", "1.1", 0.2, frame=n, night=1, etag="new") for n in range(2)))
    update(place)
    assert {(r["level"], r["frames"], r["label"]) for r in rows_of(place)} == {
        ("series", 2, "no_tumor"), ("study", 2, "no_tumor"),
    }  # fmt: skip


def many(count: int = 40) -> list[dict[str, Any]]:
    generator = random.Random(4)
    return [
        frame(f"{study}-{series}-{n}", f"2.25.{study}", f"2.25.{study}.{series}", round(generator.random(), 3))
        for study in range(count)
        for series in range(1 + study % 3)
        for n in range(1 + study % 4)
    ]


def test_the_table_does_not_depend_on_how_the_frames_lie_in_files(place: str, tmp_path: Path) -> None:
    frames = many()
    write(place, "1", *frames)
    update(place)
    other = str(tmp_path / "other")
    random.Random(1).shuffle(frames)
    for number in range(0, len(frames), 17):
        write(other, str(number), *frames[number : number + 17])
    update(other)
    assert rows_of(other) == rows_of(place)
    assert set(keys_of(rows_of(place)).values()) == {1}
    assert keys_of(rows_of(place)).total() == 40 + sum(1 + study % 3 for study in range(40))


def test_killed_between_any_two_writes_the_table_has_everything_once_and_ends_the_same(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = many()
    write(place, "1", *frames)
    update(place)
    write(place, "2", *(frame(f"new {n}", f"2.25.{n}", f"2.25.{n}.0", 0.99, night=1) for n in range(0, 40, 2)))
    before = keys_of(rows_of(place))
    real, allowed = storage.write_bytes, 0

    def dying(uri: str, body: bytes) -> None:
        nonlocal allowed
        if allowed == 0:
            raise KeyboardInterrupt
        allowed -= 1
        real(uri, body)

    monkeypatch.setattr(module.storage, "write_bytes", dying)
    for writes in range(16):
        allowed = writes
        with pytest.raises(KeyboardInterrupt):
            update(place)
        assert keys_of(rows_of(place)) == before, "each study stands once at every moment"
    monkeypatch.undo()
    update(place)
    assert keys_of(rows_of(place)) == before
    assert sum(r["frames"] for r in rows_of(place) if r["level"] == "study") == len(frames) + 20


def test_nothing_is_read_again_unless_frames_or_rule_changed(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = f"{place}-studies"
    write(place, "1", row("picture"))
    assert update_studies(place, MODEL, studies, READER, any_new=False) is None
    assert not Path(studies).exists(), "an archive of pictures has no table of studies"
    write(place, "2", *many(3))
    first = update(place)
    made: list[int] = []
    real = module._make_table
    monkeypatch.setattr(module, "_make_table", lambda *arguments: made.append(1) or real(*arguments))
    assert update_studies(place, MODEL, studies, READER, any_new=False) == first
    assert made == []
    ruled = Reader(classes=READER.classes, rule=StudyRule(top=1), is_default=False, abstain_below=None)
    assert update_studies(place, MODEL, studies, ruled, any_new=False).rule == "mean of the top 1"  # type: ignore[union-attr]
    write(place, "3", frame("late", "99", "99.1"))  # of a run that was abandoned, say
    assert update_studies(place, MODEL, studies, ruled, any_new=False).studies == first.studies + 1  # type: ignore[union-attr]
    assert len(made) == 2


def test_an_update_that_failed_is_made_good_by_the_next_run(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place, "1", *many(3))
    monkeypatch.setattr(module, "_make_table", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        update(place)
    monkeypatch.undo()
    counts = update_studies(place, MODEL, f"{place}-studies", READER, any_new=False)
    assert counts is not None
    assert counts.studies == 3


def test_files_from_before_the_columns_are_passed_over(place: str) -> None:
    old = table.SCHEMA
    for name in ("position_mm", "burned_in"):
        old = old.remove(old.get_field_index(name))
    uri = storage.join(place, table.folder(MODEL, "2026-11-21"), "0.parquet")
    write_part(uri, [row("old")], old, PartTally(objects=1))
    write(place, "1", *many(2))
    assert update(place).studies == 2


def test_studies_are_found_by_their_uids(place: str) -> None:
    write(place, "1", *many())
    update(place)
    wanted = {"2.25.3", "2.25.17", "2.25.39"}
    found = read_studies(f"{place}-studies", MODEL, wanted)
    assert found.keys() == wanted
    assert all(found[uid]["level"] == "study" for uid in wanted)
    assert read_studies(f"{place}-studies", MODEL, set()) == {}


def test_studies_lie_beside_the_results_and_nowhere_in_them(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": "m", "input": "i"}
    assert ClassifyConfig(**settings, output="s3://b/out").studies_uri == "s3://b/out-studies"
    assert ClassifyConfig(**settings, output="s3://b", studies="s3://c/x").studies_uri == "s3://c/x"
    for refused in ({"output": "s3://b"}, {"output": "/o", "studies": "/o/studies"}, {"output": "/o", "studies": "/o"}):
        with pytest.raises((ValueError, UserError), match="studies"):
            ClassifyConfig(**settings, **refused)


def test_the_page_shows_the_frames_with_the_most_tumor_of_the_studies_with_the_most() -> None:
    generator = np.random.default_rng(2)
    frames = [
        ClassifiedFrame(
            uri=f"{n}", frame=0, label="glioma", confidence=0.5, place="", study_uid=str(n % 40), tumor=float(share)
        )
        for n, share in enumerate(generator.permutation(400) / 400)
    ]
    shown = most_tumor([*frames, ClassifiedFrame(uri="x", frame=0, label="a", confidence=1.0, place="", tumor=1.0)])
    by_study = Counter(one.study_uid for one in shown)
    assert len(by_study) == SHOWN_STUDIES
    assert set(by_study.values()) == {SHOWN_FRAMES}
    best = {uid: max(one.tumor or 0 for one in frames if one.study_uid == uid) for uid in map(str, range(40))}
    assert set(by_study) == set(sorted(best, key=lambda uid: -best[uid])[:SHOWN_STUDIES])
    halves = [most_tumor(frames[::2]), most_tumor(frames[1::2])]
    assert {one.uri for one in most_tumor([*halves[0], *halves[1]])} == {one.uri for one in shown}
