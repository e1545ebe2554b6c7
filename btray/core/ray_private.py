"""Private names of Ray core that btray needs, each with its reason; tests/core/test_ray_private.py tells if one moves.

Written against Ray 2.60. None of these has a public counterpart there.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from inspect import getattr_static
from typing import IO, Any, cast

import ray
from ray._private import ray_constants, services
from ray._private.ray_logging import global_worker_stdstream_dispatcher

from btray.core.config import SUBMITTED_VARIABLE, restored_environment, set_environment

# Loggers that warn of what btray does on purpose: progress bars are off because the job draws its own line, tokens are
# a matter of docs/operations.md, and of several Rays on this machine `cluster_address` says which one is joined.
# `ray.init(logging_level=...)` cannot silence them alone. If they are renamed, the warnings come back.
QUIET_LOGGERS = (
    "ray.data._internal.progress",
    "ray._private.authentication.authentication_token_setup",
    "ray._private.services",
)

# Ray Data makes its actors with arguments in the object store, on purpose, and the core warns of each.
_FALSE_ERROR = r"core_worker\.cc:.*has constructor arguments in the object store"


def cluster_address() -> str | None:
    """Return the address of the cluster to join: RAY_ADDRESS, or that of `ray start` here; None if there is none.

    `ray.init("auto")` would join any Ray on this machine, also one that another program started for itself, and
    `ray.init()` does not say beforehand whether it will start one. If this moves, jobs fail at their start.
    """
    return services.canonicalize_bootstrap_address(None)  # type: ignore[arg-type]


@contextmanager
def own_ray(*, dashboard: bool, metrics: bool) -> Iterator[None]:
    """Let the Ray that is started in this block, and ends with it, share nothing with any other Ray of this user.

    It listens on 127.0.0.1 only, not on all interfaces. Ray does so on macOS and Windows, where this constant is False;
    its environment variable is read at import and would hold for clusters to join as well, whose addresses must not
    become loopback. If the constant moves, a laptop's Ray is open to its network.

    Its token is in the environment of its processes. Else Ray would write ~/.ray/auth_token, readable for all users,
    and every later `ray start` would require it. The core keeps the token and the mode that it has read.

    Its processes know its address. Else those that ask for it find the Ray of `ray start`, or several: Ray Train's
    PlacementGroupCleaner would take its controller for dead. The port is chosen here, since workers get the environment
    of a process that is started before the address is known.

    Its workers have the priority of this process. Ray's is lower by 15: on a machine that does anything else at the
    same time they get a thirtieth of a core, and they start after all that Ray starts beside them.

    Without a `dashboard` Ray would still start its process, to report usage, and wait until that has imported all
    modules of the dashboard: a second of CPU before the first worker. If the name moves, it does so again.

    If one of the others moves, tests/system/test_cluster_jobs.py fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables = {
        # This Ray would look for the submitted package in its own, empty store, and no worker would start.
        SUBMITTED_VARIABLE: None,
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # Ray then sets RAY_AUTH_MODE, unless the user has set it
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        ray_constants.GCS_PORT_ENVIRONMENT_VARIABLE: port,
        "RAY_worker_niceness": "0",
    }
    if not dashboard:
        variables["RAY_task_events_report_interval_ms"] = "0"  # only a dashboard shows them
    if not metrics:
        variables["RAY_enable_metrics_collection"] = "0"
    core: Any = ray._raylet
    before, start_dashboard = ray_constants.ENABLE_RAY_CLUSTER, services.start_api_server
    try:
        with restored_environment():
            set_environment(variables)
            ray_constants.ENABLE_RAY_CLUSTER = False
            if not dashboard:
                services.start_api_server = lambda *_, **__: ("", None)
            core.AuthenticationTokenLoader.instance().reset_cache()
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER, services.start_api_server = before, start_dashboard
        core.AuthenticationTokenLoader.instance().reset_cache()
        core.Config.initialize("")


def started_ray_here() -> bool:
    """Return whether this process started the Ray that it uses, rather than joined one: such a Ray never grows.

    No public call tells the two apart. If it moves, `AttributeError` ends any job that asks for actors or GPUs.
    """
    node: Any = ray._private.worker._global_node
    return node is not None and bool(node.is_head())


@contextmanager
def without_statistics() -> Iterator[None]:
    """For the block, let Ray Data keep no statistics, which only a dashboard shows.

    The actor that it keeps them in is a process of 130 MB, which takes more than a second of CPU to start. There is no
    setting. If the names move, it keeps them again, and tests/core/test_ray_private.py fails.
    """
    from ray.data._internal import stats

    manager = getattr(stats, "_StatsManager", None)
    names = ("register_dataset_to_stats_actor", "update_execution_metrics", "update_iteration_metrics")
    before = {name: function for name in names if (function := getattr_static(manager, name, None))}
    try:
        for name in before:
            setattr(manager, name, staticmethod(lambda *_, **__: None))
        yield
    finally:
        for name, function in before.items():
            setattr(manager, name, function)


def forward_worker_lines(show: Callable[[Mapping[str, Any]], None]) -> None:
    """Hand each batch of workers' output, and of the core's messages, to `show`; call it after every `ray.init`.

    Ray's own switches (RAY_DISABLE_WORKER_LOG_PREFIX, RAY_DEDUP_LOGS, RAY_COLOR_PREFIX) change how lines look, but
    cannot leave out those that Ray writes itself. If the name of the handler changes, lines come twice; if that of the
    function does, messages of the core have Ray's look.
    """
    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: show(data)
    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
    global_worker_stdstream_dispatcher.remove_handler("btray")
    global_worker_stdstream_dispatcher.add_handler("btray", show)


@contextmanager
def without_false_errors() -> Iterator[None]:
    """For the block, leave out of stderr what Ray's C++ core calls an error and is none: see `_FALSE_ERROR`.

    The core writes to file descriptor 2 past Python, and its level (RAY_BACKEND_LOG_LEVEL) would empty the log files of
    all Ray processes as well. A process of its own filters, since the core may end this one right after it has said
    why. If the core words its line otherwise, the line comes back.
    """
    sys.stderr.flush()
    with ExitStack() as stack:
        terminal = stack.enter_context(os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace"))
        try:
            command = ["grep", "--line-buffered", "--text", "--invert-match", _FALSE_ERROR]
            # A session of its own: Ctrl-C is for the job, whose last lines are still to come.
            filtering = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=terminal, start_new_session=True)
        except OSError:  # there is no grep
            yield
            return
        stack.callback(_wait, filtering)
        with cast("IO[bytes]", filtering.stdin) as pipe:
            os.dup2(pipe.fileno(), 2)
        stack.callback(os.dup2, terminal.fileno(), 2)  # the filter then reads to its end
        if sys.stderr is sys.__stderr__:  # else Python writes elsewhere already
            stack.enter_context(redirect_stderr(terminal))
        yield


def _wait(process: subprocess.Popen[bytes]) -> None:
    with suppress(subprocess.TimeoutExpired):  # a program that the job started still holds its stderr
        process.wait(5)
