"""On real Ray Serve: answers equal the archive's; switches and killed replicas cost no request; metrics are there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from btray.bulk import classify
from btray.classifier import Classifier
from btray.errors import UserError
from btray.results import current
from btray.settings_serve import ReplicasConfig, ServeConfig, ServiceConfig
from tests.classify_helpers import job, write_objects
from tests.conftest import ROOT
from tests.scan_corpus import bad_scans, good_scans
from tests.serving_helpers import bundle_at, scan
from tests.tiny_bundle import saved_bundle
from tools.processes import named, until

JPEG = {"Content-Type": "image/jpeg"}


@dataclass
class Served:
    """A running application."""

    url: str
    model: str
    session: requests.Session = field(default_factory=requests.Session)

    def deploy(self, **service: Any) -> None:
        from btray.serving import deploy

        config = ServiceConfig(**{"model": self.model, **service})
        deploy(ReplicasConfig(min_replicas=2, max_replicas=2), config)

    def wait(self) -> None:
        from ray import serve

        from btray.serving import APPLICATION

        def running() -> bool:
            application = serve.status().applications[APPLICATION]
            states = application.deployments["Classifier"].replica_states if application.deployments else {}
            return application.status == "RUNNING" and states == {"RUNNING": 2}

        until(running, seconds=90)

    def classify(self, data: bytes) -> requests.Response:
        return self.session.post(self.url + "/v1/classify", data, headers=JPEG, timeout=60)

    def models(self) -> dict[str, Any]:
        return self.session.get(self.url + "/v1/models", timeout=60).json()


@pytest.fixture(scope="module")
def objects() -> dict[str, bytes]:
    return {name: data for name, (data, _) in list(bad_scans().items())[:12]} | good_scans()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bundle_at(tmp_path_factory.mktemp("bundle"), "model")


@pytest.fixture(scope="module")
def rows(
    ray_session: None, model: str, objects: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """What bulk classification says of `objects`, by name; it has run before the replicas take all CPUs."""
    folder = tmp_path_factory.mktemp("archive")
    write_objects(str(folder / "scans"), objects)
    classify(job(model, str(folder / "scans"), str(folder / "table"), actors=1))
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(current(str(folder / "table")).to_pylist(), key=lambda row: row["frame"]):
        found.setdefault(Path(row["uri"]).name, []).append(row)
    return found


@pytest.fixture(scope="module")
def served(rows: dict[str, list[dict[str, Any]]], model: str) -> Iterator[Served]:
    from ray import serve
    from ray.serve.config import HTTPOptions

    from btray.serving import free_port

    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host="127.0.0.1", port=port))
    made = Served(f"http://127.0.0.1:{port}", model)
    made.deploy()
    made.wait()
    yield made
    serve.shutdown()


@dataclass
class Load:
    """Clients that ask as fast as they are answered, each again where it is not."""

    served: Served
    answers: list[tuple[int, str]] = field(default_factory=list)
    retried: int = 0
    lost: int = 0

    def client(self, stop: threading.Event) -> None:
        with requests.Session() as session:
            while not stop.is_set():
                for _ in range(10):
                    try:
                        answer = session.post(self.served.url + "/v1/classify", scan(), headers=JPEG, timeout=30)
                    except requests.ConnectionError:
                        answer = None
                    if answer is not None and answer.status_code == 200:
                        self.answers.append((200, answer.json()["model_id"]))
                        break
                    self.retried += 1
                    time.sleep(0.2)
                else:
                    self.lost += 1


@contextmanager
def under_load(served: Served, clients: int = 3) -> Iterator[Load]:
    load, stop = Load(served), threading.Event()
    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(load.client, stop) for _ in range(clients)]
        try:
            until(lambda: len(load.answers) > 5)
            yield load
            seen = len(load.answers)
            until(lambda: len(load.answers) > seen + 20)
        finally:
            stop.set()
        for future in running:
            future.result()


def replicas(root: int | None = None) -> list[int]:
    """Process ids of the replicas below a process; by default those of this test's own Serve."""
    return named(b"ServeReplica:btray", root or os.getpid())


@pytest.mark.cluster
def test_answers_equal_those_of_bulk_classification(
    served: Served, objects: dict[str, bytes], rows: dict[str, list[dict[str, Any]]]
) -> None:
    for name, data in objects.items():
        answer = served.classify(data)
        if rows[name][0]["status"] == "rejected":
            assert answer.json()["code"] == rows[name][0]["error_code"], name
            continue
        results = answer.json()["results"]
        assert len(results) == len(rows[name]), name
        for result, row in zip(results, rows[name], strict=True):
            assert (result["label"], result["model_id"]) == (row["label"], row["model_id"]), name
            assert result["probabilities"] == pytest.approx(dict(row["probabilities"]), abs=1e-5), name
            assert (result["abstained"], result["out_of_distribution"]) == (
                row["abstained"],
                row["out_of_distribution"],
            )


