"""The routes of the service: the page, /v1, health and metrics. `build_app` puts them behind the gate.

The app is ASGI and knows nothing of Ray Serve, so it runs under any server; see `btray.serving` for the replicas.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from btray import api_schema, serving_metrics
from btray.api_keys import KeyRing
from btray.classifier import Prediction
from btray.cli import NOTICE
from btray.explain import heat_png, overlay_png, slice_png
from btray.frames import Rejection
from btray.http_gate import CLIENT_WENT, Access, Gate, read_body
from btray.inference_protocol import add_protocol
from btray.problems import REJECTION_STATUS, Problem
from btray.scans import count_pages
from btray.served_models import Found, Line, ServedModel, ServedModels
from btray.settings_serve import LimitsConfig, ServiceConfig
from btray.uploads import Upload, images_in

Result = TypeVar("Result")

_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_SMALL = 256 * 1024
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


class Service:
    """What a replica holds: its models, its threads, and who may ask for what."""

    def __init__(self, *, sees_callers: bool = True) -> None:
        """`sees_callers`: see `Access`."""
        self.sees_callers = sees_callers
        self.metrics = serving_metrics.Metrics()
        # One thread, since each replica has one CPU: a second forward pass would only slow the first one down.
        self.models = ServedModels(ThreadPoolExecutor(1, "predict"), self.metrics)
        self.decoders = ThreadPoolExecutor(ServiceConfig.model_fields["decoders"].default, "decode")
        self.key_reader = ThreadPoolExecutor(1, "keys")
        self.access = Access(None, insecure=False, sees_callers=sees_callers)
        self.limits = LimitsConfig()

    async def configure(self, config: ServiceConfig) -> None:
        """Serve `config`, keys and limits and all, once its models are ready.

        The first config raises UserError where it cannot be served; a later one is refused, and all stays as it was.
        """

        def prepare() -> Callable[[], None]:
            keys = KeyRing.of(config.keys) if config.keys is not None else None
            return lambda: self._take(config, keys)

        await self.models.configure(config, prepare)

    def _take(self, config: ServiceConfig, keys: KeyRing | None) -> None:
        self.access = Access(keys, insecure=config.insecure, sees_callers=self.sees_callers, reader=self.key_reader)
        self.limits = config.limits
        # The old threads end once they have done what they were given.
        before, self.decoders = self.decoders, ThreadPoolExecutor(config.decoders, "decode")
        before.shutdown(wait=False)

    def line(self) -> Line:
        """What is served now. Raises Problem where nothing is yet."""
        if self.models.line is None:
            raise Problem(503, "not_ready", "the model is being loaded", retry_after=2)
        return self.models.line

    async def decoding(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run `function` on a decoder's thread, so that no request waits behind it for the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.decoders, function, *arguments)

    async def decoded(self, model: ServedModel, images: Sequence[bytes]) -> list[Found]:
        """The frames of encoded images. Raises Problem where they are more than one request may have."""
        most = self.limits.max_frames
        if await _quickly(self, sum(map(len, images)), lambda: sum(map(count_pages, images))) > most:
            raise Problem(413, "too_many_frames", f"the images of the request have more than {most} pages")
        return await asyncio.gather(*(self.decoding(model.source.from_bytes, data) for data in images))

    async def at_once(self, model: ServedModel, images: Sequence[bytes]) -> tuple[list[Found], list[Prediction]] | None:
        """`decoded` and `predict` of a request in one go, where that is quicker; see `ServedModel.at_once`."""
        answer = await model.at_once(images[0]) if len(images) == 1 else None
        if answer is None:
            return None
        frames, predictions = answer
        self.metrics.predictions(predictions)
        return [frames], predictions

    async def predict(self, model: ServedModel, found: Sequence[Found]) -> list[Prediction]:
        """Classify decoded images and count what came of it."""
        predictions = await model.predict(found)
        self.metrics.predictions(predictions)
        return predictions

    async def in_time(self, answering: Awaitable[Result]) -> Result:
        """What `answering` gives. Raises Problem where it takes longer than the service's timeout."""
        try:
            async with asyncio.timeout(self.limits.timeout):
                return await answering
        except TimeoutError as error:
            detail = f"no answer within {self.limits.timeout:g} seconds"
            raise Problem(503, "timeout", detail, retry_after=5) from error


def build_app(service: Service) -> Gate:
    """The ASGI app of `service`."""
    app = FastAPI(
        title="btray",
        version=api_schema.version(),
        description=api_schema.DESCRIPTION,
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
    service: Service, line: Line, uploads: Sequence[Upload], explain: bool, top_k: int | None
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
    record: dict[str, Any] = {"index": prediction.index, "name": upload.name, "frame": prediction.frame}
    record |= {"status": prediction.status, "model_id": prediction.model_id}
    if prediction.status != "ok":
        return record | {"error_code": prediction.error_code, "error": prediction.error}
    ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:top_k]
    return record | {
        "label": prediction.label,
        "confidence": prediction.confidence,
        "probabilities": dict(ranked),
        "abstained": prediction.abstained,
        "label_set": list(prediction.label_set),
        "out_of_distribution": prediction.out_of_distribution,
        "ood_score": prediction.ood_score,
    }


async def _quickly(service: Service, size: int, function: Callable[[], Result]) -> Result:
    """Run `function` here where `size` bytes take less time than changing threads, else on a decoder's thread."""
    return function() if size < _SMALL else await service.decoding(function)


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
    @app.post("/v1/classify", **api_schema.CLASSIFY)
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
            uploads = await _quickly(
                service, len(body), lambda: images_in(kind, body, most=limits.max_images, max_json=limits.max_json)
            )
            content = await classify(service, line, uploads, explain, top_k)
            return Response(json.dumps(content, allow_nan=False), media_type="application/json")

        return await service.in_time(answer())

    @app.get("/v1/models", **api_schema.MODELS)
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
    @app.get("/healthz", **api_schema.HEALTH)
    async def healthz() -> Response:
        return Response('{"status": "ok"}', media_type="application/json")

    @app.get("/readyz", **api_schema.READY)
    async def readyz() -> Response:
        service.line()
        return Response('{"status": "ready"}', media_type="application/json")

    @app.get("/metrics", **api_schema.METRICS)
    async def metrics() -> Response:
        try:
            pages = await asyncio.to_thread(serving_metrics.exported_pages)
        except Exception as error:
            raise Problem(503, "not_ready", "Ray's metrics agents do not answer", retry_after=10) from error
        return Response(serving_metrics.merged(pages), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI) -> None:
    for path, (name, kind) in _PAGE.items():
        give = _giving(resources.files("btray").joinpath(name).read_bytes(), kind)
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
