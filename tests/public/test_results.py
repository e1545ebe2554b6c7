"""The table's files are written once, and the latest rows of an object count."""

from __future__ import annotations

import re
import sqlite3
import time
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import botocore.exceptions
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest
import s3fs

from btray import results, storage
from btray.bulk import completed, outcomes, runs, table
from btray.bulk.part_files import read_tally, write_part
from btray.data.key_set import KeySet, keys_of
from btray.model.prediction import Prediction
from btray.storage import FileInfo
from tests.helpers.classify_helpers import plain_rows

ROOT = Path(__file__).resolve().parents[2]
PART_OBJECTS = table.product("m").part_objects
NIGHT = datetime(2026, 11, 22, 2, tzinfo=UTC)


def row(
    name: str, code: str | None = None, *, night: int = 0, frame: int = 0, label_set: tuple[str, ...] = ()
) -> dict[str, Any]:
    info = FileInfo(f"s3://b/{name}", 7, "e", 0.0)
    answer = {"label": "glioma", "confidence": 0.75, "probabilities": {"glioma": 0.75, "no_tumor": 0.25}}
    rejection = {"status": "rejected", "error_code": code, "error": "why"}
    said: dict[str, Any] = rejection if code else answer | {"label_set": label_set}
    at = NIGHT + timedelta(days=night)
    return table.row_of(Prediction(index=0, frame=frame, **said), info, run_id=f"{at:%Y%m%d}", classified_at=at)


def write(place: str, name: str, *rows: dict[str, Any], model: str = "1e10") -> bool:
    uri = storage.join(place, table.product(model).folder("2026-11-22"), f"{name}.parquet")
    return write_part(uri, rows, table.SCHEMA, {"objects": len(rows)})


def done_of(place: str, **options: bool) -> set[str]:
    """Names of the objects of the table that no later run reads again."""
    known = np.concatenate([*table.done_keys(place, "1e10", **options), keys_of([])])
    names = {uri.rpartition("/")[2] for uri in results.current(place)["uri"].to_pylist()} | {"new"}
    return {name for name in names if keys_of([(f"s3://b/{name}", "e")])[0] in known}


def test_of_two_writers_of_a_part_one_wins(place: str) -> None:
    assert write(place, "part", row("a"))
    assert not write(place, "part", row("a"), row("b"))
    uri = storage.join(place, table.product("1e10").folder("2026-11-22"), "part.parquet")
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
    assert list(table.done_keys(place, "1e10")) == []
    write(place, "1", row("ok"), row("bad", "truncated"), row("gone", "not_found"), row("again", "throttled"))
    write(place, "2", row("again", night=1))
    assert done_of(place) == {"ok", "bad", "again"}
    assert done_of(place, retry_rejected=True) == {"ok", "again"}


FIRST_COLUMNS = (
    "uri", "etag", "size", "frame", "study_uid", "series_uid", "instance_uid", "status", "error_code", "error",
    "retryable", "label", "confidence", "probabilities", "abstained", "out_of_distribution", "ood_score", "run_id",
    "classified_at",
)  # fmt: skip
"""The columns of the first tables."""


def test_files_with_the_columns_of_before_are_read_beside_new_ones(tmp_path: Path) -> None:
    root, folder = str(tmp_path), table.product("1e10").folder("2026-11-21")
    write(root, "2", row("new", label_set=("glioma", "no_tumor")), row("again", label_set=("glioma",), night=1))
    old = [{name: value for name, value in row(name).items() if name != "label_set"} for name in ("old", "again")]
    schema = pa.schema([table.SCHEMA.field(name) for name in FIRST_COLUMNS])
    assert write_part(storage.join(root, folder, "1.parquet"), old, schema, {"objects": 2})
    rows = {r["uri"]: r for r in results.current(root).to_pylist()}
    assert {uri: r["label_set"] for uri, r in rows.items()} == {
        "s3://b/old": None, "s3://b/again": ["glioma"], "s3://b/new": ["glioma", "no_tumor"],
    }  # fmt: skip
    assert all(r["label"] == "glioma" for r in rows.values())
    assert results.current(root, columns=["label_set"]).num_rows == 3
    assert done_of(root) == {"old", "again", "new"}
    assert sorted(plain_rows(root)["uri"].to_pylist()) == ["s3://b/again", "s3://b/again", "s3://b/new", "s3://b/old"]
    files = [f"{root}/{folder}/1.parquet", *map(str, tmp_path.glob("*/run_date=2026-11-22/*.parquet"))]
    for order in (files, files[::-1]):  # a reader takes the columns of the first file it sees
        seen = pa.dataset.dataset(order).to_table()
        assert (seen.num_rows, "label_set" in seen.schema.names) == (4, order[0] != files[0])


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
        ("pages", 0, "throttled"), ("pages", 1, None), ("pages", 2, None), ("once", 0, None),
        ("hidden", 0, "throttled"), ("bad", 0, None), ("back", 0, None), ("grown", 0, None), ("grown", 1, None),
        ("lost", 0, "truncated"),
    }  # fmt: skip
    assert done_of(place) == {"once", "bad", "back", "grown", "lost"}
    assert done_of(place, retry_rejected=True) == {"once", "bad", "back", "grown"}


