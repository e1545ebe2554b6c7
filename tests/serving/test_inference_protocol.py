"""Triton's own client, unchanged, and plain JSON get what the classifier says; binary tensors are parsed safely."""

from __future__ import annotations

import base64
import json
import math
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from btray.model.classifier import Classifier
from btray.serving.config import LimitsConfig
from btray.serving.oip_codec import LENGTH_HEADER, InferRequest, parse_request
from btray.serving.problems import Problem
from tests.helpers.serving_helpers import Running, problem, running, scan

INFER = "/v2/models/btray/infer"


@pytest.fixture(scope="module")
def service(model: str) -> Iterator[Running]:
    with running(model=model, limits={"max_images": 8, "max_body_mb": 4}) as served:
        yield served


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(service.url.removeprefix("http://")) as made:
        yield made


def image_input(scans: list[bytes]) -> triton.InferInput:
    tensor = triton.InferInput("image", [len(scans)], "BYTES")
    tensor.set_data_from_numpy(np.array(scans, np.object_))
    return tensor


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (3, 90, 70), np.uint8)


def test_triton_finds_the_server_and_the_model(client: triton.InferenceServerClient, classifier: Classifier) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("btray")
    assert client.is_model_ready("btray", classifier.model_id)
    assert not client.is_model_ready("another")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("btray")
    assert metadata["versions"] == [classifier.model_id]
    assert {tensor["name"]: tensor["datatype"] for tensor in metadata["inputs"]} == {
        "image": "BYTES",
        "pixels": "UINT8",
    }
    outputs = {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in metadata["outputs"]}
    assert outputs["label"] == ("BYTES", [-1])
    assert outputs["probabilities"] == ("FP32", [-1, len(classifier.classes)])


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_triton_gets_the_classifiers_answers_for_images(
    client: triton.InferenceServerClient, classifier: Classifier, binary: bool, compression: str | None
) -> None:
    scans = [scan(seed) for seed in range(4)]
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("label", "probabilities")]
    answer = client.infer(
        "btray", [image_input(scans)], outputs=outputs, request_id="mine", request_compression_algorithm=compression
    )
    expected = classifier.predict(scans)
    assert answer.get_response()["id"] == "mine"
    assert answer.get_response()["model_version"] == classifier.model_id
    labels = [label.decode() if isinstance(label, bytes) else label for label in answer.as_numpy("label")]
    assert labels == [prediction.label for prediction in expected]
    rows = [[prediction.probabilities[label] for label in classifier.classes] for prediction in expected]
    np.testing.assert_allclose(answer.as_numpy("probabilities"), np.array(rows), atol=1e-5)
    assert answer.as_numpy("abstained") is None, "an output that nobody asked for"


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
@pytest.mark.parametrize("binary", [True, False])
def test_triton_gets_the_classifiers_answers_for_pixels(
    client: triton.InferenceServerClient, classifier: Classifier, datatype: str, binary: bool
) -> None:
    values = pixels() if datatype == "UINT8" else pixels().astype(np.float32) / 7 - 3
    tensor = triton.InferInput("pixels", list(values.shape), datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    answer = client.infer("btray", [tensor], model_version=classifier.model_id)
    expected = classifier.predict(list(values))
    assert [label.decode() for label in answer.as_numpy("label")] == [prediction.label for prediction in expected]
    for row, prediction in zip(answer.as_numpy("probabilities"), expected, strict=True):
        np.testing.assert_allclose(row, list(prediction.probabilities.values()), atol=1e-4)


def test_without_named_outputs_all_come_and_a_bad_image_has_its_code(client: triton.InferenceServerClient) -> None:
    answer = client.infer("btray", [image_input([scan(), b"no image", scan()])])
    assert answer.as_numpy("error_code").tolist() == [b"", b"not_an_image", b""]
    assert answer.as_numpy("label")[1] == b""
    assert answer.as_numpy("label")[0] == answer.as_numpy("label")[2] != b""
    assert answer.as_numpy("probabilities")[1].tolist() == [0.0] * answer.as_numpy("probabilities").shape[1]
    assert answer.as_numpy("abstained").dtype == np.bool_
    assert answer.as_numpy("out_of_distribution").shape == (3,)


def test_plain_json_with_base64_is_answered_in_json(service: Running, classifier: Classifier) -> None:
    encoded = base64.b64encode(scan()).decode()
    for shape, data in (([1], [encoded]), ([1, 1], [[encoded]])):
        body = {"id": "a", "inputs": [{"name": "image", "datatype": "BYTES", "shape": shape, "data": data}]}
        answer = service.post(INFER, json=body)
        assert answer.status_code == 200
        assert answer.headers["Content-Type"] == "application/json"
        outputs = {output["name"]: output["data"] for output in answer.json()["outputs"]}
        assert outputs["label"] == [classifier.predict([scan()])[0].label]
        assert sum(outputs["probabilities"]) == pytest.approx(1, abs=1e-5)


def with_null(value: Any, *absent: str) -> Any:
    """Return JSON with null for every field of `absent` that an object in it lacks, as MLServer's types write it."""
    if isinstance(value, list):
        return [with_null(item, *absent) for item in value]
    if isinstance(value, dict):
        return dict.fromkeys(absent) | {name: with_null(item, *absent) for name, item in value.items()}
    return value


def test_null_means_that_a_field_is_absent(service: Running) -> None:
    names = ("id", "parameters", "outputs", "data", "binary_data", "binary_data_size", "binary_data_output")
    encoded = base64.b64encode(scan()).decode()
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [encoded], "parameters": {}}
    for body in ({"inputs": [tensor]}, {"inputs": [tensor], "outputs": [{"name": "label"}], "parameters": {}}):
        expected = service.post(INFER, json=body)
        answer = service.post(INFER, json=with_null(body, *names, "classification", "content_type"))
        assert answer.status_code == 200, answer.text
        assert answer.json() == expected.json()
    raw = struct.pack("<I", len(scan())) + scan()
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps(with_null({"inputs": [tensor]}, *names)).encode()
    answer = service.post(INFER, head + raw, headers={LENGTH_HEADER: str(len(head))})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("field", ["inputs", "name", "datatype", "shape", "data"])
