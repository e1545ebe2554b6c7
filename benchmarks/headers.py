"""Measure what `--series` reads to choose: bytes, requests and seconds per 1,000 DICOM instances on a SeaweedFS.

python benchmarks/headers.py --instances 200

The instances have 1024 x 1024 pixels of 16 bits, 2 MB, and headers of 2 kB, every tenth of 100 kB. They are read by 16
threads of one process, once by their headers and once whole, as in the actors of the classify job.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import checkout  # noqa: F401 - makes `tools` importable
import numpy as np

from btray import storage
from btray.bulk.clinical import headers
from btray.bulk.clinical.headers import HeaderReader
from btray.bulk.clinical.series import SeriesFilter
from btray.bulk.listing.archive import list_archive
from btray.bulk.listing.selection import Selection
from btray.bulk.worker import Prefetcher
from btray.data.scans import ScanLimits, SliceInfo
from tools.s3_server import S3Server

_THREADS = 16
_SIDE = 1024


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=200)
    count = parser.parse_args().instances
    with tempfile.TemporaryDirectory(prefix="btray-headers-") as name, S3Server(Path(name, "store")) as server:
        os.environ.update(server.environment_over(dict(os.environ)))
        storage.reconnect()
        server.make_bucket("archive")
        for number in range(count):
            storage.write_bytes(f"s3://archive/{number:05d}", _instance(100_000 if number % 10 == 0 else 0))
        objects = list(list_archive("s3://archive", Selection()))
        reads = _counted_reads()
        choice = SeriesFilter.parse(["plane=axial"])
        assert choice is not None  # noqa: S101
        reader = HeaderReader(choice, threads=_THREADS, patience=10)
        found: list[headers.Header] = []
        by_header = _timed(lambda: found.extend(reader.read(objects)), count)
        if not all(isinstance(header, SliceInfo) for header in found):
            raise RuntimeError("not every header could be read")
        whole = Prefetcher(threads=_THREADS, patience=10, max_bytes=ScanLimits().max_bytes)
        by_bytes = _timed(lambda: [len(some) for some, _ in whole.batches(objects, {"read": 0.0})], count)
    per_thousand = 1000 / count
    results = {
        "headers": by_header | {"megabytes": sum(reads) / 1e6 * per_thousand, "requests": len(reads) * per_thousand},
        "whole": by_bytes | {"megabytes": sum(info.size for info in objects) / 1e6 * per_thousand},
    }
    print(json.dumps(results, indent=2))


def _instance(private: int) -> bytes:
    """Return a DICOM instance whose header has a private element of so many bytes."""

    def element(group: int, number: int, vr: bytes, value: bytes) -> bytes:
        value += bytes(len(value) % 2)
        size = struct.pack("<HI", 0, len(value)) if vr in (b"OB", b"OW") else struct.pack("<H", len(value))
        return struct.pack("<HH2s", group, number, vr) + size + value

    pixels = np.random.default_rng(private).integers(0, 4096, (_SIDE, _SIDE)).astype("<u2")
    side, bits = struct.pack("<H", _SIDE), struct.pack("<H", 16)
    return bytes(128) + b"DICM" + b"".join(
        element(*fields)
        for fields in (
            (0x0002, 0x0010, b"UI", b"1.2.840.10008.1.2.1"),
            (0x0008, 0x0016, b"UI", b"1.2.840.10008.5.1.4.1.1.4"),
            (0x0008, 0x0060, b"CS", b"MR"),
            (0x0009, 0x0010, b"LO", b"BENCHMARK"),
            (0x0009, 0x1001, b"OB", bytes(private)),
            (0x0020, 0x0037, b"DS", b"1\\0\\0\\0\\1\\0"),
            (0x0028, 0x0002, b"US", struct.pack("<H", 1)),
            (0x0028, 0x0004, b"CS", b"MONOCHROME2"),
            (0x0028, 0x0010, b"US", side),
            (0x0028, 0x0011, b"US", side),
            (0x0028, 0x0100, b"US", bits),
            (0x0028, 0x0101, b"US", bits),
            (0x0028, 0x0103, b"US", bytes(2)),
            (0x7FE0, 0x0010, b"OW", pixels.tobytes()),
        )
    )  # fmt: skip


def _counted_reads() -> list[int]:
    """Return a list that grows by the bytes of each range that is read."""
    reads: list[int] = []
    read = headers.read_range

    def counted(uri: str, start: int, end: int) -> bytes:
        data = read(uri, start, end)
        reads.append(len(data))
        return data

    headers.read_range = counted
    return reads


def _timed(work: Any, count: int) -> dict[str, float]:
    """Return wall and CPU seconds per 1,000 instances."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    scale = 1000 / count
    return {"seconds": (time.perf_counter() - wall) * scale, "cpu_seconds": (time.process_time() - cpu) * scale}


if __name__ == "__main__":
    main()
