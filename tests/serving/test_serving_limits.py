"""What one caller asks, or a config that is refused, takes nothing from the others: places, time, memory or safety."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
from pydantic import ValidationError

from btray.data.frames import Frames, FrameSource, Rejection
from btray.data.preprocess import Frame
from btray.data.scans import Scan
from btray.model.classifier import Classifier
from btray.model.prediction import Prediction
from btray.serving import access as api_keys
from btray.serving import gate
from btray.serving.access import Access, make_key
from btray.serving.batching import Batcher, SharedThread
from btray.serving.config import LimitsConfig, ServeConfig
from btray.serving.gate import HeaderGuard
from btray.serving.models import DecodedImage, ModelFacts, ServedModel
from btray.serving.oip_codec import InferBody
from btray.serving.problems import Problem
from btray.serving.studies_api import StudiesRequest
from btray.serving.uploads import ClassifyRequest, parse_json
from tests.helpers.dicom_files import slice_file
from tests.helpers.serving_helpers import Running, bundle_at, pages, png, problem, running, scan
from tools.processes import until

CLASSIFY = "/v1/classify"
INFER = "/v2/models/btray/infer"
JPEG = "image/jpeg"
LIMITS = {"max_requests": 2, "max_reading": 4, "max_frames": 20, "max_json_mb": 0.1, "timeout": 5}


@pytest.fixture(scope="module")
def service(model: str) -> Iterator[Running]:
    with running(model=model, limits=LIMITS) as served:
        yield served


@contextmanager
def no_predictions(service: Running) -> Iterator[None]:
    """Meanwhile no forward pass begins, and what is in work stays there."""
    go_on = threading.Event()
    service.service.models.thread.submit(go_on.wait, 60)
    try:
        yield
    finally:
        go_on.set()


@contextmanager
def slow_uploads(service: Running, count: int) -> Iterator[None]:
    """Meanwhile so many bodies are on their way and do not arrive."""
    port = int(service.url.rpartition(":")[2])
    with ExitStack() as held:
        for _ in range(count):
            client = held.enter_context(socket.create_connection(("127.0.0.1", port), 10))
            client.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        yield


# ---- places


def test_bodies_that_arrive_slowly_take_no_place_of_those_in_work(service: Running) -> None:
    with slow_uploads(service, 3):
        assert service.post(CLASSIFY, scan(), JPEG).status_code == 200


def test_so_many_bodies_are_read_at_a_time_and_no_more(service: Running) -> None:
    with slow_uploads(service, 4):
        until(lambda: service.gate.reading == 4)
        assert "being read" in problem(service.post(CLASSIFY, scan(), JPEG), 503, "busy")["detail"]
        assert service.get("/healthz").status_code == 200
    until(lambda: service.post(CLASSIFY, scan(), JPEG).status_code == 200)


def test_a_client_that_goes_while_it_sends_is_no_failure_of_the_service(
    service: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(
        service.gate, "metrics", Mock(request=lambda route, code, _: seen.append((route, code)), in_work=lambda _: None)
    )
    with slow_uploads(service, 1):
        until(lambda: service.gate.reading == 1)
    until(lambda: seen)
    assert seen == [(CLASSIFY, 499)]
    assert not caplog.records


def test_beyond_what_is_in_work_requests_are_refused_with_the_time_to_wait(service: Running) -> None:
    with ThreadPoolExecutor(2) as pool, no_predictions(service):
        held = [pool.submit(service.post, CLASSIFY, scan(), JPEG) for _ in range(2)]
        until(lambda: service.gate.working == 2)
        answer = service.post(CLASSIFY, scan(), JPEG)  # after it has waited for a second
        assert "in work" in problem(answer, 503, "busy")["detail"]
        assert int(answer.headers["Retry-After"]) >= 1
        assert service.get("/healthz").status_code == 200, "health must not wait behind work"
    assert [answer.result().status_code for answer in held] == [200, 200]
    assert service.post(CLASSIFY, scan(), JPEG).status_code == 200, "what was refused once is refused for ever"


def test_what_waits_for_a_place_is_answered_once_there_is_one_and_takes_none_with_it(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "QUEUE_SECONDS", 60)
    with running(model=model, limits={"max_requests": 1, "max_reading": 3}) as service, ThreadPoolExecutor(4) as pool:
        with no_predictions(service):
            asked = [pool.submit(service.post, CLASSIFY, scan(), JPEG) for _ in range(3)]
            until(lambda: (service.gate.working, service.gate.reading) == (1, 2))
            with slow_uploads(service, 1):
                until(lambda: service.gate.reading == 3)
                problem(service.post(CLASSIFY, scan(), JPEG), 503, "busy")
            until(lambda: service.gate.reading == 2)
        assert [answer.result().status_code for answer in asked] == [200, 200, 200]
        until(lambda: (service.gate.working, service.gate.reading) == (0, 0))


def test_what_cannot_be_read_waits_for_no_model(service: Running) -> None:
    with ThreadPoolExecutor(1) as pool, no_predictions(service):
        held = pool.submit(service.post, CLASSIFY, scan(), JPEG)
        until(lambda: not service.service.split().models[0].batcher.idle)
        problem(service.post(CLASSIFY, b"x", JPEG), 400, "not_an_image")
        files = [("images", ("a", b"")), ("images", ("b", b"x"))]
        results = service.post(CLASSIFY, files=files).json()["results"]
        assert [result["error_code"] for result in results] == ["empty", "not_an_image"]
        assert not held.done()
    assert held.result().status_code == 200


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that decoded, in order."""
    names: list[str] = []
    frames_of = FrameSource.frames_of

    def watched(self: FrameSource, scan: Scan) -> list[Frame]:
        names.append(threading.current_thread().name.partition("_")[0])
        return frames_of(self, scan)

    monkeypatch.setattr(FrameSource, "frames_of", watched)
    return names


