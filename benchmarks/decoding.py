"""Measure the CPU time that a slice takes from bytes to frame, and Pillow's for decoding, which overlooks damage.

python benchmarks/decoding.py --data ../shared/data/brain-tumor-mri
"""

from __future__ import annotations

import argparse
import io
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from btray.data.config import PreprocessConfig
from btray.data.preprocess import decode_side, make_frame
from btray.data.scans import decode

Step = Callable[[Any], Any]
SUFFIXES = (".jpg", ".jpeg", ".png")


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of JPEG and PNG slices")
    parser.add_argument("--size", type=int, default=PreprocessConfig().size, help="edge of a frame, in pixels")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    paths = sorted(path for path in Path(arguments.data).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        parser.exit(2, f"--data {arguments.data}: there is no {' or '.join(SUFFIXES)} file in it\n")
    slices = [path.read_bytes() for path in paths[:: max(1, len(paths) // arguments.images)]]
    config = PreprocessConfig(size=arguments.size)
    side = decode_side(config)
    decoders: dict[str, Step] = {
        "decode": lambda data: decode(data, min_side=side),
        "decode, no hint": decode,
        "Pillow": lambda data: _pillow(data, (side, side)),
        "Pillow, no hint": lambda data: _pillow(data, None),
    }
    milliseconds = _fastest(decoders, slices, arguments.repeats)
    grays = [decode(data, min_side=side).frames[0] for data in slices]
    milliseconds |= _fastest({"make_frame": lambda gray: make_frame(gray, config)}, grays, arguments.repeats)
    milliseconds["decode and make_frame"] = milliseconds["decode"] + milliseconds["make_frame"]
    print(json.dumps({"images": len(slices), "frame size": config.size, "CPU ms per slice": milliseconds}, indent=2))


def _pillow(data: bytes, size: tuple[int, int] | None) -> np.ndarray[Any, Any]:
    image = Image.open(io.BytesIO(data))
    image.draft("L", size)
    ImageOps.exif_transpose(image, in_place=True)
    return np.array(image.convert("L"))


def _fastest(steps: dict[str, Step], inputs: Sequence[Any], repeats: int) -> dict[str, float]:
    """Return CPU milliseconds per input: the mean over inputs of each one's fastest repeat.

    The steps take turns in another order each time, since the first to see an input finds nothing of it in a cache.
    """
    order = random.Random(0)  # noqa: S311 - no secret
    best = {name: np.full(len(inputs), np.inf) for name in steps}
    for _ in range(repeats):
        for number, item in enumerate(inputs):
            for name, step in order.sample(list(steps.items()), len(steps)):
                started = time.process_time()
                step(item)
                best[name][number] = min(best[name][number], time.process_time() - started)
    return {name: float(1000 * seconds.mean()) for name, seconds in best.items()}


if __name__ == "__main__":
    main()
