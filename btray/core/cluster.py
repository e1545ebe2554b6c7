"""The connection to Ray: to a running cluster, or to one of the job's own that ends with it."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

import ray
from ray.util.annotations import RayDeprecationWarning

from btray.core import console, logs
from btray.core.errors import Stopped, UserError
from btray.core.ray_private import (
    QUIET_LOGGERS,
    cluster_address,
    forward_worker_lines,
    own_ray,
    started_ray_here,
    without_false_errors,
    without_statistics,
)

__all__ = ["connected", "cpus", "given_cpus", "gpus", "own_cpus", "own_device", "require_gpus", "started_ray_here"]

_log = logging.getLogger(__name__)


@contextmanager
def connected(*, dashboard: bool = False, metrics: bool = False, join: bool = True) -> Iterator[None]:
    """Be connected to Ray: to the running cluster (RAY_ADDRESS, or one started on this machine), else a local one.

    A connection or local cluster made here ends with the block. The latter is this process's own: it shares neither
    token nor port with a cluster that runs here, and only this machine reaches it.

    Args:
        dashboard: Whether a local cluster has one, and with it the state API, which Ray Train needs. It takes a tenth
            of a core.
        metrics: Whether the agent of a local cluster exports metrics; with a dashboard it does.
        join: Whether to use a running cluster; if not, the Ray is always this process's own.

    Raises UserError if RAY_ADDRESS does not answer, and Stopped on SIGTERM.
    """
    if ray.is_initialized():
        yield
        return
    logs.take_over("ray", "ray.serve")
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray switches these on when it is imported, so a filter of `launch`, which is set earlier, has no effect.
    warnings.filterwarnings("ignore", category=RayDeprecationWarning)
    with ExitStack() as stack:
        try:
            address = cluster_address() if join else None
            if address is None:
                stack.enter_context(own_ray(dashboard=dashboard, metrics=metrics or dashboard))
                # The dashboard's usual port is for that of `ray start`.
                with console.ProgressLine("starting Ray", keep=False):
                    ray.init(address="local", configure_logging=False, include_dashboard=dashboard, dashboard_port=0)
            else:
                ray.init(configure_logging=False)
                _log.info("using the Ray cluster at %s", address)
        except ConnectionError as error:
            raise UserError(f"no Ray cluster answers: {error}; start one, or unset RAY_ADDRESS for a local one") from (
                error
            )
        stack.callback(ray.shutdown)
        forward_worker_lines(console.show_worker_lines)
        _quieten_ray_data()
        if address is None and not dashboard:
            stack.enter_context(without_statistics())
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _stop)  # Ray's own handler, set by init, would end with the signal's number
        with without_false_errors():
            yield


def _quieten_ray_data() -> None:
    """Leave what Ray Data says of what btray does on purpose in its log files, also with --verbose."""
    # Takes most of a second to import, which a job may do in a thread while Ray starts.
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []  # they take the start of an actor for a hang, and say so
    logs.take_over("ray.data")


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped("stopped by SIGTERM, in order")


def cpus() -> float:
    """Return the CPUs of the whole cluster."""
    return float(ray.cluster_resources().get("CPU", 1.0))


def gpus() -> int:
    """Return the GPUs of the whole cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def own_cpus(workers: int, gpu_share: float = 0.0) -> int:
    """Return how many CPUs of its node this worker may keep busy, if `workers` like it share the cluster.

    With a GPU, or a share of one, it has the same share of the CPUs of its node: nodes may differ.
    """
    here = ray.get_runtime_context().get_node_id()
    node: dict[str, float] = next((node["Resources"] for node in ray.nodes() if node["NodeID"] == here), {})
    own, devices = node.get("CPU", 1.0), node.get("GPU", 0.0)
    return max(1, int(own * gpu_share / devices if gpu_share and devices else min(own, cpus() / workers)))


def given_cpus() -> float:
    """Return the CPUs that Ray gave this actor; with a GPU, or a share of one, the same share of those of its node.

    Outside of Ray, and in a process that only drives it, it is one.
    """
    inside = ray.is_initialized() and ray.get_runtime_context().get_actor_id()
    given = ray.get_runtime_context().get_assigned_resources() if inside else {}
    share = given.get("GPU", 0.0)
    return own_cpus(1, share) if share else given.get("CPU", 1.0)


def own_device() -> str | None:
    """Return the torch device of this worker: cuda if Ray gave it a GPU, else cpu; None outside of Ray: any.

    Ray hides no GPU from those that requested none, so what torch finds does not tell.
    """
    if not ray.is_initialized():
        return None
    return "cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu"


def require_gpus() -> int:
    """Return the GPUs for --use-gpu; 0, with a warning, if the cluster may yet start nodes that have some.

    Raises UserError if this process started its Ray itself: no GPU will ever come there, and waiting has no end.
    """
    count = gpus()
    if count == 0:
        if started_ray_here():
            raise UserError("--use-gpu: this machine has no GPU; leave it out, or connect to a cluster (RAY_ADDRESS)")
        _log.warning("--use-gpu: the cluster has no GPU yet; the job waits until its autoscaler has started one")
    return count
