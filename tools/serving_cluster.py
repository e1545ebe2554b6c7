"""The service on a Ray cluster of two nodes on this machine, deployed with `serve deploy` behind HAProxy."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
import yaml

from tools.loopback_cluster import BIN, ROOT, LoopbackCluster, free_ports
from tools.processes import until

# As pip writes it for `project.scripts`; the environment of these tests may be older than the command.
_COMMAND = """#!{python}
import sys
from btray.serving.haproxy import command
sys.exit(command())
"""


@contextmanager
def serving_cluster(model: str, folder: Path) -> Iterator[tuple[str, LoopbackCluster]]:
    """Serve `model` with one replica on each of two nodes of one CPU; yield the URL and the cluster.

    As serve.yaml says, but for the numbers of replicas and HAProxy on the head alone: two on one machine would both
    listen on the same port.
    """
    port, *fixed = free_ports(4)
    names = ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT")
    ports = {f"RAY_SERVE_{name}": str(free) for name, free in zip(names, fixed, strict=True)}
    settings = haproxy_environment(folder) | ports
    content = yaml.safe_load((ROOT / "serve.yaml").read_text(encoding="utf-8"))
    content |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}
    (deployment,) = content["applications"][0]["deployments"]
    deployment["user_config"]["model"] = model
    deployment["autoscaling_config"] |= {"min_replicas": 2, "max_replicas": 2}
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    with LoopbackCluster(cpus=1, settings=settings) as cluster:
        cluster.add(cpus=1)
        deploy(cluster, config)
        url = f"http://127.0.0.1:{port}"
        # of which the import of the application alone may take a minute on a busy machine
        until(lambda: len(replica_nodes(cluster)) == 2 and _ready(url), "two replicas", 300)
        yield url, cluster


def deploy(cluster: LoopbackCluster, config: Path) -> None:
    """Run `serve deploy`, again if Serve's proxies are not there within its minute, as on a busy machine."""
    address = f"http://127.0.0.1:{cluster.dashboard}"
    command = [str(BIN / "serve"), "deploy", str(config), "--address", address]

    def deployed() -> bool:
        ended = subprocess.run(
            command, env=cluster.environment, capture_output=True, text=True, timeout=120, check=False
        )
        if ended.returncode and "not available after" not in ended.stderr:
            raise RuntimeError(f"serve deploy failed: {ended.stderr[-2000:]}")
        return ended.returncode == 0

    until(deployed, "serve deploy", 240)


def haproxy_environment(folder: Path) -> dict[str, str]:
    """Return what `btray-haproxy` prints for `ray start`, as a shell reads it."""
    command = folder / "btray-haproxy"
    command.write_text(_COMMAND.format(python=sys.executable), encoding="utf-8")
    command.chmod(0o755)
    printed = subprocess.run(
        [command], env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assignments = (shlex.split(line.removeprefix("export "))[0] for line in printed.splitlines())
    return dict(assignment.split("=", 1) for assignment in assignments)


def replica_nodes(cluster: LoopbackCluster) -> list[str]:
    """Return the node of each replica that runs."""
    applications = cluster.get("/api/serve/applications/")["applications"]
    deployments = applications["btray"]["deployments"] if "btray" in applications else {}
    replicas = deployments["Classifier"]["replicas"] if deployments else []
    return [replica["node_id"] for replica in replicas if replica["state"] == "RUNNING"]


def _ready(url: str) -> bool:
    try:
        return requests.get(url + "/readyz", timeout=5).status_code == 200
    except requests.RequestException:
        return False
