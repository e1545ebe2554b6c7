"""Compare the classify job with other ways to do its work, on one archive of JPEGs of real size, in one run.

python benchmarks/bulk.py --model BUNDLE --data ../data/brain-tumor-mri [--images 20000] [--more 80000] [--s3]
                            [--rivals bare documented dataloader daft] [--rivals-at-more bare daft]

The archive consists of hard links to the images of --data, or of copies in a SeaweedFS (--s3; the result states how
much of a core the store used). The pipelines run one after the other (see benchmarks/bulk_rivals.py), first over
--images, then some of them and the job again over --more. The result has the cost per image, the peak memory, and the
job including start-up compared with each rival at the largest size that the rival ran at. daft gets a virtual
environment, because Daft needs an older pyarrow. `images_per_s` includes start-up; `steady` is the rate between the
first and last part or batch. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import checkout

from btray import storage
from tools.processes import cpu_seconds
from tools.s3_server import S3Server

ROOT: Path = checkout.ROOT
Result = dict[str, Any]


def main() -> None:
    """Measure, print each result as it arrives, then the comparison as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="bundle")
    parser.add_argument("--data", required=True, help="folder of JPEG")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument(
        "--more", type=int, default=80_000, help="second size, for the job and --rivals-at-more; 0: none"
    )
    parser.add_argument("--engine", default="frozen")
    parser.add_argument("--s3", action="store_true", help="read from a SeaweedFS")
    parser.add_argument(
        "--rivals",
        nargs="*",
        default=["bare", "documented", "dataloader"],
        help="pipelines to compare with; also: daft",
    )
    parser.add_argument("--rivals-at-more", nargs="*", default=["bare"])
    arguments = parser.parse_args()
    model = storage.resolve(arguments.model)
    with tempfile.TemporaryDirectory(prefix="btray-bulk-") as name, _place(Path(name), arguments.s3) as (root, store):
        folder = Path(name)
        pictures = sorted(path for path in Path(arguments.data).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        uris = _archive(root, pictures, max(arguments.images, arguments.more))
        results: dict[str, Result] = {}
        for size, rivals in ((arguments.images, arguments.rivals), (arguments.more, arguments.rivals_at_more)):
            for pipeline in [*rivals, "job"] if size else ():
                key = f"{pipeline} {size}"
                results[key] = _measured(pipeline, model, arguments.engine, uris[:size], out=folder / key, store=store)
                print(key, json.dumps(results[key]), file=sys.stderr, flush=True)
    print(json.dumps({"results": results} | _compared(results, arguments.images, arguments.more), indent=2))


def _compared(results: dict[str, Result], size: int, more: int) -> Result:
    job = results[f"job {more or size}"]
    ratios = {}
    for rival in ("bare", "documented", "dataloader", "daft"):
        other = results.get(f"{rival} {more}") or results.get(f"{rival} {size}")
        if other:
            ratios[f"job_over_{rival}"] = job["images_per_s"] / other["images_per_s"]
        if other and rival == "bare":
            ratios["job_over_bare_steady"] = job["steady"] / other["steady"]
    if more:
        small = results[f"job {size}"]
        ratios["cost_per_image_larger_over_smaller"] = small["images_per_s"] / job["images_per_s"]
        ratios["peak_memory_larger_over_smaller"] = job["peak_mb"] / small["peak_mb"]
    return ratios


# ---- the archive


@contextmanager
def _place(folder: Path, remote: bool) -> Iterator[tuple[str, int | None]]:
    """Yield the root of the archive and the process id of its store (None for the local disk)."""
    if not remote:
        yield str(folder / "archive"), None
        return
    with S3Server(folder / "store") as server:
        os.environ.update(server.environment_over(dict(os.environ)))
        storage.reconnect()
        server.make_bucket("archive")
        yield "s3://archive", server.pid


def _archive(root: str, pictures: list[Path], count: int) -> list[str]:
    """Write `count` objects, a thousand per folder; return their URIs."""
    uris = []
    for number, picture in enumerate(islice(cycle(pictures), count)):
        uri = storage.join(root, f"{number // 1000:04d}", f"{number:07d}.jpg")
        uris.append(uri)
        if storage.is_remote(root):
            storage.write_bytes(uri, picture.read_bytes())
        else:
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
            os.link(picture, uri)
    return uris


# ---- one pipeline


def _measured(pipeline: str, model: str, engine: str, uris: list[str], *, out: Path, store: int | None) -> Result:
    """Run one pipeline; return its throughput, with start-up and steady, and the peak memory of all its processes."""
    out.mkdir()
    listing = out / "list.txt"
    listing.write_text("\n".join(uris) + "\n", encoding="utf-8")
    rival = [str(ROOT / "benchmarks" / "bulk_rivals.py"), pipeline, model, engine, str(out / "table")]
    job = [str(ROOT / "jobs" / "classify.py"), "--model", model, "--engine", engine, "--output", str(out / "table")]
    job += ["--input", uris[0].rsplit("/", 2)[0], "--limit", str(len(uris))]
    python = _daft_python() if pipeline == "daft" else sys.executable
    mark = uuid.uuid4().hex
    environment = os.environ | {"BENCHMARK_MARK": mark, "PYTHONPATH": str(ROOT)}
    if pipeline != "dataloader":
        environment["OMP_NUM_THREADS"] = "1"
    busy_before = cpu_seconds(store) if store else 0.0
    started = time.perf_counter()
    with _Memory(mark) as memory, listing.open() as lines:
        done = subprocess.run(
            [python, *(job if pipeline == "job" else rival)],
            stdin=None if pipeline == "job" else lines,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{pipeline}: {done.stderr[-3000:]}")
    report = _report_of(out / "table") if pipeline == "job" else json.loads(done.stdout.strip().splitlines()[-1])
    result = report | {"seconds": seconds, "images_per_s": len(uris) / seconds, "peak_mb": memory.peak / 1e6}
    result["peak_mb_of"] = {name: round(held / 1e6) for name, held in memory.of_peak.items()}
    if store is not None:
        result["store_share_of_a_core"] = (cpu_seconds(store) - busy_before) / seconds
    return result


def _report_of(table: Path) -> Result:
    (path,) = table.glob("_runs/*/*/run.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    return {
        "images": report["frames"] + report["rejected"],
        "steady": report["images_per_second"],
        "seconds_to_first_part": report["seconds_to_first_part"],
        "seconds_by_stage": report["seconds_by_stage"],
    }


def _daft_python() -> str:
    """Return a Python that has Daft and, with lower priority, all packages of this one."""
    home = ROOT / ".venv" / "daft"
    python = home / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-qq", "daft"], check=True, cwd=home)
        own = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        (Path(own) / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return str(python)


class _Memory(threading.Thread):
    """Peak memory, in bytes, that all processes with a mark in their environment held at once.

    Counts the anonymous memory of each process, and the shared memory (Ray's object store, which its processes map)
    once. Reads the kernel's counters instead of PSS, which walks page tables: sampling that every two seconds took a
    sixth of a core away from the pipeline.
    """

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.of_peak: dict[str, int] = {}
        """Bytes by process title at the peak."""
        self._mark = f"BENCHMARK_MARK={mark}".encode()
        self._marked: dict[str, bool] = {}
        self._ended = threading.Event()

    def __enter__(self) -> _Memory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        """Sample the memory once per second until the context ends."""
        while not self._ended.wait(1):
            held: dict[str, int] = defaultdict(int)
            for process in os.listdir("/proc"):
                if process.isdigit() and (name := self._title(process)):
                    counters = _memory_of(process)
                    held[name] += counters["RssAnon"]
                    held["shared"] = max(held["shared"], counters["RssShmem"])
            if sum(held.values()) > self.peak:
                self.peak, self.of_peak = sum(held.values()), dict(held)

    def _title(self, process: str) -> str | None:
        """Return the current title of a process with the mark (Ray's change theirs); None for other processes."""
        try:
            if process not in self._marked:
                self._marked[process] = self._mark in Path("/proc", process, "environ").read_bytes()
            if not self._marked[process]:
                return None
            words = Path("/proc", process, "cmdline").read_bytes().decode().split("\0")
        except OSError:
            return None
        return Path(words[1] if len(words) > 1 and "python" in Path(words[0]).name else words[0]).name


def _memory_of(process: str) -> Counter[str]:
    """Return the memory counters of a process in bytes; zeros if it has ended."""
    try:
        lines = Path("/proc", process, "status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return Counter()
    return Counter({line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith("Rss")})


if __name__ == "__main__":
    main()
