"""Models are promoted and rolled back while a night and a service run: no request fails, no night mixes models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest
import requests

from btray.bulk.classify import classify
from btray.results import current
from btray.serving import job as serving
from btray.serving.config import ReplicasConfig, ServeConfig
from tests.conftest import ROOT
from tests.helpers.classify_helpers import job, write_objects
from tests.helpers.registry_helpers import models, promoted
from tests.helpers.serving_helpers import bundle_at, scan
from tests.helpers.serving_load import Served, replica_states, under_load
from tools.processes import until

pytestmark = pytest.mark.cluster


@pytest.fixture
def registry(tmp_path: Path) -> str:
    """A registry in which a model was promoted, then another."""
    uri = str(tmp_path / "models" / "brain-mri")
    for seed in (1, 2):
        models("promote", uri, model=bundle_at(tmp_path, f"run-{seed}", seed=seed), why=f"model {seed}")
    return uri


@pytest.fixture
def served(ray_session: None, registry: str) -> Iterator[Served]:
    """One replica, which leaves a CPU to the night."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    port = serving.free_port()
    serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(port=port))
    made = Served(f"http://127.0.0.1:{port}", f"{registry}@production")
    try:
        deploy_promoted(made)
        until(lambda: replica_states() == {"RUNNING": 1}, "one replica", seconds=300)
        yield made
    finally:
        serve.shutdown()


def deploy_promoted(served: Served) -> None:
    """Give the replica what jobs/serve.py does when it starts or reads its config again."""
    one = ReplicasConfig(min_replicas=1, max_replicas=1)
    served.deploy(one, **serving._verified(ServeConfig(model=served.model)).model_dump())


def test_a_roll_back_while_a_night_and_a_replica_run(served: Served, registry: str, tmp_path: Path) -> None:
    new, results = promoted(registry), tmp_path / "results"
    write_objects(str(tmp_path / "scans"), {f"{number}.jpg": scan(number % 8) for number in range(200)})

    def roll_back() -> None:
        until(lambda: any(results.glob("_runs/*")))  # the night has begun, and its actors have not: they take seconds
        models("roll-back", registry, why="while both run")
        assert not any(results.rglob("*.parquet")), "the night was over too soon to show anything"
        deploy_promoted(served)

    with under_load(served, clients=2) as load, ThreadPoolExecutor(1) as pool:
        rolled_back = pool.submit(roll_back)
        classify(job(served.model, str(tmp_path / "scans"), str(results)))
        rolled_back.result()
        old = promoted(registry)
        until(lambda: load.answers[-1][1] == old)
    assert (load.retried, load.lost) == (0, 0)
    assert {model_id for _, model_id in load.answers} == {new, old}
    rows = current(str(results), columns=["model_id"])
    assert len(rows) == 200
    assert set(rows["model_id"].to_pylist()) == {new}, "the night keeps the model that it began with"


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_promotions_without_end_while_nights_and_a_service_run(registry: str, tmp_path: Path) -> None:
    """Each a process of its own: a service that reads its config again at every promotion, and four nights."""
    second = str(promoted(registry))
    models("roll-back", registry, why="to know the first")
    first = str(promoted(registry))
    write_objects(str(tmp_path / "scans"), {f"{number}.jpg": scan(number % 8) for number in range(2000)})
    environment = os.environ | {
        "RAY_ADDRESS": "local",
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(ROOT),
        "BTRAY_MODEL": f"{registry}@production",
    }
    stop, answers, promotions = threading.Event(), list[tuple[int, str]](), list[str]()
    with service(environment, tmp_path / "serve.log") as (url, process), ThreadPoolExecutor(3) as pool:

        def promote() -> None:
            for model_id in cycle((second, first)):
                if stop.is_set():
                    return
                models("promote", registry, model=model_id, why="once more")
                promotions.append(model_id)
                process.send_signal(signal.SIGHUP)
                until(lambda model_id=model_id: stop.is_set() or answers[-1][1] == model_id, seconds=300)

        beside = [pool.submit(ask, f"{url}/v1/classify", stop, answers) for _ in range(2)]
        try:
            until(lambda: answers)
            beside.append(pool.submit(promote))
            for number in range(4):
                before = len(promotions)
                night(environment, str(tmp_path / "scans"), str(tmp_path / f"results-{number}"))
                assert len(promotions) > before, "nothing was promoted while it ran"
        finally:
            stop.set()
        for future in beside:
            future.result()
    assert {status for status, _ in answers} == {200}
    assert {model for _, model in answers} == {first, second}


@contextmanager
def service(environment: dict[str, str], log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run jobs/serve.py; yield its URL once it answers, and the process."""
    port = serving.free_port()
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), f"--port={port}", "--replicas.max-replicas=1"]
    with open(log, "w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)

    def ready() -> bool:
        try:
            return requests.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200
        except requests.RequestException:
            assert process.poll() is None, log.read_text()
            return False

    try:
        until(ready, seconds=600)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def ask(url: str, stop: threading.Event, answers: list[tuple[int, str]]) -> None:
    """Send one request after the other, and keep status and model of each answer."""
    while not stop.is_set():
        answer = requests.post(url, scan(), headers={"Content-Type": "image/jpeg"}, timeout=120)
        answers.append((answer.status_code, answer.json().get("model_id", "")))


def night(environment: dict[str, str], scans: str, results: str) -> None:
    """Run jobs/classify.py; all its rows must be of the model that it named when it began."""
    command = [sys.executable, str(ROOT / "jobs" / "classify.py"), f"--input={scans}", f"--output={results}"]
    command.append("--actors=1")
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 0, ended.stderr
    rows = current(results, columns=["model_id"])
    assert len(rows) == 2000
    (model_id,) = set(rows["model_id"].to_pylist())
    assert f"@production is model {model_id}" in ended.stderr
