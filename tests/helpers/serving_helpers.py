"""The service over real HTTP, without Ray: the routes behind uvicorn in a thread, for tests that need no replicas."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import requests
import uvicorn
from PIL import Image

from btray.phantoms import encoded_phantom
from btray.serving.app import build_app
from btray.serving.config import ServiceConfig
from btray.serving.gate import Gate
from btray.serving.service import Service
from tests.helpers.hostile_bodies import Hostile
from tests.helpers.tiny_bundle import saved_bundle
from tools.processes import until

PNG = "image/png"
SLOWEST = 15.0  # seconds that one answer may take on a busy machine


class Running:
    """A service that runs, and a client of it."""

    def __init__(self, service: Service, gate: Gate, loop: asyncio.AbstractEventLoop, port: int) -> None:
        self.service = service
        self.gate = gate
        self.loop = loop
        self.url = f"http://127.0.0.1:{port}"
        self.session = requests.Session()

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.session.get(self.url + path, timeout=60, **options)

    def post(self, path: str, data: Any = None, kind: str | None = None, **options: Any) -> requests.Response:
        headers = options.pop("headers", {}) | ({"Content-Type": kind} if kind else {})
        return self.session.post(self.url + path, data=data, headers=headers, timeout=60, **options)

    def configure(self, **config: Any) -> None:
        """As Serve does where user_config was changed."""
        done = asyncio.run_coroutine_threadsafe(self.service.models.configure(ServiceConfig(**config)), self.loop)
        done.result(60)

    def switched(self) -> dict[str, str]:
        """What became of the latest switch, once something has."""

        def ended() -> Any:
            switch = self.get("/v1/models").json()["switch"]
            return switch if switch["state"] != "loading" else None

        return until(ended)

    def served(self) -> list[str]:
        return [model["model_id"] for model in self.get("/v1/models").json()["models"]]


class TextsInMemory:
    """What `ClusterTexts` keeps in a Ray cluster, for replicas of one process without one."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def names(self, start: str) -> list[str]:
        return sorted(name for name in self.texts if name.startswith(start))

    def get(self, name: str) -> str:
        return self.texts.get(name, "")

    def put(self, name: str, text: str, *, replace: bool) -> None:
        if replace:
            self.texts[name] = text
        self.texts.setdefault(name, text)


@contextmanager
def running(*, port: int = 0, **config: Any) -> Iterator[Running]:
    """The service of a ServiceConfig, on a port of loopback, by default a free one."""
    service = Service()
    gate = build_app(service)
    ready = threading.Event()
    found: dict[str, Any] = {}

    async def run() -> None:
        found["loop"] = asyncio.get_running_loop()
        await service.models.configure(ServiceConfig(**config))
        options = uvicorn.Config(gate, host="127.0.0.1", port=port, log_level="warning")
        found["server"] = server = uvicorn.Server(options)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        found["port"] = server.servers[0].sockets[0].getsockname()[1]
        ready.set()
        await task

    def main() -> None:
        try:
            asyncio.run(run())
        except Exception as error:
            found["error"] = error
            ready.set()

    thread = threading.Thread(target=main)
    thread.start()
    ready.wait(60)
    try:
        if "error" in found:
            raise found["error"]
        yield Running(service, gate, found["loop"], found["port"])
    finally:
        if "server" in found:
            found["server"].should_exit = True
        thread.join(30)


def bundle_at(folder: Path, name: str, **options: Any) -> str:
    """A tiny bundle in `folder`."""
    path = folder / name
    saved_bundle(path, **options)
    return str(path)


@lru_cache(64)
def scan(seed: int = 1, label: str = "glioma") -> bytes:
    return encoded_phantom(label, seed)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pages(count: int) -> bytes:
    """A TIFF of so many small pages."""
    file = io.BytesIO()
    first, *others = [Image.fromarray(np.full((16, 16), number % 256, np.uint8)) for number in range(count)]
    first.save(file, "TIFF", save_all=True, append_images=others)
    return file.getvalue()


def problem(answer: requests.Response, status: int, code: str) -> dict[str, Any]:
    """The problem that an answer must be."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    content = answer.json()
    assert (content["status"], content["code"]) == (status, code), content
    assert content["detail"] == content["error"]
    return content


def status_of_raw(url: str, body: bytes) -> int:
    """The status of an answer; 0 where the connection was closed without one, which bad HTTP deserves."""
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), SLOWEST) as client:
        try:
            client.sendall(body)
            client.shutdown(socket.SHUT_WR)
            answer = client.recv(100)
        except (ConnectionResetError, BrokenPipeError):
            return 0
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.") else 0


def status_of(url: str, hostile: Hostile) -> int:
    """The same of a request that may be HTTP; an error must be a problem, but for STOW-RS's own answer."""
    if hostile.raw:
        return status_of_raw(url, hostile.body)
    headers = {name: value.encode("latin-1") for name, value in hostile.headers.items() if value}
    try:
        with requests.Session() as session:
            answer = session.post(url + hostile.path, hostile.body, headers=headers, timeout=SLOWEST)
    except requests.ConnectionError:
        return 0  # refused while the body was still on its way
    if answer.status_code >= 400 and (answer.status_code, hostile.path[:9]) != (409, "/dicomweb"):
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json()["code"]
    return answer.status_code
