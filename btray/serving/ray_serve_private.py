"""The private names of Ray Serve 2.60 that this package relies on.

tests/serving/test_ray_serve_private.py fails if an upgrade moves one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema


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


def serve_environment(middlewares: Callable[..., Any]) -> dict[str, str]:
    """Return the environment of every Serve that this package starts, with the ASGI `middlewares` before Ray's code.

    Serve's processes read their settings from the environment as they start; it has no other way in. An unknown
    variable is ignored, so a renamed one would go unnoticed: HeaderGuard would be gone, autoscaling would be slow.
    """
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",  # 10 as it comes: too late for upscale_delay 5
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{middlewares.__module__}:{middlewares.__qualname__}",
        # 5 as it comes: on a busy machine Serve kills the proxy that it waits for, and does not start.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    }


def haproxy_environment(folder: Path, binary: Path, free_port: Callable[[], int]) -> dict[str, str]:
    """Return what is added to `serve_environment` for HAProxy: `binary` is started, its files are in `folder`.

    As Ray sets them, files lie in /tmp for everyone and ports are fixed: a second service on the machine would fail.
    """
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
        **{
            f"RAY_SERVE_{name}": str(free_port())
            for name in ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT")
        },
    }
