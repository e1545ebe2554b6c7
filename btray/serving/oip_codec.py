"""Requests and answers of the Open Inference Protocol v2: JSON, and the binary tensor extension of KServe and Triton.

With the extension a body is a JSON header, whose length an HTTP header tells, and then the raw bytes of the tensors in
their order. BYTES elements have four bytes of length before each; in JSON they are base64.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from btray.serving.problems import Problem

Array = npt.NDArray[Any]

_TYPES: Final[dict[str, np.dtype[Any]]] = {
    "UINT8": np.dtype("u1"),
    "FP32": np.dtype("<f4"),
    "BOOL": np.dtype("?"),
}
_MOST_SIDES: Final = 3  # images, height, width
LENGTH_HEADER: Final = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class Tensor:
    """One input: `values` is a list of bytes for BYTES, else an array of `shape`."""

    datatype: str
    shape: tuple[int, ...]
    values: list[bytes] | Array


@dataclass(frozen=True)
class InferRequest:
    """What a client asks."""

    id: str | None
    name: str
    """Of its only input."""
    tensor: Tensor
    outputs: dict[str, bool] | None
    """Names of the outputs that are wanted -> whether in binary; None: all."""
    binary: bool
    """Whether outputs that are not named come in binary."""


def parse_request(body: bytes, header_length: str | None, *, max_json: int, max_images: int) -> InferRequest:
    """Read a request. `header_length` is the HTTP header of that name. Raises Problem where it is none.

    JSON may have `max_json` bytes: reading it holds the interpreter's lock, and with it all other requests. For that
    reason what is said of a tensor is held against its bytes and `max_images` before anything is made of it.
    """
    head, tail = body, b""
    if header_length is not None:
        length = int(header_length) if re.fullmatch("[0-9]{1,11}", header_length) else -1
        if not 0 < length <= len(body):
            raise Problem(400, "bad_body", f"{LENGTH_HEADER} {header_length[:40]!r} does not fit {len(body)} bytes")
        head, tail = body[:length], body[length:]
    if len(head) > max_json:
        detail = f"JSON of {len(head)} bytes, above {max_json}: send tensors by the binary tensor extension"
        raise Problem(413, "too_large", detail)
    try:
        content = json.loads(head)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "bad_body", f"the body is no JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise Problem(400, "bad_body", "the body is no JSON object")
    entries = _list_of_objects(content, "inputs")
    if len(entries) != 1:
        raise Problem(400, "bad_request", f"expected one input, image or pixels, and not {len(entries)}")
    name, tensor = _input(entries[0], tail, max_images)
    given = content.get("id")
    if not (given is None or isinstance(given, str)):
        raise Problem(400, "bad_request", "id must be text")
    binary = _parameters(content).get("binary_data_output", False) is True
    outputs = {_output(entry): _is_binary(entry, binary) for entry in _list_of_objects(content, "outputs")}
    return InferRequest(given, name, tensor, outputs or None, binary)


def format_answer(
    content: dict[str, Any], outputs: Mapping[str, Array], wanted: InferRequest
) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON header where tensors follow it.

    `outputs` are str (BYTES), float32 and bool arrays by name. Raises Problem where one is wanted that is not there.
    """
    chosen = wanted.outputs if wanted.outputs is not None else dict.fromkeys(outputs, wanted.binary)
    entries, tail = [], []
    for name, in_binary in chosen.items():
        if name not in outputs:
            raise Problem(400, "bad_request", f"there is no output {name[:80]!r}; there are {', '.join(outputs)}")
        values = outputs[name]
        datatype = datatype_of(values)
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(values.shape)}
        if in_binary:
            raw = _packed(values) if datatype == "BYTES" else values.astype(_TYPES[datatype]).tobytes()
            tail.append(raw)
            entry["parameters"] = {"binary_data_size": len(raw)}
        else:
            entry["data"] = values.ravel().tolist()
        entries.append(entry)
    head = json.dumps({**content, "outputs": entries}, allow_nan=False).encode()
    return head + b"".join(tail), len(head) if tail else None


def datatype_of(values: Array) -> str:
    """The protocol's name of an array's type."""
    return {"U": "BYTES", "f": "FP32", "b": "BOOL"}[values.dtype.kind]


