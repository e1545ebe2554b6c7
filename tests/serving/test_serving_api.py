"""Over HTTP callers get what the classifier says, and a named problem for whatever cannot be answered."""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
import os
import re
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btray import explain
from btray.data.scans import ScanRejected, decode
from btray.model.classifier import Classifier
from btray.serving.gate import PAGE
from tests.helpers.scan_corpus import bad_scans, good_scans
from tests.helpers.serving_helpers import PNG, Running, bundle_at, problem, running, scan

CLASSIFY = "/v1/classify"
JPEG = "image/jpeg"
TWO_GZIPS = gzip.compress(b"x" * 99) + gzip.compress(b"y")
CUT_GZIP = gzip.compress(b"x" * 99)[:-9]


@pytest.fixture(scope="module")
def service(model: str) -> Iterator[Running]:
    with running(model=model) as served:
        yield served


def test_raw_multipart_and_json_give_what_the_classifier_gives(service: Running, classifier: Classifier) -> None:
    data = scan()
    (expected,) = classifier.predict([data])
    encoded = base64.b64encode(data).decode()
    answers = {
        "raw": service.post(CLASSIFY, data, JPEG),
        "octets": service.post(CLASSIFY, data, "application/octet-stream"),
        "multipart": service.post(CLASSIFY, files={"images": ("a.jpg", data)}),
        "json": service.post(CLASSIFY, json={"images": [{"data": encoded, "name": "a.jpg"}]}),
        "json of texts": service.post(CLASSIFY, json={"images": [encoded]}),
        "deflate": service.post(CLASSIFY, zlib.compress(data), JPEG, headers={"Content-Encoding": "deflate"}),
        "identity": service.post(CLASSIFY, data, JPEG, headers={"Content-Encoding": "Identity"}),
        "null": service.post(CLASSIFY, json={"images": [{"data": encoded, "name": None, "url": None}], "x": None}),
    }
    for coding in ("gzip", "GZIP", "x-gzip", "identity, gzip", "gzip,"):
        answers[coding] = service.post(CLASSIFY, gzip.compress(data), JPEG, headers={"Content-Encoding": coding})
    for name, text in in_base64(data).items():
        answers[f"json, base64 {name}"] = service.post(CLASSIFY, json={"images": [{"data": text}]})
        tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}
        outputs = service.post("/v2/models/btray/infer", json={"inputs": [tensor]}).json()["outputs"]
        assert outputs[0]["data"] == [expected.label], name
    for kind, answer in answers.items():
        assert answer.status_code == 200, (kind, answer.text)
        content = answer.json()
        (result,) = content["results"]
        assert content["model_id"] == result["model_id"] == classifier.model_id
        assert "not a diagnosis" in content["notice"]
        assert result["label"] == expected.label, kind
        assert result["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6), kind
        assert (result["abstained"], result["out_of_distribution"]) == (False, False)
        assert list(result["probabilities"].values()) == sorted(result["probabilities"].values(), reverse=True)


def in_base64(data: bytes) -> dict[str, str]:
    """Return `data` as different encoders write it."""
    mime = base64.encodebytes(data).decode()
    return {
        "of RFC 2045": mime.replace("\n", "\r\n"),
        "in lines": mime,
        "of RFC 4648 for URLs": base64.urlsafe_b64encode(data).decode(),
        "unpadded": base64.b64encode(data + bytes(len(data) % 3 == 0)).decode().rstrip("="),
        "of a browser": "data:image/jpeg;base64," + base64.b64encode(data).decode(),
        "of a browser without a type": "DATA:;base64," + mime,
    }


def test_of_a_form_the_files_are_classified_and_text_is_not(service: Running, classifier: Classifier) -> None:
    (expected,) = classifier.predict([scan()])
    octets = {"Content-Type": "application/octet-stream"}
    text, empty, unnamed = ("note", (None, "für Dr. Ä\r\n")), ("images", ("", b"", octets)), ("images", (None, scan()))
    files = [unnamed, ("scan", (None, scan())), ("file", ("a.jpg", scan())), ("b", ("b.jpg", b""))]
    results = service.post(CLASSIFY, files=[text, empty, *files, empty]).json()["results"]
    assert [result.get("label") for result in results] == [expected.label] * 3 + [None]
    assert (results[3]["name"], results[3]["error_code"]) == ("b.jpg", "empty"), "an empty file that has a name"
    for none in ([text], [empty], [text, empty]):
        problem(service.post(CLASSIFY, files=none), 400, "bad_body")
    problem(service.post(CLASSIFY, files=[("images", (None, "no scan"))]), 400, "not_an_image")
    assert service.post(CLASSIFY, files=[("images", ("", scan()))]).status_code == 200, "a file without a name"
    url = "data:image/jpeg;base64," + base64.encodebytes(scan()).decode()
    (result,) = service.post(CLASSIFY, files=[text, ("images", (None, url))]).json()["results"]
    assert result["label"] == expected.label
    problem(service.post(CLASSIFY, files=[("images", (None, "data:image/png;base64,***"))]), 400, "bad_body")


def test_every_good_scan_is_answered_as_the_classifier_answers_it(service: Running, classifier: Classifier) -> None:
    scans = list(good_scans().items())
    for start in range(0, len(scans), 16):
        part = scans[start : start + 16]
        expected = classifier.predict([data for _, data in part])
        answer = service.post(CLASSIFY, files=[("images", (name, data)) for name, data in part])
        results = answer.json()["results"]
        assert len(results) == len(expected)
        for result, prediction in zip(results, expected, strict=True):
            assert result["name"] == part[prediction.index][0]
            assert (result["index"], result["frame"]) == (prediction.index, prediction.frame)
            assert result["label"] == prediction.label
            assert result["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-5)


def test_a_single_bad_scan_is_a_problem_with_its_own_code(service: Running) -> None:
    statuses = {"not_an_image": 400, "empty": 400, "unsupported": 415, "bomb": 413, "too_small": 422}
    for name, (data, code) in bad_scans().items():
        answer = service.post(CLASSIFY, data, "application/octet-stream")
        assert 400 <= answer.status_code < 500, name
        assert answer.json()["code"] == code, name
        assert answer.status_code == statuses.get(code, answer.status_code), name
        if code == "unsupported":  # an operator must learn which kind to convert
            with pytest.raises(ScanRejected) as rejected:
                decode(data)
            assert answer.json()["detail"] == rejected.value.message, name


def test_a_bad_image_does_not_spoil_the_others(service: Running, classifier: Classifier) -> None:
    (expected,) = classifier.predict([scan()])
    files = [("images", ("good.jpg", scan())), ("images", ("bad", b"<html>")), ("other", ("again.jpg", scan()))]
    answer = service.post(CLASSIFY, files=files)
    assert answer.status_code == 200
    first, bad, last = answer.json()["results"]
    assert first["label"] == last["label"] == expected.label
    assert (bad["status"], bad["error_code"], bad["name"]) == ("rejected", "not_an_image", "bad")
    assert "label" not in bad


def test_explanations_are_the_classifiers_own_heat_maps(service: Running, classifier: Classifier) -> None:
    answer = service.post(CLASSIFY, scan(), JPEG, params={"explain": "true", "top_k": 2})
    (result,) = answer.json()["results"]
    assert len(result["probabilities"]) == 2
    (frames,) = classifier.frames([scan()])
    (heat,) = explain.heat_maps(classifier, np.stack(frames), [result["label"]])
    pictures = {
        name: np.asarray(Image.open(io.BytesIO(base64.b64decode(result["explanation"][name]))))
        for name in ("overlay_png", "slice_png", "heat_png")
    }
    assert np.array_equal(pictures["slice_png"], frames[0])
    assert np.abs(pictures["heat_png"][..., 3] / 255 - heat).max() < 0.01
    assert pictures["overlay_png"].shape == (*heat.shape, 3)


def test_marks_of_the_model_reach_the_caller(tmp_path: Path) -> None:
    unsure = bundle_at(tmp_path, "unsure", temperature=100.0)
    with running(model=unsure, abstain_below=0.99) as service:
        (result,) = service.post(CLASSIFY, scan(), JPEG).json()["results"]
        assert result["abstained"]
        (facts,) = service.get("/v1/models").json()["models"]
        assert facts["abstain_below"] == 0.99
        assert facts["accuracy"]["value"] == 0.5


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"data": b"x", "kind": "text/plain"}, 415, "unsupported_media_type"),
        ({"data": b"x"}, 415, "unsupported_media_type"),
        ({"data": b"", "kind": JPEG}, 400, "empty"),
        ({"data": b"{", "kind": "application/json"}, 400, "bad_body"),
        ({"data": b"[" * 100_000, "kind": "application/json"}, 400, "bad_body"),
        ({"data": b"[]", "kind": "application/json"}, 422, "invalid"),
        ({"data": b'{"images": []}', "kind": "application/json"}, 400, "bad_body"),
        ({"data": b'{"images": ["***"]}', "kind": "application/json"}, 422, "invalid"),
        ({"data": b'{"images": [{"url": "http://a/b"}]}', "kind": "application/json"}, 422, "invalid"),
        ({"data": b'{"images": [7]}', "kind": "application/json"}, 422, "invalid"),
        ({"data": b'{"images": null}', "kind": "application/json"}, 422, "invalid"),
        ({"data": b'{"images": [null]}', "kind": "application/json"}, 422, "invalid"),
        ({"data": b'{"images": [{"data": null}]}', "kind": "application/json"}, 422, "invalid"),
        *(
            ({"data": b'{"images": ["%s"]}' % text, "kind": "application/json"}, 422, "invalid")
            for text in b"A eA=== eA==eA== eA%3D%3D data:,eA== data:image/png,eA== eA\xc3\xa4=".split()
        ),
        ({"data": TWO_GZIPS, "kind": JPEG, "headers": {"Content-Encoding": "gzip"}}, 400, "bad_body"),
        ({"data": b"x", "kind": "multipart/form-data"}, 400, "bad_body"),
        ({"data": b"x", "kind": "multipart/form-data; boundary=b"}, 400, "bad_body"),
        ({"data": b"--b\r\n\r\nx", "kind": "multipart/form-data; boundary=b"}, 400, "bad_body"),
        ({"data": b"--b--\r\n", "kind": "multipart/form-data; boundary=b"}, 400, "bad_body"),
        (
            {
                "data": b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n\xe2\x82\xac\r\n--b--\r\n',
                "kind": 'multipart/form-data; boundary=b; x="',
            },
            400,
            "bad_body",
        ),
        ({"data": b"x", "kind": JPEG, "headers": {"Content-Encoding": "gzip"}}, 400, "bad_body"),
        ({"data": b"x", "kind": JPEG, "headers": {"Content-Encoding": "br"}}, 415, "unsupported_media_type"),
        ({"data": b"x", "kind": JPEG, "headers": {"Content-Encoding": "gzip, gzip"}}, 415, "unsupported_media_type"),
        (
            {"data": gzip.compress(b"x" * 99)[:-9], "kind": JPEG, "headers": {"Content-Encoding": "gzip"}},
            400,
            "bad_body",
        ),
        ({"data": b"x", "kind": JPEG, "params": {"top_k": "0"}}, 422, "invalid"),
        ({"data": b"x", "kind": JPEG, "params": {"explain": "perhaps"}}, 422, "invalid"),
    ],
)
def test_what_cannot_be_read_is_named(service: Running, options: dict[str, Any], status: int, code: str) -> None:
    problem(service.post(CLASSIFY, **options), status, code)


