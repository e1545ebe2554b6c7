"""What every request passes before a route sees it: who asks, how much is in work, how large it is; and what it leaves.

A pure ASGI layer: it decides from the headers alone where it can, and nothing is read of a request that it refuses.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Final, Protocol

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from btray.serving.access import KeyRing
from btray.serving.config import LimitsConfig, is_loopback
from btray.serving.problems import Problem

_log = logging.getLogger(__name__)

OPEN_PATHS: Final = frozenset(
    ("/", "/page.css", "/page.js", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
)
"""What is answered without a key: the page, which holds no data, and whether the service is well."""

_HEADERS: Final = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
    (b"cache-control", b"no-store"),
]


CLIENT_WENT: Final = 499
"""What nginx and Ray Serve write of a client that did not wait for its answer."""


class Watcher(Protocol):
    """What is told of every answer."""

    def request(self, route: str, code: int, seconds: float) -> None:
        """A request to `route` was answered with `code` after `seconds`."""

    def in_work(self, requests: int) -> None:
        """So many requests are in work."""


class Access:
    """Who may ask: whoever has a key; where there are no keys, this machine alone, unless all may."""

    def __init__(
        self, keys: KeyRing | None, *, insecure: bool, sees_callers: bool = True, reader: Executor | None = None
    ) -> None:
        """`sees_callers`: a request's client is who asks, and no proxy that others reach.

        Keys are read again on a thread of `reader`, where no other work is before them.
        """
        self.keys = keys
        self.insecure = insecure
        self.sees_callers = sees_callers
        self.reader = reader

    async def check(self, scope: Scope) -> None:
        """Raise Problem unless the caller may ask."""
        headers = dict(scope["headers"])
        if self.keys is not None:
            if self.keys.stale:
                await asyncio.get_running_loop().run_in_executor(self.reader, self.keys.refresh)
            if not self.keys.accepts(_key_in(headers)):
                raise Problem(401, "unauthorized", "no key, or none that is known: send Authorization: Bearer KEY")
        elif not self.insecure:
            _check_local(scope, headers, self.sees_callers)


class Gate:
    """ASGI middleware around the routes. `access` and `limits` are asked for each request, for they may change."""

    def __init__(
        self, app: ASGIApp, access: Callable[[], Access], limits: Callable[[], LimitsConfig], watcher: Watcher
    ) -> None:
        self.app = app
        self.access = access
        self.limits = limits
        self.watcher = watcher
        self.reading = 0
        self.working = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send)
        started = time.perf_counter()
        try:
            await self._admitted(scope, receive, answer)
        except Problem as problem:
            await _respond(problem, scope, receive, answer)
        except Exception:
            _log.exception("a request to %s failed", route_of(scope))
            await _respond(Problem(500, "internal", "the service failed; its log says why"), scope, receive, answer)
        finally:
            status = answer.status or CLIENT_WENT
            self.watcher.request(route_of(scope), status, time.perf_counter() - started)

    async def _admitted(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        if scope["path"] not in OPEN_PATHS:
            await self.access().check(scope)
        if scope["method"] != "POST":
            await self.app(scope, receive, answer)
            return
        limits = self.limits()
        _check_length(scope, limits.max_body)
        self._require_place(limits)
        if self.reading >= limits.max_reading:
            raise Problem(503, "busy", f"{self.reading} requests are being read already", retry_after=1)
        place = _Slot(self, limits, receive)
        try:
            await self.app(scope, place.receive, answer)
        finally:
            place.leave()

    def _require_place(self, limits: LimitsConfig) -> None:
        if self.working >= limits.max_requests:
            raise Problem(503, "busy", f"{self.working} requests are in work already", retry_after=1)

    def begin_work(self, limits: LimitsConfig) -> None:
        """Count one more request in work. Raises Problem where there are as many as may be."""
        self._require_place(limits)
        self.working += 1
        self.watcher.in_work(self.working)

    def end_work(self) -> None:
        """Count one less."""
        self.working -= 1
        self.watcher.in_work(self.working)


class _Slot:
    """What a request takes of a gate: it is read, then in work. One that arrives slowly keeps nobody from working."""

    def __init__(self, gate: Gate, limits: LimitsConfig, receive: Receive) -> None:
        self.gate = gate
        self.limits = limits
        self.wrapped = receive
        self.reading, self.working = True, False
        gate.reading += 1

    async def receive(self) -> Message:
        """The next message. Raises Problem where the body is whole and there is no place in work for the request."""
        message = await self.wrapped()
        if self.reading and message["type"] == "http.request" and not message.get("more_body"):
            self._end_reading()
            self.gate.begin_work(self.limits)
            self.working = True
        return message

    def leave(self) -> None:
        """The request is answered, or gone."""
        if self.reading:
            self._end_reading()
        if self.working:
            self.gate.end_work()

    def _end_reading(self) -> None:
        self.reading = False
        self.gate.reading -= 1


class HeaderGuard:
    """ASGI middleware before Ray Serve's own code, which fails with a 500 where a header that it reads is no UTF-8."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; with 400 where a header of a name that Ray reads is no ASCII."""
        for name, value in scope.get("headers", ()):
            if not value.isascii() and name.startswith((b"x-", b"serve_", b"serve-")):
                detail = f"the header {name.decode('latin-1')[:80]} has bytes that are no ASCII"
                await Problem(400, "bad_request", detail).response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


