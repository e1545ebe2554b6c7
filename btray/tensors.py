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

from btray.problems import Problem

Array = npt.NDArray[Any]

_TYPES: Final[dict[str, np.dtype[Any]]] = {
    "UINT8": np.dtype("u1"),
    "FP32": np.dtype("<f4"),
    "BOOL": np.dtype("?"),
}
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
    inputs: dict[str, Tensor]
    outputs: dict[str, bool] | None
    """Names of the outputs that are wanted -> whether in binary; None: all."""
    binary: bool
    """Whether outputs that are not named come in binary."""


def parse_request(body: bytes, header_length: str | None, max_json: int) -> InferRequest:
    """Read a request. `header_length` is the HTTP header of that name. Raises Problem where it is none.

    JSON may have `max_json` bytes: reading it holds the interpreter's lock, and with it all other requests.
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
    inputs: dict[str, Tensor] = {}
    for entry in _list_of_objects(content, "inputs"):
        name = entry.get("name")
        if not isinstance(name, str) or name in inputs:
            raise Problem(400, "bad_request", "each input needs a name of its own")
        inputs[name], tail = _input(name, entry, tail)
    if tail:
        raise Problem(400, "bad_body", f"{len(tail)} bytes stand behind the last tensor")
    given = content.get("id")
    if not (given is None or isinstance(given, str)):
        raise Problem(400, "bad_request", "id must be text")
    binary = _parameters(content).get("binary_data_output", False) is True
    outputs = {_output(entry): _is_binary(entry, binary) for entry in _list_of_objects(content, "outputs")}
    return InferRequest(given, inputs, outputs or None, binary)


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


def _input(name: str, entry: dict[str, Any], tail: bytes) -> tuple[Tensor, bytes]:
    datatype, shape, size = entry.get("datatype"), entry.get("shape"), _parameters(entry).get("binary_data_size")
    if datatype not in ("BYTES", "UINT8", "FP32"):
        raise Problem(400, "bad_request", f"input {name[:80]!r}: datatype {str(datatype)[:40]!r} is not taken")
    if not isinstance(shape, list) or not shape or not all(type(side) is int and 0 <= side < 2**31 for side in shape):
        raise Problem(400, "bad_request", f"input {name[:80]!r}: shape must be a list of whole numbers, one at least")
    count = math.prod(shape)
    if size is None:
        values = _from_json(name, datatype, shape, entry.get("data"))
    elif type(size) is not int or not 0 <= size <= len(tail):
        raise Problem(400, "bad_body", f"input {name[:80]!r}: {len(tail)} bytes are there of binary_data_size {size!r}")
    else:
        raw, tail = tail[:size], tail[size:]
        values = _unpacked(name, raw) if datatype == "BYTES" else _from_raw(name, datatype, shape, raw)
    if len(values) != count and isinstance(values, list):
        raise Problem(400, "bad_request", f"input {name[:80]!r}: {len(values)} elements do not fill the shape {shape}")
    return Tensor(datatype, tuple(shape), values), tail


def _from_raw(name: str, datatype: str, shape: list[int], raw: bytes) -> Array:
    expected = math.prod(shape) * _TYPES[datatype].itemsize
    if len(raw) != expected:
        raise Problem(
            400, "bad_request", f"input {name[:80]!r}: {len(raw)} bytes, and the shape {shape} has {expected}"
        )
    return np.frombuffer(raw, _TYPES[datatype]).reshape(shape)


def _from_json(name: str, datatype: str, shape: list[int], data: Any) -> list[bytes] | Array:
    if not isinstance(data, list):
        raise Problem(400, "bad_request", f"input {name[:80]!r} has neither data nor binary_data_size")
    if datatype == "BYTES":
        return [_from_base64(name, element) for element in _flat(data)]
    try:
        values = np.asarray(data)
        if values.dtype.kind not in "iuf" or (datatype == "UINT8" and values.dtype.kind == "f"):
            raise ValueError(f"these are no values of {datatype}")
        if datatype == "UINT8" and values.size and (values.min() < 0 or values.max() > 255):
            raise ValueError("UINT8 lies in 0 to 255")
        with np.errstate(over="ignore"):  # what is no finite FP32 becomes a rejected image
            return values.astype(_TYPES[datatype]).reshape(shape)
    except (ValueError, OverflowError, TypeError) as error:
        raise Problem(400, "bad_request", f"input {name[:80]!r}: {str(error)[:200]}") from error


def _flat(data: list[Any]) -> list[Any]:
    """The elements of a list, or of lists in it."""
    return [element for entry in data for element in (entry if isinstance(entry, list) else [entry])]


def _from_base64(name: str, element: Any) -> bytes:
    try:
        return base64.b64decode(element, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise Problem(400, "bad_request", f"input {name[:80]!r}: BYTES in JSON must be base64: {error}") from error


def _unpacked(name: str, raw: bytes) -> list[bytes]:
    elements, at = [], 0
    while at < len(raw):
        if at + 4 > len(raw):
            raise Problem(400, "bad_body", f"input {name[:80]!r}: an element's length is cut off")
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4
        if at + length > len(raw):
            raise Problem(400, "bad_body", f"input {name[:80]!r}: an element of {length} bytes is cut off")
        elements.append(raw[at : at + length])
        at += length
    return elements


def _packed(values: Array) -> bytes:
    elements = [str(value).encode() for value in values.ravel()]
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)