def test_what_a_request_needs_may_not_be_null(service: Running, field: str) -> None:
    body = {"inputs": [entry(**{field: None})]} if field != "inputs" else {"inputs": None}
    assert field in problem(service.post(INFER, json=body), 400, "bad_request")["detail"]


def test_triton_is_told_what_is_wrong(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="no known image") as caught:
        client.infer("btray", [image_input([b"no image"])])
    assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException, match="no model 'other'"):
        client.infer("other", [image_input([scan()])])
    with pytest.raises(InferenceServerException, match="no version '9'"):
        client.infer("btray", [image_input([scan()])], model_version="9")
    with pytest.raises(InferenceServerException, match="more than 8 images"):
        client.infer("btray", [image_input([b"x"] * 9)])
    with pytest.raises(InferenceServerException, match="no output 'logits'"):
        client.infer("btray", [image_input([scan()])], outputs=[triton.InferRequestedOutput("logits")])
    with pytest.raises(InferenceServerException, match="classification"):
        client.infer("btray", [image_input([scan()])], outputs=[triton.InferRequestedOutput("label", class_count=2)])
    asked = (lambda: client.get_model_config("btray"), lambda: client.get_inference_statistics("btray"))
    for ask in (*asked, client.get_model_repository_index, client.get_log_settings):
        with pytest.raises(InferenceServerException, match="without Triton's extensions"):
            ask()


def parsed(body: bytes, length: str | None = None) -> InferRequest:
    return parse_request(body, length, LimitsConfig(max_json_mb=1, max_images=8))


def entry(**changes: Any) -> dict[str, Any]:
    return {"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 2], "data": [1, 2]} | changes


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"inputs": []},
        {"inputs": {}},
        {"inputs": [7]},
        {"inputs": [entry(), entry()]},
        {"inputs": [entry(), entry(name="image")]},
        {"inputs": [entry(name="other")]},
        {"inputs": [entry(name=7)]},
        {"inputs": [entry(datatype="FP64")]},
        {"inputs": [entry(datatype=["UINT8"])]},
        {"inputs": [entry(datatype="BYTES")]},
        {"inputs": [entry(shape=[1, 2])]},
        {"inputs": [entry(shape=[1, 1, 3])]},
        {"inputs": [entry(shape=[], data=[1])]},
        {"inputs": [entry(shape=[1] * 65, data=[1])]},
        {"inputs": [entry(shape=[0, 2**31 - 1, 2**31 - 1], data=[])]},
        {"inputs": [entry(shape=[2**31 - 1] * 100_000, data=[1])]},
        {"inputs": [entry(data=["A" * 1_000_000, *[""] * 400_000])]},
        {"inputs": [entry(data=[True, False])]},
        {"inputs": [entry(data=[{}, []])]},
        {"inputs": [entry(name=str(number)) for number in range(5000)]},
        {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [], "data": ["eA=="]}]},
        {"inputs": [entry(shape=[-1, -1, 2])]},
        {"inputs": [entry(shape=[1, 1, 2.0])]},
        {"inputs": [entry(shape="112")]},
        {"inputs": [entry(shape=[2**40, 2**40, 2**40])]},
        {"inputs": [entry(shape=[0, 5, 5], data=[])]},
        {"inputs": [entry(data=None)]},
        {"inputs": [entry(data="ab")]},
        {"inputs": [entry(data=["a", "b"])]},
        {"inputs": [entry(data=[1, 256])]},
        {"inputs": [entry(data=[1, -1])]},
        {"inputs": [entry(data=[1.5, 2])]},
        {"inputs": [entry(data=[[1], [2, 3]])]},
        {"inputs": [entry(data=[1, 10**400])]},
        {"inputs": [entry(parameters=[])]},
        {"inputs": [entry(parameters={"binary_data_size": 2})]},
        {"inputs": [entry(parameters={"binary_data_size": -1})]},
        {"inputs": [entry(parameters={"binary_data_size": True})]},
        {"inputs": [entry()], "outputs": [{}]},
        {"inputs": [entry()], "parameters": 7},
        {"inputs": [entry()], "id": 7},
        {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["***"]}]},
        {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [7]}]},
        {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": ["eA=="]}]},
    ],
)
def test_requests_that_make_no_sense_are_refused(service: Running, content: dict[str, Any]) -> None:
    answer = service.post(INFER, json.dumps(content), "application/json")
    assert answer.status_code == 400, answer.text
    problem(answer, 400, answer.json()["code"])


