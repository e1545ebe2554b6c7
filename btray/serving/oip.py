"""The Open Inference Protocol v2, which clients of KServe and Triton speak: metadata, health and inference.

The model takes `image` (BYTES [n], encoded images) or `pixels` (UINT8 or FP32 [n, height, width], gray), and gives one
row per image: `label`, `probabilities`, what tells how far to trust them, and what a medical file says of its slice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from btray.data.frames import Rejection
from btray.model.prediction import Prediction, output_arrays, output_specs
from btray.serving.gate import read_body
from btray.serving.models import DecodedImage, ServedModel
from btray.serving.oip_codec import LENGTH_HEADER, InferAnswer, InferBody, InferRequest, format_answer, parse_request
from btray.serving.openapi import BINARY, EXAMPLE_PNG, request_body, version
from btray.serving.problems import Answer, Problem, problem_responses
from btray.serving.service import Service


class ServerMetadata(Answer):
    """The server."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(Answer):
    """An input or an output; -1 in its shape is any number."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Answer):
    """A model's inputs and outputs."""

    name: str
    versions: list[str]
    """The model_id of each bundle that is served."""
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, list[str]]


_INFER: Final[dict[str, Any]] = {
    "summary": "Open Inference Protocol: inference",
    "description": (
        "`image` is BYTES [n], encoded images (base64 in JSON), or `pixels` is UINT8 or FP32 [n, height, width]. With "
        f"the binary tensor extension tensors follow the JSON, whose length is in {LENGTH_HEADER}."
    ),
    "response_model": InferAnswer,
    "responses": {
        200: {
            "description": f"{', '.join(name for name, *_ in output_specs([]))}, one row per image.",
            "content": {"application/octet-stream": {"schema": BINARY}},
        },
        **problem_responses(400, 408, 413, 415, 422),
    },
    "openapi_extra": request_body(
        InferBody,
        {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [EXAMPLE_PNG]}]},
        **{"application/octet-stream": BINARY},
    ),
}
_METADATA: Final = "Open Inference Protocol: a model's inputs and outputs"
_READY: Final = "Open Inference Protocol: whether a model is ready"


def protocol_routes(service: Service) -> APIRouter:
    """Return the routes of the protocol."""
    routes = APIRouter()
    models = APIRouter(prefix="/v2/models/{name}", responses=problem_responses(401, 403, 404, 503))

    @routes.get("/v2", summary="Open Inference Protocol: the server", responses=problem_responses(401, 403))
    async def server() -> ServerMetadata:
        return ServerMetadata(name="btray", version=version(), extensions=["binary_tensor_data"])

    @routes.get("/v2/health/live", summary="Whether the process is alive")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @routes.get("/v2/health/ready", summary="Whether a model is there to answer", responses=problem_responses(503))
    async def ready() -> dict[str, bool]:
        service.split()
        return {"ready": True}

    async def served(name: str, version: str | None = None) -> ServedModel:
        split = service.split()
        if name != split.config.name:
            raise Problem(404, "not_found", f"no model {name[:80]!r} is served; there is {split.config.name}")
        return split.choose(version)

    model_of_path = Depends(served)

    @models.get("", summary=_METADATA)
    @models.get("/versions/{version}", summary=_METADATA)
    async def metadata(name: str, model: ServedModel = model_of_path) -> ModelMetadata:
        classes = list(model.classifier.classes)

        def described(specs: Iterable[tuple[str, str, list[int]]]) -> list[TensorMetadata]:
            return [TensorMetadata(name=name, datatype=datatype, shape=shape) for name, datatype, shape in specs]

        return ModelMetadata(
            name=name,
            versions=[served.model_id for served in service.split().models],
            platform="btray_pytorch",
            inputs=described([("image", "BYTES", [-1]), ("pixels", "UINT8", [-1, -1, -1])]),
            outputs=described(output_specs(classes)),
            parameters={"classes": classes, "pixels_datatypes": ["UINT8", "FP32"]},
        )

    @models.get("/ready", summary=_READY, dependencies=[model_of_path])
    @models.get("/versions/{version}/ready", summary=_READY, dependencies=[model_of_path])
    async def model_ready(name: str) -> dict[str, str | bool]:
        return {"name": name, "ready": True}

    @models.post("/infer", **_INFER)
    @models.post("/versions/{version}/infer", **_INFER)
    async def infer(request: Request, name: str, model: ServedModel = model_of_path) -> Response:
        body = await read_body(request, service.limits)
        async with service.in_time():
            parsed = await service.decoding(parse_request, body, request.headers.get(LENGTH_HEADER), service.limits)
            predictions = await _predict(service, model, parsed)
        head = InferAnswer(model_name=name, model_version=model.model_id, id=parsed.body.id)
        outputs = output_arrays(predictions, model.classifier.classes)
        content, headers = format_answer(head, outputs, parsed.body)
        return Response(content, headers=headers)

    routes.include_router(models)
    return routes


async def _predict(service: Service, model: ServedModel, request: InferRequest) -> Sequence[Prediction]:
    """Return one prediction per image. Raises Problem if the model does not take the input or its only image."""
    tensor = request.tensor
    if (tensor.name == "image") != (tensor.datatype == "BYTES"):
        detail = f"{tensor.name} cannot be {tensor.datatype}: image is BYTES, pixels UINT8 or FP32"
        raise Problem(400, "bad_request", detail)
    if isinstance(request.values, list):
        _, predictions = await service.classify(model, request.values, lambda images: list(map(_single, images)))
    else:
        if len(tensor.shape) != 3:
            raise Problem(400, "bad_request", f"pixels of shape {tensor.shape} are not [n, height, width]")
        _, height, width = tensor.shape
        if height * width > model.source.limits.max_pixels:
            raise Problem(413, "bomb", f"{width}x{height} pixels, above max_pixels {model.source.limits.max_pixels}")
        frames = await service.decoding(model.classifier.frames, list(request.values))
        predictions = await service.predict(model, frames)
    if len(predictions) == 1 and predictions[0].status != "ok":
        raise Problem.of_rejection(str(predictions[0].error_code), str(predictions[0].error))
    return predictions


def _single(image: DecodedImage) -> DecodedImage:
    """Return `image` if it is one row of the answer, else a rejection."""
    if isinstance(image, Rejection) or len(image) == 1:
        return image
    return Rejection("unsupported", f"a scan of {len(image)} frames has several answers: use /v1/classify", False)
