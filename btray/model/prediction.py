"""One prediction: its fields, and the form that each takes wherever predictions are written.

The results table, the JSON of `btray predict` and of the service, its OpenAPI schema, the outputs of the Open Inference
Protocol, the marks on the terminal and the CSV of an evaluation derive from `Prediction`: a new field is added here and
nowhere else. Free of torch, so that whatever reads or describes predictions starts quickly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ConfigDict, Field, TypeAdapter

if TYPE_CHECKING:
    from btray.data.frames import Rejection

Datatype = Literal["BYTES", "FP32", "BOOL"]
_NUMPY: dict[Datatype, type] = {"BYTES": np.str_, "FP32": np.float32, "BOOL": np.bool_}


@dataclass(frozen=True)
class Column:
    """How a field is written that only some outputs hold; the results table is one of them."""

    arrow: pa.DataType


@dataclass(frozen=True, kw_only=True)
class AnswerColumn(Column):
    """How a field of the answer is written, which every output holds."""

    datatype: Datatype
    """Element type in the Open Inference Protocol."""
    absent: str | float | bool
    """What the protocol, which has no null, gives if there is no value: of a rejected image, say."""
    per_class: bool = False
    """The protocol gives [n, classes] instead of [n]."""
    mark: str | None
    """What the terminal prints after the probabilities if the value is true, formatted with all fields. None: the
    terminal's table has a column of it; empty: `marks` or the mark of another field shows it."""
    added: bool = False
    """The results table had this column not from the beginning: it stands at the end, null in older files."""


@dataclass(frozen=True)
class Place:
    """Where a frame comes from; the fields mean what they mean in `Prediction`."""

    index: int
    frame: int = 0
    uri: str | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model answers for one frame, or why it gives no answer."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())

    index: int
    """Number of the input it belongs to, from 0; a scan of several frames gives several predictions."""
    uri: str | None = None
    """The input, if it was a path or URI."""
    frame: Annotated[int, Column(pa.int32())] = 0
    """Number of the frame within that input, from 0: the page of a multi-page image."""
    status: Annotated[str, Column(pa.string())] = "ok"
    """`ok` or `rejected`."""
    error_code: Annotated[str | None, Column(pa.string())] = None
    """Why the input was rejected, for programs: a key of `btray.data.scans.REJECTION_CODES`, or a storage error."""
    error: Annotated[str | None, Column(pa.string())] = None
    """Why the input was rejected, for people."""
    retryable: Annotated[bool, Column(pa.bool_())] = False
    """The input was rejected, but another try may succeed."""
    label: Annotated[str | None, AnswerColumn(pa.string(), datatype="BYTES", absent="", mark=None)] = None
    """The most probable class."""
    confidence: Annotated[float | None, AnswerColumn(pa.float32(), datatype="FP32", absent=0.0, mark=None)] = None
    """Its calibrated probability, in [0, 1]."""
    probabilities: Annotated[
        dict[str, float],
        AnswerColumn(pa.map_(pa.string(), pa.float32()), datatype="FP32", absent=0.0, per_class=True, mark=None),
    ] = field(default_factory=dict)
    """Calibrated probability of every class; they sum to 1."""
    abstained: Annotated[bool, AnswerColumn(pa.bool_(), datatype="BOOL", absent=False, mark="ABSTAINED")] = False
    """The confidence is below the threshold: `label` is a guess that the model does not stand by."""
    label_set: Annotated[
        tuple[str, ...],
        AnswerColumn(
            pa.list_(pa.string()),
            datatype="BOOL",
            absent=False,
            per_class=True,
            mark="",
            added=True,
        ),
    ] = ()
    """The labels that cannot be ruled out; empty unless the bundle was made with a conformal error rate."""
    out_of_distribution: Annotated[
        bool,
        AnswerColumn(
            pa.bool_(), datatype="BOOL", absent=False, mark="UNLIKE THE TRAINING IMAGES (ood_score {ood_score:.1f})"
        ),
    ] = False
    """The input is unlike the training images: no answer can be trusted."""
    ood_score: Annotated[float | None, AnswerColumn(pa.float32(), datatype="FP32", absent=-1.0, mark="")] = None
    """How unlike the training images the input is, about 1 for these; null if the bundle cannot tell."""
    model_id: str = ""
    """The model that answered."""

    @classmethod
    def of_rejection(cls, rejection: Rejection, place: Place, model_id: str) -> Prediction:
        """Return the prediction of an input that gave no frame."""
        return cls(
            **vars(place),
            status="rejected",
            error_code=rejection.code,
            error=rejection.message,
            retryable=rejection.retryable,
            model_id=model_id,
        )


