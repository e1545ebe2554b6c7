"""The job itself, behind HAProxy as users run it: who reaches it, drains, switches, grows and shrinks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from ray.util import get_node_ip_address

from btray.serving.access import make_key
from btray.serving.config import is_loopback
from btray.serving.job import free_port
from tests.conftest import ROOT
from tests.helpers.serving_helpers import bundle_at, problem, scan
from tests.helpers.serving_load import JPEG, Served, replicas, under_load
from tests.helpers.tiny_bundle import saved_bundle
from tools.processes import listened_on, named, until

pytestmark = [pytest.mark.soak, pytest.mark.cluster]


@dataclass
class Job:
    """A running jobs/serve.py."""

    process: subprocess.Popen[str]
    served: Served
    log: Path

    def end(self) -> str:
        """Its last line, once it has ended as it was told."""
        self.process.send_signal(signal.SIGTERM)
        said, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, self.log.read_text()
        return said.splitlines()[-1]

    @property
    def port(self) -> int:
        return int(self.served.url.rpartition(":")[2])

    def listens(self, word: bytes) -> set[tuple[str, int]]:
        """Addresses and ports that its processes of this name listen on."""
        return listened_on(named(word, self.process.pid))


@contextmanager
def running_job(folder: Path, url: str, *flags: str) -> Iterator[Job]:
    """The job on a tiny bundle at `folder`/model, once it is ready; `url` is where it is asked, without the port."""
    port = free_port()
    command = [sys.executable, "jobs/serve.py", "--model", bundle_at(folder, "model"), "--port", str(port), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )  # fmt: skip
    job = Job(process, Served(f"{url}:{port}", ""), folder / "log")
    try:
        until(lambda: process.poll() is not None or _ready(job.served), seconds=120)
        assert process.poll() is None, job.log.read_text()
        yield job
    finally:
        process.kill()
        process.wait()


def _ready(served: Served) -> bool:
    try:
        return served.session.get(served.url + "/readyz", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def test_the_job_serves_behind_a_haproxy_that_only_this_machine_reaches(tmp_path: Path) -> None:
    with running_job(tmp_path, "http://127.0.0.1", "--replicas.min-replicas", "2") as job:
        assert job.served.classify(scan()).status_code == 200
        own = job.listens(b"haproxy.cfg")
        assert len(own) >= 3, "HAProxy does not run"
        assert {address for address, _ in own} == {"127.0.0.1"}, own
        before = job.served.models()["models"][0]["model_id"]
        with under_load(job.served) as load:
            saved_bundle(tmp_path / "model", seed=21)
            job.process.send_signal(signal.SIGHUP)
            until(lambda: load.answers[-1][1] != before, seconds=60)
            manifest = (tmp_path / "model" / "bundle.json").rename(tmp_path / "bundle.json")
            job.process.send_signal(signal.SIGHUP)
            until(lambda: "all stays as it was" in job.log.read_text(), seconds=60)
        assert (load.retried, load.lost) == (0, 0)
        manifest.rename(tmp_path / "model" / "bundle.json")
        with under_load(job.served) as load:
            killed = replicas(job.process.pid)[0]
            os.kill(killed, signal.SIGKILL)
            until(lambda: len(replicas(job.process.pid)) == 2, seconds=90)
        assert load.lost == 0
        assert job.end() == job.served.url
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended are no listener
        probe.bind(("127.0.0.1", job.port))


def test_open_to_others_haproxy_alone_listens_and_replicas_come_and_go_with_the_load(tmp_path: Path) -> None:
    address = get_node_ip_address()
    if is_loopback(address):
        pytest.skip(f"this machine has no address but {address}: whether others reach it is NOT shown here")
    key = make_key(str(tmp_path / "keys"), "radiology")
    flags = ["--host", "0.0.0.0", "--keys", str(tmp_path / "keys"), "--replicas.max-replicas", "2"]
    quick = ["--replicas.upscale-delay", "1", "--replicas.downscale-delay", "3"]
    with running_job(tmp_path, f"http://{address}", *flags, *quick) as job:
        problem(job.served.classify(scan()), 401, "unauthorized")
        job.served.headers = JPEG | {"Authorization": f"Bearer {key}"}
        assert job.served.classify(scan()).status_code == 200
        open_to_all = [listener for listener in job.listens(b"haproxy.cfg") if listener[0] != "127.0.0.1"]
        assert open_to_all == [("0.0.0.0", job.port)]
        ingress = [listener for listener in job.listens(b"ServeReplica:btray") if 30_000 <= listener[1] < 30_100]
        assert ingress
        assert {address for address, _ in ingress} == {"127.0.0.1"}, ingress
        assert len(replicas(job.process.pid)) == 1
        with under_load(job.served, clients=24) as load:
            until(lambda: len(replicas(job.process.pid)) == 2, seconds=60)
        until(lambda: len(replicas(job.process.pid)) == 1, seconds=120)
        assert load.lost == 0
        job.end()


@pytest.mark.parametrize(
    ("url", "flags"),
    [("http://[::1]", ["--host", "::1"]), ("http://127.0.0.1", ["--proxy", "ray"])],
    ids=["haproxy", "ray"],
)
def test_what_is_asked_when_the_end_is_told_is_answered(tmp_path: Path, url: str, flags: list[str]) -> None:
    with running_job(tmp_path, url, *flags, "--replicas.min-replicas", "2") as job:
        for name in ("X-Request-ID", "X-Request-Timeout-Seconds"):
            answer = requests.post(job.served.url + "/v1/classify", scan(), headers={**JPEG, name: b"\xff"}, timeout=30)
            problem(answer, 400, "bad_request")
        go_on = threading.Event()
        sent = threading.Semaphore(0)

        def slow_body() -> Iterator[bytes]:
            start = b'--b\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
            yield start + bytes(12_000_000) + b"\r\n"  # more than the buffers on the way hold
            sent.release()
            go_on.wait(60)
            yield start + scan() + b"\r\n--b--\r\n"

        def ask() -> requests.Response:
            headers = {"Content-Type": "multipart/form-data; boundary=b"}
            return requests.post(job.served.url + "/v1/classify", slow_body(), headers=headers, timeout=60)

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask) for _ in range(4)]
            for _ in asked:
                assert sent.acquire(timeout=30)
            job.process.send_signal(signal.SIGTERM)
            until(lambda: "draining" in job.log.read_text(), seconds=20)
            time.sleep(2)  # the end goes on meanwhile
            go_on.set()
            for answer in asked:
                assert [result["status"] for result in answer.result().json()["results"]] == ["rejected", "ok"]
        job.process.wait(60)
        assert job.process.returncode == 0
