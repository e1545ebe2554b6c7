"""Compare the service with its lower bound: the same Classifier behind bare uvicorn and FastAPI.

python benchmarks/serving.py --model BUNDLE                       # all but the soak test
python benchmarks/serving.py --model BUNDLE --only cluster        # `serve deploy` on two nodes beside one machine
python benchmarks/serving.py --model BUNDLE --only overload       # 5 times capacity
python benchmarks/serving.py --model BUNDLE --only autoscale      # replicas 1 -> 2 -> 1
python benchmarks/serving.py --model BUNDLE --only soak --seconds 600

Clients are separate processes with keep-alive connections that post 512x512 JPEGs. Each server is started, warmed up,
measured and stopped in turn; the machine's load is printed with every figure.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import checkout  # noqa: F401 - makes `tools` importable
import requests
from fastapi import FastAPI, Request
from PIL import Image

from tools.processes import cpu_seconds, descendants, named
from tools.serving_cluster import serving_cluster

ROOT = Path(__file__).resolve().parent.parent
HEADERS = {"Content-Type": "image/jpeg"}
BODIES = 16


@dataclass(frozen=True)
class Measured:
    """Latencies and status codes as the clients saw them."""

    seconds: float
    latencies: list[float]
    """Latencies of requests answered 200, in ms, sorted."""
    codes: dict[int, int]
    """Number of answers by status; 0: no answer."""
    refusals: list[float]
    """Latencies of the other answers, in ms, sorted."""

    @property
    def rate(self) -> float:
        """Requests answered 200, per second."""
        return len(self.latencies) / self.seconds

    def __str__(self) -> str:
        """Return one line for the terminal."""
        quantiles = quantiles_of(self.latencies)
        others = {code: count for code, count in self.codes.items() if code != 200}
        return f"{self.rate:7.1f} requests/s  {quantiles}  {others or ''}"


def quantile(latencies: list[float], share: float) -> float:
    """Return a quantile of sorted latencies; 0 if there are none."""
    return latencies[min(len(latencies) - 1, int(share * len(latencies)))] if latencies else 0.0


def quantiles_of(latencies: list[float]) -> str:
    """Return the median and the tail of sorted latencies as text."""
    return "  ".join(f"p{100 * share:g} {quantile(latencies, share):6.1f} ms" for share in (0.5, 0.9, 0.99))


@cache
def bodies() -> list[bytes]:
    """Return phantoms as 512x512 JPEGs."""
    from btray.phantoms import phantom  # imported late here and below, so that client processes start at once

    files = []
    for seed in range(BODIES):
        file = io.BytesIO()
        Image.fromarray(phantom("glioma", seed, size=512)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


# ---- clients


def measure(url: str, connections: int, seconds: float, rate: float | None = None) -> Measured:
    """Post on each connection as soon as the last answer arrives; with `rate`, that many requests per second in all."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as client:
        taken, times = client.submit(_client, url, bodies(), connections, seconds, rate).result()
    codes = {code: len(latencies) for code, latencies in times.items()}
    answers = {code: sorted(latencies) for code, latencies in times.items()}
    refusals = sorted(latency for code, latencies in answers.items() if code not in (0, 200) for latency in latencies)
    return Measured(taken, answers.get(200, []), codes, refusals)


def _client(url: str, files: list[bytes], connections: int, seconds: float, rate: float | None) -> Any:
    return asyncio.run(_post(url, files, connections, seconds, rate))


async def _post(url: str, files: list[bytes], connections: int, seconds: float, rate: float | None) -> Any:
    times: dict[int, list[float]] = defaultdict(list)
    started = time.perf_counter()
    turns = iter(range(1 << 60))

    async def one(session: aiohttp.ClientSession) -> None:
        while (now := time.perf_counter()) < started + seconds:
            turn = next(turns)
            due = started + turn / rate if rate else now
            if due > now:
                await asyncio.sleep(due - now)
            begun = time.perf_counter()
            try:
                async with session.post(url, data=files[turn % BODIES], headers=HEADERS) as answer:
                    await answer.read()
                status = answer.status
            except aiohttp.ClientError:
                status = 0
            times[status].append((time.perf_counter() - begun) * 1000)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections)) as session:
        await asyncio.gather(*(one(session) for _ in range(connections)))
    return time.perf_counter() - started, dict(times)


# ---- servers


