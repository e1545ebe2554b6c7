"""Gzip, bounded: medical files are often packed with it."""

from __future__ import annotations

import zlib
from typing import Final

from btray.data.scans.errors import ScanRejected

MAGIC: Final = b"\x1f\x8b"
_HEAD = 1024
_CHUNK = 1 << 20
_WINDOW = 1 << 16  # of what is unpacked at a time: what a member leaves of it is copied
_FEW, _BLOCK = 1024, 1 << 14  # members, and bytes of one more


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
    size = members = start = 0
    view = memoryview(data)
    while data.startswith(MAGIC, start):  # what follows the last member, such as padding with zeros, is not data
        stream = zlib.decompressobj(wbits=31)
        members += 1
        # Blocks of bgzip, which has most, hold 64 kB. Members of nothing would cost time without end.
        if members > _FEW + max_bytes // _BLOCK:
            raise ScanRejected("bomb", f"gzip of more than {members - 1} members")
        while not stream.eof:
            window = view[start : start + _WINDOW]
            try:
                part = stream.decompress(window, _CHUNK)
            except zlib.error as error:
                raise ScanRejected("decode_failed", f"damaged gzip: {error}") from error
            start += len(window) - len(stream.unconsumed_tail) - len(stream.unused_data)
            if not part and not window and not stream.eof:
                raise ScanRejected("truncated", f"gzip truncated after {len(data)} bytes")
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                raise ScanRejected("bomb", f"{len(data)} bytes of gzip become more than max_bytes {max_bytes}")
    return b"".join(parts) if parts else data
