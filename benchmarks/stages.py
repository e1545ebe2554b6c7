"""Compare the classify job in two stages, its network free of charge, with processes that only decode and preprocess.

python benchmarks/stages.py --data ../shared/data/brain-tumor-mri [--images 20000] [--rounds 3]

That is what keeps a GPU from waiting. The job has one actor that classifies; the cores that are left read, decode and
preprocess, and as many bare processes do nothing else, in turn with the job, over the same archive of hard links. The
network has one channel and one layer; frames are those of benchmarks/predict.py. `images_per_s` is the median between
the first and the last part (for an otherwise idle machine), `cpu_ms` that of the CPU time per slice: of the bare
processes, and of the actors of each stage once the first part is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path

import checkout
import numpy as np
import pyarrow.parquet
from predict import PREPROCESS, write_bundle

from tools.processes import cpu_seconds, named

ROOT: Path = checkout.ROOT
BARE = max(1, (os.cpu_count() or 1) - 1)
STAGES = {"read and decode": b"ReadActor", "classify and write": b"PartActor"}


def main() -> None:
    """Measure in turn and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of JPEG")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found = sorted(path for path in Path(arguments.data).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    with tempfile.TemporaryDirectory(prefix="btray-stages-") as name:
        model, archive = f"{name}/model", Path(name, "archive")
        write_bundle(model, stem_width=1, stem_stride=4, widths=(1,), depths=(1,), squeeze_excite=0)
        archive.mkdir()
        for number, path in enumerate(islice(cycle(found), arguments.images)):
            os.link(path.resolve(), archive / f"{number:07d}.jpg")
        measured = defaultdict(list)
        for number in range(arguments.rounds):
            for pipeline, result in (("bare", bare(archive)), ("job", job(archive, model, Path(name, f"out{number}")))):
                print(pipeline, json.dumps(result), file=sys.stderr, flush=True)
                for key, value in result.items():
                    measured[f"{pipeline}: {key}"].append(value)
    shown = {key: round(float(np.median(values)), 3) for key, values in measured.items()}
    shown["ratio"] = round(shown["job: images_per_s"] / shown["bare: images_per_s"], 3)
    shown["ratio of cpu_ms"] = round(shown["bare: cpu_ms"] / shown["job: cpu_ms, read and decode"], 3)
    print(json.dumps({"processes": BARE, **shown}, indent=2))


def bare(archive: Path) -> dict[str, float]:
    """Decode and preprocess in as many processes as the job has for that."""
    paths = sorted(str(path) for path in archive.iterdir())
    with ProcessPoolExecutor(BARE, get_context("spawn")) as pool:
        done = list(pool.map(_decode, [paths[number::BARE] for number in range(BARE)]))
    seconds = max(end for _, end, _ in done) - min(start for start, _, _ in done)
    return {"images_per_s": len(paths) / seconds, "cpu_ms": 1000 * sum(cpu for *_, cpu in done) / len(paths)}


def _decode(paths: list[str]) -> tuple[float, float, float]:
    from btray import storage
    from btray.data.config import PreprocessConfig
    from btray.data.frames import FrameSource

    source = FrameSource(PreprocessConfig(**PREPROCESS))
    busy, started = time.process_time(), time.time()
    for path in paths:
        source.from_bytes(storage.read_bytes(path))
    return started, time.time(), time.process_time() - busy


def job(archive: Path, model: str, out: Path) -> dict[str, float]:
    """Run the job; return its rate and the CPU time per slice of each stage."""
    command = [sys.executable, str(ROOT / "jobs" / "classify.py"), "--model", model, "--input", str(archive)]
    command += ["--output", str(out), "--pipeline", "two", "--actors", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    before = 0
    while process.poll() is None:
        busy = {stage: sum(map(cpu_seconds, named(word, process.pid))) for stage, word in STAGES.items()}
        if not first and (parts := list(out.glob("model_id=*/*/*.parquet"))):
            first, before = busy, sum(pyarrow.parquet.read_metadata(part).num_rows for part in parts)
        last = {stage: max(seconds, last.get(stage, 0.0)) for stage, seconds in busy.items()}
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"the job ended with exit code {process.returncode}")
    (path,) = out.glob("_runs/*/*/run.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    slices = report["frames"] - before
    return {
        "images_per_s": report["images_per_second"],
        "seconds_to_first_part": report["seconds_to_first_part"],
        **{f"cpu_ms, {stage}": 1000 * (last[stage] - first[stage]) / slices for stage in STAGES},
    }


if __name__ == "__main__":
    main()
