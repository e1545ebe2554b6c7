"""Measure how much faster a packed archive is read than its loose objects, from disk and from a SeaweedFS.

python benchmarks/packed.py --data ../data/brain-tumor-mri

Reading only, as in the actors of the classify job: lots of 64 objects, read by 16 threads of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import checkout  # noqa: F401 - makes `tools` importable

from btray import storage
from btray.bulk.archive import Selection, list_archive
from btray.bulk.config import PackConfig
from btray.bulk.pack import pack
from btray.bulk.worker import Prefetcher
from btray.data.scans import ScanLimits
from tools.s3_server import S3Server


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of images")
    data = storage.resolve(parser.parse_args().data)
    with tempfile.TemporaryDirectory(prefix="btray-packed-") as name, S3Server(Path(name, "store")) as server:
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
    print(json.dumps(results, indent=2))


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


if __name__ == "__main__":
    main()
