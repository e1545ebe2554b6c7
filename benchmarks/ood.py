"""Measure the cost of the out-of-distribution score: forward passes with and without it, in turn on one core.

python benchmarks/ood.py --model runs/first
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch

from btray.data.preprocess import to_tensor
from btray.model.classifier import Classifier

BATCH = 64


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a bundle with the distribution of its features")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    classifier = Classifier.load(arguments.model, device="cpu", batch_size=BATCH)
    distribution = classifier.ood
    if distribution is None:
        raise SystemExit(f"{arguments.model} has no distribution of features: train it again")
    size = classifier.manifest.preprocess.size
    frames = np.random.default_rng(0).integers(0, 256, (BATCH, size, size), dtype=np.uint8)
    images = to_tensor(torch.from_numpy(frames)).contiguous(memory_format=torch.channels_last)

    def bare() -> None:
        with torch.inference_mode():
            classifier.network(images)

    def scored() -> None:
        with torch.inference_mode():
            _, features = classifier.network.with_summary(images)
        distribution.scores(features.numpy())

    without, with_score = _milliseconds((bare, scored), arguments.rounds)
    print(
        json.dumps(
            {
                "forward_ms_per_image": round(without, 3),
                "with_score_ms_per_image": round(with_score, 3),
                "ratio": round(with_score / without, 3),
            },
            indent=2,
        )
    )


def _milliseconds(functions: tuple[Callable[[], None], ...], rounds: int) -> list[float]:
    """Return the median milliseconds per image of each function; they take turns, so that a disturbance affects all."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, taken in zip(functions, times, strict=True):
            started = time.perf_counter()
            function()
            taken.append(time.perf_counter() - started)
    return [1000 * float(np.median(taken[1:])) / BATCH for taken in times]


if __name__ == "__main__":
    main()
