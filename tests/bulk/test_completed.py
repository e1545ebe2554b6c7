"""Which objects are completed: found from key files or from the table, the latest outcome of each counts."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import botocore.exceptions
import numpy as np
import pytest
import s3fs

from btray import storage
from btray.bulk import completed, runs, table
from btray.bulk.completed import CompletedIndex, LatestOutcomes
from btray.bulk.report import AbandonedRun, PartTally
from btray.bulk.runs import write_part
from btray.data.key_set import keys_of
from btray.storage.parquet import set_aside
from tests.helpers.classify_helpers import run_report
from tests.helpers.table_helpers import done_of, row, write


def test_what_is_completed_is_what_no_later_run_need_read(place: str) -> None:
    assert list(CompletedIndex(place, "1e10").keys()) == []
    write(place, "1", row("ok"), row("bad", "truncated"), row("gone", "not_found"), row("again", "throttled"))
    write(place, "2", row("again", night=1))
    assert done_of(place) == {"ok", "bad", "again"}
    assert done_of(place, retry_rejected=True) == {"ok", "again"}


@pytest.mark.s3
def test_a_store_that_is_away_is_waited_for_as_long_as_the_job_says(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    run, _ = runs.begin(place, "1e10", {"input": "a"}, folder=partial(table.folder, "1e10"), schema=table.SCHEMA)
    for number, rows in enumerate(parts):
        write_part(run.part_uri(f"00000-{number:03d}"), rows, table.SCHEMA, PartTally(objects=len(rows)))
    return run


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URIs of the table's files that are opened from now on."""
    seen: list[str] = []
    read = completed._read_file
    monkeypatch.setattr(completed, "_read_file", lambda info: seen.append(info.uri) or read(info))
    return seen


def test_a_later_run_reads_the_key_files_of_a_run_and_not_its_files(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completed, "_FILE_RECORDS", 2)
    run = run_with(place, [row("ok"), row("bad", "empty")], [row("again", "throttled")], [row("pages"), row("pages")])
    before = done_of(place)
    CompletedIndex(run.output, run.group).write(run)
    runs.finish(run, run_report(objects=4))
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
    done_of(place, write_missing=True)
    assert not storage.exists(f"{run.folder}/keys.json"), "more of its parts may follow"
    storage.write_json(f"{run.folder}/{runs.RUN}", AbandonedRun(request={}).model_dump(mode="json"))
    assert done_of(place) == {"a"}
    assert not storage.exists(f"{run.folder}/keys.json"), "a dry run writes nothing"
    assert done_of(place, write_missing=True) == {"a"}
    seen = opened(monkeypatch)
    assert done_of(place) == {"a"}
    assert seen == []


def test_a_run_that_was_killed_while_it_wrote_its_key_files_is_read_from_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with(str(tmp_path), [row("a")], [row("b")])
    monkeypatch.setattr(completed, "_FILE_RECORDS", 1)
    monkeypatch.setattr("btray.storage.write_json", None)
    with pytest.raises(TypeError):
        CompletedIndex(run.output, run.group).write(run)
    assert done_of(str(tmp_path)) == {"a", "b"}


@pytest.mark.parametrize("held", [3, 1 << 20])
def test_the_latest_outcome_counts_whatever_the_order_and_is_found_on_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr(completed, "_IN_MEMORY", held)
    names = [(f"s3://b/{number}", "e") for number in range(200)]
    seen = LatestOutcomes(tmp_path)
    chance = np.random.default_rng(3)
    records = np.empty(1000, completed.RECORD)
    records["key"], records["at"] = keys_of(names * 5), np.repeat(np.arange(5), 200)
    records["outcome"] = chance.integers(0, 3, 1000)
    for some in np.array_split(chance.permutation(records), 40):
        seen.add(some)
    for worst in (completed.CLASSIFIED, completed.REJECTED):
        expected = {
            key for key, outcome in zip(keys_of(names), records["outcome"][-200:], strict=True) if outcome <= worst
        }
        assert set(np.concatenate(list(seen.keys(worst)))) == expected
    assert bool(list(tmp_path.iterdir())) == (held == 3)


@pytest.mark.parametrize("body", [b"", b"PAR1", b"PAR1" + bytes(500) + b"PAR1", None])
def test_a_damaged_file_of_the_table_is_named_and_its_objects_are_not_completed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, body: bytes | None
) -> None:
    place = str(tmp_path / "out")
    write(place, "1", row("kept"))
    write(place, "2", row("lost"))
    damaged = tmp_path / "out" / table.folder("1e10", "2026-11-22") / "2.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9] if body is None else body)
    index = CompletedIndex(place, "1e10")
    keys = np.concatenate([*index.keys(), keys_of([])])
    assert keys.tolist() == keys_of([("s3://b/kept", "e")]).tolist()
    assert index.damaged == [str(damaged)]
    assert str(damaged) in caplog.text
    set_aside(index.damaged[0])
    assert done_of(place) == {"kept"}
    assert not damaged.exists()


@pytest.mark.parametrize("name", ["keys.json", "keys/00000.npy"])
@pytest.mark.parametrize("body", [b"", b"{", b"\x93NUMPY\x01\x00v\x00", None])
def test_damaged_key_files_are_made_anew(tmp_path: Path, name: str, body: bytes | None) -> None:
    place = str(tmp_path / "out")
    run = run_with(place, [row("ok"), row("bad", "empty")], [row("again", "throttled")])
    CompletedIndex(place, "1e10").write(run)
    runs.finish(run, run_report(objects=3))
    damaged = Path(run.folder, name)
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-3] if body is None else body)
    index = CompletedIndex(place, "1e10")
    assert len(np.concatenate(list(index.keys(write_missing=True)))) == 2
    assert damaged.read_bytes() == whole


def test_a_damaged_part_of_an_interrupted_run_is_written_again(tmp_path: Path) -> None:
    run = run_with(str(tmp_path / "out"), [row("ok")])
    part = Path(run.part_uri("00000-000"))
    part.write_bytes(part.read_bytes()[:40])
    assert runs.read_tally(str(part), PartTally) is None
    assert write_part(str(part), [row("ok")], table.SCHEMA, PartTally(objects=1))
    assert runs.read_tally(str(part), PartTally) == PartTally(objects=1)
