"""Compare two processes that loop `Classifier.predict` with two that run the loop that one would write by hand.

python benchmarks/predict.py --data ../shared/data/brain-tumor-mri [--images 3000] [--repeats 5] [--model BUNDLE]

The loop by hand: Pillow's `draft`, a resize to 160 pixels, the same network as it was trained, batches of 64; it
neither crops, nor notices damage, nor tells what is out of distribution. The network (0.2 GFLOP) and the frames are
those of the table below, whatever btray's defaults become; weights are random. The pipelines take turns. `ratio` is
that of images per second with both processes busy, for an otherwise idle machine, and `ratio_of_cpu` that of CPU time
per image. --model is measured beside them, with its own network and frames.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

NETWORK: dict[str, Any] = {
    "architecture": "cnn", "stem_width": 24, "stem_stride": 2, "widths": (32, 64, 96, 144), "depths": (1, 1, 2, 2),
    "kernel": 3, "first_stride": 2, "norm": "batch", "activation": "relu", "residual": True, "squeeze_excite": 0.25,
    "pooling": "average_max", "dropout": 0.3,
}  # fmt: skip
PREPROCESS: dict[str, Any] = {
    "size": 160, "crop": True, "margin": 0.02, "low_percentile": 0.5, "high_percentile": 99.5
}  # fmt: skip
CLASSES = ("glioma", "meningioma", "pituitary", "metastasis", "no_tumor")
PROCESSES = 2
BATCH = 64

Work = Callable[[Sequence[str]], int]
"""Classifies files and returns how many have an answer."""
_work: Work
_barrier: Any


def main() -> None:
    """Measure and print one JSON object."""
    import checkout  # noqa: F401 - not for who imports the tables from here, which may measure another checkout

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of JPEG slices")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", help="a bundle that is measured too")
    arguments = parser.parse_args()
    found = sorted(str(path) for path in Path(arguments.data).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    paths = list(islice(cycle(found), arguments.images // BATCH * BATCH))
    names = ["plain", "predict", *(["model"] if arguments.model else [])]
    context = get_context("spawn")
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="btray-predict-") as folder, ExitStack() as stack:
        write_bundle(folder)
        models = {"plain": None, "predict": folder, "model": arguments.model}
        # Processes of their own for each, since what one sets in a process holds for the others too.
        pools = {
            name: stack.enter_context(
                ProcessPoolExecutor(PROCESSES, context, _begin, (models[name], context.Barrier(PROCESSES)))
            )
            for name in names
        }
        for _ in range(arguments.repeats):
            for name in names:
                shares = [paths[number::PROCESSES] for number in range(PROCESSES)]
                done = list(pools[name].map(_run, shares))
                wall = max(end for _, end, _ in done) - min(start for start, _, _ in done)
                results[name].append((len(paths) / wall, sum(cpu for *_, cpu in done) / len(paths)))
    medians = {name: np.median(measured, axis=0).tolist() for name, measured in results.items()}
    shown = {
        name: {"images_per_s": round(rate, 1), "cpu_ms_per_image": round(1000 * cpu, 3)}
        for name, (rate, cpu) in medians.items()
    }
    pairs = list(zip(results["predict"], results["plain"], strict=True))
    ratios = {
        "ratio": round(float(np.median([ours / plain for (ours, _), (plain, _) in pairs])), 3),
        "ratio_of_cpu": round(float(np.median([plain / ours for (_, ours), (_, plain) in pairs])), 3),
    }
    print(json.dumps({"images": len(paths), "processes": PROCESSES, **shown, **ratios}, indent=2))


def write_bundle(uri: str, **changes: Any) -> None:
    """Write a bundle of NETWORK and PREPROCESS with random weights, and with the distribution of its features.

    `changes` replace settings of the network.
    """
    import torch

    from btray.data.config import PreprocessConfig
    from btray.model.bundle import make_bundle, save_bundle
    from btray.model.config import NetworkConfig
    from btray.model.manifest import Thresholds, TrainedOn
    from btray.model.network import build_network
    from btray.model.ood import Distribution

    torch.manual_seed(0)
    config = NetworkConfig(**NETWORK | changes)
    network = build_network(config, len(CLASSES)).eval()
    with torch.inference_mode():
        _, features = network.with_summary(torch.randn(256, 1, PREPROCESS["size"], PREPROCESS["size"]))
    bundle = make_bundle(
        weights=network.state_dict(),
        classes=CLASSES,
        network=config,
        preprocess=PreprocessConfig(**PREPROCESS),
        temperature=1.0,
        training={},
        data=TrainedOn(
            uri="", fingerprint="", counts={}, rejected=0, leak={}, on_leak="warn", epochs=0, best_epoch=0,
            refit_epochs=0, patient_ids=False,
        ),
        created_at="2026-01-01T00:00:00+00:00",
        thresholds=Thresholds(ood_score=2.0),
        ood=Distribution.fit(features.numpy()),
    )  # fmt: skip
    save_bundle(bundle, uri, {})


# ---- in the processes


def _begin(model: str | None, barrier: Any) -> None:
    """Prepare a pipeline in a process, which has one core to itself; without a model it is the plain one."""
    global _work, _barrier  # noqa: PLW0603 - handed over when a process begins; no argument may hold a barrier
    import torch

    torch.set_num_threads(1)
    _barrier = barrier
    _work = _predict(model) if model else _plain()


def _run(paths: Sequence[str]) -> tuple[float, float, float]:
    """Return when the work on `paths` began and ended, and its CPU seconds, after a batch that is not counted."""
    _work(paths[:BATCH])
    _barrier.wait()
    busy, started = time.process_time(), time.time()
    answered = sum(_work(paths[start : start + BATCH]) for start in range(0, len(paths), BATCH))
    if answered != len(paths):
        raise RuntimeError(f"{answered} of {len(paths)} images have an answer")
    return started, time.time(), time.process_time() - busy


def _predict(model: str) -> Work:
    from btray import Classifier

    classifier = Classifier.load(model, device="cpu")

    def work(paths: Sequence[str]) -> int:
        return sum(prediction.status == "ok" for prediction in classifier.predict(paths))

    return work


def _plain() -> Work:
    import torch
    from PIL import Image

    from btray.model.config import NetworkConfig
    from btray.model.network import build_network

    network = build_network(NetworkConfig(**NETWORK), len(CLASSES)).eval()
    side = PREPROCESS["size"]

    def work(paths: Sequence[str]) -> int:
        images = []
        for path in paths:
            with Image.open(path) as image:
                image.draft("L", (side, side))
                images.append(np.asarray(image.convert("L").resize((side, side)), np.float32) / 255)
        with torch.inference_mode():
            batch = (torch.from_numpy(np.stack(images))[:, None] - 0.5) / 0.25
            confidences, labels = network(batch).softmax(1).max(1)
        return len(list(zip(paths, labels.tolist(), confidences.tolist(), strict=True)))

    return work


if __name__ == "__main__":
    main()
