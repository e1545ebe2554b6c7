"""The table's files are written once, its latest rows count, and worklists are taken up where they were cut off."""

from __future__ import annotations

import re
import sqlite3
import time
import tracemalloc
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import botocore.exceptions
import numpy as np
import pytest
import s3fs

from btray import outcomes, results, runs, storage
from btray.classifier import Prediction
from btray.keys import KeySet, keys_of
from btray.part_files import read_tally, write_part
from btray.runs import WorklistWriter
from btray.storage import FileInfo
from tests.classify_helpers import plain_rows

ROOT = Path(__file__).resolve().parent.parent
PART_OBJECTS = results.product("m").part_objects
NIGHT = datetime(2026, 11, 22, 2, tzinfo=UTC)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("bucket")


def row(name: str, code: str | None = None, *, night: int = 0, frame: int = 0) -> dict[str, Any]:
    info = FileInfo(f"s3://b/{name}", 7, "e", 0.0)
    said: dict[str, Any] = (
        {"status": "rejected", "error_code": code, "error": "why"}
        if code
        else {"label": "glioma", "confidence": 0.75, "probabilities": {"glioma": 0.75, "no_tumor": 0.25}}
    )
    at = NIGHT + timedelta(days=night)
    return results.row_of(Prediction(index=0, frame=frame, **said), info, run_id=f"{at:%Y%m%d}", classified_at=at)


def write(place: str, name: str, *rows: dict[str, Any], model: str = "1e10") -> bool:
    uri = storage.join(place, results.product(model).folder("2026-11-22"), f"{name}.parquet")
    return write_part(uri, rows, results.SCHEMA, {"objects": len(rows)})


def done_of(place: str, **options: bool) -> set[str]:
    """Names of the objects of the table that no later run reads again."""
    known = np.concatenate([*results.done_keys(place, "1e10", **options), keys_of([])])
    names = {uri.rpartition("/")[2] for uri in results.current(place)["uri"].to_pylist()} | {"new"}
    return {name for name in names if keys_of([(f"s3://b/{name}", "e")])[0] in known}


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
    assert done_of(place) == {"ok", "bad", "again"}
    assert done_of(place, retry_rejected=True) == {"ok", "again"}


def write_a_table_of_many_nights(place: str) -> None:
    """Objects whose rows of several nights differ: classified again, then withheld, then classified; with frames."""
    write(
        place, "1", *(row("pages", frame=frame) for frame in range(3)), row("once"), row("hidden"), row("bad", "empty")
    )
    write(place, "3", row("pages", "throttled", night=2), row("hidden", "throttled", night=2), row("bad", night=2))
    write(place, "2", *(row("pages", frame=frame, night=1) for frame in range(2)), row("back", "unavailable", night=1))
    write(place, "4", row("back", night=3), *(row("grown", frame=frame, night=3) for frame in range(2)))
    write(place, "0", row("grown", "forbidden"), row("lost", night=4), row("lost", "truncated", night=5))


def test_a_retryable_rejection_after_an_answer_is_current_and_is_tried_again(place: str) -> None:
    write_a_table_of_many_nights(place)
    found = {(r["uri"][7:], r["frame"], r["error_code"]) for r in results.current(place).to_pylist()}
    assert found == {
        ("pages", 0, "throttled"), ("once", 0, None), ("hidden", 0, "throttled"), ("bad", 0, None), ("back", 0, None),
        ("grown", 0, None), ("grown", 1, None), ("lost", 0, "truncated"),
    }, "rows of one night stand beside rows of another for the same object"  # fmt: skip
    assert done_of(place) == {"once", "bad", "back", "grown", "lost"}
    assert done_of(place, retry_rejected=True) == {"once", "bad", "back", "grown"}


def test_the_view_of_the_guide_gives_what_current_gives(tmp_path: Path) -> None:
    write_a_table_of_many_nights(str(tmp_path))
    guide = (ROOT / "docs" / "classify.md").read_text()
    windows = [" ".join(window.split()) for window in re.findall(r"(rank\(\) OVER \(.*?\))", guide, re.DOTALL)]
    assert len(windows) == 2
    assert windows[0] == windows[1]
    view = re.search(r"CREATE TEMPORARY VIEW scans AS (SELECT.*?);", guide, re.DOTALL)
    assert view
    columns = ("uri", "etag", "frame", "model_id", "run_id", "classified_at", "error_code")
    with sqlite3.connect(":memory:") as database:  # it knows window functions, and needs no installation
        database.execute(f"CREATE TABLE results ({', '.join(columns)})")
        rows = zip(*(plain_rows(str(tmp_path))[name].cast("string").to_pylist() for name in columns), strict=True)
        database.executemany(f"INSERT INTO results VALUES ({', '.join('?' * len(columns))})", list(rows))
        query = re.sub(r"parquet\.`.*?`", "results", view[1])
        said = database.execute(f"SELECT uri, CAST(frame AS INTEGER), run_id, error_code FROM ({query})").fetchall()
    table = results.current(str(tmp_path), columns=["uri", "frame", "run_id", "error_code"])
    assert sorted(said, key=repr) == sorted((tuple(r.values()) for r in table.to_pylist()), key=repr)


@pytest.mark.s3
def test_the_table_is_asked_for_as_patiently_as_the_job_says(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(bucket, "1", row("a"), row("b"))
    monkeypatch.setattr("btray.storage_errors.PATIENCE", 0.2)
    monkeypatch.setattr("btray.results._SMALL", 0)
    answer, down_until = s3fs.S3FileSystem._call_s3, time.monotonic() + 1.5

    async def away(client: Any, method: str, *options: Any, **arguments: Any) -> Any:
        if method == "get_object" and time.monotonic() < down_until:
            raise botocore.exceptions.EndpointConnectionError(endpoint_url="away")
        return await answer(client, method, *options, **arguments)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", away)
    with storage.patient(60):
        assert done_of(bucket) == {"a", "b"}
    assert time.monotonic() > down_until


@pytest.mark.parametrize("held", [3, 1 << 20])
def test_the_latest_outcome_counts_whatever_the_order_and_is_found_on_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr("btray.outcomes._IN_MEMORY", held)
    names = [(f"s3://b/{number}", "e") for number in range(200)]
    seen = outcomes.Outcomes(tmp_path)
    chance = np.random.default_rng(3)
    records = outcomes.records(
        keys_of(names * 5), np.repeat(np.arange(5), 200), chance.integers(0, 3, 1000).astype(np.uint8)
    )
    for some in np.array_split(chance.permutation(records), 40):
        seen.add(some)
    for worst in (outcomes.CLASSIFIED, outcomes.REJECTED):
        wanted = {
            key for key, outcome in zip(keys_of(names), records["outcome"][-200:], strict=True) if outcome <= worst
        }
        assert set(np.concatenate(list(seen.settled(worst)))) == wanted
    assert bool(list(tmp_path.iterdir())) == (held == 3)


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
