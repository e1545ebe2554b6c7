"""A request's body -> the images in it: a form, DICOM objects, JSON with base64, or the image itself; all in memory."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Final, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from btray.serving.config import LimitsConfig
from btray.serving.problems import Problem, first_error

Content = TypeVar("Content", bound=BaseModel)

_VARIANTS = str.maketrans("-_", "+/", " \t\r\n")
"""Base64 as encoders write it -> in one line, with the usual alphabet."""
DICOM: Final = "application/dicom"
RELATED: Final = "multipart/related"
_DATA_URL = re.compile(r"\Adata:[^,]*;base64,", re.IGNORECASE)
_CHUNK = 256 * 1024
"""Bytes of a multipart body that are parsed at once; other requests come between."""


class RequestObject(BaseModel):
    """An object in the JSON of a request; null means that a field is absent."""

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


def _decode_base64(value: Any) -> bytes:
    if isinstance(value, bytes):  # a part of a form, or a whole body
        return value
    if not isinstance(value, str):
        raise ValueError("expected text in base64")
    # As encoders write it: in lines (RFC 2045), with either alphabet (RFC 4648), unpadded, or as a browser's data URL.
    text = _DATA_URL.sub("", value.translate(_VARIANTS))
    # pydantic's own Base64Bytes skips what is not base64
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


Base64 = Annotated[bytes, BeforeValidator(_decode_base64), WithJsonSchema({"type": "string", "format": "byte"})]
"""Bytes, in JSON as base64 or a data URL."""


class Upload(RequestObject):
    """One image as it came, and the name that the caller gave it."""

    model_config = ConfigDict(extra="forbid")

    # What a caller sends belongs in no log.
    data: Base64 = Field(repr=False)
    name: str | None = Field(default=None, repr=False)


_as_object = BeforeValidator(
    lambda image: image if isinstance(image, dict) else {"data": image}, json_schema_input_type=Base64 | Upload
)


class ClassifyRequest(RequestObject):
    """Images in JSON: each an object, or base64 alone."""

    # The first wrong element is told, and no other looked for: a million errors would hold up all other requests.
    images: Annotated[list[Annotated[Upload, _as_object]], FailFast()] = Field(json_schema_extra={"minItems": 1})


async def images_in(content_type: str, body: bytes, limits: LimitsConfig) -> list[Upload]:
    """Return the images of a body in their order, up to `limits.max_images`; JSON may have `limits.max_json` bytes.

    Raises Problem if the body is not what its content type says, has no image, or more than it may have.
    """
    kind = parse_options_header(content_type)[0]
    if kind == b"multipart/form-data":
        uploads = await _from_multipart(content_type, body, limits.max_images)
    elif kind == RELATED.encode():
        uploads = [Upload(data=data) for data in await related_objects(content_type, body, limits)]
    elif kind == b"application/json":
        uploads = parse_json(ClassifyRequest, body, limits, "send the images as multipart/form-data").images
    elif kind.startswith(b"image/") or kind in (b"application/octet-stream", DICOM.encode()):
        uploads = [Upload(data=body)]
    else:
        others = "multipart/form-data, application/json, or an image as image/* or application/octet-stream"
        raise _unsupported(content_type, others)
    if len(uploads) > limits.max_images:
        raise too_many_images(limits.max_images)
    if not uploads:
        raise Problem(400, "bad_body", "there is no image in the request")
    return uploads


async def related_objects(content_type: str, body: bytes, limits: LimitsConfig) -> list[bytes]:
    """Return the DICOM objects of a body that is multipart/related (RFC 2387), up to `limits.max_images`.

    Raises Problem if the body is of another type, is damaged or cut short, or has no object or too many.
    """
    kind, options = parse_options_header(content_type)
    if kind != RELATED.encode() or options.get(b"type", DICOM.encode()).lower() != DICOM.encode():
        raise _unsupported(content_type, f'{RELATED}; type="{DICOM}"')
    objects: list[bytearray] = []
    ended = False

    def begin() -> None:
        if len(objects) == limits.max_images:
            raise too_many_images(limits.max_images)
        objects.append(bytearray())

    def end() -> None:
        nonlocal ended
        ended = True

    def add(data: bytes, start: int, stop: int) -> None:
        objects[-1] += memoryview(data)[start:stop]

    try:
        parser = MultipartParser(
            options.get(b"boundary", b""), {"on_part_begin": begin, "on_part_data": add, "on_end": end}
        )
        for start in range(0, len(body), _CHUNK):
            parser.write(body[start : start + _CHUNK])
            await asyncio.sleep(0)
    except (FormParserError, ValueError) as error:
        raise Problem(400, "bad_body", f"the body is not valid {RELATED}: {error}") from error
    if not ended:
        raise _cut_short()
    if not objects:
        raise Problem(400, "bad_body", "there is no object in the request")
    return list(map(bytes, objects))


def _unsupported(content_type: str, others: str) -> Problem:
    detail = f"content type {content_type[:80]!r} is not supported; send {others}"
    return Problem(415, "unsupported_media_type", detail)


def _cut_short() -> Problem:
    return Problem(400, "bad_body", "the multipart body ends too early: its last boundary is missing")


def too_many_images(most: int) -> Problem:
    """Return the problem of a request with more than `most` images."""
    return Problem(413, "too_many_images", f"the request has more than {most} images")


def parse_json(
    kind: type[Content], body: bytes, limits: LimitsConfig, remedy: str, wrong: tuple[int, str] = (422, "invalid")
) -> Content:
    """Return the `kind` that `body` is in JSON, of at most `limits.max_json` bytes; `remedy` is for more of them.

    Reading JSON holds the interpreter's lock, and with it all other requests. Raises Problem: for values that the
    `kind` does not take, one with the status and the code `wrong`.
    """
    if len(body) > limits.max_json:
        raise Problem(413, "too_large", f"JSON of {len(body)} bytes, above {limits.max_json}: {remedy}")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise Problem(400, "bad_body", f"the body is not valid JSON: {first['ctx']['error']}") from error
        raise Problem(*wrong, f"{first_error(error)}; /openapi.json has an example") from error


class _FormInMemory(MultiPartParser):
    """Starlette's parser, kept from writing images to disk; `ended` is set at the last boundary."""

    ended = False

    def on_end(self) -> None:
        """Note the last boundary: a form that is cut short has none, and Starlette takes it for a whole one."""
        self.ended = True


