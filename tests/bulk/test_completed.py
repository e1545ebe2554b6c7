"""Which objects are completed: found from key files or from the table, the latest outcome of each counts."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest
import s3fs

from btray import storage
from btray.bulk import runs, table
from btray.bulk.listing import completed, key_files
from btray.bulk.listing.completed import CompletedIndex, RunKeys
from btray.bulk.listing.tasks import LocalTasks
from btray.bulk.report import AbandonedRun, PartTally
from btray.bulk.runs import write_part
from btray.data.key_set import keys_of
from btray.storage.parquet import set_aside
from tests.helpers.classify_helpers import run_report
from tests.helpers.table_helpers import done_of, row, write


def test_what_is_completed_is_what_no_later_run_need_read(place: str, tmp_path: Path) -> None:
    assert CompletedIndex(place, "1e10").sources(LocalTasks(tmp_path)) == []
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
    monkeypatch.setattr("btray.bulk.listing.completed._SMALL", 0)
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


def leave_key_files(run: runs.Run) -> None:
    """As the driver of a run does with what its actors return."""
    keys = RunKeys(run.folder)
    files = [info for info in table.table_files(run.output) if runs.run_of(info.uri) == run.run_id]
    for info in files:
        for records in completed._read_file(info) or []:
            keys.add(records)
    keys.conclude(len(files))


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URIs of the table's files that are opened from now on."""
    seen: list[str] = []
    read = completed._read_file
    monkeypatch.setattr(completed, "_read_file", lambda info: seen.append(info.uri) or read(info))
    return seen


def test_a_later_run_reads_the_key_files_of_a_run_and_not_its_files(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_files, "FILE_RECORDS", 2)
    run = run_with(place, [row("ok"), row("bad", "empty")], [row("again", "throttled")], [row("pages"), row("pages")])
    before = done_of(place)
    leave_key_files(run)
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
    monkeypatch.setattr(key_files, "FILE_RECORDS", 1)
    monkeypatch.setattr("btray.storage.write_json", None)
    with pytest.raises(TypeError):
        leave_key_files(run)
    assert done_of(str(tmp_path)) == {"a", "b"}


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
    (source,) = index.sources(LocalTasks(tmp_path))
    assert source.read(0, 256)["key"].tolist() == keys_of([("s3://b/kept", "e")]).tolist()
    assert index.damaged == [str(damaged)]
    assert str(damaged) in caplog.text
    set_aside(index.damaged[0])
    assert done_of(place) == {"kept"}
    assert not damaged.exists()


@pytest.mark.parametrize("name", ["keys.json", "keys/00000.keys"])
@pytest.mark.parametrize("body", [b"", b"{", b"\x93NUMPY\x01\x00v\x00", None])
def test_damaged_key_files_are_made_anew(tmp_path: Path, name: str, body: bytes | None) -> None:
    place = str(tmp_path / "out")
    run = run_with(place, [row("ok"), row("bad", "empty")], [row("again", "throttled")])
    leave_key_files(run)
    runs.finish(run, run_report(objects=3))
    damaged = Path(run.folder, name)
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-3] if body is None else body)
    assert done_of(place, write_missing=True) == {"ok", "bad"}
    assert damaged.read_bytes() == whole


def test_a_damaged_part_of_an_interrupted_run_is_written_again(tmp_path: Path) -> None:
    run = run_with(str(tmp_path / "out"), [row("ok")])
    part = Path(run.part_uri("00000-000"))
    part.write_bytes(part.read_bytes()[:40])
    assert runs.read_tally(str(part), PartTally) is None
    assert write_part(str(part), [row("ok")], table.SCHEMA, PartTally(objects=1))
    assert runs.read_tally(str(part), PartTally) == PartTally(objects=1)
