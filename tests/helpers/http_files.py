"""HTTP servers on loopback: one file with Range support and configurable misbehaviour, and files by path."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


class LoopbackServer:
    """An HTTP server in a thread, on a free port."""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer a GET or a PUT."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        answer = self.answer

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            def do_PUT(self) -> None:
                answer(self)

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing: the tests read what the server recorded."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])


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


class FileServer(LoopbackServer):
    """Serve `content` at every path; `plan[i]` is the misbehaviour of response i, `always` that of all later ones."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.plan: list[Misbehaviour] = []
        self.always = Misbehaviour()
        self.requests: list[Request] = []
        self.before_answer: Callable[[int], None] = lambda number: None

    def url(self, path: str = "set.zip") -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

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


class PathServer(LoopbackServer):
    """Serve `files` by path; a PUT is answered with the content of its path, and its body kept in `put`."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = dict(files)
        self.asked: list[tuple[str, str]] = []
        self.put: dict[str, bytes] = {}
        self.refusals: list[int] = []
        """Statuses with which to refuse the next requests."""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.command == "PUT":
            self.put[handler.path] = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        self.asked.append((handler.command, handler.path))
        body = self.files.get(handler.path)
        handler.send_response(self.refusals.pop(0) if self.refusals else 404 if body is None else 200)
        handler.send_header("Content-Length", str(len(body or b"")))
        handler.send_header("Content-Type", "text/plain; version=0.0.4")
        handler.end_headers()
        handler.wfile.write(body or b"")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count(self, path: str) -> int:
        return sum(asked == path for _, asked in self.asked)
