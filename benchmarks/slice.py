"""Measure the CPU time that a slice costs by stage, beside that in another checkout of btray, in turn on one core.

python benchmarks/slice.py --data ../shared/data/brain-tumor-mri [--baseline CHECKOUT] [--images 512] [--rounds 9]

Stages are those of the classify job: decode, preprocess, forward (float32 and, if the CPU has it, bf16) and rows (the
answers, their rows, and the Parquet file of a part). Network and frames are those of benchmarks/predict.py, whatever
the defaults are; weights are random. Each figure is the median of the rounds, in CPU milliseconds per slice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from predict import CLASSES, NETWORK, PREPROCESS

HERE = Path(__file__).resolve()
LOT = 64  # slices that the job reads at a time
STAGES = ("decode", "preprocess", "forward", "rows")
Seconds = dict[str, float]


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of JPEG slices")
    parser.add_argument("--baseline", help="another checkout of btray, which may be as old as the first release")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", help=argparse.SUPPRESS)  # this process is one that measures
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.data, arguments.images)
        return
    root = HERE.parent.parent
    workers = {"float32": _started(root, "float32", arguments), "bf16": _started(root, "bf16", arguments)}
    if arguments.baseline:
        workers["baseline"] = _started(Path(arguments.baseline).resolve(), "float32", arguments)
    rounds: dict[str, list[Seconds]] = {name: [] for name, process in workers.items() if _answer(process) == "ready"}
    for _ in range(arguments.rounds):
        for name, measured in rounds.items():
            _line(workers[name])
            measured.append(json.loads(_answer(workers[name])))
    for process in workers.values():
        process.communicate()
    shown: dict[str, Any] = {
        name: {stage: round(float(np.median([seconds[stage] for seconds in measured])), 3) for stage in STAGES}
        for name, measured in rounds.items()
    }
    for stages in shown.values():
        stages["slice"] = round(sum(stages.values()), 3)
    if "baseline" in shown:
        before = shown["baseline"]["slice"]
        shown["ratios"] = {name: round(shown[name]["slice"] / before, 3) for name in shown if name != "baseline"}
    print(json.dumps({"CPU ms per slice": shown}, indent=2))


def _started(root: Path, precision: str, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE), "--work", precision, "--data", str(Path(arguments.data).resolve())]
    return subprocess.Popen(
        [*command, "--images", str(arguments.images)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _line(process: subprocess.Popen[str]) -> None:
    if process.stdin is not None:
        print("again", file=process.stdin, flush=True)


def _answer(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().strip() if process.stdout is not None else ""


# ---- in a process of one checkout


def work(precision: str, data: str, images: int) -> None:
    """Measure the stages once for each line of standard input, and print milliseconds per slice."""
    found = sorted(path for path in Path(data).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    slices = [path.read_bytes() for path in found[:: max(1, len(found) // images)][:images]]
    _module("core.allocator", "allocator").keep_freed_memory()
    classifier = _classifier(precision)
    with tempfile.TemporaryDirectory(prefix="btray-slice-") as folder:
        _measured(classifier, slices[:LOT], f"{folder}/warm.parquet")
        print("ready", flush=True)
        for number, _ in enumerate(sys.stdin):
            seconds = _measured(classifier, slices, f"{folder}/{number}.parquet")
            print(json.dumps({stage: 1000 * spent / len(slices) for stage, spent in seconds.items()}), flush=True)


def _module(*names: str) -> ModuleType:
    """Import the first of `names` below btray that there is: modules have moved since the first release."""
    for name in names:
        try:
            return import_module(f"btray.{name}")
        except ModuleNotFoundError as error:
            missing = error
    raise missing


def _classifier(precision: str) -> Any:
    """Return the classifier of an actor of the job, with random weights."""
    import torch

    torch.manual_seed(0)
    config = _module("model.config", "settings").NetworkConfig(**NETWORK)
    network = _module("model.network", "network").build_network(config, len(CLASSES)).eval()
    with torch.inference_mode():
        _, features = network.with_summary(torch.randn(256, 1, PREPROCESS["size"], PREPROCESS["size"]))
    bundles = _module("model.bundle", "bundle")
    data = dict.fromkeys(["uri", "fingerprint", "on_leak"], "") | {"counts": {}, "leak": {}, "patient_ids": False}
    data |= dict.fromkeys(["rejected", "epochs", "best_epoch", "refit_epochs"], 0)
    bundle = bundles.make_bundle(
        weights=network.state_dict(),
        classes=CLASSES,
        network=config,
        preprocess=_module("data.config", "settings").PreprocessConfig(**PREPROCESS),
        temperature=1.0,
        training={},
        data=bundles.TrainedOn(**data) if hasattr(bundles, "TrainedOn") else data,
        created_at="2026-01-01T00:00:00+00:00",
        thresholds=bundles.Thresholds(ood_score=2.0),
        ood=_module("model.ood", "ood").Distribution.fit(features.numpy()),
    )
    options = {} if precision == "float32" else {"precision": precision}
    return _module("model.classifier", "classifier").Classifier(bundle, device="cpu", engine="frozen", **options)


def _measured(classifier: Any, slices: Sequence[bytes], uri: str) -> Seconds:
    """Classify `slices` as the job does, and write their rows to `uri`; return CPU seconds by stage."""
    storage, source = import_module("btray.storage"), classifier.source
    decode = getattr(source, "decode", None) or source.decoded
    results, runs = _module("bulk.table", "results"), _module("bulk.runs", "part_files")
    seconds: Seconds = defaultdict(float)
    answer = type(classifier).answer.__get__(classifier)

    def timed_answer(frames: Any) -> Any:
        with _timed(seconds, "forward"):
            return answer(frames)

    classifier.answer = timed_answer
    rows: list[dict[str, Any]] = []
    for start in range(0, len(slices), LOT):
        lot = slices[start : start + LOT]
        uris = [f"s3://bucket/{start + number:07d}.jpg" for number in range(len(lot))]
        infos = [storage.FileInfo(name, len(data), "e", 0.0) for name, data in zip(uris, lot, strict=True)]
        with _timed(seconds, "decode"):
            scans = [decode(data) for data in lot]
        with _timed(seconds, "preprocess"):
            frames = [source.frames_of(scan) for scan in scans]
        with _timed(seconds, "rows"):
            rows += _rows(classifier, results, infos, frames)
    tally = runs.PartTally() if hasattr(runs, "PartTally") else {}
    with _timed(seconds, "rows"):
        runs.write_part(uri, rows, results.SCHEMA, tally)
    seconds["rows"] -= seconds["forward"]  # which it holds
    return seconds


def _rows(classifier: Any, results: ModuleType, infos: Sequence[Any], frames: Sequence[Any]) -> list[dict[str, Any]]:
    now = datetime.now(UTC)
    rows = []
    for prediction in classifier.predict_decoded(frames, [info.uri for info in infos]):
        row = results.row_of(prediction, infos[prediction.index], run_id="run", classified_at=now)
        if results.__name__ == "btray.bulk.table":  # the first release told no equal pictures
            row["picture"] = hashlib.sha256(frames[prediction.index][prediction.frame].tobytes()).hexdigest()
        rows.append(row)
    return rows


@contextmanager
def _timed(seconds: Seconds, stage: str) -> Iterator[None]:
    started = time.process_time()
    yield
    seconds[stage] += time.process_time() - started


if __name__ == "__main__":
    main()
