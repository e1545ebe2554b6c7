"""The files that the parts of a run become: each is Parquet, written by one put that fails where it is there.

What an actor counted of its part stands in the footer, so that a run that is taken up need not count again.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from btray import storage

_TALLY = b"btray_tally"


@dataclass(frozen=True, kw_only=True)
class Product:
    """What the parts of a run become."""

    folder: Callable[[str], str]
    """From the day a run began (YYYY-MM-DD, UTC) to the folder of its files, below the output."""
    schema: pa.Schema
    part_objects: int
    """Most objects in a part."""


def write_part(
    uri: str,
    rows: Sequence[Mapping[str, Any]],
    schema: pa.Schema,
    tally: Mapping[str, Any],
    **options: Any,
) -> bool:
    """Write one file, with `tally` in its footer, by one put; False where it is there already. Raises StorageError.

    `options` are those of pyarrow.parquet.write_table.
    """
    table = pa.Table.from_pylist(list(rows), schema=schema.with_metadata({_TALLY: json.dumps(tally).encode()}))
    body = io.BytesIO()
    pa.parquet.write_table(table, body, **{"compression": "zstd", **options})
    return storage.write_new(uri, body.getvalue())


def read_tally(uri: str) -> dict[str, Any] | None:
    """What `write_part` put into the footer of a file; None where there is no such file. Raises StorageError."""
    filesystem, path = storage.arrow_filesystem(uri)
    with storage.suppress_missing():
        storage.describe(uri)
        with storage.storage_errors_for(uri), filesystem.open_input_file(path) as file:
            metadata = pa.parquet.read_metadata(file).metadata
        tally: dict[str, Any] = json.loads(metadata[_TALLY])
        return tally
    return None
