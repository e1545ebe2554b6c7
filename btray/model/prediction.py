"""One prediction: its fields, and the form that each takes wherever predictions are written.

The results table, the JSON of `btray predict` and of the service, its OpenAPI schema, the outputs of the Open Inference
Protocol, the terminal's table and the CSV of an evaluation follow from the fields of `Answer`, `SliceFacts` and
`Prediction`: a new one is added there, and `tests/model/test_prediction.py` finds the output that lacks it. Free of
torch, so that whatever reads or describes predictions starts quickly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ConfigDict, Field, TypeAdapter

from btray.data.slice_facts import UIDS, SliceFacts

if TYPE_CHECKING:
    from btray.data.frames import Rejection


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model says of one frame. Every output holds all of it."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)

    label: str | None = None
    """The most probable class."""
    confidence: float | None = None
    """Its calibrated probability, in [0, 1]."""
    probabilities: dict[str, float] = field(default_factory=dict)
    """Calibrated probability of every class; they sum to 1."""
    abstained: bool = False
    """The confidence is below the threshold: `label` is a guess that the model does not stand by."""
    label_set: tuple[str, ...] = ()
    """The labels that cannot be ruled out; empty unless the bundle was made with a conformal error rate."""
    out_of_distribution: bool = False
    """The input is unlike the training images: no answer can be trusted."""
    ood_score: float | None = None
    """How unlike the training images the input is, about 1 for these; null if the bundle cannot tell."""


@dataclass(frozen=True, kw_only=True)
class Prediction(SliceFacts, Answer):
    """The answer for one frame, or why there is none; and what its file says of the frame."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())

    index: int
    """Number of the input it belongs to, from 0; a scan of several frames gives several predictions."""
    uri: str | None = None
    """The input, if it was a path or URI."""
    frame: int = 0
    """Number of the frame within that input, from 0: the page of a multi-page image."""
    status: str = "ok"
    """`ok` or `rejected`."""
    error_code: str | None = None
    """Why the input was rejected, for programs: a key of `btray.data.scans.REJECTION_CODES`, or a storage error."""
    error: str | None = None
    """Why the input was rejected, for people."""
    retryable: bool = False
    """The input was rejected, but another try may succeed."""
    engine: str | None = None
    """How the network was run and in which precision: `frozen float32`; null if there is no answer."""
    model_id: str = ""
    """The model that answered."""

    @classmethod
    def of_rejection(cls, rejection: Rejection, *, index: int, uri: str | None, model_id: str) -> Self:
        """Return the prediction of an input that gave no frame."""
        return cls(
            index=index,
            uri=uri,
            status="rejected",
            error_code=rejection.code,
            error=rejection.message,
            retryable=rejection.retryable,
            model_id=model_id,
            **facts_of(rejection.info),
        )


SLICE = tuple(item.name for item in fields(SliceFacts))
"""Fields that say what the file says."""


def facts_of(info: SliceFacts | None) -> dict[str, Any]:
    """Return those fields of a prediction; none if the file says nothing."""
    return {} if info is None else {name: getattr(info, name) for name in SLICE}


class _Form(NamedTuple):
    """How values of one Python type are written."""

    arrow: pa.DataType
    datatype: str = ""
    """Element type in the Open Inference Protocol."""
    element: type = object
    """The same in NumPy."""
    absent: Any = None
    """What the protocol, which has no null, gives if there is no value."""


_FORMS: dict[Any, _Form] = {
    int: _Form(pa.int32()),
    str: _Form(pa.string(), "BYTES", np.str_, ""),
    float: _Form(pa.float32(), "FP32", np.float32, -1.0),
    bool: _Form(pa.bool_(), "BOOL", np.bool_, False),
    bool | None: _Form(pa.bool_(), "BYTES", np.str_, ""),  # true, false or empty: unknown is not false
    dict[str, float]: _Form(pa.map_(pa.string(), pa.float32()), "FP32", np.float32),  # [n, classes]
    tuple[str, ...]: _Form(pa.list_(pa.string()), "BOOL", np.bool_),  # [n, classes]: whether the label is in the set
}
_HINTS = get_type_hints(Prediction)
ANSWER = tuple(item.name for item in fields(Answer))
"""Fields of the answer."""
COLUMNS = ("frame", "status", "error_code", "error", "retryable", *ANSWER, *SLICE, "engine")
"""Fields that are columns of the results table; `uri` and `model_id` are there too, as the object's and the path's."""
_ALWAYS, _REASON = ("frame", "status", "model_id"), ("error_code", "error")
ADDED = ("label_set", *(name for name in SLICE if name not in UIDS), "engine")
"""Columns that the first results tables lack: they stand at the end, and are null in older files."""
OUTPUTS = (*ANSWER, "error_code", *SLICE)
"""Fields that are outputs of the Open Inference Protocol."""


