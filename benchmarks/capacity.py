"""Predict how many nodes an archive needs, from the cost of each stage of the classify job.

python benchmarks/capacity.py --model runs/first --input ../data/brain-tumor-mri/Testing   # measure here, then predict
python benchmarks/capacity.py --rates rates.json --scans 10e6 --hours 6                    # predict from a measurement

The stages of one actor run one after the other (reading overlaps with them, and counts only if it is slower), so its
rate is one over the sum of the seconds that an image spends in each. Actors share memory bandwidth, the network and the
object store: the last two are upper limits, and --efficiency accounts for the first. Start-up is counted once.

The stages are measured on one core. So the rate on one core shows what the stages omit, and the rate on two cores,
which does not enter the model, shows whether actors add up as assumed. For GPUs the forward pass is replaced by its
FLOP over the FLOP/s that the device sustains: calculated, not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Assumed, not fitted to the job: half of the speed-up of two bare processes, each on its own core, over one on such a
# machine (two_bare_processes_over_one of scale.py). Measure your own machine and set --efficiency.
DEFAULT_EFFICIENCY = 0.95
_SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The cost of one image."""

    read: float
    """Seconds that an actor waits for bytes; near 0 on a fast store, because reading overlaps with the other stages."""
    decode: float
    """Core-seconds for decoding and preprocessing, from bytes to frame."""
    predict: float
    """Core-seconds for the forward pass and for building rows."""
    write: float
    """Seconds for writing the table."""
    bytes: float
    """Size of the encoded image in bytes."""
    start: float = 25.0
    """Seconds until the first part: Ray, imports, the model."""
    gflop: float = 0.2
    """GFLOP of the forward pass; a multiply-add counts as two."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The nodes and the store that run the job."""

    nodes: int
    cores: int
    """Cores per node."""
    gpus: int = 0
    """GPUs per node; 0: the cores run the network."""
    tflops: float = 0.0
    """TFLOP/s that a GPU sustains on this network; its nominal figure is several times as high."""
    efficiency: float = DEFAULT_EFFICIENCY
    """Share of the sum of the actors' rates that remains when several run on a node."""
    network: float = 1.25e9
    """Bytes per second into a node."""
    store: float = 40e9
    """Bytes per second that the object store delivers to all nodes together."""
    store_requests: float = 5500.0
    """GETs per second that the store serves: S3's figure for one prefix."""


@dataclass(frozen=True)
class Prediction:
    """A throughput in images per second, and its limiting factor."""

    rate: float
    limit: str
    ceilings: Mapping[str, float]

    def hours(self, scans: float, rates: Rates) -> float:
        """Return the hours for `scans` images, including start-up."""
        return (rates.start + scans / self.rate) / _SECONDS_PER_HOUR


def predict(rates: Rates, cluster: Cluster) -> Prediction:
    """Predict the throughput of the classify job on a cluster."""
    cores = cluster.nodes * cluster.cores * (cluster.efficiency if cluster.cores > 1 else 1.0)
    if cluster.gpus:
        device = cluster.nodes * cluster.gpus * cluster.tflops * 1e3 / rates.gflop
        feeding = cores / rates.decode
        work = {"GPUs": device, "cores that decode for them": feeding}
    else:
        each = rates.read + rates.decode + rates.predict + rates.write
        work = {"cores": cores / each}
    ceilings = work | {
        "network of the nodes": cluster.nodes * cluster.network / rates.bytes,
        "object store, bytes": cluster.store / rates.bytes,
        "object store, requests": cluster.store_requests,
    }
    limit = min(ceilings, key=lambda name: ceilings[name])
    return Prediction(ceilings[limit], limit, ceilings)


def nodes_for(rates: Rates, one: Cluster, scans: float, hours: float) -> int | None:
    """Return the fewest nodes like `one` that finish in `hours`; None if the object store limits them to less."""
    required = scans / max(1e-9, hours * _SECONDS_PER_HOUR - rates.start)
    shared = min(one.store / rates.bytes, one.store_requests)
    if required > shared:
        return None
    single = predict(rates, Cluster(**{**vars(one), "nodes": 1, "store": math.inf, "store_requests": math.inf}))
    return math.ceil(required / single.rate)


# ---- measuring