_HINTS = get_type_hints(Prediction, include_extras=True)
COLUMNS: dict[str, Column] = {
    name: form for name, hint in _HINTS.items() for form in get_args(hint)[1:] if isinstance(form, Column)
}
"""Fields that are columns of the results table, by name."""
ANSWER = {name: column for name, column in COLUMNS.items() if isinstance(column, AnswerColumn)}
"""Fields of the answer, by name."""
ADDED = tuple(name for name, column in ANSWER.items() if column.added)
"""Columns that the results table did not have at first."""
_RECORD = tuple(item.name for item in fields(Prediction) if item.name != "index")


# ---- the results table


def arrow_field(name: str) -> pa.Field:
    """Return the column `name` of the results table; null is allowed unless every prediction has a value."""
    return pa.field(name, COLUMNS[name].arrow, nullable=get_args(_HINTS[name])[0] not in (int, str, bool))


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
    return {name: getattr(prediction, name) for name in _RECORD}


def as_answer(prediction: Prediction) -> dict[str, Any]:
    """Return what the service answers: the fields of the answer, or `error_code` and `error` of a rejection."""
    names: Sequence[str] = list(ANSWER) if prediction.status == "ok" else ("error_code", "error")
    return {name: getattr(prediction, name) for name in ("frame", "status", "model_id", *names)}


def answer_model_fields() -> dict[str, Any]:
    """Return the fields of `as_answer` for `pydantic.create_model`, described by the docstrings of `Prediction`."""
    described = TypeAdapter(Prediction).json_schema()["properties"]
    always = ("frame", "status", "model_id")
    return {
        name: (
            _HINTS[name] if name in always else _HINTS[name] | None,
            Field(... if name in always else None, description=described[name]["description"]),
        )
        for name in (*always, "error_code", "error", *ANSWER)
    }


# ---- the Open Inference Protocol


def output_specs(classes: Sequence[str]) -> list[tuple[str, Datatype, list[int]]]:
    """Return name, datatype and shape of each output; -1 stands for the number of images."""
    answer = [(name, c.datatype, [-1, len(classes)] if c.per_class else [-1]) for name, c in ANSWER.items()]
    return [*answer, ("error_code", "BYTES", [-1])]


def output_arrays(predictions: Sequence[Prediction], classes: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """Return the outputs by name, a row per prediction: [n], or [n, classes] in the order of `classes`."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, column in ANSWER.items():
        values = [getattr(prediction, name) for prediction in predictions]
        rows: list[Any]
        if column.per_class:
            rows = [
                [value.get(label, column.absent) if isinstance(value, dict) else label in value for label in classes]
                for value in values
            ]
        else:
            rows = [column.absent if value is None else value for value in values]
        arrays[name] = np.array(rows, _NUMPY[column.datatype])
    codes = [prediction.error_code or "" for prediction in predictions]
    return arrays | {"error_code": np.array(codes, np.str_)}


# ---- text


def csv_header(classes: Sequence[str]) -> list[str]:
    """Return the titles of `csv_cells`: the fields of the answer, `p_LABEL` for each class's probability."""
    titles = [[f"p_{label}" for label in classes] if name == "probabilities" else [name] for name in ANSWER]
    return [title for group in titles for title in group]


def csv_cells(prediction: Prediction) -> list[str]:
    """Return the answer as text: six decimals, `true` or `false`, labels of a set separated by `;`, null empty."""
    cells: list[str] = []
    for name in ANSWER:
        match getattr(prediction, name):
            case dict() as by_class:
                cells += [f"{share:.6f}" for share in by_class.values()]
            case tuple() as labels:
                cells.append(";".join(labels))
            case bool() as flag:
                cells.append(str(flag).lower())
            case float() as number:
                cells.append(f"{number:.6f}")
            case value:
                cells.append(value or "")
    return cells


def marks(prediction: Prediction, classes: Sequence[str]) -> list[str]:
    """Return why not to rely on the label, the gravest reason first, for a terminal."""
    reasons = [
        column.mark.format(**vars(prediction))
        for name, column in reversed(ANSWER.items())
        if column.mark and getattr(prediction, name)
    ]
    if 1 < len(prediction.label_set) < len(classes):  # a set of one, or of all, adds nothing to the label
        reasons.append("one of: " + ", ".join(prediction.label_set))
    return reasons