def _form(name: str) -> _Form:
    hint = _HINTS[name]
    kind = hint if hint in _FORMS else get_args(hint)[0]
    form = _FORMS[str if get_origin(kind) is Literal else kind]
    # a position may well be -1 mm; JSON has null for NaN
    return form._replace(absent=math.nan) if kind is float and name in SLICE else form


# ---- the results table


def arrow_field(name: str) -> pa.Field:
    """Return the column `name` of the results table; null is allowed unless every prediction has a value."""
    return pa.field(name, _form(name).arrow, nullable=_HINTS[name] not in (int, str, bool))


def as_row(prediction: Prediction) -> dict[str, Any]:
    """Return the columns of the results table that a prediction fills; maps and lists are null if it is a rejection."""
    row = {name: getattr(prediction, name) for name in COLUMNS}
    ok = prediction.status == "ok"
    row["probabilities"] = list(prediction.probabilities.items()) if ok else None
    row["label_set"] = list(prediction.label_set) if ok else None
    return row


# ---- JSON


def as_record(prediction: Prediction) -> dict[str, Any]:
    """Return all fields but `index`, ready for JSON: what `btray predict --json` prints."""
    return {name: getattr(prediction, name) for name in ("uri", *COLUMNS, "model_id")}


def as_answer(prediction: Prediction) -> dict[str, Any]:
    """Return what the service answers: the fields of the answer, or `error_code` and `error` of a rejection.

    What the file says of the frame is there as far as it is known.
    """
    names = (*_ALWAYS, *(ANSWER if prediction.status == "ok" else _REASON))
    known = (name for name in SLICE if getattr(prediction, name) is not None)
    return {name: getattr(prediction, name) for name in (*names, *known)}


def answer_model_fields() -> dict[str, Any]:
    """Return the fields of `as_answer` for `pydantic.create_model`, described by their docstrings."""
    # pydantic reads the docstrings of the class itself, not those of its bases
    described: dict[str, str] = {}
    for kind in (Prediction, Answer, SliceFacts):
        schema = TypeAdapter(kind).json_schema()["properties"]
        described |= {name: schema[name]["description"] for name in schema if "description" in schema[name]}
    always = {name: (_HINTS[name], Field(description=described[name])) for name in _ALWAYS}
    return always | {
        name: (_HINTS[name] | None, Field(None, description=described[name])) for name in (*_REASON, *ANSWER, *SLICE)
    }


# ---- the Open Inference Protocol


def output_specs(classes: Sequence[str]) -> list[tuple[str, str, list[int]]]:
    """Return name, datatype and shape of each output; -1 stands for the number of images."""
    return [
        (name, _form(name).datatype, [-1] if _form(name).absent is not None else [-1, len(classes)]) for name in OUTPUTS
    ]


def output_arrays(predictions: Sequence[Prediction], classes: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """Return the outputs by name, a row per prediction: [n], or [n, classes] in the order of `classes`."""

    def cells(value: Any, absent: Any) -> Any:
        if isinstance(value, dict):
            return [value.get(label, 0.0) for label in classes]
        if isinstance(value, tuple):
            return [label in value for label in classes]
        if value is None:
            return absent
        return _csv_text(value) if absent == "" else value

    return {
        name: np.array([cells(getattr(p, name), _form(name).absent) for p in predictions], _form(name).element)
        for name in OUTPUTS
    }


# ---- CSV


def csv_header(classes: Sequence[str]) -> list[str]:
    """Return the titles of `csv_cells`: the fields of the answer, `p_LABEL` for each class's probability."""
    titles = [[f"p_{label}" for label in classes] if name == "probabilities" else [name] for name in ANSWER]
    return [title for group in titles for title in group]


def csv_cells(answer: Answer) -> list[str]:
    """Return the answer as text: six decimals, `true` or `false`, labels of a set separated by `;`, null empty."""
    values: list[Any] = []
    for name in ANSWER:
        value = getattr(answer, name)
        values += value.values() if isinstance(value, dict) else [value]
    return [_csv_text(value) for value in values]


def _csv_text(value: float | bool | str | tuple[str, ...] | None) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6f}"
    return ";".join(value) if isinstance(value, tuple) else value or ""
