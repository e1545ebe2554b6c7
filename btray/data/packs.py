"""Packed archives: many small objects as the rows of few Parquet shards, which are read several times faster.

A pack is a folder with `pack.json`, which says from the start what is packed and, once a run has ended, that it is
finished, and `shards/*.parquet` with the columns of SCHEMA. An object that changed has another row; the one of the
latest run counts.

A frame pack holds, instead of each object, the frames that preprocessing makes of it, or why it makes none, in
`frames/KEY/*.parquet` with the columns of FRAMES_SCHEMA. KEY names the preprocessing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from btray import storage
from btray.core.errors import UserError
from btray.data.config import PreprocessConfig
from btray.data.fingerprint import fingerprint_of
from btray.data.key_set import Keys, KeySet, keys_of
from btray.data.preprocess import Frame, preprocessing_key
from btray.data.scans import Scan, SliceInfo
from btray.storage import FileInfo
from btray.storage.packed import member_uri
from btray.storage.parquet import read_undamaged

DESCRIPTION = "pack.json"
FORMAT, FRAMES_FORMAT = 1, 2
SCHEMA = pa.schema(
    [
        pa.field("data", pa.large_binary()),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("error", pa.string()),
        pa.field("retryable", pa.bool_(), nullable=False),
    ]
)
"""Bytes and identifiers of an object; `data` is null if it could not be read. The small columns come after it, so
that they are one read together with the footer."""
FRAMES_SCHEMA = pa.schema(
    [
        *SCHEMA,
        pa.field("frames", pa.int32()),
        pa.field("preprocessing", pa.string()),
        pa.field("scan", pa.string()),
        pa.field("fingerprint", pa.binary()),
        pa.field("slices", pa.string()),
    ]
)
"""The same of an object whose `data` are `frames` frames, uint8 [frames, size, size]: the key of their preprocessing,
the SHA-256 of the object, the fingerprint of the scan, and what its file says of each frame, as JSON; null if nothing.
If the object was read and rejected, `data` is null and `scan` is not."""
SHARDS = "shards"
_FREE_TEXT = ("body_part", "description", "protocol")  # it may name the patient, and serves nothing but --series
_AT_A_TIME = 16  # shards whose footers are read at once
_LISTED = ["uri", "path", "etag", "size", "error_code", "retryable"]


@dataclass(frozen=True)
class Pack:
    """The content of pack.json."""

    root: str
    """The folder that relative URIs, globs and, unless a labelled manifest was packed, paths start from."""
    manifest: str | None
    """Name of the copy of the labelled manifest, if one was packed."""
    preprocess: PreprocessConfig | None = None
    """Settings of preprocessing, if it is a frame pack."""
    preprocessing: str = ""
    """The key of that."""

    @property
    def folder(self) -> str:
        """Folder of the shards, below the pack."""
        return shards_folder(self.preprocessing)

    @property
    def schema(self) -> pa.Schema:
        """Schema of the shards."""
        return FRAMES_SCHEMA if self.preprocess else SCHEMA

    @property
    def content(self) -> str:
        """What it holds, in words."""
        return f"frames of preprocessing {self.preprocessing}" if self.preprocess else "files"


def shards_folder(preprocessing: str) -> str:
    """Return the folder, below the pack, of the shards of frames with this key; of files if it is empty."""
    return f"frames/{preprocessing}" if preprocessing else SHARDS


def write_options(schema: pa.Schema) -> dict[str, Any]:
    """Return the options of pyarrow.parquet.write_table for a shard; pages have checksums, verified when it is read."""
    others = [name for name in schema.names if name != "data"]
    # Scans are compressed already, and frames are to be read as fast as can be.
    compression = {name: "none" if name == "data" else "zstd" for name in schema.names}
    return {
        "compression": compression,
        "use_dictionary": others,
        "write_statistics": others,
        "write_page_checksum": True,
    }


def is_pack(uri: str) -> bool:
    """Return whether `uri` is the folder of a packed archive. Raises StorageError if that cannot be told."""
    return storage.exists(storage.join(uri, DESCRIPTION))


def describe_pack(uri: str, *, unfinished: bool = False) -> Pack:
    """Read pack.json. Raises UserError for one of a newer format, and, unless `unfinished` will do, of such a pack."""
    content = storage.read_json(storage.join(uri, DESCRIPTION))
    if content.get("format_version") not in (FORMAT, FRAMES_FORMAT):
        raise UserError(
            f"{uri} is a packed archive of format {content.get('format_version')}, which this version cannot read; "
            "update btray"
        )
    if not (unfinished or content.get("finished", True)):
        raise UserError(f"{uri} is a pack that is not finished: run jobs/pack.py again, with the same arguments")
    if content["format_version"] == FORMAT:
        return Pack(content["root"], content["manifest"])
    preprocess = PreprocessConfig(**content["preprocess"])
    return Pack(content["root"], content["manifest"], preprocess, content["preprocessing"])


def write_description(uri: str, pack: Pack, *, finished: bool = True) -> None:
    """Write pack.json, which makes `uri` a pack, `finished` or not."""
    content: dict[str, Any] = {"format_version": FORMAT, "root": pack.root, "manifest": pack.manifest}
    if not finished:
        content["finished"] = False
    if pack.preprocess:
        content |= {
            "format_version": FRAMES_FORMAT,  # which btray before frame packs refuses to read
            "preprocess": pack.preprocess.model_dump(mode="json"),
            "preprocessing": pack.preprocessing,
        }
    storage.write_json(storage.join(uri, DESCRIPTION), content)


def require_preprocessing(uri: str, preprocess: PreprocessConfig | None) -> None:
    """Raise UserError if `uri` is a pack of frames that were not made as `preprocess` says; None: files are needed."""
    pack = describe_pack(uri)
    if pack.preprocess is None:
        return
    if preprocess is None:
        raise UserError(f"{uri} is a pack of {pack.content}, and the files themselves are needed; give what was packed")
    if (wanted := preprocessing_key(preprocess)) == pack.preprocessing:
        return
    made, asked = pack.preprocess.model_dump(), preprocess.model_dump()
    differing = ", ".join(
        f"{name} {made[name]} instead of {asked[name]}" for name in asked if made[name] != asked[name]
    )
    raise UserError(
        f"{uri} is a pack of {pack.content}, not of {wanted} ({differing or 'made by other versions of libraries'}); "
        "give what was packed, or pack it anew with jobs/pack.py --frames into another output"
    )


def frames_row(frames: Sequence[Frame], scan: Scan) -> dict[str, Any]:
    """Return the columns data, frames, fingerprint and slices of a scan and its frames."""
    slices = slices_json(scan.slices) if scan.slices else None
    fingerprint = fingerprint_of(scan.frames)
    return {"data": np.stack(frames).tobytes(), "frames": len(frames), "fingerprint": fingerprint, "slices": slices}


def slices_json(slices: Sequence[SliceInfo]) -> str:
    """Return the column slices, without free text, which may name a patient."""
    facts = ({name: value for name, value in asdict(info).items() if value is not None} for info in slices)
    return json.dumps([{name: known[name] for name in known if name not in _FREE_TEXT} for known in facts])


def list_pack(uri: str) -> Iterator[FileInfo]:
    """Yield every object of the pack, once: original URI, size and etag, and its member URI as the place of its bytes.

    Streams; what was listed is kept on disk. Raises StorageError.
    """
    for shard, newest in _newest(uri, describe_pack(uri).folder):
        if newest is None:
            raise UserError(f"{shard} is damaged; run jobs/pack.py again, which packs anew what it held")
        for number, row in newest:
            yield FileInfo(row["uri"], row["size"], row["etag"], 0.0, member_uri(shard, number, row["path"]))


def packed_keys(uri: str, folder: str, damaged: list[str]) -> Iterator[Keys]:
    """Yield keys of the objects that need not be packed again: of those that are listed, all that the store gave.

    The shards lie in `folder`, below the pack. Those that are damaged are added to `damaged`; what they held is to be
    packed again.
    """
    for shard, newest in _newest(uri, folder):
        if newest is None:
            damaged.append(shard)
        else:
            yield keys_of([(row["uri"], row["etag"]) for _, row in newest if not row["retryable"]])


def _newest(uri: str, folder: str) -> Iterator[tuple[str, list[tuple[int, dict[str, Any]]] | None]]:
    """Yield the URI of each shard in `folder`, and numbers and rows of what no later one has; None if it is damaged."""
    with tempfile.TemporaryDirectory() as scratch:
        seen = KeySet(Path(scratch))  # on disk: a pack may hold 10^8 objects
        for shard, rows in _shards(uri, folder):
            if rows is None:
                yield shard, None
                continue
            keys = keys_of([(row["uri"], "") for row in rows])
            newest = ~seen.contains(keys)
            seen.add(keys[newest])
            yield shard, [(number, rows[number]) for number in np.flatnonzero(newest).tolist()]


def _shards(uri: str, below: str) -> Iterator[tuple[str, list[dict[str, Any]] | None]]:
    """Yield URI and rows, without data, of every shard, the latest run's first; None for those of a damaged one."""
    folder = storage.join(uri, below)
    names = storage.list_names(folder, missing_ok=True)
    shards = [storage.join(folder, name) for name in reversed(names) if name.endswith(".parquet") and name[0] != "."]

    def read_rows(shard: str) -> tuple[str, list[dict[str, Any]] | None]:
        def read(file: Any) -> list[dict[str, Any]]:
            return list(pa.parquet.read_table(file, columns=_LISTED).select(_LISTED).to_pylist())

        return shard, read_undamaged(shard, read)

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for start in range(0, len(shards), _AT_A_TIME):  # not all at once: their rows would fill the memory
            yield from pool.map(read_rows, shards[start : start + _AT_A_TIME])
