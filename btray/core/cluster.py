"""Where Ray runs: the cluster that is there, or one of the job's own that ends with it."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import ray
import ray.data
from ray._private import ray_constants, ray_logging, services
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from btray.core import logs
from btray.core.config import set_environment
from btray.core.errors import Stopped, UserError

_log = logging.getLogger(__name__)


@contextmanager
def connected(*, dashboard: bool = True) -> Iterator[None]:
    """Be connected to Ray: to the running cluster (RAY_ADDRESS, or one started on this machine), else a local one.

    A connection or local cluster made here ends with the block; only this machine reaches the latter. Without
    `dashboard` a local cluster has no state API either, which Ray Train asks, and saves a tenth of a core. Raises
    UserError where RAY_ADDRESS does not answer, and Stopped on SIGTERM.
    """
    if ray.is_initialized():
        yield
        return
    _quieten()
    if logs.is_json():
        _pass_lines_on_as_they_are()
    try:
        alone = services.canonicalize_bootstrap_address(None) is None  # type: ignore[arg-type]
        with on_loopback() if alone else nullcontext():
            ray.init(
                address="local" if alone else None,
                logging_level=logging.WARNING,
                log_to_driver=True,
                configure_logging=not logs.is_json(),
                include_dashboard=None if dashboard else False,
            )
    except ConnectionError as error:
        raise UserError(f"no Ray cluster answers: {error}; start one, or unset RAY_ADDRESS for a local one") from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _stop)  # Ray's own handler, set by init, would end with the signal's number
        yield
    finally:
        ray.shutdown()


@contextmanager
def on_loopback() -> Iterator[None]:
    """For the block, a Ray that is started in it listens on 127.0.0.1 alone, not on all interfaces.

    Ray does so by itself on macOS and Windows, where this constant of its own is False. Where `ray job submit` started
    this process, its runtime environment is the cluster's: the new Ray has no such package, and would look for it.
    """
    set_environment({RAY_JOB_CONFIG_JSON_ENV_VAR: None})
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped("stopped by SIGTERM, in order")


def _quieten() -> None:
    """Leave Ray Data's own progress and logs in its log files; the job prints its own lines."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []  # they take the start of an actor for a hang, and say so
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _pass_lines_on_as_they_are() -> None:
    """Without `(RayTrainWorker pid=...)` before them and ` [repeated 2x across cluster]` behind, which are no JSON.

    Ray's own switches, RAY_DISABLE_WORKER_LOG_PREFIX and RAY_DEDUP_LOGS, are read when it is imported: too early.
    """
    ray_constants.RAY_DISABLE_WORKER_LOG_PREFIX = True
    ray_logging.RAY_DEDUP_LOGS = False


def cpus() -> float:
    """CPUs of the whole cluster."""
    return float(ray.cluster_resources().get("CPU", 1.0))


def gpus() -> int:
    """GPUs of the whole cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def own_device() -> str | None:
    """Where a worker runs a network: on the GPU that Ray gave it, else on the CPU. None outside of Ray: where it can.

    Ray hides no GPU from those that asked for none, so what torch finds does not tell.
    """
    if not ray.is_initialized():
        return None
    return "cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu"


def require_gpus() -> int:
    """GPUs that --use-gpu finds now; 0, with a warning, where the cluster may yet start nodes that have some.

    Raises UserError where this process started its Ray itself: no GPU will ever come there, and waiting has no end.
    """
    found = gpus()
    if found == 0 and started_ray_here():
        raise UserError("--use-gpu: this machine has no GPU; leave it out, or connect to a cluster (RAY_ADDRESS)")
    if found == 0:
        _log.warning("--use-gpu: the cluster has no GPU yet; the job waits until its autoscaler has started one")
    return found


def started_ray_here() -> bool:
    """Whether this process started the Ray that it uses, rather than joined one: such a Ray never grows."""
    node: Any = ray._private.worker._global_node
    return node is not None and bool(node.is_head())
