"""Measure what it costs to group images by their fingerprints, which must stay near linear in their number.

python benchmarks/grouping.py [--images 100000 200000]
python benchmarks/grouping.py --images 1000000                       # in at most three minutes and 2 GB on two cores

Fingerprints are synthetic: the spectrum of each image is drawn at random and falls with the frequency as that of a
slice does; two thirds are copies of a sixth, of which each view lies 0.01 from the image's. Each size runs in a process
of its own, of which the result has seconds, CPU seconds and the peak memory, fingerprints included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import checkout  # noqa: F401 - finds btray
import numpy as np

from btray.data.duplicates import group_by_fingerprint
from btray.data.fingerprint import VIEWS, Fingerprints, frequencies

_DECAY = 1.5  # power of the frequency by which amplitudes fall
_APART = 0.01
_AT_A_TIME = 20_000


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 200_000])
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # this process measures one size
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measured(*arguments.images)))
        return
    results = {}
    for images in arguments.images:
        command = [sys.executable, __file__, "--alone", "--images", str(images)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results[f"{images} images"] = json.loads(done.stdout)
    print(json.dumps(results, indent=2))


def measured(images: int) -> dict[str, float]:
    """Group synthetic fingerprints of so many images; return what it took, and the groups found and made."""
    prints, groups = synthetic(images)
    started, busy = time.perf_counter(), time.process_time()
    found = len(np.unique(group_by_fingerprint(prints)))
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - busy, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
        "groups": found,
        "groups_made": groups,
    }


def synthetic(images: int) -> tuple[Fingerprints, int]:
    """Return float16 [images, VIEWS, LENGTH], and the number of groups that it has."""
    random = np.random.default_rng(0)
    amplitudes = frequencies() ** -_DECAY
    original = np.arange(images)
    copied = random.permutation(images)[: images * 2 // 3]
    kept = np.setdiff1d(original, copied)
    original[copied] = random.choice(kept[: len(kept) // 2], len(copied))
    prints = np.empty((images, VIEWS, len(amplitudes)), np.float16)
    for start in range(0, images, _AT_A_TIME):
        for number, source in enumerate(original[start : start + _AT_A_TIME].tolist(), start):
            own = np.random.default_rng(source).normal(size=(VIEWS, len(amplitudes))) * amplitudes
            own /= np.linalg.norm(own, axis=-1, keepdims=True)
            noise = random.normal(size=own.shape)
            prints[number] = np.abs(own) + _APART * noise / np.linalg.norm(noise, axis=-1, keepdims=True)
    return prints, len(kept)


if __name__ == "__main__":
    main()
