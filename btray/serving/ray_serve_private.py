"""The private names of Ray Serve 2.60 that this package relies on.

tests/serving/test_ray_serve_private.py fails if an upgrade moves one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.experimental import internal_kv
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

_NAMESPACE = "btray"


def deploy_config(config: ServeDeploySchema) -> None:
    """Have the running Serve apply `config`, as `serve deploy` does.

    The public ways do not fit: `serve.run` gives each deployment a new version and so replaces all replicas, and the
    REST API belongs to Ray's dashboard, which a service on one machine does not start (a tenth of a core, and a port
    that runs code). Without this name there is no reload of a running service.
    """
    client: Any = _get_global_client()
    client.deploy_apps(config)


def haproxy_host() -> str | None:
    """Return the host that Serve's HTTP proxies listen on if they are HAProxy, else None.

    `serve.status()` says neither. A replica that took Ray's own proxy for granted would take every caller that
    HAProxy lets in for one of this machine.
    """
    if not RAY_SERVE_ENABLE_HA_PROXY:
        return None
    client: Any = _get_global_client()
    return client.http_config.host or "127.0.0.1"


class ClusterTexts:
    """Texts by name in the store of the Ray cluster, where Serve keeps its own state: as durable, and gone with it.

    An actor, the public way, is a process of a tenth of a gigabyte, and dies with its node.
    """

    def __init__(self, owner: str) -> None:
        """Keep texts that only those who name the same `owner` see."""
        self._prefix = f"{owner} "

    def names(self, start: str) -> list[str]:
        """Return the names that begin with `start`, in order."""
        keys = internal_kv._internal_kv_list(self._prefix + start, namespace=_NAMESPACE)
        return sorted(key.decode().removeprefix(self._prefix) for key in keys)

    def get(self, name: str) -> str:
        """Return a text; an empty one if there is none."""
        return (internal_kv._internal_kv_get(self._prefix + name, namespace=_NAMESPACE) or b"").decode()

    def put(self, name: str, text: str, *, replace: bool) -> None:
        """Keep a text; without `replace`, the first one of its name stays."""
        internal_kv._internal_kv_put(self._prefix + name, text, overwrite=replace, namespace=_NAMESPACE)


def serve_environment() -> dict[str, str]:
    """Return the environment of every Serve of this package, with the gate's ASGI middlewares before Ray's own code.

    Serve's processes read their settings from the environment as they start; it has no other way in. An unknown
    variable is ignored, so a renamed one would go unnoticed: HeaderGuard would be gone, autoscaling would be slow.
    """
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",  # 10 as it comes: too late for upscale_delay 5
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "btray.serving.gate:proxy_middlewares",
        # 5 as it comes: on a busy machine Serve kills the proxy that it waits for, and does not start.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    }


def haproxy_environment(folder: Path, binary: Path, ports: Callable[[], int] | None = None) -> dict[str, str]:
    """Return what is added to `serve_environment` for HAProxy: `binary` is started, its files are in `folder`.

    As Ray sets them, files lie in /tmp for everyone, and ports are fixed: with `ports`, which returns free ones, a
    second service may run on the machine.
    """
    names = ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT")
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(binary),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        **({f"RAY_SERVE_{name}": str(ports()) for name in names} if ports else {}),
    }
