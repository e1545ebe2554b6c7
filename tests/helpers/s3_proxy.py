"""A loopback proxy before a server that behaves as other stores do, which a real SeaweedFS or Orthanc does not."""

from __future__ import annotations

import http.client
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from btray import storage
from tools.s3_server import S3Server


class Request(BaseHTTPRequestHandler):
    """One request: `method`, `path` and `headers`; `forward` sends it, or another of the same signature, upstream."""

    protocol_version = "HTTP/1.1"
    upstream = ""
    behave: Callable[[Request], None]

    def forward(self) -> None:
        """Answer what the server behind the proxy answers."""
        upstream = http.client.HTTPConnection(self.upstream, timeout=30)
        upstream.request(self.command, self.path, self.body, dict(self.headers.items()))
        response = upstream.getresponse()
        self.answer(response.status, response.read(), dict(response.getheaders()))
        upstream.close()

    def refuse(self, status: int, code: str, **headers: str) -> None:
        """Answer an S3 error."""
        self.answer(status, f"<Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode(), headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Answer with `body`; of a HEAD the headers tell its length."""
        self.send_response_only(status)
        length = headers.pop("Content-Length", str(len(body)))
        for name, value in headers.items():
            if name not in ("Transfer-Encoding", "Connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        type(self).behave(self)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 - the names that http.server looks for

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing."""


@contextmanager
def http_proxy(upstream: str, behave: Callable[[Request], None], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Run a proxy before the server at the URL `upstream` that answers each request by `behave`. Gives its own URL.

    With `tls` it speaks HTTPS.
    """
    members = {"upstream": urlsplit(upstream).netloc, "behave": staticmethod(behave)}
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Request,), members))
    proxy.daemon_threads = True
    if tls:
        proxy.socket = tls.wrap_socket(proxy.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{proxy.server_port}"
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()


@contextmanager
def s3_proxy(server: S3Server, behave: Callable[[Request], None], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Do the same before an S3 server; until it ends, the environment points at the proxy."""
    with http_proxy(server.endpoint, behave, tls) as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        storage.reconnect()
        try:
            yield endpoint
        finally:
            patch.undo()
            storage.reconnect()
