"""The parts of OpenAPI that do not follow from the routes' own models."""

from __future__ import annotations

import importlib.metadata
from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from btray.core.notice import NOTICE

DESCRIPTION: Final = (
    f"Brain-tumor classification of MRI slices. {NOTICE}\n\nIf the service has API keys, send one as "
    "`Authorization: Bearer KEY`. Errors are `application/problem+json` with a `code` that programs can rely on."
)
BINARY: Final = {"type": "string", "format": "binary"}
EXAMPLE_PNG: Final = "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAAAAAA6mKC9AAAADUlEQVR4nGNgGAXIAAABEAABoJMRpQAAAABJRU5ErkJggg=="
_REFERENCE: Final = "#/components/schemas/{model}"


def version() -> str:
    """Return the version of this btray."""
    return importlib.metadata.version("btray")


def request_body(model: type[BaseModel], example: dict[str, Any], **others: dict[str, Any]) -> dict[str, Any]:
    """Return `openapi_extra` for a body that is `model` in JSON, or of `others`: schemas by content type.

    FastAPI would read a body that a route declares: whole, whatever its size. So bodies are read by the routes
    themselves, and described here.
    """
    json_body = {"schema": {"$ref": _REFERENCE.format(model=model.__name__)}, "example": example}
    content = {"application/json": json_body} | {kind: {"schema": schema} for kind, schema in others.items()}
    return {"requestBody": {"required": True, "content": content}}


def define(app: FastAPI, *models: type[BaseModel]) -> None:
    """Add `models`, which routes refer to but do not declare, to the schemas of `app`; its routes must be complete."""
    definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REFERENCE)[1]
    app.openapi()["components"]["schemas"] |= definitions["$defs"]