@pytest.mark.cluster
def test_a_switch_under_load_costs_no_request_and_a_bad_bundle_changes_nothing(served: Served, tmp_path: Path) -> None:
    other = bundle_at(tmp_path, "other", seed=5)
    wanted = Classifier.load(other).model_id
    before = sorted(replicas())
    with under_load(served) as load:
        served.deploy(model=other)
        until(lambda: load.answers[-1][1] == wanted)
        until(lambda: all(model_id == wanted for _, model_id in load.answers[-30:]))
        served.deploy(model=str(tmp_path / "nothing"))
        until(lambda: "no model bundle" in served.models()["switch"]["detail"])
        seen = len(load.answers)
        until(lambda: len(load.answers) > seen + 30)
        assert {model_id for _, model_id in load.answers[seen:]} == {wanted}
        served.deploy()
    assert (load.retried, load.lost) == (0, 0)
    assert sorted(replicas()) == before, "a switch is no restart"


@pytest.mark.cluster
def test_a_replica_killed_under_load_costs_retries_and_no_request(served: Served) -> None:
    until(lambda: len(replicas()) == 2)
    with under_load(served) as load:
        killed = replicas()[0]
        os.kill(killed, signal.SIGKILL)
        until(lambda: killed not in replicas())
        until(lambda: len(replicas()) == 2, seconds=60)
    assert load.lost == 0
    assert load.retried < 30


@pytest.mark.cluster
def test_monitoring_finds_every_number_of_all_replicas(served: Served) -> None:
    for data in (scan(), b"no image"):
        served.classify(data)
    names = [
        "requests_total",
        "latency_seconds_bucket",
        "batch_size_bucket",
        "queue",
        "predictions_total",
        "rejects_total",
    ]

    def all_there() -> str | None:
        text = served.session.get(served.url + "/metrics", timeout=30).text
        return text if all(f"btray_serve_{name}{{" in text for name in names) else None

    text = until(all_there, seconds=60)
    assert re.search(r'btray_serve_requests_total\{.*code="400".*route="/v1/classify"', text)
    assert re.search(r'btray_serve_rejects_total\{.*code="not_an_image"', text)
    families = re.findall(r"# TYPE (\S+)", text)
    assert len(families) == len(set(families)), "a family stands twice, which Prometheus refuses"


# ---- the job, and the files of a deployment


def test_wrong_use_is_told_before_anything_starts(tmp_path: Path) -> None:
    import socket

    from btray.serving import run_service

    model = bundle_at(tmp_path, "model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for flags, said in (
            ({"model": str(tmp_path / "nothing")}, "no model bundle"),
            ({"model": model, "model_id": "0" * 32}, "not the pinned"),
            ({"model": model, "canary": {"model": str(tmp_path / "other")}}, "no model bundle"),
            ({"model": model, "keys": str(tmp_path / "no keys")}, "no keys"),
            ({"model": model, "port": taken.getsockname()[1]}, "cannot listen"),
        ):
            with pytest.raises(UserError, match=said):
                run_service(ServeConfig(**flags), lambda: ServeConfig(model=model))


def test_an_open_address_is_refused_by_the_job_itself() -> None:
    command = [sys.executable, "jobs/serve.py", "--model", "m", "--host", "0.0.0.0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2
    assert "--insecure" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_serve_yaml_is_what_the_application_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    from btray.serving import DEPLOYMENT, application

    content = yaml.safe_load((ROOT / "serve.yaml").read_text(encoding="utf-8"))
    (app,) = ServeDeploySchema.model_validate(content).applications
    (deployment,) = app.deployments
    assert app.import_path == "btray.serving:application"
    assert deployment.name == DEPLOYMENT
    assert ServiceConfig.model_validate(deployment.user_config)
    assert application(app.args)
    with pytest.raises(UserError, match="modle"):
        application({"modle": "x"})


@pytest.mark.soak
@pytest.mark.cluster
def test_the_job_serves_behind_a_haproxy_that_only_this_machine_reaches(tmp_path: Path) -> None:
    import socket

    from btray.serving import free_port

    port = free_port()
    flags = ["--model", bundle_at(tmp_path, "model"), "--port", str(port), "--replicas.min-replicas", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "jobs/serve.py", *flags],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    served = Served(f"http://127.0.0.1:{port}", "")
    try:
        until(lambda: process.poll() is not None or _ready(served), seconds=120)
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert served.classify(scan()).status_code == 200
        proxies = named(b"haproxy.cfg", process.pid)
        assert proxies, "HAProxy does not run"
        listeners = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines()
        own = [line for line in listeners if any(f"pid={pid}," in line for pid in proxies)]
        assert len(own) >= 3
        assert all(line.split()[3].startswith("127.0.0.1:") for line in own), own
        before = served.models()["models"][0]["model_id"]
        with under_load(served) as load:
            saved_bundle(tmp_path / "model", seed=21)
            process.send_signal(signal.SIGHUP)
            until(lambda: load.answers[-1][1] != before, seconds=60)
            manifest = (tmp_path / "model" / "bundle.json").rename(tmp_path / "bundle.json")
            process.send_signal(signal.SIGHUP)
            until(lambda: "all stays as it was" in (tmp_path / "log").read_text(), seconds=60)
        assert (load.retried, load.lost) == (0, 0)
        manifest.rename(tmp_path / "model" / "bundle.json")
        with under_load(served) as load:
            killed = replicas(process.pid)[0]
            os.kill(killed, signal.SIGKILL)
            until(lambda: len(replicas(process.pid)) == 2, seconds=90)
        assert load.lost == 0
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert said.splitlines()[-1] == served.url
    finally:
        process.kill()
        process.wait()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


def _ready(served: Served) -> bool:
    try:
        return served.session.get(served.url + "/readyz", timeout=5).status_code == 200
    except requests.RequestException:
        return False
