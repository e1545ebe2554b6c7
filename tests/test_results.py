"""The table's files are written once, its latest rows count, and worklists are taken up where they were cut off."""

from __future__ import annotations

import re
import tracemalloc
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btray import results, runs, storage
from btray.classifier import Prediction
from btray.keys import KeySet, keys_of
from btray.part_files import read_tally, write_part
from btray.runs import WorklistWriter
from btray.storage import FileInfo

ROOT = Path(__file__).resolve().parent.parent
PART_OBJECTS = results.product("m").part_objects
NIGHT = datetime(2026, 11, 22, 2, tzinfo=UTC)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("bucket")


def row(name: str, code: str | None = None, *, night: int = 0) -> dict[str, Any]:
    info = FileInfo(f"s3://b/{name}", 7, "e", 0.0)
    said: dict[str, Any] = (
        {"status": "rejected", "error_code": code, "error": "why"}
        if code
        else {"label": "glioma", "confidence": 0.75, "probabilities": {"glioma": 0.75, "no_tumor": 0.25}}
    )
    at = NIGHT + timedelta(days=night)
    return results.row_of(Prediction(index=0, **said), info, run_id=f"{at:%Y%m%d}", classified_at=at)


def write(place: str, name: str, *rows: dict[str, Any], model: str = "1e10") -> bool:
    uri = storage.join(place, results.product(model).folder("2026-11-22"), f"{name}.parquet")
    return write_part(uri, rows, results.SCHEMA, {"objects": len(rows)})


def begin(place: str, model: str, request: dict[str, Any]) -> tuple[runs.Run, bool]:
    return runs.begin(place, model, request, results.product(model))


def objects(count: int, size: int = 7) -> list[FileInfo]:
    return [FileInfo(f"s3://b/{number}", size, "e", 0.0) for number in range(count)]


def part_sizes(listed: list[FileInfo], *, taper: bool) -> list[int]:
    parts = runs._cut(listed, PART_OBJECTS, taper=taper)
    assert sorted(set(parts)) == list(range(parts[-1] + 1))
    return np.bincount(parts).tolist()


def test_of_two_writers_of_a_part_one_wins(place: str) -> None:
    assert write(place, "part", row("a"))
    assert not write(place, "part", row("a"), row("b"))
    uri = storage.join(place, results.product("1e10").folder("2026-11-22"), "part.parquet")
    assert read_tally(uri) == {"objects": 1}
    assert read_tally(uri + "x") is None
    assert storage.list_names(uri.rpartition("/")[0]) == ["part.parquet"]


def test_current_gives_the_latest_row_of_each_key_and_every_model_its_own(place: str) -> None:
    write(place, "1", row("a", "forbidden"), row("b"))
    write(place, "2", row("a", night=1))
    write(place, "1", row("a", night=2), model="2")
    storage.write_bytes(storage.join(place, "_runs", "x.parquet"), b"no data")
    found = results.current(place).to_pylist()
    assert sorted((r["uri"][-1], r["model_id"], r["status"]) for r in found) == [
        ("a", "1e10", "ok"), ("a", "2", "ok"), ("b", "1e10", "ok"),
    ]  # fmt: skip
    assert found[0]["probabilities"] == [("glioma", 0.75), ("no_tumor", 0.25)]
    assert results.current(place, model_id="2", columns=["uri"]).to_pydict() == {"uri": ["s3://b/a"]}


def test_what_is_done_is_what_no_later_run_need_read(place: str) -> None:
    assert list(results.done_keys(place, "1e10")) == []
    write(place, "1", row("ok"), row("bad", "truncated"), row("gone", "not_found"), row("again", "throttled"))
    write(place, "2", row("again", night=1))
    names = ("ok", "bad", "gone", "again", "new")
    wanted = keys_of([(f"s3://b/{name}", "e") for name in names])

    def done(**options: bool) -> set[str]:
        known = np.concatenate(list(results.done_keys(place, "1e10", **options)))
        return {name for name, key in zip(names, wanted, strict=True) if key in known}

    assert done() == {"ok", "bad", "again"}
    assert done(retry_rejected=True) == {"ok", "again"}


