"""A service on Ray Serve, and clients that keep it busy, for the tests that need replicas."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import requests

from btray.serving.config import ReplicasConfig, ServiceConfig
from tests.helpers.serving_helpers import scan
from tools.processes import named, until

JPEG = {"Content-Type": "image/jpeg"}


@dataclass
class Served:
    """A running application."""

    url: str
    model: str
    session: requests.Session = field(default_factory=requests.Session)
    headers: dict[str, str] = field(default_factory=lambda: dict(JPEG))

    def deploy(self, replicas: ReplicasConfig | None = None, **service: Any) -> None:
        from btray.serving.job import deploy

        config = ServiceConfig(**{"model": self.model, **service})
        deploy(replicas or ReplicasConfig(min_replicas=2, max_replicas=2), config)

    def wait(self) -> None:
        until(lambda: replica_states() == {"RUNNING": 2}, seconds=180)

    def classify(self, data: bytes) -> requests.Response:
        return self.session.post(self.url + "/v1/classify", data, headers=self.headers, timeout=60)

    def models(self) -> dict[str, Any]:
        return self.session.get(self.url + "/v1/models", timeout=60).json()


def replica_states() -> dict[str, int]:
    """Return the number of replicas in each state; none unless the application runs."""
    from ray import serve

    from btray.serving.job import APPLICATION

    application = serve.status().applications[APPLICATION]
    return dict(application.deployments["Classifier"].replica_states) if application.status == "RUNNING" else {}


@dataclass
class Load:
    """Clients that send requests as fast as they are answered, and retry failed ones."""

    served: Served
    answers: list[tuple[int, str]] = field(default_factory=list)
    retried: int = 0
    lost: int = 0
    body: bytes = field(default_factory=scan)

    def client(self, stop: threading.Event) -> None:
        with requests.Session() as session:
            while not stop.is_set():
                for _ in range(10):
                    try:
                        answer = session.post(
                            self.served.url + "/v1/classify", self.body, headers=self.served.headers, timeout=30
                        )
                    except (requests.ConnectionError, requests.ReadTimeout):
                        answer = None  # retried, and lost after the last try: as a replica that never answers is
                    if answer is not None and answer.status_code == 200:
                        self.answers.append((200, answer.json()["model_id"]))
                        break
                    self.retried += 1
                    time.sleep(0.2)
                else:
                    self.lost += 1


@contextmanager
def under_load(served: Served, clients: int = 3, **options: Any) -> Iterator[Load]:
    load, stop = Load(served, **options), threading.Event()
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
    """Return the ids of the replicas that descend from a process; by default those of this test's own Serve."""
    return named(b"ServeReplica:btray", root or os.getpid())