def test_unknown_paths_and_methods_are_problems_too(service: Running) -> None:
    problem(service.get("/v1/nothing"), 404, "not_found")
    answer = service.get(CLASSIFY)
    problem(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == "POST"


def test_head_is_answered_as_get_without_the_body(service: Running) -> None:
    routes = service.get("/openapi.json").json()["paths"]
    assert {"/healthz", "/readyz", "/metrics", "/v1/models", "/v2", "/v2/health/ready"} <= routes.keys()
    for route in (*routes, *PAGE, "/docs", "/openapi.json", "/v1/nothing"):
        path = route.replace("{name}", "btray").replace("{version}", service.served()[0])
        got, head = service.get(path), service.session.head(service.url + path, timeout=60)
        assert head.content == b""
        assert head.status_code == got.status_code, path
        assert {**head.headers, "date": ""} == {**got.headers, "date": ""}, path


@pytest.mark.parametrize("path", ["models/btray/config", "models/btray/stats", "repository/index", "trace/setting"])
def test_what_triton_has_beyond_the_protocol_is_said_not_to_be_there(service: Running, path: str) -> None:
    for answer in (service.get(f"/v2/{path}"), service.post(f"/v2/{path}", json={})):
        assert "without Triton's extensions" in problem(answer, 404, "not_found")["detail"]


def test_every_answer_has_the_headers_that_keep_a_page_safe(service: Running) -> None:
    for answer in (service.get("/"), service.get("/nothing"), service.post(CLASSIFY, scan(), JPEG)):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Cache-Control"] == "no-store"
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_the_page_on_the_api_shows_every_route_and_loads_nothing_from_elsewhere(service: Running) -> None:
    page = service.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    schema = service.get("/openapi.json").json()
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            assert f"{method.upper()} {html.escape(path)}</code>" in page.text
            for code in route["responses"]:
                assert f"<code>{code}</code>" in page.text
    assert [
        link for link in re.findall(r'(?:src|href)="([^"]*)"', page.text) if "://" in link or link[:2] == "//"
    ] == []


def test_openapi_names_every_route_with_its_errors_and_examples(service: Running) -> None:
    schema = service.get("/openapi.json").json()
    post = schema["paths"][CLASSIFY]["post"]
    assert {"image/jpeg", "multipart/form-data", "application/json"} <= post["requestBody"]["content"].keys()
    assert post["responses"]["200"]["content"]["application/json"]["example"]
    for status in ("400", "401", "403", "413", "415", "422", "503"):
        assert "application/problem+json" in post["responses"][status]["content"], status
    example = post["requestBody"]["content"]["application/json"]["example"]
    assert service.post(CLASSIFY, json=example).status_code == 200, "the example does not work"


# ---- limits


@pytest.fixture(scope="module")
def strict(model: str) -> Iterator[Running]:
    limits = {"max_body_mb": 0.2, "max_images": 3, "max_megapixels": 0.3, "timeout": 2}
    with running(model=model, limits=limits) as served:
        yield served


def test_a_large_body_is_refused_before_it_is_read(strict: Running) -> None:
    problem(strict.post(CLASSIFY, b"x" * 200_001, JPEG), 413, "too_large")
    with socket.create_connection(("127.0.0.1", int(strict.url.rpartition(":")[2])), 10) as client:
        client.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413"), "it waited for a body that never comes"


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(strict: Running) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(20_000):
            sent += 10_000
            yield b"x" * 10_000

    try:
        answer = strict.post(CLASSIFY, endless(), JPEG)
    except OSError:
        pass  # the connection was closed while this side still sent
    else:
        problem(answer, 413, "too_large")
    assert sent < 100_000_000


def test_packed_bombs_are_not_unpacked_beyond_the_limit(strict: Running) -> None:
    bomb = gzip.compress(bytes(100_000_000))
    assert len(bomb) < 200_000
    problem(strict.post(CLASSIFY, bomb, JPEG, headers={"Content-Encoding": "gzip"}), 413, "too_large")


def test_too_many_images_and_pixels_are_refused(strict: Running) -> None:
    problem(strict.post(CLASSIFY, files=[("i", ("a", b"x"))] * 4), 413, "too_many_images")
    encoded = base64.b64encode(b"x").decode()
    problem(strict.post(CLASSIFY, json={"images": [encoded] * 4}), 413, "too_many_images")
    file = io.BytesIO()
    Image.new("L", (1000, 1000)).save(file, "PNG")
    problem(strict.post(CLASSIFY, file.getvalue(), PNG), 413, "bomb")


def test_a_body_that_drips_is_given_up(strict: Running) -> None:
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", int(strict.url.rpartition(":")[2])), 20) as client:
        client.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
        assert client.recv(100).startswith(b"HTTP/1.1 408")
    assert 1.5 < time.monotonic() - started < 10


def test_nothing_of_an_image_is_written_to_disk_or_log(
    service: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    large = os.urandom(3_000_000)
    with caplog.at_level("DEBUG"):
        service.post(CLASSIFY, files={"images": ("a very private name.jpg", large)})
    assert list(tmp_path.iterdir()) == []
    assert "very private" not in caplog.text


# ---- many at once


def test_concurrent_requests_get_their_own_answers(service: Running, classifier: Classifier) -> None:
    scans = [scan(seed, label) for seed in range(8) for label in ("glioma", "pituitary")]
    expected = classifier.predict(scans)

    def ask(number: int) -> bool:
        (result,) = service.post(CLASSIFY, scans[number % 16], JPEG).json()["results"]
        return result["probabilities"] == pytest.approx(expected[number % 16].probabilities, abs=1e-5)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(96)))


def test_health_is_answered_while_images_are_decoded(service: Running) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 64, (5500, 5500), np.uint8)).save(file, "PNG")
    done = threading.Event()
    answers = []

    def heavy() -> None:
        answers.append(service.post(CLASSIFY, file.getvalue(), PNG))
        done.set()

    thread = threading.Thread(target=heavy)
    thread.start()
    backoff_delays = []
    while not done.is_set():
        started = time.perf_counter()
        assert service.get("/healthz").status_code == 200
        backoff_delays.append(time.perf_counter() - started)
    thread.join()
    assert answers[0].status_code == 200
    assert len(backoff_delays) > 5
    assert sorted(backoff_delays)[len(backoff_delays) // 2] < 0.1


def test_the_service_says_that_it_is_ready(service: Running) -> None:
    for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
        assert service.get(path).status_code == 200, path
        assert json.loads(service.get(path).text)
