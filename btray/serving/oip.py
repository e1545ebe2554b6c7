"""The Open Inference Protocol v2, which clients of KServe and Triton speak: metadata, health and inference.

The model takes `image` (BYTES [n], encoded images) or `pixels` (UINT8 or FP32 [n, height, width], gray), and gives a
row an image: `label`, `probabilities`, and what tells how far to trust them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from btray.data.frames import Rejection
from btray.model.prediction import Prediction, output_arrays, output_specs
from btray.serving import openapi
from btray.serving.config import LimitsConfig
from btray.serving.gate import read_body
from btray.serving.models import Found, ServedModel
from btray.serving.oip_codec import LENGTH_HEADER, InferRequest, Tensor, format_answer, parse_request
from btray.serving.problems import REJECTION_STATUS, Problem
from btray.serving.service import Service

_EXTENSIONS: Final = ["binary_tensor_data"]


def add_protocol(app: FastAPI, service: Service) -> None:
    """Add the routes of the protocol to `app`."""
    _add_server(app, service)
    _add_model(app, service)

    @app.post("/v2/models/{name}/infer", **openapi.INFER)
    @app.post("/v2/models/{name}/versions/{version}/infer", **openapi.INFER)
    async def infer(request: Request, name: str, version: str | None = None) -> Response:
        model = _model(service, name, version)
        body = await read_body(request, service.limits)
        length = request.headers.get(LENGTH_HEADER)

        async def answer() -> Response:
            asked = await service.decoding(_parsed, body, length, service.limits)
            return await _infer(service, name, model, asked)

        return await service.in_time(answer())


def _add_server(app: FastAPI, service: Service) -> None:
    @app.get("/v2", **openapi.SERVER)
    async def server() -> Response:
        return JSONResponse({"name": "btray", "version": openapi.version(), "extensions": _EXTENSIONS})

    @app.get("/v2/health/live", **openapi.HEALTH)
    async def live() -> Response:
        return JSONResponse({"live": True})

    @app.get("/v2/health/ready", **openapi.READY)
    async def ready() -> Response:
        service.line()
        return JSONResponse({"ready": True})


def _add_model(app: FastAPI, service: Service) -> None:
    @app.get("/v2/models/{name}", **openapi.MODEL)
    @app.get("/v2/models/{name}/versions/{version}", **openapi.MODEL)
    async def metadata(name: str, version: str | None = None) -> Response:
        return JSONResponse(_metadata(service, name, _model(service, name, version)))

    @app.get("/v2/models/{name}/ready", **openapi.MODEL_READY)
    @app.get("/v2/models/{name}/versions/{version}/ready", **openapi.MODEL_READY)
    async def model_ready(name: str, version: str | None = None) -> Response:
        return JSONResponse({"name": name, "ready": _model(service, name, version) is not None})


def _model(service: Service, name: str, version: str | None) -> ServedModel:
    """The model of a path. Raises Problem where it is not served."""
    line = service.line()
    if name != line.config.name:
        raise Problem(404, "not_found", f"no model {name[:80]!r} is served; there is {line.config.name}")
    return line.choose(version)


def _metadata(service: Service, name: str, model: ServedModel) -> dict[str, Any]:
    classes = model.classifier.classes
    return {
        "name": name,
        "versions": [served.model_id for served in service.line().models()],
        "platform": "btray_pytorch",
        "inputs": [
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
            {"name": "pixels", "datatype": "UINT8", "shape": [-1, -1, -1]},
        ],
        "outputs": [
            {"name": output, "datatype": datatype, "shape": shape} for output, datatype, shape in output_specs(classes)
        ],
        "parameters": {"classes": list(classes), "pixels_datatypes": ["UINT8", "FP32"]},
    }


async def _infer(service: Service, name: str, model: ServedModel, asked: InferRequest) -> Response:
    predictions = await _predictions(service, model, _input(asked))
    if len(predictions) == 1 and predictions[0].status != "ok":
        code = str(predictions[0].error_code)
        raise Problem(REJECTION_STATUS.get(code, 422), code, str(predictions[0].error))
    content = {"model_name": name, "model_version": model.model_id, "parameters": {}}
    content |= {"id": asked.id} if asked.id is not None else {}
    body, length = format_answer(content, output_arrays(predictions, model.classifier.classes), asked)
    if length is None:
        return Response(body, media_type="application/json")
    return Response(body, headers={LENGTH_HEADER: str(length)}, media_type="application/octet-stream")


def _parsed(body: bytes, length: str | None, limits: LimitsConfig) -> InferRequest:
    return parse_request(body, length, max_json=limits.max_json, max_images=limits.max_images)


def _input(asked: InferRequest) -> Tensor:
    name, tensor = asked.name, asked.tensor
    if name not in ("image", "pixels"):
        raise Problem(400, "bad_request", f"expected one input, image or pixels, and not {name[:40]}")
    if (name == "image") != (tensor.datatype == "BYTES"):
        raise Problem(400, "bad_request", f"{name} cannot be {tensor.datatype}: image is BYTES, pixels UINT8 or FP32")
    if name == "pixels" and len(tensor.shape) != 3:
        raise Problem(400, "bad_request", f"pixels of shape {list(tensor.shape)} are not [n, height, width]")
    return tensor


async def _predictions(service: Service, model: ServedModel, tensor: Tensor) -> Sequence[Prediction]:
    """One for each image."""
    at_once = await service.at_once(model, tensor.values) if isinstance(tensor.values, list) else None
    return at_once[1] if at_once else await service.predict(model, await _decoded(service, model, tensor))


async def _decoded(service: Service, model: ServedModel, tensor: Tensor) -> Sequence[Found]:
    """One frame for each image, or why there is none."""
    if isinstance(tensor.values, list):
        return [_single(result) for result in await service.decoded(model, tensor.values)]
    _, height, width = tensor.shape
    if height * width > model.source.limits.max_pixels:
        raise Problem(413, "bomb", f"{width}x{height} pixels, above max_pixels {model.source.limits.max_pixels}")
    images = list(tensor.values)
    return await service.decoding(model.classifier.frames, images)


def _single(found: Found) -> Found:
    if isinstance(found, Rejection) or len(found) == 1:
        return found
    return Rejection("unsupported", f"a scan of {len(found)} frames has several answers: use /v1/classify", False)
