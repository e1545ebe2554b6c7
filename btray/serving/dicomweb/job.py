"""The one process of a service that reports what was pushed to any of its replicas: a named actor of Ray.

Each replica asks for it every few seconds, so whichever asks first makes it, and it comes back on another node if its
own, or the replica that made it, is lost. It ends with the service. What it knows is in the folder of marks.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayError

from btray.core import logs
from btray.core.errors import UserError
from btray.pacs.config import PacsConfig
from btray.serving.config import ServiceConfig
from btray.serving.dicomweb.studies import PushedStudies
from btray.serving.models import ServedModels

_log = logging.getLogger(__name__)

EVERY: Final = 10.0
"""Seconds between two signs of a replica that reports are wanted."""
_LOOK: Final = 5.0
"""Most seconds between two looks at the marks."""
_AFTER_FAILURE: Final = 30.0
"""Seconds after which a model or folder that could not be read is tried again."""


class ReportJob:
    """The actor: a thread reports, while calls tell it by which config."""

    def __init__(self) -> None:
        """Begin without a config."""
        logs.begin_in_worker("text", job="report")
        os.nice(10)  # requests to the replicas go first
        self._config: ServiceConfig | None = None
        threading.Thread(target=self._run, name="report", daemon=True).start()

    def configure(self, config: ServiceConfig) -> None:
        """Report by `config` from the next study on."""
        if config != self._config:
            self._config = config

    def _run(self) -> None:
        studies: PushedStudies | None = None
        its_config: ServiceConfig | None = None
        while True:
            config, pause = self._config, _LOOK
            try:
                if config is not None and config is not its_config:
                    studies = PushedStudies(config, PacsConfig.from_environment(), studies)
                    its_config = config
                if studies is not None and its_config is not None:
                    pause = min(_LOOK, its_config.report_after_seconds / 4)
                    studies.report_what_is_still()
            except UserError as error:
                pause = _AFTER_FAILURE
                _log.warning("reports of pushed studies: %s; tried again", error)
            except Exception:
                pause = _AFTER_FAILURE
                _log.exception("reports of pushed studies failed; tried again")
            time.sleep(pause)


async def keep_reporting(models: ServedModels) -> None:
    """Keep the process at work, as a replica does, while the config that is served has a `report_to`; never return."""
    actor: Any = None
    while True:
        config = models.split.config if models.split else None
        try:
            if config is not None and config.report_to is not None:
                actor = await asyncio.to_thread(_actor)
                await actor.configure.remote(config)
            elif actor is not None:
                ray.kill(actor)
                actor = None
        except (RayError, ValueError) as error:  # it was lost: it is made again at the next sign
            _log.warning("the process that reports pushed studies is not there: %s", type(error).__name__)
        await asyncio.sleep(EVERY)


def _actor() -> Any:
    """Return the actor of this application, made if it is not there."""
    name = f"{serve.get_replica_context().app_name}-reports"
    # No CPU of its own: replicas may hold all there are, and it is the nicer one.
    return ray.remote(ReportJob).options(name=name, get_if_exists=True, num_cpus=0).remote()
