"""The ASGI layer before the routes: who asks, how much is in work, how large a body is; and the headers of each answer.

It decides from the headers alone if it can, and reads nothing of a request that it refuses.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import zlib
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from btray.serving.config import LimitsConfig
from btray.serving.haproxy import QUEUE_SECONDS
from btray.serving.problems import Problem, problem_of
from btray.serving.service import Service

_log = logging.getLogger(__name__)

PAGE: Final = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    **{f"/{name}": (name, "text/javascript") for name in ("page.js", "api.js", "viewer.js", "studies.js")},
}
"""The page by path: its files, and what they are."""

OPEN_PATHS: Final = frozenset((*PAGE, "/docs", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"))
"""Answered without a key: the pages, which hold no data, and the health of the service."""

_SECURITY_HEADERS: Final = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}

CLIENT_CLOSED: Final = 499
"""The status that nginx and Ray Serve log for a client that did not wait for its answer."""


class Gate:
    """ASGI middleware around the routes of `service`, whose access and limits may change between two requests."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        """Guard `app`, which answers for `service`."""
        self.app = app
        self.service = service
        self.metrics = service.metrics
        self.reading = 0
        """Requests whose bodies are on their way, or that wait for a place in work."""
        self.working = 0
        """Requests that are read, and not answered yet."""
        self._left = asyncio.Condition()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, started = 0, time.perf_counter()
        is_head = scope["method"] == "HEAD"
        if is_head:  # whatever answers GET
            scope = {**scope, "method": "GET"}

        async def answer(message: Message) -> None:
            nonlocal status
            if is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._admit(scope, receive, answer)
        except Exception as error:
            if not isinstance(error, Problem):
                _log.exception("a request to %s failed", route_of(scope))
            if not status:  # else the answer is on its way already
                await problem_of(error).response()(scope, receive, answer)
        finally:
            self.metrics.request(route_of(scope), status or CLIENT_CLOSED, time.perf_counter() - started)

    async def _admit(self, scope: Scope, receive: Receive, answer: Send) -> None:
        """Pass a request on if its caller may ask and, for a POST, once there is a place for it."""
        if scope["path"] not in OPEN_PATHS:
            await self.service.access.check(scope)
        if scope["method"] != "POST":
            await self.app(scope, receive, answer)
            return
        limits = self.service.limits
        for length in Headers(scope=scope).getlist("content-length"):
            if len(length) > 18 or not length.isdecimal() or int(length) > limits.max_body:
                raise _too_large(limits.max_body)
        if self.reading >= limits.max_reading:
            raise Problem(503, "busy", f"{self.reading} requests are being read already", retry_after=1)
        # A request is read, then in work, each in a place of its own: a slow upload keeps nobody from working. One that
        # is read waits where it is: Serve's autoscaler counts it, which it would not if it were refused.
        reading, working = True, False
        self.reading += 1

        async def receive_counted() -> Message:
            nonlocal reading, working
            message = await receive()
            if reading and message["type"] == "http.request" and not message.get("more_body"):
                await self._take_place()
                reading, working = False, True
                self.reading -= 1
            return message

        try:
            await self.app(scope, receive_counted, answer)
        finally:
            if reading:  # the client went, or was refused, before its body had arrived
                self.reading -= 1
            if working:
                self._count_work(-1)
                async with self._left:
                    self._left.notify()

    async def _take_place(self) -> None:
        """Count a request as in work, once there is a place. Raises Problem if none is free in time."""
        try:
            async with asyncio.timeout(QUEUE_SECONDS), self._left:
                await self._left.wait_for(lambda: self.working < self.service.limits.max_requests)
                self._count_work(1)
        except TimeoutError as error:
            raise Problem(503, "busy", f"{self.working} requests are in work already", retry_after=1) from error

    def _count_work(self, change: int) -> None:
        self.working += change
        self.metrics.in_work(self.working)


class HeaderGuard:
    """ASGI middleware before Ray Serve's own code, which fails with a 500 if a header that it reads is not UTF-8."""

    def __init__(self, app: ASGIApp) -> None:
        """Guard `app`."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; with 400 if a header of a name that Ray reads is not ASCII."""
        for name, value in scope.get("headers", ()):
            if not value.isascii() and name.startswith((b"x-", b"serve_", b"serve-")):
                detail = f"the header {name.decode('latin-1')[:80]} has bytes that are not ASCII"
                await Problem(400, "bad_request", detail).response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


def proxy_middlewares() -> list[Middleware]:
    """Return what Ray Serve puts before its proxies and replicas (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH)."""
    return [Middleware(HeaderGuard)]


async def read_body(request: Request, limits: LimitsConfig) -> bytes:
    """Return the whole body, unpacked if it is gzip or deflate. Raises Problem if it is too large, late or damaged."""
    chunks, size = [], 0
    try:
        async with asyncio.timeout(limits.timeout):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.max_body:
                    raise _too_large(limits.max_body)
                chunks.append(chunk)
    except TimeoutError as error:
        raise Problem(408, "timeout", f"the body did not arrive within {limits.timeout:g} seconds") from error
    body = b"".join(chunks)
    encodings = re.split(r"[,\s]+", ",".join(request.headers.getlist("content-encoding")).lower())
    encoding = ", ".join(each for each in encodings if each not in ("", "identity"))
    return await asyncio.to_thread(_unpack, body, encoding, limits.max_body) if encoding else body


def route_of(scope: Scope) -> str:
    """Return the route's own path, which has no text of the caller and so makes few metrics; else `other`."""
    return str(getattr(scope.get("route"), "path", "other"))


def _too_large(largest: int) -> Problem:
    return Problem(413, "too_large", f"the body has more than {largest} bytes")


def _unpack(body: bytes, encoding: str, largest: int) -> bytes:
    """Return the content of a gzip or zlib `body`, and stop at `largest` bytes: it may be a bomb."""
    if encoding not in ("gzip", "x-gzip", "deflate"):  # RFC 9110: x-gzip is the same
        detail = f"content encoding {encoding[:40]!r} is not supported; use gzip or none"
        raise Problem(415, "unsupported_media_type", detail)
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # 32: gzip or zlib, as the header says
    try:
        content = unpacker.decompress(body, largest + 1)
    except zlib.error as error:
        raise Problem(400, "bad_body", f"the body is not valid {encoding}: {error}") from error
    if len(content) > largest:
        raise _too_large(largest)
    if not unpacker.eof:
        raise Problem(400, "bad_body", f"the {encoding} body ends too early")
    if unpacker.unused_data:
        detail = f"{len(unpacker.unused_data)} bytes follow the end of the {encoding} body; send it as one member"
        raise Problem(400, "bad_body", detail)
    return content