def bare(model: str, port: int) -> None:
    """Serve with uvicorn and FastAPI alone: each request is decoded and classified on one of two threads."""
    import torch
    import uvicorn

    from btray.model.classifier import Classifier

    torch.set_num_threads(1)
    classifier, pool, app = Classifier.load(model), ThreadPoolExecutor(2), FastAPI()

    @app.post("/v1/classify")
    async def classify(request: Request) -> dict[str, Any]:
        body = await request.body()
        (prediction,) = await asyncio.get_running_loop().run_in_executor(pool, classifier.predict, [body])
        return {"label": prediction.label, "probabilities": prediction.probabilities}

    @app.get("/readyz")
    def ready() -> str:
        return "ready"

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def plain_serve(model: str, port: int) -> None:
    """Serve the same handler as a Serve deployment with Serve's default settings."""
    import ray
    from ray import serve

    app = FastAPI()

    @serve.deployment
    @serve.ingress(app)
    class Plain:
        def __init__(self) -> None:
            from btray.model.classifier import Classifier

            self.classifier = Classifier.load(model)

        async def classify(self, request: Request) -> dict[str, Any]:
            (prediction,) = self.classifier.predict([await request.body()])
            return {"label": prediction.label, "probabilities": prediction.probabilities}

        # In a replica FastAPI cannot resolve the annotation from its name.
        classify.__annotations__["request"] = Request
        app.post("/v1/classify")(classify)

        @app.get("/readyz")
        def ready(self) -> str:
            return "ready"

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"port": port})
    serve.run(Plain.bind())  # type: ignore[attr-defined]
    signal.pause()


@contextmanager
def two_nodes(model: str) -> Iterator[tuple[str, list[int]]]:
    """Run `serve deploy` on a loopback cluster; yield the URL and the process ids of its two nodes."""
    with tempfile.TemporaryDirectory() as folder, serving_cluster(model, Path(folder)) as (url, cluster):
        yield url, [node.process.pid for node in cluster.nodes]


