"""Pieces of a file or object are those bytes, wherever they end."""

from __future__ import annotations

import pytest

from btray import storage
from btray.storage import StorageError
from btray.storage.ranges import read_range


def test_a_piece_has_the_bytes_that_are_there(place: str) -> None:
    body = bytes(range(256)) * 10
    for name in ("plain", "with space & %41.dcm"):
        uri = storage.join(place, name)
        storage.write_bytes(uri, body)
        for start, end in ((0, 10), (100, 2560), (2000, 99_999), (2560, 5000), (9999, 10_000)):
            assert read_range(uri, start, end) == body[start:end], (name, start, end)
    storage.write_bytes(storage.join(place, "empty"), b"")
    assert read_range(storage.join(place, "empty"), 0, 10) == b""
    with pytest.raises(StorageError) as caught:
        read_range(storage.join(place, "absent"), 0, 10)
    assert caught.value.code == "not_found"
