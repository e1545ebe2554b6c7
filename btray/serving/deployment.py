"""The Ray Serve application: replicas that answer over HTTP, the same from serve.yaml and from jobs/serve.py.

What may change while it runs is in the deployment's `user_config` (a `ServiceConfig`); see `btray.serving.app` for the
routes.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from btray.core import logs
from btray.core.config import ComponentConfig
from btray.core.errors import UserError
from btray.model.promotion import pinned, split
from btray.serving.app import build_app
from btray.serving.config import ApplicationConfig, ServiceConfig, is_loopback
from btray.serving.gate import Gate
from btray.serving.problems import first_error
from btray.serving.ray_serve_private import haproxy_host
from btray.serving.service import Service
from btray.storage import StorageError

Config = TypeVar("Config", bound=ComponentConfig)

DEPLOYMENT = "Classifier"

# Serve counts the requests to a replica in its own queue; the gate refuses long before it is full, with a problem to
# read.
_MAX_ONGOING = 256
_PEERS_TIMEOUT = 20.0  # seconds that other replicas have to say what they serve; if there are none, none answers
_DRAIN = 20.0  # seconds that a replica that is stopped has for the requests it holds


class Replica:
    """One process with its models."""

    def __init__(self) -> None:
        """Start without a model; Serve calls `reconfigure` next."""
        logs.begin_in_worker("text", job="serve")  # the driver turns lines into JSON if it logs JSON
        host = haproxy_host()
        # Behind an HAProxy that Ray set up every request comes from HAProxy: only its own address says who may ask.
        self.service = Service(sees_callers=host is None or is_loopback(host))
        # The latest config as it was given, and with the bundles that its promoted models were then.
        self._named: tuple[ServiceConfig, ServiceConfig] | None = None

    def __serve_build_asgi_app__(self) -> Gate:
        """Return the app that this replica answers with; `serve.ingress()` without an app calls it."""
        return build_app(self.service)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve `user_config`, or continue with what is served if that is not possible; see `ServedModels.configure`.

        A replica that starts then takes over what the others serve: else one bad bundle would keep a service from
        growing under load, and from replacing replicas that die. Raises the error of the config if there are no others.
        """
        config = None
        try:
            config = await self._pinned(_validated(ServiceConfig, user_config))
            await self.service.models.configure(config)
        except Exception as error:
            if self.service.models.split is None:
                if isinstance(error, StorageError) and error.retryable:
                    raise  # Serve starts a replica again, and the store may have come back by then
                good = await _served_by_others()
                if good is None or good == config:
                    raise
                try:
                    await self.service.models.configure(good)
                except Exception as another:
                    raise error from another
            self.service.models.refuse(str(user_config.get("model")), error)

    async def serving(self, given: ServiceConfig | None = None) -> ServiceConfig | None:
        """Return the config that is served, or what `given` was taken for, for a replica that starts."""
        if given is not None:
            return self._named[1] if self._named and self._named[0] == given else None
        split = self.service.models.split
        return split.config if split else None

    async def _pinned(self, given: ServiceConfig) -> ServiceConfig:
        """Return `given` with the bundles that its promoted models are now.

        A replica that starts takes what the others took: another one may have been promoted since.
        """
        if any(split(entry.model) for entry in (given, given.canary) if entry):
            config = await _served_by_others(given) if self.service.models.split is None else None
            if config is None:
                config = await asyncio.to_thread(_as_promoted, given)
            self._named = given, config
            return config
        return given


def _as_promoted(config: ServiceConfig) -> ServiceConfig:
    canary = pinned(config.canary) if config.canary else None
    return pinned(config).model_copy(update={"canary": canary})


async def _served_by_others(given: ServiceConfig | None = None) -> ServiceConfig | None:
    """Return what another replica of this application serves, or took `given` for; None if none answers."""
    handle = serve.get_deployment_handle(DEPLOYMENT, serve.get_replica_context().app_name)
    with suppress(TimeoutError, RayError, RayServeException):
        return await asyncio.wait_for(handle.serving.remote(given), _PEERS_TIMEOUT)
    return None


def application(arguments: dict[str, Any]) -> Application:
    """Build the application, for serve.yaml and for `serve run btray.serving:application model=BUNDLE`.

    `arguments` are the fields of an `ApplicationConfig`. Raises UserError for one that it does not have.
    """
    config = _validated(ApplicationConfig, arguments)
    deployment = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=_MAX_ONGOING,
        max_queued_requests=_MAX_ONGOING,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        graceful_shutdown_timeout_s=_DRAIN,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        logging_config=LoggingConfig(enable_access_log=False),  # who asked for what is the proxy's to log
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if config.use_gpu else 0},
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.most,
            # Six requests in work keep one CPU busy; if more wait, another replica helps.
            target_ongoing_requests=6,
            look_back_period_s=20,
            upscale_delay_s=config.upscale_delay,
            downscale_delay_s=config.downscale_delay,
        ),
        user_config={"model": config.model},
    )
    return deployment(serve.ingress()(Replica)).bind()


def _validated(kind: type[Config], values: Any) -> Config:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(first_error(error)) from error
