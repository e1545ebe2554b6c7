"""Each private name of Ray that btray uses is where it was and works; an upgrade that moves one fails here."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray._private import ray_constants, services
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray._private.runtime_env import constants
from ray.data._internal import stats

from btray.core import ray_private
from btray.core.config import SUBMITTED_VARIABLE
from tests.helpers.forked_jobs import ROOT

_PRIVATE = re.compile(r"ray\._private|ray\._raylet|ray\.\w+(?:\.\w+)*\._(?!_)|from ray[\w.]* import _(?!_)")


def test_private_names_of_ray_stand_in_one_module_for_ray_and_one_for_serve() -> None:
    found = {str(path.relative_to(ROOT / "btray")) for path in (ROOT / "btray").rglob("*.py")
             if _PRIVATE.search(path.read_text())}  # fmt: skip
    assert "core/ray_private.py" in found
    assert {path for path in found if not path.startswith("serving/")} == {"core/ray_private.py"}


def test_an_address_is_found_in_the_environment_and_none_where_a_local_ray_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    assert ray_private.cluster_address() == "10.1.2.3:6379"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert ray_private.cluster_address() is None


def test_in_the_block_this_machine_is_loopback_and_the_submitted_package_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert constants.RAY_JOB_CONFIG_JSON_ENV_VAR == SUBMITTED_VARIABLE
    monkeypatch.setenv(SUBMITTED_VARIABLE, "{}")
    monkeypatch.setattr(ray._private.worker, "_global_node", None)
    before = ray_constants.ENABLE_RAY_CLUSTER
    with ray_private.own_ray(dashboard=True, metrics=True):
        assert services.get_node_ip_address() == "127.0.0.1"
        assert SUBMITTED_VARIABLE not in os.environ
        assert "RAY_enable_metrics_collection" not in os.environ, "the service gathers its own from the agents"
    assert before == ray_constants.ENABLE_RAY_CLUSTER


def test_without_a_dashboard_none_is_started_and_ray_data_keeps_no_statistics_for_one() -> None:
    manager = stats._StatsManager
    names = ("register_dataset_to_stats_actor", "update_execution_metrics", "update_iteration_metrics")
    before = [services.start_api_server, *(inspect.getattr_static(manager, name) for name in names)]
    for name in names:
        assert "get_or_create_stats_actor()" in inspect.getsource(getattr(manager, name)), "what makes the actor"
    with ray_private.own_ray(dashboard=False, metrics=False), ray_private.without_statistics():
        start: Callable[..., object] = services.start_api_server
        assert start(False, raise_on_failure=False) == ("", None)
        assert [getattr(manager, name)("any", arguments=1) for name in names] == [None] * 3
    assert [services.start_api_server, *(inspect.getattr_static(manager, name) for name in names)] == before


def test_the_loggers_that_are_silenced_are_those_that_warn() -> None:
    for name in ray_private.QUIET_LOGGERS:
        assert importlib.import_module(name).logger is logging.getLogger(name)


def test_worker_lines_reach_the_given_function_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", print)
    before = list(global_worker_stdstream_dispatcher.handlers)
    batches: list[object] = []
    try:
        global_worker_stdstream_dispatcher.add_handler("ray_print_logs", print)
        ray_private.forward_worker_lines(batches.append)
        ray_private.forward_worker_lines(batches.append)
        global_worker_stdstream_dispatcher.emit("a batch")
        assert batches == ["a batch"]
        ray._private.worker.print_to_stdstream("of the core", ignore_prefix=False)
        assert batches[1:] == ["of the core"]
        assert "print_to_stdstream(\n" in inspect.getsource(ray._private.worker.listen_error_messages)
        assert "ray_print_logs" in Path(ray._private.worker.__file__).read_text(), "the name under which Ray prints"
    finally:
        global_worker_stdstream_dispatcher.handlers = before


_CORE = """
import os, sys
from btray.core.ray_private import without_false_errors
with without_false_errors():
    os.write(2, b"[E 1 1] core_worker.cc:2465: Actor with class: 'X' has constructor arguments in the object store\\n")
    print("of Python", file=sys.stderr)
    if sys.argv[1:]:
        os.write(2, b"[E 1 1] rpc_client.h:204: Failed to connect to GCS\\n")
        os._exit(1)
os.write(2, b"afterwards\\n")
"""


def test_what_the_core_wrongly_calls_an_error_is_left_out_and_python_prints_as_ever() -> None:
    done = subprocess.run([sys.executable, "-c", _CORE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "of Python\nafterwards\n"


def test_why_the_core_ends_the_process_is_said() -> None:
    done = subprocess.run([sys.executable, "-c", _CORE, "x"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "of Python\n[E 1 1] rpc_client.h:204: Failed to connect to GCS\n"


def test_without_grep_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", _CORE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "core_worker" in done.stderr
    assert done.stderr.endswith("of Python\nafterwards\n")


@pytest.mark.cluster
def test_this_process_started_its_ray(ray_session: None) -> None:
    assert ray_private.started_ray_here()
