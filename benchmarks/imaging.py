"""Measure what a slice costs in each transfer syntax of DICOM, beside the same picture as JPEG; and a run over both.

python benchmarks/imaging.py --data ../shared/data/brain-tumor-mri [--model BUNDLE --objects 5000]

The pictures are resized to 512x512 and given 12 bits with noise in the lowest four, as scanners have it; the JPEG files
are those at quality 90. Elements of an MR object surround the pixels. With `--model`, the job classifies an archive of
uncompressed DICOM and one of JPEG files, hard links to the pictures, one after the other and each twice.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import checkout
import numpy as np
import pydicom
from PIL import Image

from btray.data.config import PreprocessConfig
from btray.data.preprocess import decode_side, make_frame
from btray.data.scans import decode
from tests.helpers import dicom_files as dicom

Writer = Callable[[np.ndarray[Any, Any]], bytes]

SIDE, PRIVATE_ELEMENTS = 512, 120
SYNTAXES = {
    "uncompressed": dicom.EXPLICIT, "implicit VR": dicom.IMPLICIT, "big endian": dicom.BIG_ENDIAN,
    "deflated": dicom.DEFLATED, "RLE": dicom.RLE, "JPEG baseline": dicom.JPEG, "JPEG extended": dicom.JPEG_EXTENDED,
    "JPEG lossless": dicom.JPEG_LOSSLESS_1, "JPEG-LS": dicom.JPEG_LS, "JPEG 2000": dicom.JPEG_2000,
    "HTJ2K": dicom.HTJ2K,
}  # fmt: skip


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of JPEG slices")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", help="bundle, for a run over an archive")
    parser.add_argument("--objects", type=int, default=5000, help="of each archive")
    arguments = parser.parse_args()
    paths = sorted(path for path in Path(arguments.data).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        parser.exit(2, f"--data {arguments.data}: there is no .jpg or .jpeg file in it\n")
    slices = [_twelve_bits(path) for path in paths[:: max(1, len(paths) // arguments.images)]]
    report: dict[str, Any] = {"images": len(slices), "CPU ms per slice": _costs(slices, arguments.repeats)}
    if arguments.model:
        report["images per second"] = _rates(slices, arguments.model, arguments.objects)
    print(json.dumps(report, indent=2))


def _twelve_bits(path: Path) -> np.ndarray[Any, Any]:
    gray = Image.open(path).convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).integers(0, 16, (SIDE, SIDE))
    return (np.asarray(gray).astype(np.uint16) * 16 + noise).astype(np.uint16)


def _as_dicom(pixels: np.ndarray[Any, Any], syntax: str) -> bytes:
    if syntax == dicom.JPEG:
        pixels = (pixels >> 4).astype(np.uint8)
    bits = {} if pixels.dtype == np.uint8 else {"BitsStored": 12, "HighBit": 11}
    dataset = dicom.mr_slice(pixels, **bits)
    block = dataset.private_block(0x0019, "BENCHMARK", create=True)
    for number in range(PRIVATE_ELEMENTS):
        block.add_new(number, "DS", "1.5")
    return dicom.write(dataset, pixels, syntax=syntax)


def _as_jpeg(pixels: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray((pixels >> 4).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _costs(slices: list[np.ndarray[Any, Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Return CPU milliseconds of decoding, and of that with preprocessing: means of each slice's fastest repeat."""
    config = PreprocessConfig()
    side = decode_side(config)

    def ours(data: bytes) -> Any:
        return decode(data, min_side=side).frames[0]

    def pydicoms(data: bytes) -> Any:
        return pydicom.dcmread(io.BytesIO(data)).pixel_array

    readers: dict[str, tuple[Writer, Callable[[bytes], Any]]] = {"JPEG file": (_as_jpeg, ours)}
    for name, syntax in SYNTAXES.items():
        readers[f"DICOM, {name}"] = partial(_as_dicom, syntax=syntax), ours
    readers["pydicom, uncompressed"] = partial(_as_dicom, syntax=dicom.EXPLICIT), pydicoms
    order = random.Random(0)  # noqa: S311 - no secret
    best = {name: np.full((len(slices), 2), np.inf) for name in readers}
    for number, pixels in enumerate(slices):
        files = {name: write(pixels) for name, (write, _) in readers.items()}
        for _ in range(repeats):
            for name, (_, read) in order.sample(list(readers.items()), len(readers)):
                started = time.process_time()
                gray = read(files[name])
                decoded = time.process_time()
                make_frame(gray, config)
                times = decoded - started, time.process_time() - started
                best[name][number] = np.minimum(best[name][number], times)
    return {
        name: dict(zip(("decode", "with preprocessing"), (1000 * seconds.mean(0)).round(3).tolist(), strict=True))
        for name, seconds in best.items()
    }


def _rates(slices: list[np.ndarray[Any, Any]], model: str, objects: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {"DICOM, uncompressed": [], "JPEG file": []}
    writers: tuple[Writer, ...] = (partial(_as_dicom, syntax=dicom.EXPLICIT), _as_jpeg)
    with tempfile.TemporaryDirectory(prefix="btray-imaging-") as folder:
        for name, write in zip(rates, writers, strict=True):
            for number, pixels in enumerate(slices):
                Path(folder, f"{name}-{number}").write_bytes(write(pixels))
            root = Path(folder, name, "archive")
            for number, which in enumerate(islice(cycle(range(len(slices))), objects)):
                link = root / f"{number // 1000:04d}" / f"{number:07d}"
                link.parent.mkdir(parents=True, exist_ok=True)
                os.link(Path(folder, f"{name}-{which}"), link)
        for turn in range(2):
            for name in rates if turn else reversed(rates):
                rates[name].append(_rate(model, Path(folder, name, "archive"), Path(folder, name, f"table-{turn}")))
    return rates


def _rate(model: str, archive: Path, table: Path) -> float:
    """Return objects per second between the first part and the last."""
    job = [sys.executable, str(checkout.ROOT / "jobs" / "classify.py"), "--model", model]
    subprocess.run([*job, "--input", str(archive), "--output", str(table)], check=True, capture_output=True)
    (path,) = table.glob("_runs/*/*/run.json")
    return round(float(json.loads(path.read_text(encoding="utf-8"))["images_per_second"]), 1)


if __name__ == "__main__":
    main()
