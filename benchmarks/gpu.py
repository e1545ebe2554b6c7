"""Measure btray on a machine with a GPU, on phantoms that it makes itself, in at most 8 minutes.

python benchmarks/gpu.py [--out gpu.json] [--rehearse]

Prints one JSON object, and what it has so far to standard error:

training   images/s of the median epoch without the first one, the loop's own share of time with images at hand
bulk       images/s between first and last part, of the pipeline in one stage and in two, in float32, bfloat16 and as
           a frozen graph, and the share of time by stage
precision  of each engine and precision: frames/s of the network alone, and how far it answers from float32 on a CPU
serving    requests/s and latency at 1, 8 and 32 connections, from 512x512 JPEG to the answer

`waits` is the share of time in which the GPU had nothing to do, sampled by nvidia-smi between the first and the last
moment in which it had. A measurement that fails, or for which no time is left, says so and the others follow. Without a
GPU all is skipped, with the reason; --rehearse runs a small version of everything on the CPU, which measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import checkout
import numpy as np

ROOT: Path = checkout.ROOT
SECONDS = 480.0
Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is done."""

    phantoms: int = 400
    """Different ones of each class."""
    training: int = 16_384
    archive: int = 120_000
    frames: int = 4096
    seconds: float = 6.0
    """Of each measurement of the service."""


REHEARSAL = Sizes(phantoms=4, training=96, archive=300, frames=32, seconds=1.0)