def test_the_view_of_the_guide_gives_what_current_gives(tmp_path: Path) -> None:
    write_a_table_of_many_nights(str(tmp_path))
    guide = (ROOT / "docs" / "classify.md").read_text()
    windows = [" ".join(window.split()) for window in re.findall(r"(row_number\(\) OVER \(.*?\))", guide, re.DOTALL)]
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
    monkeypatch.setattr("btray.storage.retry.DEFAULT_TIMEOUT", 0.2)
    monkeypatch.setattr("btray.bulk.completed._SMALL", 0)
    answer, down_until = s3fs.S3FileSystem._call_s3, time.monotonic() + 1.5

    async def away(client: Any, method: str, *options: Any, **arguments: Any) -> Any:
        if method == "get_object" and time.monotonic() < down_until:
            raise botocore.exceptions.EndpointConnectionError(endpoint_url="away")
        return await answer(client, method, *options, **arguments)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", away)
    with storage.retry_timeout(60):
        assert done_of(bucket) == {"a", "b"}
    assert time.monotonic() > down_until


def run_with(place: str, *parts: list[dict[str, Any]]) -> runs.Run:
    """A run that has written these parts and has not ended."""
    run, _ = runs.begin(place, "1e10", {"input": "a"}, table.product("1e10"))
    for number, rows in enumerate(parts):
        write_part(run.part_uri(f"00000-{number:03d}"), rows, table.SCHEMA, {"objects": len(rows)})
    return run


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URIs of the table's files that are opened from now on."""
    seen: list[str] = []
    read = completed._records_of
    monkeypatch.setattr(completed, "_records_of", lambda info: seen.append(info.uri) or read(info))
    return seen


def test_a_later_night_reads_the_key_files_of_a_run_and_not_its_files(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completed, "_FILE_RECORDS", 2)
    run = run_with(place, [row("ok"), row("bad", "empty")], [row("again", "throttled")], [row("pages"), row("pages")])
    before = done_of(place)
    table.note_done(run)
    runs.finish(run, {"state": "finished", "objects": 4})
    write(place, "by hand", row("again", night=1), row("ok", "throttled", night=1))
    seen = opened(monkeypatch)
    assert done_of(place) == (before | {"again"}) - {"ok"}
    assert done_of(place, retry_rejected=True) == {"again", "pages"}
    assert {storage.name(uri) for uri in seen} == {"by hand.parquet"}
    assert len(storage.list_names(f"{run.folder}/keys")) == 2
    storage.delete(run.part_uri("00000-002"))
    assert done_of(place) == {"again", "bad"}, "what somebody removed is classified again"


def test_a_run_that_ended_without_key_files_gets_some_when_it_is_first_read_by_one_that_may_write(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with(place, [row("a")], [])
    done_of(place, note=True)
    assert not storage.exists(f"{run.folder}/keys.json"), "more of its parts may follow"
    storage.write_json(f"{run.folder}/{runs.RUN}", {"state": "given up"})
    assert done_of(place) == {"a"}
    assert not storage.exists(f"{run.folder}/keys.json"), "a dry run writes nothing"
    assert done_of(place, note=True) == {"a"}
    seen = opened(monkeypatch)
    assert done_of(place) == {"a"}
    assert seen == []


def test_a_run_that_was_killed_while_it_left_its_key_files_is_read_from_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with(str(tmp_path), [row("a")], [row("b")])
    monkeypatch.setattr(completed, "_FILE_RECORDS", 1)
    monkeypatch.setattr("btray.storage.write_json", None)
    with pytest.raises(TypeError):
        table.note_done(run)
    assert done_of(str(tmp_path)) == {"a", "b"}


@pytest.mark.parametrize("held", [3, 1 << 20])
def test_the_latest_outcome_counts_whatever_the_order_and_is_found_on_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr("btray.bulk.outcomes._IN_MEMORY", held)
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
    monkeypatch.setattr("btray.data.key_set._IN_MEMORY", 5000)
    held = KeySet(tmp_path)
    assert not held.contains(keys_of([("s3://b/0", "e")])).any()
    every = keys_of([(f"s3://b/{number}", "e") for number in range(60_000)])
    tracemalloc.start()
    for start in range(0, 50_000, 1000):
        held.add(every[start : start + 1000])
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 50_000 * 16 / 2
    assert held.contains(every).tolist() == [True] * 50_000 + [False] * 10_000
    assert held.contains(every[::-1]).tolist() == [False] * 10_000 + [True] * 50_000
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 50_000 * 16, "merged files stay"
    assert len(held._runs) < 12


def test_the_pandas_query_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(str(tmp_path / "results"), "1", row("a", "empty"), row("b"))
    monkeypatch.chdir(tmp_path)
    (query,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "classify.md").read_text(), re.DOTALL)
    exec(query, {})
    assert re.search(r"empty\s+1\s+s3://b/a", capsys.readouterr().out)
