"""Requests and answers of the Open Inference Protocol v2: JSON, and the binary tensor extension of KServe and Triton.

With the extension a body is a JSON header, whose length is in an HTTP header, followed by the raw bytes of the tensors
in their order. Each element of BYTES follows four bytes with its length; in JSON it is base64.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, FailFast, Field, TypeAdapter, ValidationError, field_validator

from btray.serving.config import LimitsConfig
from btray.serving.problems import Problem, first_error
from btray.serving.uploads import Base64, RequestObject, parse_json, too_many_images

Array = npt.NDArray[Any]
Datatype = Literal["BYTES", "UINT8", "FP32"]

_TYPES: Final[dict[str, np.dtype[Any]]] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4"), "BOOL": np.dtype("?")}
_DATATYPES: Final = {"U": "BYTES", "f": "FP32", "b": "BOOL"}
"""The protocol's name of a kind of NumPy array."""
_ELEMENTS: Final[dict[str, TypeAdapter[list[Any]]]] = {
    "BYTES": TypeAdapter(Annotated[list[Base64], FailFast()]),
    "UINT8": TypeAdapter(Annotated[list[Annotated[int, Field(strict=True, ge=0, le=255)]], FailFast()]),
    "FP32": TypeAdapter(Annotated[list[Annotated[float, Field(strict=True)]], FailFast()]),
}
"""What the elements of an input are in JSON."""
_MAX_RANK: Final = 3  # images, height, width
LENGTH_HEADER: Final = "Inference-Header-Content-Length"


# ---- the JSON of a request


class Parameters(RequestObject):
    """The extensions of a request, an input or an output."""

    binary_data_size: Annotated[int, Field(strict=True)] | None = None
    binary_data: bool | None = None
    binary_data_output: bool = False
    classification: Any = None

    @field_validator("classification")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        raise ValueError("the classification extension is not offered: take label and probabilities")


class InputTensor(RequestObject):
    """An input tensor: its elements are `data`, or follow the JSON."""

    name: Literal["image", "pixels"]
    datatype: Datatype
    shape: list[Annotated[int, Field(strict=True, ge=1, lt=2**31)]] = Field(min_length=1, max_length=_MAX_RANK)
    parameters: Parameters = Parameters()
    data: list[Any] | None = None


class OutputRequest(RequestObject):
    """An output that is asked for."""

    name: str
    parameters: Parameters = Parameters()


class InferBody(RequestObject):
    """A request: one input, image or pixels, and the outputs that are asked for; none: all."""

    id: str | None = None
    parameters: Parameters = Parameters()
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: Annotated[list[OutputRequest], FailFast()] = Field(default_factory=list)


# ---- the JSON of an answer


class OutputTensor(BaseModel):
    """An output tensor: its elements are `data`, or follow the JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[Any] | None = None


class InferAnswer(BaseModel):
    """An answer."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[OutputTensor] = []


# ---- requests and answers


@dataclass(frozen=True)
class InferRequest:
    """A request whose tensor is decoded: `values` is a list of bytes for BYTES, else an array of the tensor's shape."""

    body: InferBody
    values: list[bytes] | Array

    @property
    def tensor(self) -> InputTensor:
        """The only input."""
        return self.body.inputs[0]


def parse_request(body: bytes, header_length: str | None, limits: LimitsConfig) -> InferRequest:
    """Parse a request; `header_length` is the HTTP header of that name. Raises Problem if it is not valid.

    A tensor's claims are checked against its bytes and `limits.max_images` before anything is made of it.
    """
    head, tail = body, b""
    if header_length is not None:
        length = int(header_length) if re.fullmatch("[0-9]{1,11}", header_length) else -1
        if not 0 < length <= len(body):
            raise Problem(400, "bad_body", f"{LENGTH_HEADER} {header_length[:40]!r} does not fit {len(body)} bytes")
        head, tail = body[:length], body[length:]
    content = parse_json(InferBody, head, limits, "send tensors by the binary tensor extension", (400, "bad_request"))
    return InferRequest(content, _elements(content.inputs[0], tail, limits.max_images))


