"""A roll-back while a night and a service run, each a process of its own: no request fails, no night mixes models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from btray.phantoms import write_data_set
from btray.results import current
from btray.serving.job import free_port
from tests.conftest import ROOT
from tests.helpers.registry_helpers import IDS, models, new_bundle
from tests.helpers.serving_helpers import scan
from tools.processes import until

pytestmark = [pytest.mark.soak, pytest.mark.cluster, pytest.mark.timeout(1800)]


def test_a_roll_back_while_a_night_and_a_service_run(tmp_path: Path) -> None:
    registry = str(tmp_path / "models" / "brain-mri")
    for seed in (1, 2):
        models("promote", registry, model=new_bundle(str(tmp_path), seed), why=f"model {seed}")
    write_data_set(str(tmp_path / "scans"), per_class=200, seed=1)
    environment = os.environ | {
        "RAY_ADDRESS": "local",
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(ROOT),
        "BTRAY_MODEL": f"{registry}@production",
    }
    port = free_port()
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), f"--port={port}", "--replicas.max-replicas=1"]
    with open(tmp_path / "serve.log", "w") as log:
        service = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    url, stop, answers = f"http://127.0.0.1:{port}", threading.Event(), list[tuple[int, str]]()

    def ready() -> bool:
        try:
            return requests.get(f"{url}/readyz", timeout=5).status_code == 200
        except requests.RequestException:
            assert service.poll() is None, (tmp_path / "serve.log").read_text()
            return False

    def hammer() -> None:
        while not stop.is_set():
            answer = requests.post(f"{url}/v1/classify", scan(), headers={"Content-Type": "image/jpeg"}, timeout=120)
            answers.append((answer.status_code, answer.json().get("model_id", "")))

    night_command = [sys.executable, str(ROOT / "jobs" / "classify.py"), f"--input={tmp_path}/scans"]
    night_command += [f"--output={tmp_path}/results", "--actors=1"]
    try:
        until(ready, seconds=600)
        with ThreadPoolExecutor(2) as pool:
            hammers = [pool.submit(hammer) for _ in range(2)]
            night = subprocess.Popen(night_command, env=environment, stderr=subprocess.PIPE, text=True)
            assert night.stderr
            for line in night.stderr:  # the log says so before anything is classified
                if f"@production is model {IDS[2]}" in line:
                    break
            models("roll-back", registry, why="while both run")
            service.send_signal(signal.SIGHUP)
            until(lambda: answers and answers[-1][1] == IDS[1], seconds=600)
            night.stderr.read()
            assert night.wait(600) == 0
            stop.set()
            for future in hammers:
                future.result()
    finally:
        stop.set()
        service.send_signal(signal.SIGTERM)
        service.wait(120)
    assert {status for status, _ in answers} == {200}
    assert {model for _, model in answers} == {IDS[1], IDS[2]}
    rows = current(str(tmp_path / "results"), columns=["uri"])
    assert len(rows) == 1000
    assert set(rows["model_id"].to_pylist()) == {IDS[2]}, "the night kept the model that it began with"
