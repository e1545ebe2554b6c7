"""What is new is what no set of plain Python would hold either, however it is partitioned and in rounds."""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btray.bulk import worklist
from btray.bulk.config import ArchiveConfig
from btray.bulk.listing import join, key_files, new_objects
from btray.bulk.listing.archive import Archive
from btray.bulk.listing.key_files import (
    CLASSIFIED,
    RECORD,
    REJECTED,
    WITHHELD,
    HeldKeys,
    KeyFile,
    KeyFileWriter,
    unselected,
)
from btray.bulk.listing.new_objects import NewObjects
from btray.bulk.listing.objects import Listed, chunks_of, table_of
from btray.bulk.listing.sealing import Listing
from btray.bulk.listing.tasks import LocalTasks
from btray.bulk.worklist import PartLimits
from btray.core.errors import UserError
from btray.data.key_set import Keys, keys_of
from btray.storage import FileInfo, StorageError, describe
from tools.processes import until

_OBJECTS = st.integers(0, 40)
_OUTCOMES = st.lists(st.tuples(_OBJECTS, st.integers(0, 5), st.sampled_from([CLASSIFIED, REJECTED, WITHHELD])))


class Partitioned(LocalTasks):
    """In this process, but split as if many ran at a time."""

    def __init__(self, scratch: Path, partitions: int) -> None:
        super().__init__(scratch)
        self.parallel = self.partitions = partitions


def info(number: int) -> FileInfo:
    return FileInfo(f"s3://b/{number}", number, f"e{number}", 0.0)


def alike(pairs: Any) -> Keys:
    """Digests of which many begin with the same eight bytes: what is right must not rest on their being different."""
    digests = [int(etag[1:]).to_bytes(16, "little") if etag[1:].isdigit() else bytes(16) for _, etag in pairs]
    return np.array([digest[8:] + digest[:8] for digest in digests], "S16") if digests else np.empty(0, "S16")


def records_of(outcomes: list[tuple[int, int, int]], keys: Any = keys_of) -> Any:
    records = np.empty(len(outcomes), RECORD)
    records["key"] = keys([(info(number).uri, info(number).etag) for number, _, _ in outcomes])
    records["at"] = [at for _, at, _ in outcomes]
    records["outcome"] = [outcome for _, _, outcome in outcomes]
    return records


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_new_is_what_plain_sets_say(data: st.DataObject) -> None:
    listed, runs = data.draw(st.lists(_OBJECTS, max_size=60)), data.draw(st.lists(_OUTCOMES, max_size=4))
    parallel, chunk = data.draw(st.sampled_from([1, 2, 3, 7])), data.draw(st.integers(1, 20))
    worst, keys = data.draw(st.sampled_from([CLASSIFIED, REJECTED])), data.draw(st.sampled_from([keys_of, alike]))
    sealed = data.draw(st.sets(_OBJECTS, max_size=5))
    latest: dict[int, tuple[int, int]] = {}
    for number, at, outcome in itertools.chain(*runs):
        latest[number] = max(latest.get(number, (-1, -1)), (at, outcome))
    done = {number for number, (_, outcome) in latest.items() if outcome <= worst}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as scratch:
        patch.setattr(
            join, "keys_of_columns", lambda *pair: keys(list(zip(*(each.to_pylist() for each in pair), strict=True)))
        )
        patch.setattr(new_objects, "_FIRST_ROUND", 3)
        tasks = Partitioned(Path(scratch), parallel)
        sources = [tasks.keep(records_of(run, keys)) for run in runs]
        new = NewObjects(sources, tasks, scratch, worst=worst)
        if sealed:
            new.leave_out(table_of([info(number) for number in sealed]))
        parts = [listed[start : start + chunk] for start in range(0, len(listed), chunk)]
        archive = Archive(iter([Listed(table_of(list(map(info, part)))) for part in parts]), may_repeat=True)
        found = [one for some in new.among(archive) for one in some]
    assert sorted(one.size for one in found) == sorted(set(listed) - done - sealed)
    assert [(one.uri, one.etag) for one in found] == [(info(one.size).uri, info(one.size).etag) for one in found]
    assert new.unchanged == len(listed) - len(found)
    if parallel == 1:
        assert [one.size for one in found] == list(dict.fromkeys(n for n in listed if n not in done | sealed))