async def _from_multipart(content_type: str, body: bytes, most: int) -> list[Upload]:
    """Return the images of a form: its files, and parts without a file name in the field `images` or that are no text.

    Other text is not read, and neither is a file input that was left empty, which browsers send without name or bytes.
    """

    async def chunks() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), _CHUNK):
            yield body[start : start + _CHUNK]
            await asyncio.sleep(0)

    # Parts without a file name become text. In latin-1 every byte is a character, so no byte of an image is lost.
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"").decode("latin-1")
    quoted = boundary.replace("\\", "\\\\").replace('"', '\\"')
    headers = Headers({"Content-Type": f'multipart/form-data; charset=latin-1; boundary="{quoted}"'})
    parser = _FormInMemory(headers, chunks(), max_files=most, max_fields=most, max_part_size=len(body))
    parser.spool_max_size = len(body) + 1
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many"):
            raise too_many_images(most) from error
        raise Problem(400, "bad_body", f"the body is not valid multipart/form-data: {error.message}") from error
    if not parser.ended:
        raise _cut_short()
    uploads = []
    for field, part in form.multi_items():
        if isinstance(part, UploadFile):
            name = (part.filename or "").encode("latin-1").decode("utf-8", "replace")
            if name or part.size:
                uploads.append(Upload(data=part.file.read(), name=name))
            part.file.close()  # a body's bytes are held once less
        elif field == "images" or not _is_text(part):
            uploads.append(Upload(data=_bytes_of(part)))  # curl can send images so
    return uploads


def _bytes_of(part: str) -> bytes:
    """Return the bytes of a part that has no file name; a page sends the picture of its canvas as a data URL."""
    if not _DATA_URL.match(part):
        return part.encode("latin-1")
    try:
        return _decode_base64(part)
    except ValueError as error:
        raise Problem(400, "bad_body", f"a data URL in the form is not valid: {error}") from error


def _is_text(part: str) -> bool:
    """Return whether the bytes that `part` has as latin-1 are UTF-8 without control characters."""
    try:
        text = part.encode("latin-1").decode()
    except UnicodeDecodeError:
        return False
    return not re.search(r"[\x00-\x08\x0e-\x1f]", text)
