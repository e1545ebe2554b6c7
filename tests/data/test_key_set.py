"""The set of keys that have been seen: it answers right, and what is old lies on disk."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from btray.data.key_set import KeySet, keys_of, keys_of_columns


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


def test_columns_have_the_digests_of_their_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("btray.data.key_set._AT_A_TIME", 3)
    pairs = [
        ("s3://b/日本", "e"),
        ("", ""),
        ("a\0b", "c"),
        ("a", "b\0c"),
        ("s3://b/\\udcff", "e"),
        *[("x", str(n)) for n in range(9)],
    ]
    columns = (
        pa.chunked_array([column[:5], column[5:]], pa.string()) for column in map(list, zip(*pairs, strict=True))
    )
    assert keys_of_columns(*columns).tolist() == keys_of(pairs).tolist()