@contextmanager
def server(kind: str, model: str, *flags: str) -> Iterator[tuple[str, int]]:
    """Run a server; yield its URL and process id. `kind` is bare, plain, or a --proxy of jobs/serve.py."""
    from btray.serving.job import free_port

    port = free_port()
    command = [sys.executable, "jobs/serve.py", "--model", model, "--port", str(port), "--proxy", kind, *flags]
    if kind in ("bare", "plain"):
        command = [sys.executable, __file__, "--model", model, "--serve", kind, "--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(url + "/readyz", timeout=5).status_code == 200:
                return
        except requests.RequestException:
            time.sleep(0.3)
    raise SystemExit(f"{process.args!r} did not start")


def replicas_of(pid: int) -> list[int]:
    """Return the process ids of the replicas that descend from the job `pid`."""
    return named(b"ServeReplica:btray", pid)


def resident(pids: list[int]) -> float:
    """Return the resident memory of these processes together, in MB."""
    total = 0
    for pid in pids:
        try:
            line = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
        except OSError:
            continue
        total += int(line[1]) if line else 0
    return total / 1000


def load_average() -> str:
    """Return the load average of the machine as text."""
    return f"load {os.getloadavg()[0]:.1f}"


# ---- measurements


def side_by_side(model: str, seconds: float, kinds: list[str]) -> None:
    """Print requests per second and latency at 1, 8 and 32 connections."""
    for kind in kinds:
        flags = [] if kind in ("bare", "plain") else ["--replicas.min-replicas", "2"]
        with server(kind, model, *flags) as (url, _):
            measure(url + "/v1/classify", 8, 5)
            for connections in (1, 8, 32):
                result = measure(url + "/v1/classify", connections, seconds)
                print(f"{kind:8} {connections:3} connections  {result}  {load_average()}", flush=True)


def cluster(model: str, seconds: float) -> None:
    """Print the rate and the CPU time per answer of two replicas on two nodes, on one machine, and the ratio.

    They take turns, two each, with the same cores for replicas, proxies, Ray and clients, so the ratio of the rates is
    that per core.
    """
    rates: dict[str, list[float]] = {"machine": [], "cluster": []}
    for kind in ("machine", "cluster") * 2:
        with ExitStack() as stack:
            if kind == "cluster":
                url, roots = stack.enter_context(two_nodes(model))
            else:
                url, pid = stack.enter_context(server("haproxy", model, "--replicas.min-replicas", "2"))
                roots = [pid]
            measure(url + "/v1/classify", 8, 5)
            pids = {pid for root in roots for pid in (root, *descendants(root))}
            before = sum(map(cpu_seconds, pids))
            result = measure(url + "/v1/classify", 32, seconds)
            cost = 1000 * (sum(map(cpu_seconds, pids)) - before) / max(1, len(result.latencies))
            rates[kind].append(result.rate)
            print(f"{kind:8}  32 connections  {result}  {cost:.1f} ms of CPU per answer  {load_average()}", flush=True)
    ratio = sum(rates["cluster"]) / sum(rates["machine"])
    print(f"ratio     cluster / machine {ratio:.2f}, {'kept' if ratio >= 0.9 else 'NOT KEPT'} above 0.9")


def overload(model: str, seconds: float) -> None:
    """Print the capacity, the behaviour at five times that load, and the latency afterwards.

    The flooding client is itself overloaded, so a separate client with few connections measures how long answers take.
    An accepted request waits for a slot in HAProxy, then for a place in its replica, and then for the requests that the
    replica is processing. Half of the machine is used by the clients and the refusals, hence the factor 2 in the bound.
    """
    from btray.serving.config import LimitsConfig
    from btray.serving.haproxy import QUEUE_SECONDS

    replicas = 2
    with server("haproxy", model, "--replicas.min-replicas", str(replicas)) as (url, _), ThreadPoolExecutor(1) as pool:
        post = url + "/v1/classify"
        measure(post, 8, 5)
        capacity = measure(post, 16, seconds)
        print(f"capacity      {capacity}  {load_average()}", flush=True)
        flooding = pool.submit(measure, post, 512, seconds + 4, rate=5 * capacity.rate)
        time.sleep(2)
        beside_it = measure(post, 8, seconds)
        flood = flooding.result()
        sent = sum(flood.codes.values()) / flood.seconds
        print(f"flood         {flood}  sent {sent:.0f}/s  {load_average()}", flush=True)
        print(f"beside it     {beside_it}", flush=True)
        print(
            f"  refused     {len(beside_it.refusals):7.0f} requests    {quantiles_of(beside_it.refusals)}", flush=True
        )
        bound = 2 * QUEUE_SECONDS + 2 * replicas * LimitsConfig().max_requests / capacity.rate
        slowest = quantile(beside_it.latencies, 0.99) / 1000
        print(f"bound         p99 {slowest:.1f} s, {'kept' if slowest <= bound else 'NOT KEPT'} below {bound:.1f} s")
        print(f"afterwards    {measure(post, 1, 5)}  {load_average()}", flush=True)


def autoscale(model: str, seconds: float) -> None:
    """Print the number of replicas before, under and after load."""
    flags = ["--replicas.max-replicas", "2", "--replicas.upscale-delay", "3", "--replicas.downscale-delay", "10"]
    with server("haproxy", model, *flags) as (url, pid), ThreadPoolExecutor(1) as pool:
        print(f"idle          {len(replicas_of(pid))} replica", flush=True)
        load = pool.submit(measure, url + "/v1/classify", 24, max(40.0, seconds))
        while not load.done():
            time.sleep(5)
            print(f"under load    {len(replicas_of(pid))} replicas", flush=True)
        print(f"              {load.result()}  {load_average()}", flush=True)
        deadline = time.monotonic() + 120
        while len(replicas_of(pid)) > 1 and time.monotonic() < deadline:
            time.sleep(2)
        print(f"after load    {len(replicas_of(pid))} replica", flush=True)


def soak(model: str, seconds: float) -> None:
    """Print errors, latency, and the memory of the replicas and of all processes of the job, at 80 % of capacity.

    Memory growth is the peak relative to the end of the first quarter, when everything is warmed up.
    """
    with server("haproxy", model, "--replicas.min-replicas", "2") as (url, pid):
        post = url + "/v1/classify"
        measure(post, 16, 10)
        capacity = statistics.median(measure(post, 16, 5).rate for _ in range(3))
        parts, started = max(4, int(seconds / 30)), time.monotonic()
        memory: dict[str, list[float]] = {"replicas": [], "all": []}
        for part in range(parts):
            result = measure(post, 32, seconds / parts, rate=0.8 * capacity)
            memory["replicas"].append(resident(replicas_of(pid)))
            memory["all"].append(resident([pid, *descendants(pid)]))
            held = "  ".join(f"{name} {values[-1]:.0f} MB" for name, values in memory.items())
            print(f"{time.monotonic() - started:6.0f} s  {result}  {held}  {load_average()}", flush=True)
            if set(result.codes) != {200}:
                raise SystemExit(f"part {part} had errors: {result.codes}")
        growth = {name: max(values[parts // 4 :]) / values[parts // 4] - 1 for name, values in memory.items()}
        print(json.dumps({"capacity": capacity, "memory_growth": growth}))


def main() -> None:
    """Run the measurements that the command line selects."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of each measurement")
    parser.add_argument("--kinds", nargs="+", default=["bare", "haproxy", "ray", "plain"])
    parser.add_argument("--only", choices=["compare", "cluster", "overload", "autoscale", "soak"])
    parser.add_argument("--serve", choices=["bare", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwinds, so that the servers end too
    model = str(Path(options.model).resolve()) if "://" not in options.model else options.model
    if options.serve:
        {"bare": bare, "plain": plain_serve}[options.serve](model, options.port)
        return
    shows = {"cluster": cluster, "overload": overload, "autoscale": autoscale, "soak": soak}
    if options.only in (None, "compare"):
        side_by_side(model, options.seconds, options.kinds)
    for name, show in shows.items():
        if options.only == name or (options.only is None and name != "soak"):
            show(model, options.seconds)


if __name__ == "__main__":
    main()
