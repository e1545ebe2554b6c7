"""What OpenAPI says of each route: summaries, bodies with examples, answers and errors."""

from __future__ import annotations

import importlib.metadata
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, create_model

from btray.core.notice import NOTICE
from btray.model.prediction import answer_model_fields, output_specs
from btray.serving.problems import PROBLEM_TYPE, REJECTION_STATUS

DESCRIPTION: Final = (
    f"Brain-tumor classification of MRI slices. {NOTICE}\n\nWhere the service has API keys, send one as "
    "`Authorization: Bearer KEY`. Errors are `application/problem+json` with a `code` that programs can rely on."
)


def version() -> str:
    """Of this btray."""
    return importlib.metadata.version("btray")


class _Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


class ProblemAnswer(_Answer):
    """An error (RFC 9457)."""

    type: str
    """Always about:blank."""
    title: str
    """The phrase of the status."""
    status: int
    """The HTTP status."""
    code: str
    """What is wrong, for programs."""
    detail: str
    """What is wrong, for people."""
    error: str
    """The same as detail, for clients of the Open Inference Protocol."""


class Explanation(_Answer):
    """Grad-CAM pictures as PNG in base64; all show the frame that the network sees."""

    label: str
    """The label that is explained."""
    overlay_png: str
    """The slice with the heat map over it."""
    slice_png: str
    """The slice alone."""
    heat_png: str
    """The heat map alone, the more transparent the colder it is."""


class _Image(_Answer):
    index: int
    """Which image of the request it belongs to, from 0."""
    name: str | None
    """The name that the image came with."""
    explanation: Explanation | None = None
    """With explain=true."""


ImageAnswer = create_model(
    "ImageAnswer",
    __base__=_Image,
    __doc__="What the model says of one frame of one image, or why it says nothing.",
    **answer_model_fields(),
)


class ClassifyAnswer(_Answer):
    """The answers for all images of a request."""

    model_id: str
    """The model that answered."""
    notice: str
    """What this is not."""
    results: list[ImageAnswer]  # type: ignore[valid-type]
    """One for each frame of each image, in their order."""


_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAAAAAA6mKC9AAAADUlEQVR4nGNgGAXIAAABEAABoJMRpQAAAABJRU5ErkJggg=="
_EXAMPLE: Final = {
    "model_id": "6c8ff0849668f68db3cba254da5c0b42",
    "notice": NOTICE,
    "results": [
        {
            "index": 0, "name": "scan.jpg", "frame": 0, "status": "ok",
            "model_id": "6c8ff0849668f68db3cba254da5c0b42", "label": "glioma", "confidence": 0.91,
            "probabilities": {"glioma": 0.91, "metastasis": 0.06, "meningioma": 0.02, "pituitary": 0.01},
            "abstained": False, "label_set": [], "out_of_distribution": False, "ood_score": 1.1,
        },
        {
            "index": 1, "name": "notes.txt", "frame": 0, "status": "rejected",
            "model_id": "6c8ff0849668f68db3cba254da5c0b42", "error_code": "not_an_image",
            "error": "no known image: it begins with 48 65 6c 6c 6f",
        },
    ],
}  # fmt: skip

