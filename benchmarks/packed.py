"""Measure how much faster a packed archive is read than its loose objects, and frames than files.

python benchmarks/packed.py --data ../data/brain-tumor-mri
python benchmarks/packed.py --data ../data/brain-tumor-mri --feed 512

Reading only, as in the actors of the classify job, from disk and from a SeaweedFS: lots of 64 objects, read by 16
threads of one process. With --feed it measures what streamed training does with so many images before they reach the
network: read, decode, preprocess, and hold back for shuffling, in one process and without Ray. CPU time per image of
loose files and of a frame pack of them, by turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import checkout  # noqa: F401 - makes `tools` importable
import numpy as np

from btray import storage
from btray.bulk.config import PackConfig
from btray.bulk.listing.archive import list_archive
from btray.bulk.listing.selection import Selection
from btray.bulk.pack import pack
from btray.bulk.worker import Prefetcher
from btray.data.config import PreprocessConfig
from btray.data.frames import FrameSource
from btray.data.labelled import read_labelled
from btray.data.scans import ScanLimits
from btray.storage import packed
from btray.training.feeding.stream import FramePool
from btray.training.feeds import stream_block
from tools.s3_server import S3Server

_ROUNDS = 6


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of images, labelled for --feed")
    parser.add_argument("--feed", type=int, metavar="IMAGES", help="feed so many images, and measure nothing else")
    arguments = parser.parse_args()
    data = storage.resolve(arguments.data)
    with tempfile.TemporaryDirectory(prefix="btray-packed-") as name:
        results = _fed(data, arguments.feed, name) if arguments.feed else _read(data, name)
    print(json.dumps(results, indent=2))


def _read(data: str, name: str) -> dict[str, Any]:
    """Return the objects read per second, loose and packed, by place."""
    with S3Server(Path(name, "store")) as server:
        os.environ.update(server.environment_over(dict(os.environ)))
        storage.reconnect()
        server.make_bucket("archive")
        for info in storage.list_files(data):
            storage.write_bytes("s3://archive/loose" + info.uri.removeprefix(data), storage.read_bytes(info.uri))
        results = {}
        for place, loose, packed in (
            ("disk", data, f"{name}/packed"),
            ("s3", "s3://archive/loose", "s3://archive/packed"),
        ):
            pack(PackConfig(input=loose, output=packed))
            rates = {"loose": _rate(loose), "packed": _rate(packed)}
            results[place] = rates | {"ratio": rates["packed"] / rates["loose"]}
    return results


def _rate(uri: str) -> float:
    """Return the objects read per second, without the listing."""
    objects = list(list_archive(uri, Selection()))
    reader = Prefetcher(threads=16, patience=10, max_bytes=ScanLimits().max_bytes)
    started = time.perf_counter()
    read = [answer for _, answers in reader.batches(objects, {"read": 0.0}) for answer in answers]
    seconds = time.perf_counter() - started
    if not all(isinstance(answer, bytes) for answer in read):
        raise RuntimeError(f"{uri}: not everything could be read")
    return len(read) / seconds


def _fed(data: str, images: int, name: str) -> dict[str, Any]:
    """Return what an image costs, loose and in a pack of frames."""
    links = Path(name, "loose")
    links.mkdir()
    for number, uri in enumerate(read_labelled(data)["uri"].to_pylist()[:images]):
        (links / f"{number}.jpg").symlink_to(uri)
    shards = pack(PackConfig(input=str(links), output=f"{name}/frames", frames=True))
    preprocess = PreprocessConfig()
    uris = {
        "loose": [info.uri for info in storage.list_files(str(links))],
        "frames": [info.place for info in list_archive(shards, Selection(), preprocess=preprocess)],
    }
    milliseconds: dict[str, list[float]] = {kind: [] for kind in uris}
    for _ in range(_ROUNDS):
        for kind, names in uris.items():
            milliseconds[kind].append(_feed(names, FrameSource(preprocess)))
    loose, frames = (statistics.median(values) for values in milliseconds.values())
    return {"loose_ms": loose, "frames_ms": frames, "ratio": loose / frames, "all": milliseconds}


def _feed(uris: list[str], source: FrameSource) -> float:
    """Return the CPU milliseconds per image."""
    packed._load_shard.cache_clear()
    batch = {"row": np.arange(len(uris)), "uri": np.array(uris, object)}
    pool, started, count = FramePool(len(uris), source.preprocess.size), time.process_time(), 0
    for block in stream_block(batch, source):
        pool.put(np.arange(count, count + len(block["frame"])), block["frame"])
        count += len(block["frame"])
    for start in range(0, count, 64):
        pool.take(np.arange(start, min(start + 64, count)))
    return (time.process_time() - started) / count * 1e3


if __name__ == "__main__":
    main()
