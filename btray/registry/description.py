"""A model in words: what it is, and how accurate by source, as its bundle says."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from btray import storage
from btray.core.errors import UserError
from btray.evaluation.metrics import Evaluation
from btray.evaluation.report import model_facts, summary
from btray.model.bundle_files import read_manifest


def line_of(uri: str, stages: Sequence[str]) -> str:
    """Return one line for a list: model_id, age, accuracy, and the stages it is promoted in."""
    manifest, metrics = read_manifest(uri), _metrics(uri)
    accuracy = f"accuracy {metrics.accuracy:.3f} on {metrics.n} images" if metrics else "accuracy not measured"
    marks = f"  <- {', '.join(stages)}" if stages else ""
    return f"{manifest.model_id}  {manifest.created_at}  {accuracy}{marks}"


def describe(uri: str) -> list[str]:
    """Return the lines that describe a bundle; its metrics as published, by source if the data named sources."""
    metrics = _metrics(uri)
    facts = [f"{name}: {value}" for name, value in model_facts(read_manifest(uri)).items()]
    return [uri, *facts, summary(metrics) if metrics else "its accuracy was not measured"]


def _metrics(uri: str) -> Evaluation | None:
    """Return metrics.json; None if there is none that this btray reads."""
    with suppress(UserError):
        return Evaluation.from_json(storage.read_bytes(storage.join(uri, "metrics.json")))
    return None