def _list_of_objects(content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = content.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise Problem(400, "bad_request", f"{key} must be a list of objects")
    return entries


def _parameters(entry: dict[str, Any]) -> dict[str, Any]:
    parameters = entry.get("parameters", {})
    if not isinstance(parameters, dict):
        raise Problem(400, "bad_request", "parameters must be an object")
    return parameters


def _output(entry: dict[str, Any]) -> str:
    if "classification" in _parameters(entry):
        raise Problem(400, "bad_request", "the classification extension is not offered: take label and probabilities")
    name = entry.get("name")
    if not isinstance(name, str):
        raise Problem(400, "bad_request", "each output needs a name")
    return name


def _is_binary(entry: dict[str, Any], default: bool) -> bool:
    return _parameters(entry).get("binary_data", default) is True


def _input(entry: dict[str, Any], raw: bytes, max_images: int) -> tuple[str, Tensor]:
    """Name and tensor; `raw` is what stands behind the JSON."""
    name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
    if not isinstance(name, str):
        raise Problem(400, "bad_request", "the input needs a name")
    where = f"input {name[:80]!r}"
    if datatype not in ("BYTES", "UINT8", "FP32"):
        raise Problem(400, "bad_request", f"{where}: datatype {str(datatype)[:40]!r} is not taken")
    if not isinstance(shape, list) or not 1 <= len(shape) <= _MOST_SIDES or not all(map(_is_side, shape)):
        raise Problem(400, "bad_request", f"{where}: shape must be one to {_MOST_SIDES} whole numbers from 1 on")
    if (math.prod(shape) if datatype == "BYTES" else shape[0]) > max_images:
        raise Problem(413, "too_many_images", f"the request has more than {max_images} images")
    size = _parameters(entry).get("binary_data_size")
    if size is None and not raw:
        values = _from_json(where, datatype, shape, entry.get("data"))
    elif type(size) is int and size == len(raw):
        values = _unpacked(where, raw, shape) if datatype == "BYTES" else _from_raw(where, datatype, shape, raw)
    else:
        detail = f"{where}: {len(raw)} bytes stand behind the JSON, and binary_data_size is {str(size)[:40]}"
        raise Problem(400, "bad_body", detail)
    return name, Tensor(datatype, tuple(shape), values)


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _require_filled(where: str, shape: list[int], elements: int) -> None:
    if elements != math.prod(shape):
        raise Problem(400, "bad_request", f"{where}: {elements} elements do not fill the shape {shape}")


def _from_raw(where: str, datatype: str, shape: list[int], raw: bytes) -> Array:
    kind = _TYPES[datatype]
    if len(raw) % kind.itemsize:
        raise Problem(400, "bad_request", f"{where}: {len(raw)} bytes are no whole number of {datatype}")
    _require_filled(where, shape, len(raw) // kind.itemsize)
    return np.frombuffer(raw, kind).reshape(shape)


def _from_json(where: str, datatype: str, shape: list[int], data: Any) -> list[bytes] | Array:
    if not isinstance(data, list):
        raise Problem(400, "bad_request", f"{where} has neither data nor binary_data_size")
    elements = _flat(data)
    _require_filled(where, shape, len(elements))
    if datatype == "BYTES":
        return [_from_base64(where, element) for element in elements]
    # Before NumPy sees them: of texts it makes an array of so many times the longest one.
    if not all(type(element) in ((int,) if datatype == "UINT8" else (int, float)) for element in elements):
        raise Problem(400, "bad_request", f"{where}: these are no values of {datatype}")
    if datatype == "UINT8" and not 0 <= min(elements) <= max(elements) <= 255:
        raise Problem(400, "bad_request", f"{where}: UINT8 lies in 0 to 255")
    try:
        with np.errstate(over="ignore"):  # what is no finite FP32 becomes a rejected image
            return np.array(elements, np.float64).astype(_TYPES[datatype]).reshape(shape)
    except OverflowError as error:
        raise Problem(400, "bad_request", f"{where}: {error}") from error


def _flat(data: list[Any]) -> list[Any]:
    """The elements of a list, or of lists in it, row by row."""
    for _ in range(_MOST_SIDES - 1):
        if not any(isinstance(entry, list) for entry in data):
            break
        data = [element for entry in data for element in (entry if isinstance(entry, list) else [entry])]
    return data


def _from_base64(where: str, element: Any) -> bytes:
    try:
        return base64.b64decode(element, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise Problem(400, "bad_request", f"{where}: BYTES in JSON must be base64: {error}") from error


def _unpacked(where: str, raw: bytes, shape: list[int]) -> list[bytes]:
    elements, at = [], 0
    for _ in range(min(math.prod(shape), len(raw) // 4 + 1)):
        if at + 4 > len(raw):
            raise Problem(400, "bad_body", f"{where}: an element's length is cut off")
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4
        if at + length > len(raw):
            raise Problem(400, "bad_body", f"{where}: an element of {length} bytes is cut off")
        elements.append(raw[at : at + length])
        at += length
    if at != len(raw):
        raise Problem(400, "bad_body", f"{where}: {len(raw) - at} bytes stand behind the elements of the shape {shape}")
    return elements


def _packed(values: Array) -> bytes:
    elements = [str(value).encode() for value in values.ravel()]
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)
