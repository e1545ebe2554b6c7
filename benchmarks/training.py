"""Measure the overhead of the training job over a bare DDP loop, and the throughput of its loader.

python benchmarks/training.py --data ../data/brain-tumor-mri [--epochs 3] [--rounds 2] [--images 1024]

Both train the same network with the same batch and augmentation in two gloo processes, in turn, so that drift in the
machine's speed does not favour one. Epochs are compared by the images per second that pass through training; the first
epoch of each run is warm-up and not counted. The loader is measured alone: from files to decoded frames, by Ray Data
and by two plain processes. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from btray.data.config import PreprocessConfig
from btray.data.fingerprint import fingerprint_of
from btray.data.frames import FrameSource, Rejection
from btray.data.labelled import read_labelled

HERE = Path(__file__).resolve().parent
WORKERS = 2
BATCH_SIZE = 64


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="class-per-folder tree or manifest")
    parser.add_argument("--epochs", type=int, default=3, help="epochs per run, the first of which is not counted")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind")
    parser.add_argument("--images", type=int, default=1024, help="images to train on")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="btray-benchmark-") as name:
        folder = Path(name)
        manifest = _manifest(arguments.data, arguments.images, folder)
        loader = {
            "loader_plain_images_per_s": _plain_loader(manifest, folder),
            "loader_ray_images_per_s": _ray_loader(manifest),
        }
        bare: list[float] = []
        job: list[float] = []
        for index in range(arguments.rounds):
            bare += _bare(folder / "frames.npz", arguments.epochs)
            job += _job(manifest, folder / f"run{index}", arguments.epochs)
    result = {
        "bare_images_per_s": statistics.median(bare),
        "job_images_per_s": statistics.median(job),
        "epoch_time_ratio": statistics.median(bare) / statistics.median(job),
        "bare_all": bare,
        "job_all": job,
        **loader,
        "loader_ratio": loader["loader_ray_images_per_s"] / loader["loader_plain_images_per_s"],
    }
    print(json.dumps(result, indent=2))


def _manifest(data: str, images: int, folder: Path) -> Path:
    """Write a manifest of evenly spaced training images, a sixteenth of them as the val split; return its path."""
    table = read_labelled(data)
    rows = [row for row in table.to_pylist() if row["split"] != "test"]
    chosen = [rows[index] for index in np.linspace(0, len(rows) - 1, min(images, len(rows))).astype(int)]
    lines = [f'"{row["uri"]}",{row["label"]},{"val" if i % 16 == 0 else "train"}' for i, row in enumerate(chosen)]
    path = folder / "manifest.csv"
    path.write_text("\n".join(["uri,label,split", *lines]) + "\n", encoding="utf-8")
    return path


def _plain_loader(manifest: Path, folder: Path) -> float:
    """Return the images per second of two plain processes that read, decode, preprocess and fingerprint.

    That is what the job's loader does. Saves the training frames for the bare loop.
    """
    table = read_labelled(str(manifest))
    uris = table["uri"].to_pylist()
    parts = [uris[start : start + 128] for start in range(0, len(uris), 128)]
    with get_context("spawn").Pool(WORKERS) as pool:
        pool.map(_decode, [uris[:8]] * WORKERS)  # warm-up: imports are not the loader's speed
        started = time.perf_counter()
        frames = np.concatenate(pool.map(_decode, parts, chunksize=1))
        seconds = time.perf_counter() - started
    training = np.array(table["split"].to_pylist()) == "train"
    _, labels = np.unique(table["label"].to_pylist(), return_inverse=True)
    np.savez(folder / "frames.npz", frames=frames[training], labels=labels[training])
    return len(uris) / seconds


def _decode(uris: list[str]) -> np.ndarray:
    source = FrameSource(PreprocessConfig())
    scans = [scan for scan in source.scans(uris) if not isinstance(scan, Rejection)]
    for scan in scans:
        fingerprint_of(scan.frames)
    return np.stack([source.frames_of(scan)[0] for scan in scans])


def _ray_loader(manifest: Path) -> float:
    """Return the images per second of the job's own decoding, after its worker processes have started."""
    import pyarrow as pa

    from btray.core.cluster import connected
    from btray.training.feeds import decode_rows

    table = read_labelled(str(manifest))
    rows = pa.table({"row": np.arange(len(table)), "uri": table["uri"], "label": np.zeros(len(table), np.int64)})
    source = FrameSource(PreprocessConfig())
    with connected(dashboard=True):
        decode_rows(rows, source).materialize()
        started = time.perf_counter()
        decode_rows(rows, source).materialize()
        return len(rows) / (time.perf_counter() - started)


def _bare(frames: Path, epochs: int) -> list[float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORKERS)]
    command += [str(HERE / "bare_loop.py"), str(frames), str(epochs), str(BATCH_SIZE)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    seconds = [float(line) for line in done.stdout.split()][1:]
    images = len(np.load(frames)["labels"]) // BATCH_SIZE * BATCH_SIZE
    return [images / value for value in seconds]


def _job(manifest: Path, out: Path, epochs: int) -> list[float]:
    command = [sys.executable, str(HERE.parent / "jobs" / "train.py"), "--data", str(manifest), "--out", str(out)]
    command += ["--epochs", str(epochs), "--num-workers", str(WORKERS), "--batch-size", str(BATCH_SIZE)]
    subprocess.run(command, check=True, capture_output=True)
    records = [json.loads(line) for line in (out / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record["images_per_second"] for record in records][1:]


if __name__ == "__main__":
    main()
