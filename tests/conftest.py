"""Fixtures shared by all tests: a real S3 server, Ray, and the public data set."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from btray import storage
from btray.core import logs
from tools.s3_server import S3Server

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data" / "brain-tumor-mri"


# These take longest, the first one most: started last, one of two test processes would wait for the other. `make test`
# tells pytest-xdist to keep the order, which by itself begins with the files of the most tests, not the longest.
_FIRST = (
    "test_readme.py", "test_serving.py", "test_job.py", "test_wheel.py", "test_behaviour.py", "test_classify.py",
    "test_cluster_jobs.py", "test_live.py", "test_serving_job.py", "test_patients.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest; keep the order within each file."""
    items.sort(key=lambda item: _FIRST.index(item.path.name) if item.path.name in _FIRST else len(_FIRST))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Run an S3 server; until the session ends, the environment points at it and at no other AWS account."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        before = dict(os.environ)
        _replace_environment(server.environment_over(before))
        try:
            yield server
        finally:
            _replace_environment(before)


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Undo what a test does to this process's logs: a handler that stays would write into what later tests capture."""
    btray, root = logging.getLogger("btray"), logging.root
    before = btray.level, root.level, list(root.handlers)
    yield
    logs._handler.style, logs._handler.verbose, logs._handler.in_worker, logs._handler.bound = "text", False, False, {}
    btray.setLevel(before[0])
    root.setLevel(before[1])
    root.handlers[:] = before[2]


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """Return the URI of a new, empty bucket."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    s3.make_bucket(name)
    return f"s3://{name}"


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return a place for a table: a folder that does not exist yet, and a bucket."""
    return str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("bucket")


@pytest.fixture(scope="session")
def ray_session(s3: S3Server) -> Iterator[None]:
    """Start Ray with two CPUs. Depends on `s3` because Ray's workers inherit the environment at the start of Ray."""
    patch = pytest.MonkeyPatch()
    # A local ray.init turns token authentication on and looks for a token file in the home folder.
    patch.setenv("RAY_AUTH_MODE", "disabled")
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
    patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # 5 as it comes: too short on a busy machine
    patch.setenv("RAY_worker_niceness", "0")  # 15 as it comes: on a busy machine workers would hardly run
    # Workers import the checkout's modules, wherever they are started.
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    import ray

    try:
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
        )
        yield
    finally:
        ray.shutdown()
        patch.undo()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of the public data set; skip the test with a message if it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"REAL DATA ABSENT: {REAL_DATA} does not exist, so what this test shows is NOT shown here")
    return REAL_DATA


def _replace_environment(wanted: dict[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)
    storage.reconnect()  # an existing client would continue to use the old endpoint