def test_only_what_is_small_is_decoded_where_it_is_classified(service: Running, threads: list[str]) -> None:
    for body in (scan(), png(np.zeros((1100, 1000), np.uint8)), scan() + bytes(2**18)):
        assert service.post(CLASSIFY, body, JPEG).status_code == 200
    assert threads == ["predict", "decode", "decode"]
    with ThreadPoolExecutor(2) as pool, no_predictions(service):
        pool.submit(service.post, CLASSIFY, scan(), JPEG)
        until(lambda: not service.service.split().models[0].batcher.idle)
        pool.submit(service.post, CLASSIFY, scan(), JPEG)
        until(lambda: threads[3:] == ["decode"])


def test_no_model_decodes_on_the_thread_that_another_one_uses(model: str, tmp_path: Path, threads: list[str]) -> None:
    canary = bundle_at(tmp_path, "canary", seed=4)
    with running(model=model, canary={"model": canary, "share": 0.5}) as service, ThreadPoolExecutor(2) as pool:
        main, other = service.served()
        with no_predictions(service):
            held = pool.submit(service.post, f"{CLASSIFY}?model_id={main}", scan(), JPEG)
            until(lambda: not service.service.split().models[0].batcher.idle)
            second = pool.submit(service.post, f"{CLASSIFY}?model_id={other}", scan(), JPEG)
            until(lambda: threads == ["decode"])
        for answer, model_id in ((held, main), (second, other)):
            assert answer.result().json()["model_id"] == model_id
        assert service.post(f"{CLASSIFY}?model_id={other}", scan(), JPEG).status_code == 200
    assert threads == ["decode", "predict", "predict"]


def test_an_answer_that_takes_too_long_is_a_problem_with_the_time_to_wait(model: str) -> None:
    with running(model=model, limits={"timeout": 0.3}) as service, no_predictions(service):
        answer = service.post(CLASSIFY, scan(), JPEG)
        problem(answer, 503, "timeout")
        assert int(answer.headers["Retry-After"]) >= 1


# ---- frames


def test_frames_behind_the_first_member_of_gzip_are_counted_too(service: Running) -> None:
    data = slice_file(np.arange(16 * 16 * 21, dtype=np.uint16).reshape(21, 16, 16))
    problem(service.post(CLASSIFY, data, "application/dicom"), 413, "too_many_frames")
    members = gzip.compress(data[:300]) + gzip.compress(data[300:])
    problem(service.post(CLASSIFY, members, "application/dicom"), 413, "too_many_frames")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ClassifyRequest, {"images": [1] * 999}),
        (StudiesRequest, {"frames": [1] * 999}),
        (InferBody, {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1]}], "outputs": [1] * 999}),
        (StudiesRequest, {"frames": [{"model_id": "a", "probabilities": {f"{n}": "x" for n in range(1001)}}]}),
    ],
)
def test_of_wrong_json_the_first_mistake_is_told_and_no_other_looked_for(kind: Any, body: dict[str, Any]) -> None:
    with pytest.raises(Problem) as caught:
        parse_json(kind, json.dumps(body).encode(), LimitsConfig(), "")
    assert isinstance(caught.value.__cause__, ValidationError)
    assert caught.value.__cause__.error_count() == 1


