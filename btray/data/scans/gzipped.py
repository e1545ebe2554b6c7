"""Gzip, bounded: medical files are often packed with it."""

from __future__ import annotations

import zlib
from typing import Final

from btray.data.scans.errors import ScanRejected

MAGIC: Final = b"\x1f\x8b"
_HEAD = 1024
_CHUNK = 1 << 20


def peek(data: bytes, length: int = _HEAD) -> bytes:
    """Return the first `length` bytes that `data` unpacks to, or as many as it has; `data` itself if it is not gzip."""
    if not data.startswith(MAGIC):
        return data
    try:
        return zlib.decompressobj(wbits=31).decompress(data[: max(65536, length)], length)
    except zlib.error:
        return b""


def unpack(data: bytes, max_bytes: int) -> bytes:
    """Return what `data` unpacks to, all its members; `data` itself if it is not gzip.

    Raises ScanRejected: `bomb` above `max_bytes`, `truncated` if it ends early, `decode_failed` if it is damaged.
    """
    parts: list[bytes] = []
    size, left = 0, data
    while left.startswith(MAGIC):  # what follows the last member, such as padding with zeros, is not data
        stream = zlib.decompressobj(wbits=31)
        while not stream.eof:
            try:
                part = stream.decompress(left, _CHUNK)
            except zlib.error as error:
                raise ScanRejected("decode_failed", f"damaged gzip: {error}") from error
            left = stream.unconsumed_tail
            if not part and not left and not stream.eof:
                raise ScanRejected("truncated", f"gzip truncated after {len(data)} bytes")
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                raise ScanRejected("bomb", f"{len(data)} bytes of gzip become more than max_bytes {max_bytes}")
        left = stream.unused_data
    return b"".join(parts) if parts else data
