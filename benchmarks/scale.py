"""Measure the gain of a second node: a bulk job on one Ray node and on two (one core each), and bare processes.

python benchmarks/scale.py --model runs/first --input ../data/brain-tumor-mri/Testing [--rounds 5] [--times 30]
python benchmarks/scale.py --job pack --input ../data/brain-tumor-mri/Testing --times 200

Every round measures, in turn: one and two bare processes, each pinned to its own core (classify: read, decode and
forward pass, nothing written; pack: read and write shards), then the job on a cluster of one node with one CPU, and on
two such nodes, each pinned to a core. Bare processes keep the memory they free, as the job's actors do; otherwise page
faults slow them down, and a second process does not make that worse. The head has no CPU and coordinates, on both
cores. Rates are measured from the first part to the last, without start-up. The goal, in medians: the speed-up from one
node to two is at least 0.9 times that from one bare process to two.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import checkout  # noqa: F401 - makes `tools` importable

from tools.loopback_cluster import LoopbackCluster
from tools.processes import cpu_seconds, until

HERE = Path(__file__).resolve().parent
_IDLE_CORES = 0.15  # busy cores of all nodes together, below which the cluster counts as idle

_BARE = {
    "classify": """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from btray.model.classifier import Classifier
model, paths = sys.argv[1], json.load(sys.stdin)
classifier = Classifier.load(model)
def work(some):
    frames = [classifier.source.from_bytes(Path(path).read_bytes()) for path in some]
    classifier.predict_decoded(frames, some)
work(paths[:64])
started = time.perf_counter()
for start in range(0, len(paths), 64):
    work(paths[start:start + 64])
print(time.perf_counter() - started, flush=True)
""",
    "pack": """
import json, sys, tempfile, time
from collections import defaultdict
from btray.bulk.pack import PartPacker
from btray.data.packs import SCHEMA
from btray.bulk.report import PartTally
from btray.bulk.runs import write_part
from btray.bulk.worker import Prefetcher
from btray.data.scans import ScanLimits
from btray.bulk.config import PackConfig
from btray.storage import describe
paths = json.load(sys.stdin)
reader = Prefetcher(threads=PackConfig.model_fields["threads"].default, patience=10, max_bytes=ScanLimits().max_bytes)
rest = {"etag": "", "error_code": None, "error": None, "retryable": False}
def work(some, uri):
    objects = [describe(path) for path in some]
    rows = [
        {"data": answer, "uri": info.uri, "path": info.uri, "size": info.size} | rest
        for batch, answers in reader.batches(objects, defaultdict(float)) for info, answer in zip(batch, answers)
    ]
    write_part(uri, rows, SCHEMA, PartTally(), **PartPacker.write_options)
with tempfile.TemporaryDirectory() as out:
    work(paths[:64], out + "/warm.parquet")
    started = time.perf_counter()
    for start in range(0, len(paths), 512):
        work(paths[start:start + 512], f"{out}/{start}.parquet")
    print(time.perf_counter() - started, flush=True)
""",
}


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=list(_BARE), default="classify")
    parser.add_argument("--model", help="bundle, for classify")
    parser.add_argument("--input", required=True, help="local folder of scans")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=4, help="how many times one run reads the folder")
    arguments = parser.parse_args()
    if arguments.job == "classify" and not arguments.model:
        parser.error("classify needs --model")
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        parser.error("two cores are needed")
    rates: dict[str, list[float]] = {name: [] for name in ("bare_1", "bare_2", "nodes_1", "nodes_2")}
    with tempfile.TemporaryDirectory(prefix="btray-scale-") as name:
        archive = Path(name, "archive")
        archive.mkdir()
        for number in range(arguments.times):
            (archive / f"{number:03d}").symlink_to(Path(arguments.input).resolve(), target_is_directory=True)
        paths = [str(path) for top in sorted(archive.iterdir()) for path in sorted(top.rglob("*")) if path.is_file()]
        bare(arguments, paths, cores)  # warm-up: gets memory back that the virtual machine had released
        for number in range(arguments.rounds):
            for count in (1, 2):
                os.sync()  # flush, so that earlier output is not written back during the next measurement
                rates[f"bare_{count}"].append(bare(arguments, paths, cores[:count]))
                output = Path(name, f"results{number}-{count}")
                os.sync()
                rates[f"nodes_{count}"].append(on_nodes(arguments, archive, output, cores[:count]))
                shutil.rmtree(output)
            print(json.dumps({key: round(values[-1], 1) for key, values in rates.items()}), file=sys.stderr, flush=True)
    median = {name: statistics.median(values) for name, values in rates.items()}
    bare_gain, node_gain = median["bare_2"] / median["bare_1"], median["nodes_2"] / median["nodes_1"]
    result: dict[str, Any] = {
        "images": len(paths),
        "images_per_s": {name: round(value, 1) for name, value in median.items()},
        "two_bare_processes_over_one": round(bare_gain, 3),
        "two_nodes_over_one": round(node_gain, 3),
        "ratio": round(node_gain / bare_gain, 3),
        "all": {name: [round(value, 1) for value in values] for name, values in rates.items()},
    }
    print(json.dumps(result, indent=2))


def bare(arguments: argparse.Namespace, paths: list[str], cores: list[int]) -> float:
    """Return the images per second of one process per core, which share the paths, without imports and warm-up."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    with ThreadPoolExecutor(len(cores)) as pool:
        seconds = pool.map(
            lambda place: _bare_process(arguments, paths[place :: len(cores)], cores[place], environment),
            range(len(cores)),
        )
        return len(paths) / max(seconds)


def _bare_process(arguments: argparse.Namespace, paths: list[str], core: int, environment: dict[str, str]) -> float:
    command = ["taskset", "--cpu-list", str(core), sys.executable, "-c", _BARE[arguments.job], str(arguments.model)]
    done = subprocess.run(command, input=json.dumps(paths), capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def on_nodes(arguments: argparse.Namespace, archive: Path, output: Path, cores: list[int]) -> float:
    """Return the images per second of the job, first part to last, on a cluster with one node per core."""
    with LoopbackCluster(cpus=0) as cluster:
        for core in cores:
            node = cluster.add(cpus=1)
            for pid in node.pids():
                subprocess.run(["taskset", "--all-tasks", "--cpu-list", "--pid", str(core), str(pid)], check=False,
                               capture_output=True)  # fmt: skip
        until(lambda: _busy(cluster) < _IDLE_CORES, "the nodes' own processes to become idle")
        command = [sys.executable, str(HERE.parent / "jobs" / f"{arguments.job}.py")]
        command += ["--input", str(archive), "--output", str(output)]
        command += ["--model", arguments.model] if arguments.job == "classify" else []
        subprocess.run(command, check=True, capture_output=True, env=cluster.environment_of_jobs())
    (path,) = output.glob("_runs/*/*/run.json")
    return float(json.loads(path.read_text(encoding="utf-8"))["images_per_second"])


def _busy(cluster: LoopbackCluster) -> float:
    """Return how many cores the processes of a cluster keep busy, measured over one second."""
    before = {pid: cpu_seconds(pid) for node in cluster.nodes for pid in node.pids()}
    time.sleep(1)
    return sum(max(0.0, cpu_seconds(pid) - seconds) for pid, seconds in before.items())


if __name__ == "__main__":
    main()