def test_more_pages_than_a_request_may_have_are_refused_undecoded(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(service.post(CLASSIFY, pages(20), "image/tiff").json()["results"]) == 20
    decoded: list[int] = []
    from_bytes = FrameSource.from_bytes
    monkeypatch.setattr(FrameSource, "from_bytes", lambda *given: decoded.append(1) or from_bytes(*given))
    problem(service.post(CLASSIFY, pages(21), "image/tiff"), 413, "too_many_frames")
    problem(service.post(CLASSIFY, pages(300), "image/tiff"), 413, "too_many_frames")
    files = [("images", ("a.tif", pages(11))), ("images", ("b.jpg", scan())), ("images", ("c.tif", pages(9)))]
    problem(service.post(CLASSIFY, files=files), 413, "too_many_frames")
    encoded = base64.b64encode(pages(30)).decode()
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [encoded]}
    problem(service.post(INFER, json={"inputs": [tensor]}), 413, "too_many_frames")
    assert decoded == []


def test_more_pages_than_are_explained_are_refused_before_they_are_classified(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(model=model, limits={"max_images": 3}) as few:
        monkeypatch.setattr(Classifier, "answer", Mock(side_effect=AssertionError("classified")))
        problem(few.post(CLASSIFY + "?explain=true", pages(4), "image/tiff"), 413, "too_many_explanations")


def test_many_frames_go_in_parts_and_others_come_between() -> None:
    batches: list[int] = []
    go_on = threading.Event()

    def run(works: Sequence[Sequence[DecodedImage]]) -> list[list[Prediction]]:
        batches.append(sum(len(work) for work in works))
        go_on.wait(10)
        return [[answer_to(place, found) for place, found in enumerate(work)] for work in works]

    def answer_to(index: int, found: DecodedImage) -> Prediction:
        said = found.code if isinstance(found, Rejection) else str(found[0][0, 0])
        return Prediction(index=index, label=said)

    async def both() -> tuple[list[Prediction], list[str]]:
        batcher: Batcher[Sequence[DecodedImage], list[Prediction]] = Batcher(
            run, SharedThread("predict"), largest=2, weight=len, watch=lambda *_: None
        )
        served = ServedModel(cast(Classifier, None), cast(FrameSource, None), batcher, cast(ModelFacts, None))
        frames = Frames(np.full((2, 2), number, np.uint8) for number in range(6))
        order: list[str] = []

        async def ask(name: str, found: Sequence[DecodedImage]) -> list[Prediction]:
            predictions = await served.predict(found)
            order.append(name)
            return predictions

        long = asyncio.create_task(ask("long", [frames.part(0, 4), Rejection("empty", "", False), frames.part(4, 6)]))
        short = asyncio.create_task(ask("short", [frames.part(0, 1)]))
        await asyncio.sleep(0)
        go_on.set()
        await short
        return await long, order

    predictions, order = asyncio.run(both())
    assert order == ["short", "long"]
    assert max(batches) == 2
    assert [(said.index, said.frame, said.label) for said in predictions] == [
        (0, 0, "0"), (0, 1, "1"), (0, 2, "2"), (0, 3, "3"), (1, 0, "empty"), (2, 0, "4"), (2, 1, "5"),
    ]  # fmt: skip


# ---- JSON


def test_large_json_is_refused_and_the_quick_way_is_named(service: Running) -> None:
    text = json.dumps({"images": ["A" * 100_000]})
    assert "multipart" in problem(service.post(CLASSIFY, text, "application/json"), 413, "too_large")["detail"]
    shape = [1, 200, 200]
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": shape, "data": [100] * 40_000}
    answer = service.post(INFER, json.dumps({"inputs": [tensor]}), "application/json")
    assert "binary tensor" in problem(answer, 413, "too_large")["detail"]
    del tensor["data"]
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": 40_000}}]}).encode()
    answer = service.post(INFER, head + bytes(40_000), headers={"Inference-Header-Content-Length": str(len(head))})
    assert answer.status_code == 200, answer.text


# ---- who may ask


def test_a_refused_config_changes_nothing_and_least_of_all_who_may_ask(model: str, tmp_path: Path) -> None:
    stranger = {"Host": "example.org"}
    with running(model=model) as service:
        service.configure(model=str(tmp_path / "nothing"), insecure=True, limits={"max_images": 1})
        assert service.switched()["state"] == "refused"
        problem(service.get("/v1/models", headers=stranger), 403, "forbidden")
        answer = service.post(CLASSIFY, files=[("images", ("a", scan())), ("images", ("b", scan()))])
        assert answer.status_code == 200, "limits of a config that was refused"
        service.configure(model=model, insecure=True, limits={"max_images": 1})
        assert service.switched()["state"] == "done"
        assert service.get("/v1/models", headers=stranger).status_code == 200


def test_a_config_takes_over_with_its_access_and_not_before_its_model(model: str, tmp_path: Path) -> None:
    other = bundle_at(tmp_path, "other", seed=3)
    with running(model=model) as service:
        before = service.served()

        async def seen() -> tuple[bool, bool]:
            models = service.service.split().models
            return [model.model_id for model in models] != before, service.service.access.insecure

        service.configure(model=other, insecure=True)
        states = set()
        while (True, True) not in states:
            states.add(asyncio.run_coroutine_threadsafe(seen(), service.loop).result(10))
        assert states <= {(False, False), (True, True)}


def test_behind_a_proxy_that_hides_who_asks_nobody_is_local() -> None:
    scope = {"client": ("127.0.0.1", 1), "headers": [(b"host", b"localhost")]}
    asyncio.run(Access(None, insecure=False).check(scope))
    with pytest.raises(Problem, match="set keys"):
        asyncio.run(Access(None, insecure=False, sees_callers=False).check(scope))
    asyncio.run(Access(None, insecure=True, sees_callers=False).check(scope))


@pytest.mark.parametrize(("name", "value"), [("host", "0.0.0.0"), ("port", 8001), ("proxy", "ray")])
def test_a_running_service_refuses_another_address(
    name: str, value: Any, model: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from btray.serving import job as serving

    def deploy(*_: Any) -> None:
        raise AssertionError("deployed")

    monkeypatch.setattr(serving, "deploy", deploy)
    started = ServeConfig(model=model, insecure=True)
    serving._reload(started, lambda: ServeConfig(**{"model": model, "insecure": True, name: value}))
    assert f"--{name} {value}" in caplog.text
    assert "all stays as it was" in caplog.text


def test_keys_are_read_again_though_all_other_threads_are_busy(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "REREAD", 0.0)
    key = make_key(str(tmp_path / "keys"), "a")
    go_on = threading.Event()

    async def fill() -> None:
        for _ in range(64):
            asyncio.get_running_loop().run_in_executor(None, go_on.wait, 60)

    with running(model=model, keys=str(tmp_path / "keys")) as service:
        asyncio.run_coroutine_threadsafe(fill(), service.loop).result(10)
        try:
            headers = {"Authorization": f"Bearer {key}"}
            assert service.post(CLASSIFY, scan(), JPEG, headers=headers).status_code == 200
        finally:
            go_on.set()


# ---- headers that Ray reads


@pytest.mark.parametrize("name", [b"x-request-id", b"x-request-timeout-seconds", b"serve_multiplexed_model_id"])
def test_a_header_that_ray_would_fail_at_is_refused(name: bytes) -> None:
    passed: list[Any] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope)

    async def send(message: Any) -> None:
        sent.append(message)

    async def call(value: bytes) -> None:
        scope = {"type": "http", "headers": [(b"user-agent", b"\xff"), (name, value)]}
        await HeaderGuard(app)(scope, cast(Any, None), send)

    asyncio.run(call(b"\xff"))
    assert not passed
    assert sent[0]["status"] == 400
    assert json.loads(sent[1]["body"])["code"] == "bad_request"
    asyncio.run(call(b"7"))
    assert len(passed) == 1
