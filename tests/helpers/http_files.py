"""A loopback HTTP server with Range support and configurable misbehaviour, for the download tests."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


@dataclass
class Request:
    """A received request, and how many bytes of body were sent."""

    headers: dict[str, str]
    status: int = 0
    sent: int = 0


@dataclass
class Misbehaviour:
    """How one response differs from a correct one."""

    cut_after: int | None = None
    """Close the connection after this many bytes of body."""
    status: int | None = None
    """Answer with this status and no body."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers that replace the correct ones; an empty value omits the header."""
    no_range: bool = False
    """Answer 200 with the whole file, whatever range was requested."""
    ignore_if_range: bool = False
    """Answer with a range of the current file, whatever version was requested."""


class FileServer:
    """Serve `content` at every path; `plan[i]` is the misbehaviour of response i, `always` that of all later ones."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.plan: list[Misbehaviour] = []
        self.always = Misbehaviour()
        self.requests: list[Request] = []
        self.before_answer: Callable[[int], None] = lambda number: None

    def __enter__(self) -> FileServer:
        files = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                files.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing: the tests read `requests` instead."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def url(self, path: str = "set.zip") -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/{path}"

    @property
    def sent(self) -> int:
        """Body bytes of all responses together."""
        return sum(request.sent for request in self.requests)

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.content).hexdigest()}"'

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        number = len(self.requests)
        self.before_answer(number)
        wrong = self.plan[number] if number < len(self.plan) else self.always
        request = Request(dict(handler.headers))
        self.requests.append(request)
        status, body, headers = self._good_answer(request, wrong)
        if wrong.status is not None:
            status, body = wrong.status, b""
        headers["Content-Length"] = str(len(body))
        request.status = status
        handler.send_response(status)
        for key, value in (headers | wrong.headers).items():
            if value:
                handler.send_header(key, value)
        handler.end_headers()
        body = body[: wrong.cut_after]
        request.sent = len(body)  # set before the client can have read the whole body
        handler.wfile.write(body)
        handler.close_connection = True

    def _good_answer(self, request: Request, wrong: Misbehaviour) -> tuple[int, bytes, dict[str, str]]:
        headers = {"ETag": self.etag}
        if request.headers.get("If-None-Match") == self.etag:
            return 304, b"", headers
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        current = wrong.ignore_if_range or request.headers.get("If-Range", self.etag) == self.etag
        if not wanted or wrong.no_range or not current:
            return 200, self.content, headers
        start = int(wanted[1])
        if start >= len(self.content):
            return 416, b"", headers | {"Content-Range": f"bytes */{len(self.content)}"}
        end = f"{len(self.content) - 1}/{len(self.content)}"
        return 206, self.content[start:], headers | {"Content-Range": f"bytes {start}-{end}"}