def proxy_middlewares() -> list[Middleware]:
    """What Ray Serve puts before its proxies and replicas (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH)."""
    return [Middleware(HeaderGuard)]


async def read_body(request: Request, limits: LimitsConfig) -> bytes:
    """The whole body, unpacked where it is gzip or deflate. Raises Problem where it is too large, late or damaged."""
    _check_length(request.scope, limits.max_body)
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
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    return body if encoding in ("identity", "") else await asyncio.to_thread(_unpacked, body, encoding, limits.max_body)


def route_of(scope: Scope) -> str:
    """The route's own path, which has no caller's text in it and so makes few metrics; `other` where there is none."""
    return str(getattr(scope.get("route"), "path", "other"))


class _Answer:
    """`send` with the security headers, remembering the status."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = {name for name, _ in message["headers"]}
            message["headers"] = [*message["headers"], *(header for header in _HEADERS if header[0] not in given)]
        await self.send(message)


async def _respond(problem: Problem, scope: Scope, receive: Receive, answer: _Answer) -> None:
    if not answer.status:  # else the answer is on its way already
        await problem.response()(scope, receive, answer)


def _key_in(headers: dict[bytes, bytes]) -> str:
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return headers.get(b"x-api-key", b"").decode("latin-1").strip()


def _check_local(scope: Scope, headers: dict[bytes, bytes], sees_callers: bool) -> None:
    """Raise Problem unless the request comes from this machine, and names it: a page on another site, whose name was
    made to point here, is not answered either."""
    if not sees_callers:
        raise Problem(403, "forbidden", "this service has no API keys, and HAProxy before it hides who asks: set keys")
    client: Any = scope.get("client")
    host = headers.get(b"host", b"").decode("latin-1")
    name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
    if client is None or not is_loopback(client[0]) or not is_loopback(name):
        raise Problem(403, "forbidden", "this service has no API keys and answers requests to localhost alone")


def _check_length(scope: Scope, largest: int) -> None:
    for name, value in scope["headers"]:
        if name == b"content-length" and (len(value) > 18 or not value.isdigit() or int(value) > largest):
            raise _too_large(largest)


def _too_large(largest: int) -> Problem:
    return Problem(413, "too_large", f"the body has more than {largest} bytes")


def _unpacked(body: bytes, encoding: str, largest: int) -> bytes:
    if encoding not in ("gzip", "deflate"):
        raise Problem(
            415, "unsupported_media_type", f"content encoding {encoding[:40]!r} is not read; use gzip or none"
        )
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # told by the header, gzip or zlib
    try:
        unpacked = unpacker.decompress(body, largest + 1)
    except zlib.error as error:
        raise Problem(400, "bad_body", f"the body is no {encoding}: {error}") from error
    if len(unpacked) > largest:
        raise _too_large(largest)
    if not unpacker.eof:
        raise Problem(400, "bad_body", f"the {encoding} body ends too early")
    if unpacker.unused_data:
        detail = f"{len(unpacker.unused_data)} bytes stand behind the end of the {encoding} body; send it as one member"
        raise Problem(400, "bad_body", detail)
    return unpacked
