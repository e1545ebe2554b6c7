"""The cost of the audit per image, on the real data and on many more images.

python benchmarks/audit.py --data ../data/brain-tumor-mri [--images 50000]

Audits the real images, then many synthetic ones: phantoms, each with a random warp and brightness so that no two count
as the same image, as JPEGs of the real data's usual size. Each audit is a separate process with its own Ray. Memory is
the peak of the private memory of all processes of the job together (shared pages are not counted). Run it on an
otherwise idle machine; the load is printed, because it determines how reliable the figures are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from btray.phantoms import CLASSES, phantom

JOB = Path(__file__).resolve().parent.parent / "jobs" / "audit.py"
HEADS = 300
SIDE = 512
WORKERS = 2


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="class-per-folder tree or manifest")
    parser.add_argument("--images", type=int, default=50_000, help="synthetic images")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="btray-benchmark-") as name:
        folder = Path(name)
        real = _measured(arguments.data, folder / "real")
        _write_synthetic(folder / "images", arguments.images)
        synthetic = _measured(str(folder / "images"), folder / "synthetic")
    ratio = synthetic["ms_per_image"] / real["ms_per_image"]
    print(json.dumps({"real": real, "synthetic": synthetic, "cost_ratio": round(ratio, 3)}, indent=2))


def _measured(data: str, out: Path) -> dict[str, Any]:
    """Run one audit; return its seconds including the start of Ray, its memory and its counts."""
    load = os.getloadavg()[0]
    started = time.perf_counter()
    with (out.parent / f"{out.name}.log").open("wb") as log:
        job = subprocess.Popen([sys.executable, str(JOB), "--data", data, "--out", str(out)], stdout=log, stderr=log)
        driver, workers = 0, 0
        while job.poll() is None:
            alone, below = _memory(job.pid)
            driver, workers = max(driver, alone), max(workers, below)
            time.sleep(0.5)
    seconds = time.perf_counter() - started
    if job.returncode:
        raise SystemExit((out.parent / f"{out.name}.log").read_text(encoding="utf-8"))
    findings = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    return {
        "images": findings["images"],
        "seconds": round(seconds, 1),
        "ms_per_image": round(1000 * seconds / findings["images"], 2),
        "driver_mb": driver // 2**20,
        "workers_mb": workers // 2**20,
        "pairs_considered": findings["duplicates"]["pairs_considered"],
        "pairs_compared": findings["duplicates"]["pairs_compared"],
        "in_groups": findings["duplicates"]["images"],
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
    }


def _memory(driver: int) -> tuple[int, int]:
    """Return the private bytes of the driver, and of all its descendants together (Ray's own included)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended
    below = {driver}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return _private(driver), sum(_private(process) for process in below - {driver})


def _private(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))


def _write_synthetic(folder: Path, images: int) -> None:
    parts = [(folder, start, min(start + 1000, images)) for start in range(0, images, 1000)]
    for label in CLASSES:
        for split in ("train", "test"):
            (folder / split / label).mkdir(parents=True)
    with get_context("spawn").Pool(WORKERS, initializer=_draw_heads) as pool:
        pool.starmap(_write_part, parts, chunksize=1)


_heads: list[npt.NDArray[np.uint8]] = []


def _draw_heads() -> None:
    _heads.extend(phantom(CLASSES[seed % len(CLASSES)], seed, size=SIDE) for seed in range(HEADS))


def _write_part(folder: Path, start: int, end: int) -> None:
    for number in range(start, end):
        random = np.random.default_rng([number, 1])
        head = int(random.integers(HEADS))
        split = "test" if number % 5 == 0 else "train"
        path = folder / split / CLASSES[head % len(CLASSES)] / f"{number:06d}.jpg"
        _varied(_heads[head], random).save(path, quality=75)


def _varied(gray: npt.NDArray[np.uint8], random: np.random.Generator) -> Image.Image:
    """Apply a random smooth warp and a random smooth gain to `gray`, so that it shows another head."""
    cells = 4
    corners = np.mgrid[0 : cells + 1, 0 : cells + 1] * (SIDE / cells) + random.normal(
        0, SIDE / 22, (2, cells + 1, cells + 1)
    )
    mesh = []
    for row in range(cells):
        for column in range(cells):
            step = SIDE // cells
            box = (column * step, row * step, (column + 1) * step, (row + 1) * step)
            around = ((row, column), (row + 1, column), (row + 1, column + 1), (row, column + 1))
            mesh.append((box, tuple(float(corners[axis][place]) for place in around for axis in (1, 0))))
    warped = Image.fromarray(gray).transform((SIDE, SIDE), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
    grid = random.uniform(0.5, 1.3, (5, 5)).astype(np.float32)
    gain = np.asarray(Image.fromarray(grid).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(np.asarray(warped) * gain, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