def measure(model: str, source: str, cores: int, times: int) -> dict[str, Any]:
    """Run the classify job on `cores` cores over `source`, linked `times` times; return its run.json."""
    with tempfile.TemporaryDirectory(prefix="btray-capacity-") as name:
        archive = Path(name, "archive")
        for number in range(times):
            archive.mkdir(exist_ok=True)
            (archive / f"{number:03d}").symlink_to(Path(source).resolve(), target_is_directory=True)
        command = ["taskset", "--cpu-list", ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))]
        command += [sys.executable, str(HERE.parent / "jobs" / "classify.py"), "--model", model]
        command += ["--input", str(archive), "--output", str(Path(name, "results"))]
        environment = os.environ | {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
        environment["PYTHONPATH"] = str(HERE.parent)
        subprocess.run([*command, "--actors", str(cores)], check=True, capture_output=True, env=environment)
        (path,) = Path(name, "results", "_runs").glob("*/*/run.json")
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return report


def rates_of(report: Mapping[str, Any], gflop: float) -> Rates:
    """Return the cost of one image in a run, from its run.json."""
    images = report["objects"] - report["taken_from_earlier_attempt"]
    stages = {stage: seconds / images for stage, seconds in report["seconds_by_stage"].items()}
    size = report["bytes"] / report["objects"]
    return Rates(**stages, bytes=size, start=report["seconds_to_first_part"], gflop=gflop)


def main() -> None:
    """Measure or load the rates, predict, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="bundle to measure with")
    parser.add_argument("--input", help="local folder of scans to measure on")
    parser.add_argument("--times", type=int, default=4, help="how many times one run reads the folder")
    parser.add_argument("--rates", help="JSON of an earlier measurement, instead of a new one")
    parser.add_argument("--scans", type=float, default=10e6)
    parser.add_argument("--hours", type=float, default=6.0)
    parser.add_argument("--cores", type=int, default=16, help="cores per node")
    parser.add_argument(
        "--efficiency",
        type=float,
        default=DEFAULT_EFFICIENCY,
        help="share of their summed rates that cores reach together",
    )
    parser.add_argument(
        "--tflops", type=float, default=8.0, help="TFLOP/s that a GPU sustains, for the calculated GPU plan"
    )
    arguments = parser.parse_args()
    if arguments.rates:
        costs = json.loads(Path(arguments.rates).read_text(encoding="utf-8"))
        checked: dict[str, Any] = {"taken from": arguments.rates}
    else:
        costs, checked = _measured(parser, arguments)
    rates = Rates(**costs)
    cpu = Cluster(nodes=1, cores=arguments.cores, efficiency=arguments.efficiency)
    gpu = Cluster(nodes=1, cores=8, gpus=1, tflops=arguments.tflops, efficiency=arguments.efficiency)
    plan = {}
    for name, one in (("cpu", cpu), ("gpu_on_paper", gpu)):
        nodes = nodes_for(rates, one, arguments.scans, arguments.hours)
        whole = predict(rates, Cluster(**{**vars(one), "nodes": nodes or 1}))
        plan[name] = {
            "nodes": nodes,
            "images_per_s": round(whole.rate, 1),
            "limited_by": whole.limit,
            "hours": round(whole.hours(arguments.scans, rates), 2),
            "network_gbit_per_s": round(whole.rate * rates.bytes * 8 / 1e9, 2),
            "get_requests_per_s": round(whole.rate, 1),
        }
    print(json.dumps({"rates": vars(rates), "check": checked, "plan": plan}, indent=2))


def _measured(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure the rates on one core; return them and how well they predict one core and two."""
    if not arguments.model or not arguments.input:
        parser.error("give --model and --input to measure, or --rates")
    from btray.model.bundle import load_bundle
    from btray.model.network import count_flops

    bundle = load_bundle(arguments.model)
    gflop = count_flops(bundle.network(), bundle.manifest.preprocess.size) / 1e9
    reports = {cores: measure(arguments.model, arguments.input, cores, arguments.times) for cores in (1, 2)}
    rates = rates_of(reports[1], gflop)
    check = {}
    for cores, report in reports.items():
        one = Cluster(nodes=1, cores=cores, efficiency=arguments.efficiency, store=math.inf, store_requests=math.inf)
        predicted = predict(rates, one).rate
        measured = report["images_per_second"]
        check[f"{cores} cores"] = {
            "measured_images_per_s": measured,
            "predicted_images_per_s": round(predicted, 1),
            "predicted_over_measured": round(predicted / measured, 3),
        }
    return vars(rates), check


if __name__ == "__main__":
    main()
