"""The Ray Serve application: replicas that answer over HTTP, the same from serve.yaml and from jobs/serve.py.

What may change while it runs is in the deployment's `user_config` (a `ServiceConfig`); see `btray.serving.app` for the
routes.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from btray.core import logs
from btray.core.config import ComponentConfig
from btray.core.errors import UserError
from btray.serving.app import build_app
from btray.serving.config import ApplicationConfig, LimitsConfig, ServiceConfig, is_loopback
from btray.serving.dicomweb.job import keep_reporting
from btray.serving.gate import Gate
from btray.serving.models import ConfigStore
from btray.serving.problems import first_error
from btray.serving.ray_serve_private import ClusterTexts, haproxy_host
from btray.serving.service import Service
from btray.storage import StorageError

Config = TypeVar("Config", bound=ComponentConfig)

DEPLOYMENT = "Classifier"

_DRAIN = 20.0  # seconds that a replica that is stopped has for the requests it holds


class SharedConfigs(ConfigStore):
    """What the replicas of one deployed application have made of its configs, kept in the cluster for later ones."""

    def __init__(self, deployed: str) -> None:
        """Share with the replicas that are given the same `deployed`, an id of no other deployment."""
        self.texts = ClusterTexts(deployed)

    def pin(self, config: ServiceConfig) -> ServiceConfig:
        """Return `config` with the models that it meant to the replica that read it first.

        A bundle may have been replaced at its place since, or another one promoted. When the config changes, and when
        it changes back, it is read anew.
        """
        given = config.model_dump(mode="json")
        while True:
            names = self.texts.names("pinned ")
            latest = json.loads(self.texts.get(names[-1])) if names else {}
            if latest.get("given") == given:
                return ServiceConfig.model_validate(latest["pinned"])
            record = {"given": given, "pinned": super().pin(config).model_dump(mode="json")}
            # Of several replicas that come here at a time one is first; the others find its record.
            self.texts.put(f"pinned {len(names):08d}", json.dumps(record), replace=False)

    def keep(self, config: ServiceConfig) -> None:
        """Keep `config` as what is served."""
        self.texts.put("served", config.model_dump_json(), replace=True)

    def kept(self) -> ServiceConfig | None:
        """Return what was served last; None if nothing was."""
        text = self.texts.get("served")
        return ServiceConfig.model_validate_json(text) if text else None


class Replica:
    """One process with its models."""

    def __init__(self, deployed: str) -> None:
        """Start without a model; Serve calls `reconfigure` next. `deployed` is the id of `SharedConfigs`."""
        logs.begin_in_worker("text", job="serve")  # the driver turns lines into JSON if it logs JSON
        host = haproxy_host()
        # Behind an HAProxy that Ray set up every request comes from HAProxy: only its own address says who may ask.
        self.configs = SharedConfigs(deployed)
        self.service = Service(sees_callers=host is None or is_loopback(host), configs=self.configs)
        self._reporting: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Gate:
        """Return the app that this replica answers with; `serve.ingress()` without an app calls it."""
        return build_app(self.service)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve `user_config`, or continue with what is served if that is not possible; see `ServedModels.configure`.

        A replica that starts then serves what was served last: else one bad bundle would keep a service from growing
        under load, and from replacing replicas that die. Raises the error of the config if nothing was served yet.
        """
        try:
            await self.service.models.configure(_validated(ServiceConfig, user_config))
        except Exception as error:
            if self.service.models.split is None:
                if isinstance(error, StorageError) and error.retryable:
                    raise  # Serve starts a replica again, and the store may have come back by then
                good = await asyncio.to_thread(self.configs.kept)
                if good is None:
                    raise
                try:
                    await self.service.models.configure(good, kept=True)
                except Exception as another:
                    raise error from another
            self.service.models.refuse(str(user_config.get("model")), error)
        if self._reporting is None:
            self._reporting = asyncio.create_task(keep_reporting(self.service.models))


def application(arguments: dict[str, Any]) -> Application:
    """Build the application, for serve.yaml and for `serve run btray.serving:application model=BUNDLE`.

    `arguments` are the fields of an `ApplicationConfig`. Raises UserError for one that it does not have.
    """
    config = _validated(ApplicationConfig, arguments)
    deployment = serve.deployment(
        name=DEPLOYMENT,
        # As many as HAProxy gives a replica, all of which its gate takes: what waits is counted by the autoscaler.
        max_ongoing_requests=LimitsConfig().places,
        max_queued_requests=LimitsConfig().places,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        graceful_shutdown_timeout_s=_DRAIN,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        logging_config=LoggingConfig(enable_access_log=False),  # who asked for what is the proxy's to log
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpu_share},
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.most,
            # Six requests keep one CPU busy; if more are in work or wait for it, another replica helps.
            target_ongoing_requests=6,
            look_back_period_s=20,
            upscale_delay_s=config.upscale_delay,
            downscale_delay_s=config.downscale_delay,
        ),
        user_config={"model": config.model},
    )
    return deployment(serve.ingress()(Replica)).bind(uuid4().hex)


def _validated(kind: type[Config], values: Any) -> Config:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(first_error(error)) from error
