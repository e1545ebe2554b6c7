"""Answers of several parts (multipart/related, RFC 2046), read while they come; one that was cut is noticed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from email.message import Message
from typing import NamedTuple

_LONGEST_HEADERS = 64 << 10  # bytes
_HEAD = 64 << 10  # bytes of a body that is too large


class CutShort(Exception):
    """The answer ended before its closing boundary, or is not what its headers say."""


class Part(NamedTuple):
    """One part."""

    body: bytes
    """All of it, or the first bytes if it is larger than is wanted."""
    size: int
    """Of the whole body, in bytes."""


def boundary_of(content_type: str) -> bytes | None:
    """Return the boundary that a Content-Type names; None if it is no multipart/related."""
    message = Message()
    message["Content-Type"] = content_type
    boundary = message.get_boundary()
    return boundary.encode("latin-1") if boundary and message.get_content_type() == "multipart/related" else None


def read_parts(chunks: Iterable[bytes], boundary: bytes, *, max_bytes: int) -> Iterator[Part]:
    """Yield the parts of a body that comes in `chunks`, each once all of it is there.

    Of a part above `max_bytes` only the first bytes are kept. Raises CutShort unless the body ends with its closing
    boundary and each part is as long as its Content-Length, if it has one.
    """
    reader = _Reader(chunks)
    delimiter = b"\r\n--" + boundary
    reader.take_until(b"--" + boundary, 0)
    while reader.peek(2) != b"--":
        headers = reader.take_until(b"\r\n\r\n", _LONGEST_HEADERS).body
        length = re.search(rb"(?im)^content-length:[ \t]*(\d+)[ \t]*\r?$", headers)
        if length is None:
            yield reader.take_until(delimiter, max_bytes)
            continue
        part = reader.take_many(int(length[1]), max_bytes)
        if reader.take(len(delimiter)) != delimiter:
            raise CutShort("a part is not as long as its Content-Length")
        yield part


def write_parts(bodies: Sequence[bytes], boundary: bytes, content_type: str) -> bytes:
    """Return a body of several parts, each of `content_type`."""
    head = b"--" + boundary + b"\r\nContent-Type: " + content_type.encode() + b"\r\n"
    parts = [head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body + b"\r\n" for body in bodies]
    return b"".join([*parts, b"--" + boundary + b"--\r\n"])


class _Reader:
    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._held = bytearray()

    def _more(self) -> None:
        chunk = next(self._chunks, b"")
        if not chunk:
            raise CutShort("the answer ended before its closing boundary")
        self._held += chunk

    def peek(self, count: int) -> bytes:
        while len(self._held) < count:
            self._more()
        return bytes(memoryview(self._held)[:count])

    def take(self, count: int) -> bytes:
        taken = self.peek(count)
        del self._held[:count]
        return taken

    def take_many(self, count: int, most: int) -> Part:
        """Take `count` bytes; if they are more than `most`, keep few of them."""
        if count <= most:
            return Part(self.take(count), count)
        head, left = self.take(min(count, _HEAD)), count - min(count, _HEAD)
        while left:
            if not self._held:
                self._more()
            passed = min(left, len(self._held))
            del self._held[:passed]
            left -= passed
        return Part(head, count)

    def take_until(self, mark: bytes, most: int) -> Part:
        """Take what comes before `mark`, and the mark; of more than `most` bytes keep few."""
        head, size, searched = b"", 0, 0
        while (at := self._held.find(mark, searched)) < 0:
            searched = max(0, len(self._held) - len(mark) + 1)
            if size + searched > most:
                head = head or bytes(self._held[: min(searched, _HEAD)])
                del self._held[:searched]
                size, searched = size + searched, 0
            self._more()
        body = self.take(at)
        del self._held[: len(mark)]
        return Part(head or body, size + at)
