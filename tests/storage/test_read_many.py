"""Many objects are read at once: in their order, without waking threads for nothing, and patient with a store."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from btray import storage
from btray.storage import StorageError
from btray.storage import read_many as reading
from btray.storage.read_many import read_many, read_patiently


@pytest.mark.parametrize(("seconds", "waited_for"), [(0.0, False), (0.01, True)])
def test_threads_are_woken_only_for_files_that_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, waited_for: bool
) -> None:
    uris = [str(tmp_path / f"{number}.bin") for number in range(60)]
    for uri in uris:
        storage.write_bytes(uri, uri.encode())
    threads = set()
    read_bytes = storage.read_bytes

    def watched(uri: str, **options: Any) -> bytes:
        threads.add(threading.get_ident())
        time.sleep(seconds)
        return read_bytes(uri, **options)

    monkeypatch.setattr(storage, "read_bytes", watched)
    monkeypatch.setattr(reading, "_QUICK", 0.005)  # a noisy machine is not a slow disk
    assert read_many(uris, threads=8) == [uri.encode() for uri in uris]
    assert (len(threads) > 1) == waited_for


def test_a_store_that_is_away_costs_time_and_a_broken_object_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("btray.storage.read_many._PAUSE", 0.01)
    up_at = time.monotonic() + 0.3
    monkeypatch.setattr("btray.storage.read_many._store_answers", lambda uri: time.monotonic() > up_at)

    def read(uris: Any) -> list[Any]:
        down = time.monotonic() < up_at
        return [StorageError("unavailable", uri) if down or uri == "s3://b/broken" else uri.encode() for uri in uris]

    answers = read_patiently(["s3://b/1", "s3://b/2"], read, 60)
    assert answers == [b"s3://b/1", b"s3://b/2"]
    started = time.monotonic()
    answers = read_patiently(["s3://b/1", "s3://b/broken"], read, 60)
    assert answers[0] == b"s3://b/1"
    assert isinstance(answers[1], StorageError)
    assert time.monotonic() - started < 1
    up_at = time.monotonic() + 600
    started = time.monotonic()
    assert all(isinstance(answer, StorageError) for answer in read_patiently(["s3://b/1"], read, 0.2))
    assert 0.2 < time.monotonic() - started < 5


def test_a_store_that_refuses_all_is_waited_for_and_one_that_refuses_a_few_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("btray.storage.read_many._PAUSE", 0.001)
    rounds = iter(range(1000))
    refusing = 20

    def read(uris: Any) -> list[Any]:
        refuses = next(rounds) < refusing
        return [StorageError("throttled", uri) if refuses or uri == "s3://b/hot" else uri.encode() for uri in uris]

    for listing_answers in (False, True):  # a store may refuse to be read while it can be listed
        rounds, left = iter(range(1000)), iter([listing_answers] * refusing)
        monkeypatch.setattr("btray.storage.read_many._store_answers", lambda uri: next(left, True))  # noqa: B023
        assert read_patiently(["s3://b/1", "s3://b/2"], read, 60) == [b"s3://b/1", b"s3://b/2"]
    rounds = iter(range(refusing, 1000))
    answers = read_patiently(["s3://b/1", "s3://b/hot"], read, 60)
    assert answers[0] == b"s3://b/1"
    assert isinstance(answers[1], StorageError)
    assert next(rounds) == refusing + 2, "an object that is refused while others are read is asked for once more"
