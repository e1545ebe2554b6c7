"""Ray clusters of several nodes on this machine, for tests that kill nodes: every node has its own processes and ports.

A cluster does not touch any other Ray on the machine: it has its own folder and ports, and kills only processes that it
started, by their ids.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tools.processes import descendants, is_alive, until

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Return `count` different ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@dataclass
class Node:
    """One `ray start --block` and all of its descendants."""

    process: subprocess.Popen[bytes]

    def pids(self) -> set[int]:
        """Return the ids of the node's processes."""
        return descendants(self.process.pid) | {self.process.pid}

    def kill(self) -> None:
        """Kill all of its processes at once, like a power failure."""
        for pid in self.pids():
            if is_alive(pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        self.process.wait()


class LoopbackCluster:
    """A head with `cpus` CPUs and the nodes of `add`; `settings` are further environment variables of all nodes."""

    def __init__(self, *, cpus: int = 1, settings: dict[str, str] | None = None) -> None:
        self.cpus = cpus
        self.folder = Path(tempfile.mkdtemp(prefix="rb", dir="/tmp"))  # short: Unix sockets are in it
        self.port, self.dashboard, self.metrics = free_ports(3)
        self.nodes: list[Node] = []
        self._started: set[int] = set()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "BTRAY_"))},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(self.folder),
            "RAY_AUTH_MODE": "disabled",
            "RAY_worker_niceness": "0",  # 15 as it comes: on a busy machine workers would hardly run
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            # Count a silent node as dead after seconds instead of half a minute.
            "RAY_health_check_initial_delay_ms": "3000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "4",
            **(settings or {}),
        }

    @property
    def address(self) -> str:
        """The address of the head, for RAY_ADDRESS."""
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> LoopbackCluster:
        try:
            self.start_head()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in reversed(self.nodes):
            self._started |= node.pids()
        for node in reversed(self.nodes):
            node.kill()
        for pid in filter(is_alive, self._started):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_head(self) -> Node:
        """Start the head, for the first time or after it was killed; the ports stay the same."""
        # A killed head leaves its address here, and Ray counts it as running while any of its nodes is on this machine.
        (self.folder / "ray" / "ray_current_cluster").unlink(missing_ok=True)
        client, *agents = free_ports(4)
        node = self._start(
            "--head", f"--port={self.port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}",
            f"--ray-client-server-port={client}", f"--metrics-export-port={self.metrics}", f"--num-cpus={self.cpus}",
            agents=agents,
        )  # fmt: skip
        until(lambda: self._answers(node), "the head's dashboard", 90)
        return node

    def add(self, *, cpus: int = 1, **resources: float) -> Node:
        """Add a node and wait until it has joined."""
        before = set(self.node_ids())
        more = [f"--resources={json.dumps(resources)}"] if resources else []
        node = self._start(f"--address={self.address}", f"--num-cpus={cpus}", *more, agents=free_ports(3))
        until(lambda: set(self.node_ids()) - before, "a node to join", 90)
        return node

    def _start(self, *options: str, agents: list[int]) -> Node:
        names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
        ports = [f"--{name}={port}" for name, port in zip(names, agents, strict=True)]
        command = [str(BIN / "ray"), "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
        command += ["--object-store-memory=150000000", *options, *ports]
        log = (self.folder / f"node{len(self.nodes)}.log").open("wb")
        with log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, cwd=self.folder)
        node = Node(process)
        self.nodes.append(node)
        return node

    def _answers(self, node: Node) -> bool:
        if node.process.poll() is not None:
            raise RuntimeError((self.folder / f"node{len(self.nodes) - 1}.log").read_text())
        try:
            self.get("/api/version")
            return self.alive() > 0
        except OSError:
            return False

    def get(self, path: str) -> Any:
        """Return JSON from the dashboard.

        Raises:
            OSError: the dashboard does not answer.
        """
        with urllib.request.urlopen(f"http://127.0.0.1:{self.dashboard}{path}", timeout=10) as answer:
            return json.load(answer)

    def alive(self) -> int:
        """Return how many nodes Ray counts as alive."""
        summary = self.get("/nodes?view=summary")["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in summary)

    def node_ids(self) -> list[str]:
        """Return the ids of the nodes that are alive, the head's first."""
        summary = self.get("/nodes?view=summary")["data"]["summary"]
        living = [node["raylet"] for node in summary if node["raylet"].get("state") == "ALIVE"]
        return [node["nodeId"] for node in sorted(living, key=lambda node: not node.get("isHeadNode", False))]

    def environment_of_jobs(self) -> dict[str, str]:
        """Return the environment in which a job on this machine finds the cluster."""
        return self.environment | {"RAY_ADDRESS": self.address}

    def ray(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run the `ray` command against this cluster."""
        environment = self.environment | {
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "RAY_ADDRESS": self.address,
        }
        return subprocess.run(
            [str(BIN / "ray"), *arguments], env=environment, cwd=ROOT, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip
