"""Searches all that jobs write, Ray's logs too, for what must not stand there."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import ray

Text = tuple[str, str]
"""Where something stands, and what."""


def written(*folders: str | Path) -> Iterator[Text]:
    """Yield what stands in every file below some folders, tables and worklists as they are read."""
    for folder in folders:
        for path in filter(Path.is_file, Path(folder).rglob("*")):
            body = path.read_bytes()
            rows = str(pq.read_table(path).to_pylist()) if body[:4] == b"PAR1" else ""
            yield str(path), body.decode("latin-1") + rows


def ray_logs(before: Iterable[Text] = ()) -> list[Text]:
    """Return all that Ray has logged in this session, without what it had `before`: other tests name what they like."""
    logs = list(written(os.path.join(ray._private.worker._global_node.get_session_dir_path(), "logs")))
    assert len(logs) > 5
    known = {place: len(text) for place, text in before}
    return [(place, text[known.get(place, 0) :]) for place, text in logs]


def found_in(texts: Iterable[Text], secrets: Collection[str]) -> set[Text]:
    """Return which of `secrets` stand where."""
    return {(place, secret) for place, text in texts for secret in secrets if secret in text}
