"""Where Ray runs: the cluster that is there, or one of the job's own that ends with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.data

from btray.errors import UserError


@contextmanager
def connected() -> Iterator[None]:
    """Be connected to Ray: to the running cluster (RAY_ADDRESS, or one started on this machine), else a local one.

    A connection or local cluster made here ends with the block. Raises UserError where RAY_ADDRESS does not answer.
    """
    if ray.is_initialized():
        yield
        return
    _quieten()
    try:
        ray.init(logging_level=logging.WARNING, log_to_driver=True, configure_logging=True)
    except ConnectionError as error:
        raise UserError(f"no Ray cluster answers: {error}; start one, or unset RAY_ADDRESS for a local one") from error
    try:
        yield
    finally:
        ray.shutdown()


def _quieten() -> None:
    """Leave Ray Data's own progress and logs in its log files; the job prints its own lines."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def cpus() -> float:
    """CPUs of the whole cluster."""
    return float(ray.cluster_resources().get("CPU", 1.0))


def gpus() -> int:
    """GPUs of the whole cluster."""
    return int(ray.cluster_resources().get("GPU", 0))