def test_what_is_no_number_is_a_rejected_image(service: Running) -> None:
    values = np.full((1, 40, 40), np.nan, np.float32)
    raw = values.tobytes()
    head = json.dumps(
        {"inputs": [entry(datatype="FP32", shape=[1, 40, 40], parameters={"binary_data_size": len(raw)})]}
    )
    answer = service.post(INFER, head.encode() + raw, headers={LENGTH_HEADER: str(len(head))})
    problem(answer, 415, "unsupported")


@pytest.mark.parametrize("length", ["-1", "0", "999999", "x", "9" * 30, "2", "\xb9"])
def test_a_header_length_that_does_not_fit_is_refused(service: Running, length: str) -> None:
    answer = service.post(INFER, json.dumps({"inputs": [entry()]}), headers={LENGTH_HEADER: length.encode("latin-1")})
    problem(answer, 400, "bad_body")


MOST = 2**31 - 1


@pytest.mark.parametrize(
    ("datatype", "shape", "raw"),
    [
        ("UINT8", [1] * 65, b"x"),
        ("UINT8", [0, MOST, MOST, MOST], b""),
        ("FP32", [0, MOST, MOST], b""),
        ("FP32", [MOST] * 3, b"x"),
        ("UINT8", [MOST] * 500, b"x"),
        ("BYTES", [1], bytes(400_000)),
        ("BYTES", [MOST], bytes(400_000)),
        ("BYTES", [1, 100_000], bytes(400_000)),
        ("BYTES", [1, 1, 9], bytes(36)),
    ],
    ids=lambda value: str(value)[:20],
)
def test_tensors_that_cannot_be_are_refused_at_once_and_in_a_line(datatype: str, shape: list[int], raw: bytes) -> None:
    tensor = {"name": "pixels", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    with pytest.raises(Problem) as refused:
        parsed(head + raw, str(len(head)))
    assert len(refused.value.detail) < 300


def test_what_a_request_costs_is_bounded_by_its_size() -> None:
    many = {"inputs": [entry(data=["A" * 20_000, *[""] * 20_000])]}
    head = json.dumps(many).encode()
    tracemalloc.start()
    try:
        with pytest.raises(Problem):
            parsed(head)
        assert tracemalloc.get_traced_memory()[1] < 50 * len(head), "an array of 20,000 times the longest text"
    finally:
        tracemalloc.stop()


def test_cut_elements_are_refused() -> None:
    for raw in (b"\1\0\0", struct.pack("<I", 9) + b"short", struct.pack("<I", 2**32 - 1)):
        tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(raw)}}
        head = json.dumps({"inputs": [tensor]}).encode()
        with pytest.raises(Problem, match="cut off"):
            parsed(head + raw, str(len(head)))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(-5, 250).map(str), st.text(max_size=8)))
def test_any_bytes_are_a_request_or_a_problem(body: bytes, length: str | None) -> None:
    with suppress(Problem):
        parsed(body, length)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {"inputs": st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(entry(), JSON) | {"parameters": JSON}))},
        optional={"outputs": JSON, "parameters": JSON, "id": JSON},
    )
)
def test_any_json_is_a_request_or_a_problem(content: dict[str, Any]) -> None:
    with suppress(Problem):
        parsed(json.dumps(content).encode())


NUMBERS = st.lists(st.integers(-1, 300) | st.floats(), max_size=4)


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(["BYTES", "UINT8", "FP32"]),
    st.lists(st.integers(0, 3), max_size=4),
    st.binary(max_size=12) | NUMBERS | st.lists(NUMBERS, max_size=3) | st.lists(st.sampled_from(["", "eA==", "x"])),
)
def test_what_nearly_makes_sense_has_the_shape_it_names_or_is_a_problem(
    datatype: str, shape: list[int], data: bytes | list[Any]
) -> None:
    raw = data if isinstance(data, bytes) else b""
    values = {"parameters": {"binary_data_size": len(raw)}} if isinstance(data, bytes) else {"data": data}
    head = json.dumps({"inputs": [{"name": "pixels", "datatype": datatype, "shape": shape, **values}]}).encode()
    with suppress(Problem):
        tensor = parsed(head + raw, str(len(head)))
        assert shape
        found = [len(tensor.values)] if isinstance(tensor.values, list) else list(tensor.values.shape)
        assert found == shape or (datatype == "BYTES" and math.prod(shape) == found[0])
        assert found[0] <= 8