_TITLES: Final = {
    400: "The request or its only image cannot be read.",
    401: "A key is needed.",
    403: "The service answers its own machine alone.",
    404: "There is no such model or version.",
    408: "The body did not arrive in time.",
    413: "Too many bytes, images, frames or pixels.",
    415: "A content type, encoding or kind of image that is not read.",
    422: "A value is out of range.",
    503: "Too much is in work, or no model is there yet: wait as long as Retry-After says.",
}


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route."""
    schema = {"schema": {"$ref": "#/components/schemas/ProblemAnswer"}}
    return {code: {"description": _TITLES[code], "content": {PROBLEM_TYPE: schema}} for code in codes}


def _json(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": {"type": "object"}}}}


_BINARY: Final = {"type": "string", "format": "binary"}
_IMAGE: Final = {
    "type": "object",
    "required": ["data"],
    "additionalProperties": False,
    "properties": {"data": {"type": "string", "format": "byte"}, "name": {"type": ["string", "null"]}},
}
_BODIES: Final = {
    "multipart/form-data": {
        "schema": {"type": "object", "properties": {"images": {"type": "array", "items": _BINARY, "minItems": 1}}},
    },
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["images"],
            "properties": {
                "images": {
                    "type": "array",
                    "minItems": 1,
                    "items": {"anyOf": [{"type": "string", "format": "byte"}, _IMAGE]},
                }
            },
        },
        "example": {"images": [{"name": "scan.png", "data": _PIXEL}]},
    },
    **{kind: {"schema": _BINARY} for kind in ("image/jpeg", "image/png", "image/tiff", "application/octet-stream")},
}

_GUARDED: Final = _problems(401, 403)
_SERVING: Final = {**_GUARDED, **_problems(503)}

CLASSIFY: Final[dict[str, Any]] = {
    "summary": "Classify one or many images",
    "description": (
        "A request with one image that cannot be used is answered with an error whose code is that of the image: "
        + ", ".join(f"{code} ({status})" for code, status in REJECTION_STATUS.items())
        + ". Among several images each has a status of its own. No URL is ever fetched; images are not kept."
    ),
    "responses": {
        200: {"model": ClassifyAnswer, "content": {"application/json": {"example": _EXAMPLE}}},
        422: {"model": ProblemAnswer},  # puts the schema among the components
        **_SERVING,
        **_problems(400, 408, 413, 415, 422),
    },
    "openapi_extra": {"requestBody": {"required": True, "content": _BODIES}},
}

MODELS: Final[dict[str, Any]] = {
    "summary": "The models that answer, and what became of the latest switch",
    "responses": {200: _json("The main model, and the canary where there is one."), **_SERVING},
}
HEALTH: Final[dict[str, Any]] = {"summary": "Whether the process is alive", "responses": {200: _json("It is.")}}
READY: Final[dict[str, Any]] = {
    "summary": "Whether a model is there to answer",
    "responses": {200: _json("It is."), **_problems(503)},
}
METRICS: Final[dict[str, Any]] = {
    "summary": "The service's numbers for Prometheus, of all replicas",
    "responses": {
        200: {"description": "Prometheus text.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **_SERVING,
    },
}
SERVER: Final[dict[str, Any]] = {
    "summary": "Open Inference Protocol: the server",
    "responses": {200: _json("Name, version and extensions."), **_GUARDED},
}
MODEL: Final[dict[str, Any]] = {
    "summary": "Open Inference Protocol: a model's inputs and outputs",
    "responses": {200: _json("Its metadata."), **_SERVING, **_problems(404)},
}
MODEL_READY: Final[dict[str, Any]] = {
    "summary": "Open Inference Protocol: whether a model is ready",
    "responses": {200: _json("It is."), **_SERVING, **_problems(404)},
}

_TENSOR: Final = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"type": "string", "enum": ["image", "pixels"]},
        "datatype": {"type": "string", "enum": ["BYTES", "UINT8", "FP32"]},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "parameters": {"type": "object"},
        "data": {"type": "array"},
    },
}
INFER: Final[dict[str, Any]] = {
    "summary": "Open Inference Protocol: inference",
    "description": (
        "`image` is BYTES [n], encoded images (base64 in JSON), or `pixels` is UINT8 or FP32 [n, height, width]. With "
        "the binary tensor extension tensors follow the JSON, whose length Inference-Header-Content-Length tells."
    ),
    "responses": {
        200: {
            "description": f"{', '.join(name for name, *_ in output_specs(()))}: one row per image.",
            "content": {
                "application/json": {"schema": {"type": "object"}},
                "application/octet-stream": {"schema": _BINARY},
            },
        },
        **_SERVING,
        **_problems(400, 404, 408, 413, 415, 422),
    },
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": ["inputs"],
                        "properties": {
                            "id": {"type": "string"},
                            "parameters": {"type": "object"},
                            "inputs": {"type": "array", "items": _TENSOR, "minItems": 1, "maxItems": 1},
                            "outputs": {"type": "array", "items": {"type": "object"}},
                        },
                    },
                    "example": {
                        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [_PIXEL]}],
                    },
                },
                "application/octet-stream": {"schema": _BINARY},
            },
        }
    },
}