def test_the_key_set_answers_right_and_keeps_what_is_old_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btray.keys._IN_MEMORY", 5000)
    held = KeySet(tmp_path)
    every = keys_of([(f"s3://b/{number}", "e") for number in range(60_000)])
    tracemalloc.start()
    for start in range(0, 50_000, 1000):
        held.add(every[start : start + 1000])
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 50_000 * 16 / 2
    assert held.contains(every).tolist() == [True] * 50_000 + [False] * 10_000


def test_a_worklist_gives_its_parts_in_order_and_ends(place: str) -> None:
    writer = WorklistWriter(place, PART_OBJECTS)
    listed = objects(5000)
    for start in range(0, 5000, 700):
        writer.add(listed[start : start + 700])
    assert not runs.sealed(place)[1]
    writer.end(complete=True)
    assert runs.sealed(place)[1]
    found = [part.to_pylist()[0] for part in runs.parts(place)]
    assert [uri for part in found for uri in part["uri"]] == [info.uri for info in listed]
    assert len({part["part"] for part in found}) == len(found)
    assert max(len(part["uri"]) for part in found) <= PART_OBJECTS


def test_parts_of_large_objects_are_small() -> None:
    assert max(part_sizes(objects(100, size=200 << 20), taper=False)) == 1
    assert max(part_sizes(objects(100, size=200 << 20), taper=True)) == 1


def test_parts_are_many_and_the_last_ones_of_an_archive_small() -> None:
    assert max(part_sizes(objects(8192), taper=False)) == PART_OBJECTS
    assert part_sizes(objects(64), taper=False) == [32, 32]
    for count in (1, 31, 33, 1000, 15_000):
        sizes = part_sizes(objects(count), taper=True)
        assert sum(sizes) == count
        assert sizes == sorted(sizes, reverse=True), "a large part at the end keeps one worker busy while others idle"
        assert sizes[-1] <= 32
        assert sizes[0] <= PART_OBJECTS


def test_a_run_is_taken_up_by_the_same_request_and_given_up_by_another(place: str) -> None:
    first, resumed = begin(place, "m", {"input": "a"})
    assert not resumed
    WorklistWriter(first.worklist, PART_OBJECTS).end(complete=False)
    assert begin(place, "m", {"input": "a"}) == (first, True)
    assert not begin(place, "other model", {"input": "a"})[1]
    second, resumed = begin(place, "m", {"input": "b"})
    assert not resumed
    assert storage.read_json(storage.join(first.folder, runs.RUN))["state"] == "given up"
    assert runs._names(first.worklist) == []
    runs.finish(second, {"state": "finished", "objects": 9})
    assert list(runs.reports(place, "m")) == [{"state": "finished", "objects": 9}]
    assert not begin(place, "m", {"input": "b"})[1]


def test_a_worker_that_outlives_a_given_up_run_adds_no_row(place: str) -> None:
    run, _ = begin(place, "1e10", {"input": "a"})
    writer = WorklistWriter(run.worklist, PART_OBJECTS)
    writer.add(objects(1024))
    names = [part["part"][0].as_py() for part in islice(runs.parts(run.worklist), 8)]
    assert write_part(run.part_uri(names[3]), [row("in time")], results.SCHEMA, {"objects": 1})
    begin(place, "1e10", {"input": "b"})
    assert not any(write_part(run.part_uri(name), [row("late")], results.SCHEMA, {"objects": 1}) for name in names)
    assert [uri[-7:] for uri in results.current(place)["uri"].to_pylist()] == ["in time"]


def test_a_part_that_kills_its_workers_ends_the_run_with_its_name(tmp_path: Path) -> None:
    run, _ = begin(str(tmp_path), "m", {})
    for _ in range(5):
        runs.note_attempt(run, "00000-003", "s3://b/poison.jpg")
    runs.note_attempt(run, "00000-004", "s3://b/other.jpg")
    with pytest.raises(RuntimeError, match=r"00000-003 .*s3://b/poison.jpg.*--exclude"):
        runs.note_attempt(run, "00000-003", "s3://b/poison.jpg")
    assert runs.sealed(run.worklist) == ([], False)


def test_the_pandas_query_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(str(tmp_path / "results"), "1", row("a", "empty"), row("b"))
    monkeypatch.chdir(tmp_path)
    (query,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "classify.md").read_text(), re.DOTALL)
    exec(query, {})
    assert re.search(r"empty\s+1\s+s3://b/a", capsys.readouterr().out)
