"""An S3 store in memory that takes any key, as S3 does; SeaweedFS keeps objects as files and refuses some keys."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

from btray import storage


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]

    def do_GET(self) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if "list-type" in query:
            self._answer(200, self._listing(query["prefix"][0] if "prefix" in query else "", "delimiter" in query))
        elif (body := self.objects.get(unquote(path.removeprefix("/flat/")))) is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._answer(200, body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        key = unquote(urlsplit(self.path).path.removeprefix("/flat/"))
        self.objects[key] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, b"")

    def do_DELETE(self) -> None:
        self.objects.pop(unquote(urlsplit(self.path).path.removeprefix("/flat/")), None)
        self._answer(204, b"")

    def _listing(self, prefix: str, grouped: bool) -> bytes:
        text = "<ListBucketResult><EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>"
        groups = set()
        for key in sorted(key for key in self.objects if key.startswith(prefix)):
            if grouped and "/" in (below := key[len(prefix) :]):
                groups.add(prefix + below.partition("/")[0] + "/")
                continue
            text += (
                f"<Contents><Key>{quote(key)}</Key><Size>{len(self.objects[key])}</Size>"
                f"<ETag>{hashlib.md5(self.objects[key]).hexdigest()}</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            )
        text += "".join(f"<CommonPrefixes><Prefix>{quote(name)}</Prefix></CommonPrefixes>" for name in groups)
        return f"{text}</ListBucketResult>".encode()

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.md5(body).hexdigest()}"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def flat_store(monkeypatch: pytest.MonkeyPatch, objects: dict[str, bytes]) -> Iterator[str]:
    """Serve `objects`, which may change meanwhile, as the bucket whose URI the block gets."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"objects": objects}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    storage.reconnect()
    try:
        yield "s3://flat"
    finally:
        server.shutdown()
        server.server_close()
        monkeypatch.undo()
        storage.reconnect()
