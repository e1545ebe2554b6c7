"""The application: all routes, with the page, health and metrics among them, behind the gate.

It is ASGI and knows nothing of Ray Serve, so it runs under any server; see `btray.serving.deployment` for the replicas.
"""

from __future__ import annotations

import asyncio
from functools import partial
from importlib import resources
from typing import Final

import jinja2
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response

from btray.serving import openapi
from btray.serving.classify_api import classify_routes
from btray.serving.dicomweb.stow import stow_routes
from btray.serving.gate import CLIENT_CLOSED, PAGE, Gate
from btray.serving.metrics import exported_pages, merged
from btray.serving.oip import protocol_routes
from btray.serving.oip_codec import InferBody
from btray.serving.problems import Problem, ProblemAnswer, problem_of, problem_responses
from btray.serving.service import Service
from btray.serving.studies_api import StudiesRequest, studies_routes
from btray.serving.uploads import ClassifyRequest

_ERRORS: Final = (Problem, HTTPException, RequestValidationError, ClientDisconnect, Exception)


def build_app(service: Service) -> Gate:
    """Return the ASGI app of `service`."""
    app = FastAPI(
        title="btray",
        version=openapi.version(),
        description=openapi.DESCRIPTION,
        docs_url=None,  # FastAPI's own page for it loads scripts from elsewhere; ours is below
        redoc_url=None,
        exception_handlers={**dict.fromkeys(_ERRORS, _answer_error), 404: _answer_no_route},
    )
    for path, (name, kind) in PAGE.items():
        content = resources.files("btray").joinpath("serving/static", name).read_bytes()
        app.add_api_route(path, partial(_send, content, kind), include_in_schema=False)

    @app.get("/healthz", summary="Whether the process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Whether a model is there to answer", responses=problem_responses(503))
    async def readyz() -> dict[str, str]:
        service.split()
        return {"status": "ready"}

    @app.get(
        "/metrics",
        summary="The service's numbers for Prometheus, of all replicas",
        response_class=PlainTextResponse,
        responses=problem_responses(401, 403, 503),
    )
    async def metrics() -> Response:
        try:
            pages = await asyncio.to_thread(exported_pages)
        except Exception as error:
            raise Problem(503, "not_ready", "Ray's metrics agents do not answer", retry_after=10) from error
        return Response(merged(pages), media_type="text/plain; version=0.0.4")

    app.include_router(classify_routes(service))
    app.include_router(studies_routes(service))
    app.include_router(protocol_routes(service))
    app.include_router(stow_routes(service))
    openapi.define(app, ProblemAnswer, ClassifyRequest, StudiesRequest, InferBody)
    template = resources.files("btray").joinpath("serving/static/docs.html").read_text(encoding="utf-8")
    docs = jinja2.Template(template, autoescape=True).render(api=app.openapi()).encode()
    app.add_api_route("/docs", partial(_send, docs, "text/html"), include_in_schema=False)
    return Gate(app, service)


async def _send(content: bytes, kind: str) -> Response:
    return Response(content, media_type=kind)


async def _answer_no_route(request: Request, _: Exception) -> Response:
    """Answer a path that is not there; Triton's client asks for some that the protocol leaves open."""
    detail = f"nothing is at {request.url.path[:80]}; /openapi.json lists what is"
    if request.url.path.startswith("/v2/"):
        detail += ". Of the Open Inference Protocol it is health, metadata and inference, without Triton's extensions "
        detail += "(model configuration, statistics, model repository, shared memory, trace, logging)"
    return Problem(404, "not_found", detail).response()


async def _answer_error(_: Request, error: Exception) -> Response:
    """Answer every error with a problem."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED)  # for the metrics: nobody is there to read it
    return problem_of(error).response()
