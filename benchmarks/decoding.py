"""Measure the CPU time that decoding a slice takes, beside Pillow, which does not notice damage, and simplejpeg alone.

python benchmarks/decoding.py --data ../shared/data/brain-tumor-mri
"""

from __future__ import annotations

import argparse
import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import ImageOps, JpegImagePlugin

from btray.data.config import PreprocessConfig
from btray.data.preprocess import decode_side
from btray.data.scans import decode

Decoder = Callable[[bytes], Any]


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of JPEG slices")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    paths = sorted(Path(arguments.data).rglob("*.jpg"))
    slices = [path.read_bytes() for path in paths[:: max(1, len(paths) // arguments.images)]]
    side = decode_side(PreprocessConfig())
    decoders: dict[str, Decoder] = {
        "btray": lambda data: decode(data, min_side=side),
        "btray, no hint": decode,
        "Pillow": lambda data: _pillow(data, (side, side)),
        "Pillow, no hint": lambda data: _pillow(data, None),
        "simplejpeg, no hint": lambda data: simplejpeg.decode_jpeg(data, "GRAY"),
    }
    milliseconds = {name: 1000 * seconds for name, seconds in _fastest(decoders, slices, arguments.repeats).items()}
    ratios = {"Pillow / btray": milliseconds["Pillow"] / milliseconds["btray"]}
    ratios["Pillow / btray, no hint"] = milliseconds["Pillow, no hint"] / milliseconds["btray, no hint"]
    print(json.dumps({"images": len(slices), "CPU ms per slice": milliseconds, "ratios": ratios}, indent=2))


def _pillow(data: bytes, size: tuple[int, int] | None) -> np.ndarray[Any, Any]:
    """Return what `btray.data.scans.decode` made of a JPEG while it decoded with Pillow."""
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    image.draft("L", size)
    image.getexif()
    ImageOps.exif_transpose(image, in_place=True)
    return np.array(image)


def _fastest(decoders: dict[str, Decoder], slices: list[bytes], repeats: int) -> dict[str, float]:
    """Return CPU seconds per slice: the mean over slices of each one's fastest repeat.

    The decoders take turns in another order each time, since the first to see a slice finds nothing of it in a cache.
    """
    order = random.Random(0)  # noqa: S311 - no secret
    best = {name: np.full(len(slices), np.inf) for name in decoders}
    for _ in range(repeats):
        for number, data in enumerate(slices):
            for name, decoder in order.sample(list(decoders.items()), len(decoders)):
                started = time.process_time()
                decoder(data)
                best[name][number] = min(best[name][number], time.process_time() - started)
    return {name: float(seconds.mean()) for name, seconds in best.items()}


if __name__ == "__main__":
    main()
