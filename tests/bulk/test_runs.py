"""Runs are resumed where they were interrupted, abandoned for good, and leave nothing behind, whoever is late."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btray import results, storage
from btray.bulk import runs, table, worklist
from btray.bulk.pipeline import WorklistSource
from btray.bulk.report import PartTally
from btray.bulk.runs import write_part
from btray.bulk.worklist import PART_OBJECTS, PartLimits, WorklistWriter
from btray.core.errors import Failed, UserError
from btray.storage import FileInfo
from tests.helpers.classify_helpers import run_report
from tests.helpers.table_helpers import row

LIMITS = PartLimits()


def begin(place: str, model: str, request: dict[str, Any]) -> tuple[runs.Run, bool]:
    return runs.begin(place, model, request, folder=partial(table.folder, model), schema=table.SCHEMA)


def objects(count: int, size: int = 7) -> list[FileInfo]:
    return [FileInfo(f"s3://b/{number}", size, "e", 0.0) for number in range(count)]


def part_sizes(listed: list[FileInfo], *, taper: bool, before: int = 0, limits: PartLimits = LIMITS) -> list[int]:
    parts = worklist.cut_into_parts(listed, limits, listed=before + len(listed), taper=taper)
    assert sorted(set(parts)) == list(range(parts[-1] + 1))
    return np.bincount(parts).tolist()


def test_a_worklist_gives_its_parts_in_order_and_ends(place: str) -> None:
    writer = WorklistWriter(place)
    listed = objects(5000)
    for start in range(0, 5000, 700):
        writer.add(listed[start : start + 700])
    assert not worklist.sealed_shards(place)[1]
    writer.end(complete=True)
    assert worklist.sealed_shards(place)[1]
    found = [part.to_pylist()[0] for part in worklist.read_parts(place)]
    assert [uri for part in found for uri in part["uri"]] == [info.uri for info in listed]
    assert len({part["part"] for part in found}) == len(found)
    assert max(len(part["uri"]) for part in found) <= PART_OBJECTS


def test_parts_of_large_objects_are_small() -> None:
    assert max(part_sizes(objects(100, size=200 << 20), taper=False)) == 1
    assert max(part_sizes(objects(100, size=200 << 20), taper=True)) == 1


def test_parts_are_many_and_the_last_ones_of_an_archive_small() -> None:
    assert max(part_sizes(objects(8192), taper=False)) == PART_OBJECTS
    assert part_sizes(objects(1024), taper=False)[:4] == [32, 64, 128, 128], "the first rows come early"
    assert part_sizes(objects(1024), taper=False, before=1024)[0] == 128
    assert part_sizes(objects(64), taper=False) == [32, 32]
    for count in (1, 31, 33, 1000, 15_000):
        sizes = part_sizes(objects(count), taper=True)
        assert sum(sizes) == count
        assert sizes == sorted(sizes, reverse=True), "a large part at the end keeps one worker busy while others idle"
        assert sizes[-1] <= 32
        assert sizes[0] <= PART_OBJECTS


def test_parts_grow_with_the_archive_until_a_shard_is_one_part() -> None:
    for before in (10**6, 10**9):
        sizes = part_sizes(objects(32_768), taper=False, before=before)
        assert max(sizes) == min(32_768, max(PART_OBJECTS, (before + 32_768) // 256))
        assert max(part_sizes(objects(32_768, size=1 << 20), taper=False, before=before)) <= 256
        assert max(part_sizes(objects(32_768), taper=False, before=before, limits=PartLimits(objects=4096))) <= 4096
        assert part_sizes(objects(32_768), taper=True, before=before)[-1] <= 32


def test_a_run_is_resumed_by_the_same_request_and_abandoned_by_another(place: str) -> None:
    first, resumed = begin(place, "m", {"input": "a"})
    assert not resumed
    WorklistWriter(first.worklist).end(complete=False)
    assert begin(place, "m", {"input": "a"}) == (first, True)
    assert not begin(place, "other model", {"input": "a"})[1]
    second, resumed = begin(place, "m", {"input": "b"})
    assert not resumed
    assert storage.read_json(storage.join(first.folder, runs.RUN))["state"] == "abandoned"
    assert storage.list_names(first.worklist, missing_ok=True) == ["00000.segment", "closed"], (
        "what keeps a late driver from continuing"
    )
    runs.finish(second, run_report(objects=9))
    assert list(runs.reports(place, "m")) == [run_report(objects=9)]
    assert not begin(place, "m", {"input": "b"})[1]


def test_a_run_that_an_older_version_abandoned_has_ended_and_is_no_run_to_compare_with(place: str) -> None:
    run, _ = begin(place, "m", {"input": "a"})
    storage.write_json(storage.join(run.folder, runs.RUN), {"state": "given up", "request": {"input": "a"}})
    assert runs.has_ended(run.folder)
    assert list(runs.reports(place, "m")) == []
    assert begin(place, "m", {"input": "a"})[0] != run


def test_a_worker_that_outlives_an_abandoned_run_adds_no_row(place: str) -> None:
    run, _ = begin(place, "1e10", {"input": "a"})
    writer = WorklistWriter(run.worklist)
    writer.add(objects(1024))
    names = [part["part"][0].as_py() for part in islice(worklist.read_parts(run.worklist), 8)]
    assert write_part(run.part_uri(names[3]), [row("in time")], table.SCHEMA, PartTally(objects=1))
    begin(place, "1e10", {"input": "b"})
    assert not any(write_part(run.part_uri(name), [row("late")], table.SCHEMA, PartTally(objects=1)) for name in names)
    assert [uri[-7:] for uri in results.current(place)["uri"].to_pylist()] == ["in time"]


def test_of_two_drivers_that_list_for_one_run_one_seals_a_shard_and_the_other_learns_of_it(place: str) -> None:
    first, second = WorklistWriter(place), WorklistWriter(place)
    first.add(objects(1024))
    with pytest.raises(UserError, match=r"00000\.segment was sealed by another run") as caught:
        second.add(objects(1024, size=8))
    assert "\n" not in str(caught.value)
    (shard,), _ = worklist.sealed_shards(place)
    assert worklist.read_shard(shard)["size"].to_pylist() == [7] * 1024
    WorklistWriter(place).add(objects(1024))  # the same, say by a put whose answer was lost


def test_a_driver_that_lost_its_lease_writes_nothing_into_the_worklist(place: str) -> None:
    def lost() -> None:
        raise UserError("another run has taken over")

    writer = WorklistWriter(place, check=lost)
    for write_on in (lambda: writer.add(objects(1024)), lambda: writer.end(complete=False)):
        with pytest.raises(UserError, match="taken over"):
            write_on()
    assert storage.list_names(place, missing_ok=True) == []


def test_a_shard_that_comes_after_its_run_was_abandoned_is_never_read(place: str) -> None:
    run, _ = begin(place, "m", {"input": "a"})
    late = WorklistWriter(run.worklist)
    late.add(objects(1024))
    reading = worklist.read_parts(run.worklist)
    next(reading)
    begin(place, "m", {"input": "b"})
    with pytest.raises(UserError, match="another run"):
        late.add(objects(2048))
    assert len(list(reading)) == len(part_sizes(objects(1024), taper=False)) - 1


def test_a_run_that_was_being_abandoned_when_its_driver_was_killed_is_not_resumed(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = begin(place, "m", {"input": "a"})
    WorklistWriter(run.worklist).add(objects(1024))
    with monkeypatch.context() as patch:
        patch.setattr("btray.bulk.runs.finish", killed)
        with pytest.raises(KeyboardInterrupt):
            begin(place, "m", {"input": "b"})
    again, resumed = begin(place, "m", {"input": "a"})
    assert not resumed, "some of its parts are closed with empty files"
    assert again != run
    assert runs.has_ended(run.folder)


def killed(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_no_file_of_a_run_looks_like_one_of_the_table(tmp_path: Path) -> None:
    run, _ = begin(str(tmp_path), "m", {"input": "a"})
    WorklistWriter(run.worklist).add(objects(1024))
    runs.note_attempt(run, "00000-000", "s3://b/0", actor="PartActor")
    assert list(tmp_path.rglob("*.segment"))
    assert not list(tmp_path.rglob("*.parquet")), "DuckDB and Polars do not skip folders that begin with _"


def test_what_a_run_left_that_was_killed_in_its_last_moment_is_removed_by_the_next(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = begin(place, "m", {"input": "a"})
    WorklistWriter(run.worklist).add(objects(1024))
    write_part(run.part_uri("00000-000"), [row("a")], table.SCHEMA, PartTally())
    if not storage.is_remote(place):  # two workers, and a driver before its first word
        half_written = [run.part_uri("x").replace("part-", ".") + ".tmp", f"{run.folder}-0/.1.tmp"]
        for uri in half_written:
            storage.write_bytes(uri, b"half")
    with monkeypatch.context() as patch:
        patch.setattr("btray.bulk.worklist.remove", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.finish(run, run_report())
    assert storage.list_names(run.worklist, missing_ok=True)
    assert not begin(place, "m", {"input": "a"})[1]
    assert storage.list_names(run.worklist, missing_ok=True) == []
    assert [storage.name(info.uri) for info in storage.list_files(storage.join(place, run.parts))] == [
        storage.name(run.part_uri("00000-000"))
    ]
    if not storage.is_remote(place):
        assert not list(Path(place).rglob("*.tmp"))


def test_a_part_that_kills_its_workers_ends_the_run_with_its_name(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = begin(place, "m", {})
    with monkeypatch.context() as patch:
        patch.setattr(storage, "list_names", None)  # a listing for each part would be work without bound
        for _ in range(5):
            runs.note_attempt(run, "00000-003", "s3://b/poison.jpg", actor="PartActor")
        runs.note_attempt(run, "00000-004", "s3://b/other.jpg", actor="PartActor")
        with pytest.raises(Failed, match=r"00000-003 .*s3://b/poison.jpg.*--exclude"):
            runs.note_attempt(run, "00000-003", "s3://b/poison.jpg", actor="PartActor")
    assert worklist.sealed_shards(run.worklist) == ([], False)
    runs.finish(run, run_report())
    assert storage.list_names(run.worklist, missing_ok=True) == []


def test_a_node_that_does_not_see_a_local_output_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btray.bulk.runs._SEEN_WITHIN", 0.0)
    run, _ = begin(str(tmp_path / "here"), "m", {})
    runs.require_visible(run)
    runs.require_visible(dataclasses.replace(run, output="s3://bucket/out"))
    elsewhere = dataclasses.replace(run, output=str(tmp_path / "there"))
    (read,) = WorklistSource(elsewhere, 1.0).get_read_tasks(1)
    with pytest.raises(UserError, match=r"--output .*/there is another folder on the node .*: give s3://") as caught:
        list(read())
    assert "\n" not in str(caught.value)


def test_nobody_waits_for_a_shard_of_a_run_that_has_ended(tmp_path: Path) -> None:
    run, _ = begin(str(tmp_path), "m", {})
    runs.finish(run, run_report())
    assert list(worklist.read_parts(run.worklist, lambda: runs.has_ended(run.folder))) == []
