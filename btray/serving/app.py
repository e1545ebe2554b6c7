"""The routes of the service: the page, /v1, health and metrics. `build_app` puts them behind the gate.

The app is ASGI and knows nothing of Ray Serve, so it runs under any server; see `btray.serving` for the replicas.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from btray.core.notice import NOTICE
from btray.data.frames import Rejection
from btray.explain import heat_png, overlay_png, slice_png
from btray.model.prediction import Prediction, as_answer
from btray.serving import metrics as serving_metrics
from btray.serving import openapi
from btray.serving.gate import CLIENT_WENT, Gate, read_body
from btray.serving.models import Found, ServedModel, TrafficSplit
from btray.serving.oip import add_protocol
from btray.serving.problems import REJECTION_STATUS, Problem
from btray.serving.service import Service, quickly
from btray.serving.uploads import Upload, images_in

_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def build_app(service: Service) -> Gate:
    """The ASGI app of `service`."""
    app = FastAPI(
        title="btray",
        version=openapi.version(),
        description=openapi.DESCRIPTION,
        docs_url=None,  # FastAPI's own page for it loads scripts from elsewhere
        redoc_url=None,
    )
    _add_errors(app)
    _add_page(app)
    _add_health(app, service)
    _add_classify(app, service)
    add_protocol(app, service)
    return Gate(app, lambda: service.access, lambda: service.limits, service.metrics)


async def classify(
    service: Service, line: TrafficSplit, uploads: Sequence[Upload], explain: bool, top_k: int | None
) -> dict[str, Any]:
    """The answer of /v1/classify. Raises Problem for a single image that cannot be used."""
    model = line.choose()
    images = [upload.data for upload in uploads]
    at_once = await service.at_once(model, images)
    found = at_once[0] if at_once else await service.decoded(model, images)
    if explain:
        _require_explainable(found, service.limits.max_images)
    predictions = at_once[1] if at_once else await service.predict(model, found)
    if len(found) == 1 and isinstance(found[0], Rejection):
        rejection = found[0]
        raise Problem(REJECTION_STATUS.get(rejection.code, 422), rejection.code, rejection.message)
    results = [_record(prediction, uploads[prediction.index], top_k) for prediction in predictions]
    if explain:
        await _explain(service, model, found, predictions, results)
    return {"model_id": model.model_id, "notice": NOTICE, "results": results}


def _record(prediction: Prediction, upload: Upload, top_k: int | None) -> dict[str, Any]:
    record = {"index": prediction.index, "name": upload.name, **as_answer(prediction)}
    if prediction.status == "ok":
        ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
        record["probabilities"] = dict(ranked[:top_k])
    return record


def _require_explainable(found: Sequence[Found], most: int) -> None:
    """Raise Problem for more frames than pictures are drawn of; nothing of them is classified then."""
    frames = sum(len(frames) for frames in found if not isinstance(frames, Rejection))
    if frames > most:
        raise Problem(413, "too_many_explanations", f"{frames} frames, above the {most} explained: ask without explain")


async def _explain(
    service: Service,
    model: ServedModel,
    found: Sequence[Found],
    predictions: Sequence[Prediction],
    results: list[dict[str, Any]],
) -> None:
    """Add the pictures to the results that are answers."""
    rows = [row for row, prediction in enumerate(predictions) if prediction.status == "ok"]
    if not rows:
        return
    frames = [found[predictions[row].index][predictions[row].frame] for row in rows]  # type: ignore[index]
    labels = [str(predictions[row].label) for row in rows]
    heats = await model.explain(frames, labels)
    pictures = await asyncio.gather(*(service.decoding(_pictures, *pair) for pair in zip(frames, heats, strict=True)))
    for row, explanation in zip(rows, pictures, strict=True):
        results[row]["explanation"] = {"label": results[row]["label"], **explanation}


def _pictures(frame: np.ndarray[Any, Any], heat: np.ndarray[Any, Any]) -> dict[str, str]:
    """The frame, its heat and one over the other, as PNG in base64."""
    drawn = {"overlay_png": overlay_png(frame, heat), "slice_png": slice_png(frame), "heat_png": heat_png(heat)}
    return {name: base64.b64encode(picture).decode("ascii") for name, picture in drawn.items()}


def _add_classify(app: FastAPI, service: Service) -> None:
    @app.post("/v1/classify", **openapi.CLASSIFY)
    async def classify_images(
        request: Request,
        explain: Annotated[bool, Query(description="Add Grad-CAM pictures of what spoke for each label.")] = False,
        top_k: Annotated[int | None, Query(ge=1, le=1000, description="Most probabilities of each answer.")] = None,
    ) -> Response:
        line = service.line()
        body = await read_body(request, service.limits)

        async def answer() -> Response:
            kind = request.headers.get("content-type", "")
            limits = service.limits
            uploads = await quickly(
                service, len(body), lambda: images_in(kind, body, most=limits.max_images, max_json=limits.max_json)
            )
            content = await classify(service, line, uploads, explain, top_k)
            return Response(json.dumps(content, allow_nan=False), media_type="application/json")

        return await service.in_time(answer())

    @app.get("/v1/models", **openapi.MODELS)
    async def list_models() -> Response:
        line = service.line()
        share = line.config.canary.share if line.config.canary else 0.0
        shares = [1 - share, share]
        models = [
            {"name": line.config.name, "role": role, "share": part, **model.facts}
            for model, role, part in zip(line.models(), ("main", "canary"), shares, strict=False)
        ]
        return Response(
            json.dumps({"notice": NOTICE, "models": models, "switch": service.models.switch}),
            media_type="application/json",
        )


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", **openapi.HEALTH)
    async def healthz() -> Response:
        return Response('{"status": "ok"}', media_type="application/json")

    @app.get("/readyz", **openapi.READY)
    async def readyz() -> Response:
        service.line()
        return Response('{"status": "ready"}', media_type="application/json")

    @app.get("/metrics", **openapi.METRICS)
    async def metrics() -> Response:
        try:
            pages = await asyncio.to_thread(serving_metrics.exported_pages)
        except Exception as error:
            raise Problem(503, "not_ready", "Ray's metrics agents do not answer", retry_after=10) from error
        return Response(serving_metrics.merged(pages), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI) -> None:
    for path, (name, kind) in _PAGE.items():
        give = _giving(resources.files("btray").joinpath("serving/static", name).read_bytes(), kind)
        app.add_api_route(path, give, methods=["GET", "HEAD"], include_in_schema=False)


def _giving(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def give() -> Response:
        return Response(content, media_type=kind)

    return give


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Problem)
    async def problem(_: Request, error: Problem) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        told = Problem(error.status_code, _HTTP_CODES.get(error.status_code, "bad_request"), str(error.detail))
        told.headers |= dict(error.headers or {})
        return told.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return Problem(422, "invalid", f"{where}: {first['msg']}"[:500]).response()

    @app.exception_handler(ClientDisconnect)
    async def client_went(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_WENT)  # for the metrics: nobody is there to read it

    @app.exception_handler(Exception)
    async def failure(_: Request, __: Exception) -> Response:
        return Problem(500, "internal", "the service failed; its log says why").response()