@settings(max_examples=40, deadline=None)
@given(outcomes=_OUTCOMES, first=st.integers(0, 256), more=st.integers(0, 256), held=st.integers(1, 30))
def test_a_key_file_gives_of_each_range_of_keys_what_was_written_and_no_more(
    outcomes: list[tuple[int, int, int]], first: int, more: int, held: int
) -> None:
    end = min(256, first + more)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(key_files, "FILE_RECORDS", held)
        writer = KeyFileWriter(folder)
        for outcome in outcomes:
            writer.add(records_of([outcome]))
        writer.flush()
        files = [KeyFile.open(describe(str(path))) for path in sorted(Path(folder).iterdir())]
        assert len(files) == writer.files == -(-len(outcomes) // held)
        found = [tuple(record) for file in files for record in file.read(first, end)]
    expected = {tuple(r) for r in records_of(outcomes) if first <= np.array([r["key"]]).view(np.uint8)[0] < end}
    latest = {key: max((at, outcome) for k, at, outcome in expected if k == key) for key, _, _ in expected}
    assert set(found) <= expected
    assert {key: max((at, outcome) for k, at, outcome in found if k == key) for key, _, _ in found} == latest


def test_a_file_that_is_cut_off_is_no_key_file(tmp_path: Path) -> None:
    writer = KeyFileWriter(str(tmp_path))
    writer.add(records_of([(number, 0, 0) for number in range(9)]))
    writer.flush()
    (path,) = tmp_path.iterdir()
    body = path.read_bytes()
    for damaged in (b"", body[:100], body[:-1], body + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a whole key file"):
            KeyFile.open(describe(str(path)))


def test_what_was_left_out_for_a_reason_is_completed_for_that_reason_alone(tmp_path: Path) -> None:
    records = records_of([(number, 0, REJECTED) for number in range(200)])
    records["key"] = unselected(records["key"], "series plane=axial")
    tasks = Partitioned(tmp_path, 3)

    def left(reason: str) -> int:
        new = NewObjects([HeldKeys(records)], tasks, str(tmp_path), reason=reason)
        return sum(map(len, new.among(Archive(chunks_of(info(number) for number in range(300))))))

    assert left("series plane=axial") == 100
    assert left("series plane=sagittal") == left("") == 300


def test_the_first_new_objects_come_before_the_last_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_objects, "_FIRST_ROUND", 100)
    taken: list[int] = []

    def chunks() -> Iterator[Listed]:
        for start in range(0, 100_000, 100):
            taken.append(start)
            yield Listed(table_of([info(number) for number in range(start, start + 100)]))

    done = HeldKeys(records_of([(number, 0, CLASSIFIED) for number in range(0, 100_000, 2)]))
    batches = NewObjects([done], Partitioned(tmp_path, 2), str(tmp_path)).among(Archive(chunks()))
    assert all(one.size % 2 for one in next(filter(None, batches)))
    assert len(taken) < 10


def test_no_more_partitions_are_joined_at_a_time_than_tasks_run(tmp_path: Path) -> None:
    at_a_time = [0]

    class Counting(Partitioned):
        def start(self, function: Any, *arguments: Any, returns: int = 1) -> Any:
            at_a_time.append(at_a_time[-1] + (function is join.join))
            return super().start(function, *arguments)

        def result(self, started: Any) -> Any:
            at_a_time.append(max(0, at_a_time[-1] - isinstance(started, pa.Table)))
            return super().result(started)

    tasks = Counting(tmp_path, 7)
    tasks.parallel = 2
    done = HeldKeys(records_of([(number, 0, CLASSIFIED) for number in range(100)]))
    new = NewObjects([done], tasks, str(tmp_path))
    assert sum(map(len, new.among(Archive(chunks_of(map(info, range(150))))))) == 50
    assert (max(at_a_time), at_a_time[-1]) == (2, 0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, no listing counts as slow."""
    monkeypatch.setattr("btray.bulk.listing.objects._SECONDS", 600.0)


def test_chunks_of_a_quick_listing_grow(quick: None) -> None:
    sizes = [len(chunk().objects) for chunk in chunks_of(info(number) for number in range(9000))]
    assert sizes == [1024, 2048, 4096, 1832]


def test_what_a_listing_gave_before_it_hangs_is_sealed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("listing.objects._SECONDS", "worklist._LONGEST_WAIT", "listing.new_objects._ROUND_SECONDS"):
        monkeypatch.setattr(f"btray.bulk.{place}", 0.01)
    goes_on = threading.Event()

    def pager() -> Iterator[FileInfo]:
        yield from map(info, range(6))
        assert goes_on.wait(60)
        yield info(6)

    def new_objects() -> tuple[NewObjects, Archive]:
        done = HeldKeys(records_of([(number, 0, CLASSIFIED) for number in range(1, 6, 2)]))
        return NewObjects([done], LocalTasks(tmp_path), str(tmp_path)), Archive(chunks_of(pager()))

    folder = str(tmp_path / "worklist")
    config = ArchiveConfig(input="in", output="out")
    listing = Listing(folder, config, new_objects, lambda objects: objects, PartLimits(), lambda: None)

    def sealed() -> list[int]:
        shards, _ = worklist.sealed_shards(folder)
        return [size for uri in shards for size in worklist.read_shard(uri)["size"].to_pylist()]

    listing.start()
    until(lambda: sealed() == [0, 2, 4], "what was listed")
    assert not goes_on.is_set()
    goes_on.set()
    listing.join()
    assert (listing.complete, listing.error, sealed()) == (True, None, [0, 2, 4, 6])
    assert listing.unchanged == 3


def test_a_listing_that_fails_half_way_is_an_error_of_whoever_takes_its_chunks(quick: None) -> None:
    def pager() -> Iterator[FileInfo]:
        yield from map(info, range(2000))
        raise StorageError("unavailable", "s3://b")

    chunks = chunks_of(pager())
    assert len(next(chunks).objects) == 1024
    with pytest.raises(StorageError):
        list(chunks)


def test_how_long_a_store_is_waited_for_is_said_by_who_takes_the_chunk(quick: None) -> None:
    waits: ContextVar[int] = ContextVar("waits", default=8)
    chunks = chunks_of(FileInfo(f"s3://b/{number}", waits.get(), "e", 0.0) for number in range(3000))
    assert set(next(chunks).objects["size"].to_pylist()) == {8}
    waits.set(300)
    assert set(next(chunks).objects["size"].to_pylist()) == {300}


def test_an_archive_of_nothing_that_counts_is_refused_when_all_of_it_is_listed(tmp_path: Path) -> None:
    class Nothing:
        def require_counted(self, seen: int, counted: int) -> None:
            raise UserError(f"names {seen} objects, of which {counted} count")

    chunks = iter([Listed(table_of([]), seen=2), Listed(table_of([]), seen=3)])
    archive = Archive(chunks, inventory=Nothing())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="names 5 objects, of which 0 count"):
        list(NewObjects([], Partitioned(tmp_path, 2), str(tmp_path)).among(archive))
