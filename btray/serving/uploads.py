"""A request's body -> the images in it: multipart, JSON with base64, or the image itself. All of it in memory."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from btray.serving.problems import Problem

# A part may have a header or two; what has more is no upload of a browser's or a library's.
_MAX_PART_HEADERS = 8
_MAX_HEADER_BYTES = 4096
_MAX_NAME = 255


@dataclass(frozen=True)
class Upload:
    """One image as it came, and the name that the caller gave it, cut where it is long."""

    data: bytes
    name: str | None = None


def images_in(content_type: str, body: bytes, *, most: int, max_json: int) -> list[Upload]:
    """The images of a body, in their order, up to `most`; JSON may have `max_json` bytes.

    Raises Problem where the body is not what its content type says, has no image, or more than it may have.
    """
    kind, options = parse_options_header(content_type)
    if kind == b"multipart/form-data":
        uploads = _from_multipart(options.get(b"boundary", b""), body, most)
    elif kind == b"application/json":
        uploads = _from_json(body, most, max_json)
    elif kind.startswith(b"image/") or kind in (b"application/octet-stream", b"application/dicom"):
        uploads = [Upload(body)]
    else:
        raise Problem(
            415,
            "unsupported_media_type",
            f"content type {content_type[:80]!r} is not read; send multipart/form-data, application/json, or an image "
            "as image/* or application/octet-stream",
        )
    if not uploads:
        raise Problem(400, "bad_body", "there is no image in the request")
    return uploads


def _too_many(most: int) -> Problem:
    return Problem(413, "too_many_images", f"the request has more than {most} images")


def _from_json(body: bytes, most: int, largest: int) -> list[Upload]:
    """`{"images": [{"data": BASE64, "name": TEXT}, ...]}`; an image may be BASE64 alone."""
    if len(body) > largest:
        detail = f"JSON of {len(body)} bytes, above {largest}: send the images as multipart/form-data"
        raise Problem(413, "too_large", detail)
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "bad_body", f"the body is no JSON: {str(error)[:200]}") from error
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise Problem(422, "invalid", 'expected {"images": [{"data": BASE64, "name": TEXT}, ...]}')
    if len(entries) > most:
        raise _too_many(most)
    return [_decoded(entry, number) for number, entry in enumerate(entries)]


def _decoded(entry: Any, number: int) -> Upload:
    if isinstance(entry, str):
        entry = {"data": entry}
    if not isinstance(entry, dict) or entry.keys() - {"data", "name"}:
        raise Problem(422, "invalid", f"images[{number}]: expected BASE64, or an object with data and name alone")
    data, name = entry.get("data"), entry.get("name")
    if not isinstance(data, str) or not (name is None or isinstance(name, str)):
        raise Problem(422, "invalid", f"images[{number}]: data, and name where there is one, must be text")
    try:
        return Upload(base64.b64decode(data, validate=True), name and name[:_MAX_NAME])
    except (binascii.Error, ValueError) as error:
        raise Problem(422, "invalid", f"images[{number}].data is no base64: {error}") from error


class _Parts:
    """Collects the files of a multipart body; fields without a file name count too, for curl sends them so."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.uploads: list[Upload] = []
        self.ended = False
        self._headers: dict[bytes, bytes] = {}
        self._name = self._value = b""
        self._pieces: list[bytes] = []

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._field,
            "on_header_value": self._content,
            "on_header_end": self._header,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        if len(self.uploads) == self.most:
            raise _too_many(self.most)
        self._headers, self._pieces = {}, []

    def _field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _content(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(data[start:end])

    def _end(self) -> None:
        options = parse_options_header(self._headers.get(b"content-disposition", b""))[1]
        name = options.get(b"filename")
        shown = None if name is None else name.decode("utf-8", "replace")[:_MAX_NAME]
        self.uploads.append(Upload(b"".join(self._pieces), shown))

    def _finish(self) -> None:
        self.ended = True


def _from_multipart(boundary: bytes, body: bytes, most: int) -> list[Upload]:
    parts = _Parts(most)
    if not boundary:
        raise Problem(400, "bad_body", "the content type multipart/form-data has no boundary")
    try:
        parser = MultipartParser(
            boundary,
            parts.callbacks(),  # type: ignore[arg-type]
            max_header_count=_MAX_PART_HEADERS,
            max_header_size=_MAX_HEADER_BYTES,
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Problem(400, "bad_body", f"the body is no multipart/form-data: {str(error)[:200]}") from error
    if not parts.ended:
        raise Problem(400, "bad_body", "the multipart body ends too early: its last boundary is missing")
    return parts.uploads