def format_answer(
    answer: InferAnswer, outputs: Mapping[str, Array], request: InferBody
) -> tuple[bytes, dict[str, str]]:
    """Return the body of `answer`, with the `outputs` that are asked for, and its HTTP headers.

    `outputs` are str (BYTES), float32 and bool arrays by name. Raises Problem if one is asked for that does not exist.
    """
    binary = request.parameters.binary_data_output
    chosen = {output.name: output.parameters.binary_data for output in request.outputs} or dict.fromkeys(outputs)
    tensors, tail = [], []
    for name, in_binary in chosen.items():
        if name not in outputs:
            raise Problem(400, "bad_request", f"there is no output {name[:80]!r}; there are {', '.join(outputs)}")
        values = outputs[name]
        tensor = OutputTensor(name=name, datatype=_DATATYPES[values.dtype.kind], shape=list(values.shape))
        if binary if in_binary is None else in_binary:
            if tensor.datatype == "BYTES":
                elements = [str(value).encode() for value in values.ravel()]
                raw = b"".join(struct.pack("<I", len(element)) + element for element in elements)
            else:
                raw = values.astype(_TYPES[tensor.datatype]).tobytes()
            tail.append(raw)
            tensor.parameters = {"binary_data_size": len(raw)}
        else:
            tensor.data = values.ravel().tolist()
        tensors.append(tensor)
    head = answer.model_copy(update={"outputs": tensors}).model_dump_json(exclude_none=True).encode()
    if not tail:
        return head, {"Content-Type": "application/json"}
    return head + b"".join(tail), {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(len(head))}


# ---- tensors


def _elements(tensor: InputTensor, raw: bytes, max_images: int) -> list[bytes] | Array:
    """Return the elements of a tensor; `raw` is what follows the JSON."""
    shape, size = tensor.shape, tensor.parameters.binary_data_size
    if (math.prod(shape) if tensor.datatype == "BYTES" else shape[0]) > max_images:
        raise too_many_images(max_images)
    if size is None and not raw:
        return _from_json(tensor)
    if size != len(raw):
        detail = f"{tensor.name}: {len(raw)} bytes follow the JSON, and binary_data_size is {str(size)[:40]}"
        raise Problem(400, "bad_body", detail)
    if tensor.datatype == "BYTES":
        return _unpack(tensor, raw)
    kind = _TYPES[tensor.datatype]
    _require_filled(tensor, len(raw) / kind.itemsize)
    return np.frombuffer(raw, kind).reshape(shape)


def _require_filled(tensor: InputTensor, elements: float) -> None:
    if elements != math.prod(tensor.shape):
        detail = f"{tensor.name}: {elements:.10g} elements do not fill the shape {tensor.shape}"
        raise Problem(400, "bad_request", detail)


def _from_json(tensor: InputTensor) -> list[bytes] | Array:
    if tensor.data is None:
        raise Problem(400, "bad_request", f"{tensor.name} has neither data nor binary_data_size")
    elements = tensor.data
    for _ in range(_MAX_RANK - 1):  # lists may be nested, row by row
        if any(isinstance(element, list) for element in elements):
            elements = [item for element in elements for item in (element if isinstance(element, list) else [element])]
    _require_filled(tensor, len(elements))
    try:
        # Before NumPy sees them: of texts it makes an array of as many times the longest one.
        values = _ELEMENTS[tensor.datatype].validate_python(elements)
    except ValidationError as error:
        raise Problem(400, "bad_request", f"{tensor.name}, {tensor.datatype}: {first_error(error)}") from error
    if tensor.datatype == "BYTES":
        return values
    with np.errstate(over="ignore"):  # a number that is not a finite FP32 becomes a rejected image
        return np.array(values, np.float64).astype(_TYPES[tensor.datatype]).reshape(tensor.shape)


def _unpack(tensor: InputTensor, raw: bytes) -> list[bytes]:
    """Return the elements of a binary BYTES tensor."""
    elements, at = [], 0
    for _ in range(math.prod(tensor.shape)):
        start = at + 4
        if start > len(raw):
            raise Problem(400, "bad_body", f"{tensor.name}: an element's length is cut off")
        length = int.from_bytes(raw[at:start], "little")
        at = start + length
        if at > len(raw):
            raise Problem(400, "bad_body", f"{tensor.name}: an element of {length} bytes is cut off")
        elements.append(raw[start:at])
    if at != len(raw):
        detail = f"{tensor.name}: {len(raw) - at} bytes follow the elements of the shape {tensor.shape}"
        raise Problem(400, "bad_body", detail)
    return elements
