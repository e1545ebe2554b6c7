"""Whatever is sent, the service answers in time, never with a 5xx, keeps nothing of it, and is well afterwards."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from btray.model.classifier import Classifier
from tests.helpers.hostile_bodies import hostile_bodies
from tests.helpers.serving_helpers import SLOWEST, Running, running, scan, status_of

LIMITS = {"max_body_mb": 2, "timeout": 5, "max_images": 16, "max_megapixels": 20}


@pytest.fixture(scope="module")
def service(model: str) -> Iterator[Running]:
    with running(model=model, limits=LIMITS) as served:
        yield served


def resident() -> int:
    """Bytes of this process, in which the service runs."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("bodies", [500, pytest.param(2000, marks=pytest.mark.soak)])
def test_hostile_bodies_do_no_harm(service: Running, model: str, bodies: int) -> None:
    (expected,) = Classifier.load(model).predict([scan()])
    for _, hostile in hostile_bodies(64, seed=1):  # what a first time costs is not a leak
        status_of(service.url, hostile)
    memory, threads, files = resident(), threading.active_count(), len(os.listdir("/proc/self/fd"))
    seen: Counter[int] = Counter()
    for name, hostile in hostile_bodies(bodies, seed=2):
        started = time.monotonic()
        status = status_of(service.url, hostile)
        assert status < 500, f"{name}: {status}"
        assert time.monotonic() - started < SLOWEST, name
        seen[status] += 1
    assert seen[200] < bodies / 2
    assert seen[0] < bodies / 10, seen
    (answer,) = service.post("/v1/classify", scan(), "image/jpeg").json()["results"]
    assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    assert resident() - memory < 200_000_000, seen
    assert threading.active_count() <= threads + 2
    assert len(os.listdir("/proc/self/fd")) <= files + 8


# ---- the schema, driven by schemathesis


QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@pytest.mark.parametrize("examples", [40, pytest.param(400, marks=pytest.mark.soak)])
def test_answers_are_what_openapi_says(service: Running, examples: int) -> None:
    import schemathesis  # slow to import, and needed here alone

    schemathesis.serializer.alias("multipart/related", "application/octet-stream")
    seen = []
    for found in schemathesis.openapi.from_url(service.url + "/openapi.json").get_all_operations():
        operation = found.ok()
        if operation.path == "/metrics":  # 503 here, where no Ray runs
            continue
        seen.append(operation.path)
        for mode in schemathesis.GenerationMode:
            with suppress(Unsatisfiable):  # where nothing about a call can be wrong
                drive(operation.as_strategy(generation_mode=mode), examples)
    assert len(seen) >= 13, seen


def drive(strategy: Any, examples: int) -> None:
    """Call an operation with so many values that `strategy` makes, and check what comes back against its schema."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    wanted = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.unsupported_method,
    ]

    @settings(max_examples=examples, deadline=None, suppress_health_check=QUIET, database=None)
    @given(case=strategy)
    def check(case: Any) -> None:
        case.call_and_validate(checks=wanted)

    check()