class Bench:
    """The measurements, each of which returns its figures."""

    def __init__(self, folder: Path, sizes: Sizes, *, gpu: bool) -> None:
        """Make the phantoms, a training set and an archive of hard links to them in `folder`."""
        self.folder, self.sizes, self.gpu = folder, sizes, gpu
        self.started = time.monotonic()
        pictures = [(label, seed) for label in range(5) for seed in range(sizes.phantoms)]
        with ProcessPoolExecutor() as pool:
            for (label, seed), data in zip(pictures, pool.map(_phantom, pictures, chunksize=8), strict=True):
                (folder / f"{label}-{seed}.jpg").write_bytes(data)
        self.pictures = [folder / f"{label}-{seed}.jpg" for label, seed in pictures]
        lines = ["uri,label,split"]
        for number, path in enumerate(islice(cycle(self.pictures), sizes.training + len(self.pictures))):
            link = self._linked(path, f"training/{number:06d}.jpg")
            split = "val" if number % 32 == 0 else "train"
            lines.append(f"{link},class {path.name[0]},{split}")
        (folder / "training.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for number, path in enumerate(islice(cycle(self.pictures), sizes.archive)):
            self._linked(path, f"archive/{number // 1000:04d}/{number:07d}.jpg")

    def _linked(self, path: Path, name: str) -> Path:
        link = self.folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, link)
        return link

    @property
    def seconds_left(self) -> float:
        """Return how long a measurement may still take."""
        return SECONDS - (time.monotonic() - self.started)

    def training(self) -> Result:
        """Run the training job; the step is that of the defaults, with a batch that suits a GPU."""
        out = self.folder / "trained"
        flags = ["--data", self.folder / "training.csv", "--out", out, "--epochs", 4, "--patience", 0]
        flags += ["--batch-size", 256 if self.gpu else 32, "--use-gpu" if self.gpu else "--num-workers=1"]
        waits = self._job("train.py", *flags)
        records = [json.loads(line) for line in (out / "history.jsonl").read_text(encoding="utf-8").splitlines()][1:]
        return {
            "images_per_s": statistics.median(record["images_per_second"] for record in records),
            "feed_ratio": statistics.median(record["feed_ratio"] for record in records),
            "waits": waits,
        }

    def bulk(self, pipeline: str, *flags: str) -> Result:
        """Classify the archive with the model that ships."""
        out = self.folder / "-".join(["bulk", pipeline, *flags])
        where = ["--use-gpu"] if self.gpu else []
        waits = self._job(
            "classify.py", "--input", self.folder / "archive", "--output", out, "--pipeline", pipeline, *where, *flags
        )
        (path,) = out.glob("_runs/*/*/run.json")
        report = json.loads(path.read_text(encoding="utf-8"))
        total = sum(report["seconds_by_stage"].values())
        return {
            "images_per_s": report["images_per_second"],
            "seconds_to_first_part": report["seconds_to_first_part"],
            "by_stage": {name: round(seconds / total, 3) for name, seconds in report["seconds_by_stage"].items()},
            "waits": waits,
        }

    def precision(self) -> Result:
        """Run the network alone in every engine and precision, and compare its answers with float32 on the CPU."""
        from btray.data.frames import Rejection
        from btray.model.bundle import load_bundle
        from btray.model.classifier import Classifier
        from btray.model.shipped import SHIPPED

        bundle = dataclasses.replace(load_bundle(SHIPPED), uri="")  # it is measured here whether it may use bf16
        exact = Classifier(bundle, device="cpu")
        pictures = exact.frames([str(path) for path in self.pictures[:: self.sizes.phantoms // 4]])
        scans = [frame for frames in pictures if not isinstance(frames, Rejection) for frame in frames]
        expected = exact.calibrated(exact.answer(np.stack(scans)).logits, 1.0)
        many = np.stack(list(islice(cycle(scans), self.sizes.frames)))
        results: Result = {}
        for engine in ("eager", "frozen"):
            for precision in ("float32", "bf16"):
                with _reason(results, name := f"{engine} {precision}"):
                    device = "cuda" if self.gpu else "cpu"
                    measured = Classifier(bundle, device=device, engine=engine, precision=precision, batch_size=256)
                    got = measured.calibrated(measured.answer(np.stack(scans)).logits, 1.0)
                    measured.answer(many)
                    started = time.perf_counter()
                    measured.answer(many)
                    results[name] = {
                        "engine": measured.engine,
                        "frames_per_s": len(many) / (time.perf_counter() - started),
                        "largest_difference": float(np.abs(got - expected).max()),
                        "equal_labels": float((got.argmax(1) == expected.argmax(1)).mean()),
                    }
        return results

    def serving(self) -> Result:
        """Serve the model that ships from one replica, and post to it."""
        import serving

        from btray.model.shipped import SHIPPED

        results: Result = {}
        flags = ["--replicas.max-replicas", "1", *(["--replicas.use-gpu"] if self.gpu else [])]
        with serving.server("haproxy", SHIPPED, *flags) as (url, _):
            serving.measure(url + "/v1/classify", 8, self.sizes.seconds)
            for connections in (1, 8, 32):
                got = serving.measure(url + "/v1/classify", connections, self.sizes.seconds)
                quantiles = {f"p{100 * share:g}": serving.quantile(got.latencies, share) for share in (0.5, 0.9, 0.99)}
                results[f"{connections} connections"] = {"requests_per_s": got.rate, "latency_ms": quantiles}
        return results

    def _job(self, script: str, *flags: object) -> float | None:
        """Run a job to its end, and return the share of time in which the GPU waited; raise if it fails."""
        command = [sys.executable, str(ROOT / "jobs" / script), *map(str, flags)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with Watch() as watch:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=self.seconds_left
            )
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {' '.join(done.stderr.strip().splitlines()[-1:])}")
        return watch.waits


class Watch:
    """Samples how busy the GPU is while its block runs."""

    def __enter__(self) -> Watch:
        self.percent: list[int] = []
        self._process: subprocess.Popen[str] | None = None
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            self._reader = threading.Thread(target=self._read, args=(self._process,))
            self._reader.start()
        return self

    def _read(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            with suppress(ValueError):
                self.percent.append(int(line))

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.terminate()
            self._reader.join()
            self._process.wait()

    @property
    def waits(self) -> float | None:
        """The share of time in which the GPU waited, from the first moment to the last in which it did not."""
        busy = np.flatnonzero(self.percent)
        return round(1 - float(np.mean(self.percent[busy[0] : busy[-1] + 1])) / 100, 3) if len(busy) else None


class _reason(suppress):  # noqa: N801 - reads as a function, as suppress does
    """Put the reason why a block failed into a result."""

    def __init__(self, results: Result, name: str) -> None:
        super().__init__(Exception, SystemExit)  # which says that a server did not start
        self.results, self.name = results, name

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception | SystemExit):
            self.results[self.name] = {"failed": f"{type(error).__name__}: {error}"}
        return bool(super().__exit__(kind, error, trace))


def _phantom(picture: tuple[int, int]) -> bytes:
    from btray.phantoms import CLASSES, encoded_phantom

    label, seed = picture
    return encoded_phantom(CLASSES[label], seed)


def main() -> None:
    """Measure what there is time for, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the result, besides standard output")
    parser.add_argument("--rehearse", action="store_true", help="a small version on the CPU, which measures nothing")
    arguments = parser.parse_args()
    results: Result = {}
    reason = None if arguments.rehearse else missing_gpu()
    if reason:
        results["skipped"] = reason
    else:
        with tempfile.TemporaryDirectory(prefix="btray-gpu-") as name:
            results = _measured(Path(name), gpu=not arguments.rehearse)
    text = json.dumps(results, indent=2)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")
    print(text)


def missing_gpu() -> str | None:
    """Return why there is no GPU to measure; None if there is one."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is made for CPUs: install one for CUDA"
    return None if torch.cuda.is_available() else "torch finds no GPU: nvidia-smi says whether the driver does"


def _measured(folder: Path, *, gpu: bool) -> Result:
    import torch

    device = torch.cuda.get_device_name() if gpu else "CPU, a rehearsal: no figure means anything"
    results: Result = {"device": device, "cpus": os.cpu_count(), "torch": torch.__version__}
    bench = Bench(folder, Sizes() if gpu else REHEARSAL, gpu=gpu)
    measurements: list[tuple[str, Callable[[], Result]]] = [
        ("training", bench.training),
        ("bulk two", lambda: bench.bulk("two")),
        ("bulk one", lambda: bench.bulk("one")),
        ("precision", bench.precision),
        ("serving", bench.serving),
        ("bulk two bf16", lambda: bench.bulk("two", "--precision", "bf16")),
        ("bulk two frozen", lambda: bench.bulk("two", "--engine", "frozen")),
    ]
    for name, measure in measurements:
        if bench.seconds_left < 60:
            results[name] = {"skipped": f"{bench.seconds_left:.0f} of {SECONDS:.0f} s are left"}
            continue
        with _reason(results, name):
            results[name] = measure()
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    return results | {"seconds": SECONDS - bench.seconds_left}


if __name__ == "__main__":
    main()
