"""Measure how much faster a packed archive is read than its loose objects, and frames than files.

python benchmarks/packed.py --data ../data/brain-tumor-mri
python benchmarks/packed.py --data ../data/brain-tumor-mri --feed 16384

Reading only, as in the actors of the classify job, from disk and from a SeaweedFS: lots of 64 objects, read by 16
threads of one process. With --feed so many images, links to those of `data`, are streamed as training does, and nothing
is trained: images per CPU second of all processes that take part, Ray's own too, for loose files and for a frame pack
of them by turns, and the median of three epochs each.
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

from btray import storage
from btray.bulk.archive import Selection, list_archive
from btray.bulk.config import PackConfig
from btray.bulk.pack import pack
from btray.bulk.worker import Prefetcher
from btray.data.labelled import read_labelled
from btray.data.scans import ScanLimits
from tools.processes import cpu_seconds, descendants
from tools.s3_server import S3Server

_EPOCHS = 3


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of images, labelled for --feed")
    parser.add_argument("--feed", type=int, metavar="IMAGES", help="stream so many images, and measure nothing else")
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
    """Return the images per CPU second that streamed training is fed with, and how often that is more for frames."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from btray.core.cluster import connected
    from btray.training.config import TrainConfig
    from btray.training.feeding.stream import StreamFeed
    from btray.training.prepare import prepare, read_source

    rows = read_labelled(data).to_pylist()
    rows = [row for row in rows if row["split"] != "test"]
    for number in range(images):
        row = rows[number % len(rows)]
        link = Path(name, "loose", "val" if number % 64 == 0 else "train", row["label"], f"{number}.jpg")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(row["uri"])
    sources = {"loose": f"{name}/loose", "frames": f"{name}/frames"}
    rates: dict[str, list[float]] = {kind: [] for kind in sources}

    def measure(settings: dict[str, Any]) -> None:
        feed = StreamFeed(settings["plan"])
        for epoch in settings["epochs"]:
            before = _cpu_seconds()
            fed = sum(len(batch.labels) for batch in feed.train(epoch))
            rates[settings["kind"]].append(fed / (_cpu_seconds() - before))

    with connected(dashboard=True):
        pack(PackConfig(input=sources["loose"], output=sources["frames"], frames=True))
        prepared = {
            kind: prepare(read_source(TrainConfig(data=uri, out=f"{name}/out-{kind}", cache_gb=0)))
            for kind, uri in sources.items()
        }
        for epoch in range(_EPOCHS):
            for kind, data_of_kind in prepared.items():
                settings = {"plan": data_of_kind.plan, "kind": kind, "epochs": [epoch]}
                TorchTrainer(
                    measure,
                    train_loop_config=settings,
                    scaling_config=ray.train.ScalingConfig(num_workers=0),
                    datasets=data_of_kind.datasets(),
                ).fit()
    medians = {f"{kind}_images_per_cpu_s": statistics.median(values) for kind, values in rates.items()}
    loose, frames = medians.values()
    return {**medians, "ratio": frames / loose, "all": rates}


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and all that it has started."""
    return time.process_time() + sum(map(cpu_seconds, descendants(os.getpid())))


if __name__ == "__main__":
    main()
