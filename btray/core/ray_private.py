"""Private names of Ray core that btray needs, each with its reason; tests/core/test_ray_private.py tells if one moves.

Written against Ray 2.60. None of these has a public counterpart there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._private.ray_logging import global_worker_stdstream_dispatcher

from btray.core.config import set_environment

# The runtime environment of the job that `ray job submit` started. Without it unset, a Ray of this process's own would
# look for the submitted package in its own, empty store, and no worker would start.
JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# Loggers that warn of what btray does on purpose: progress bars are off because the job draws its own line, and tokens
# are a matter of docs/operations.md. `ray.init(logging_level=...)` cannot silence them alone. If they are renamed, the
# warnings come back.
QUIET_LOGGERS = ("ray.data._internal.progress", "ray._private.authentication.authentication_token_setup")


def cluster_address() -> str | None:
    """Return the address of the cluster to join: RAY_ADDRESS, or that of `ray start` here; None if there is none.

    `ray.init("auto")` would join any Ray on this machine, also one that another program started for itself, and
    `ray.init()` does not say beforehand whether it will start one. If this moves, jobs fail at their start.
    """
    return services.canonicalize_bootstrap_address(None)  # type: ignore[arg-type]


@contextmanager
def on_loopback() -> Iterator[None]:
    """Let a Ray that is started in this block listen on 127.0.0.1 only, not on all interfaces.

    Ray does so on macOS and Windows, where this constant is False; its environment variable is read at import and would
    hold for clusters to join as well, whose addresses must not become loopback. If the constant moves, a laptop's Ray
    is open to its network: test_a_ray_that_a_job_starts_listens_on_loopback_alone fails.
    """
    set_environment({JOB_CONFIG_VARIABLE: None})
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def started_ray_here() -> bool:
    """Return whether this process started the Ray that it uses, rather than joined one: such a Ray never grows.

    No public call tells the two apart. If it moves, `AttributeError` ends any job that asks for actors or GPUs.
    """
    node: Any = ray._private.worker._global_node
    return node is not None and bool(node.is_head())


def forward_worker_lines(show: Callable[[Mapping[str, Any]], None]) -> None:
    """Hand each batch of workers' output to `show` instead of Ray's printer; call it after every `ray.init`.

    Ray's own switches (RAY_DISABLE_WORKER_LOG_PREFIX, RAY_DEDUP_LOGS, RAY_COLOR_PREFIX) change how lines look, but
    cannot leave out those that Ray writes itself. If the name of the handler changes, lines come twice.
    """
    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
    global_worker_stdstream_dispatcher.remove_handler("btray")
    global_worker_stdstream_dispatcher.add_handler("btray", show)


@contextmanager
def core_lines_in_log() -> Iterator[None]:
    """For the block, write what Ray's C++ core prints in this process to Ray's log folder instead of the terminal.

    The core writes its errors to file descriptor 2, some of which are none: it warns of each actor that Ray Data makes.
    Its level (RAY_BACKEND_LOG_LEVEL) holds for the log files of all Ray processes as well, and is announced by a line
    of its own. Python's `sys.stderr` still reaches the terminal. If `get_logs_dir_path` moves, jobs fail at their
    start.
    """
    node: Any = ray._private.worker._global_node
    with ExitStack() as stack:
        try:
            log = stack.enter_context(open(f"{node.get_logs_dir_path()}/btray-{os.getpid()}.err", "ab"))
        except OSError:  # another user's cluster
            yield
            return
        sys.stderr.flush()
        terminal = stack.enter_context(os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace"))
        os.dup2(log.fileno(), 2)
        stack.callback(os.dup2, terminal.fileno(), 2)
        if sys.stderr is sys.__stderr__:  # else Python writes elsewhere already
            stack.enter_context(redirect_stderr(terminal))
        yield
