"""UIDs of what btray writes into a PACS. They follow from the model and its sources, so that a repeat is the same."""

from __future__ import annotations

import json
import uuid
from typing import Final

from btray.pacs.report.answers import SourceFrame, StudyAnswer

_NAMESPACE: Final = uuid.UUID("5a2f7c1e-8d0b-4b52-9a35-6c1d0e6f9b27")


def derived_uid(*names: object) -> str:
    """Return the UID of what `names` say: `2.25.` and a UUID of version 5 (PS3.5 B.2), the same for the same names."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, json.dumps(names)).int}"


def report_uid(answer: StudyAnswer) -> str:
    """Return the SOP Instance UID of the report, which follows from the model and what it has seen of the study.

    So a study that has grown gets another report, beside the one on what there was of it before.
    """
    seen = [
        (part.series_uid, part.frames, part.rejected, [(frame.instance_uid, frame.frame) for frame in part.sources])
        for part in answer.parts
    ]
    return derived_uid("report", answer.model_id, answer.study_uid, seen)


def heat_map_uid(report: str, frame: SourceFrame) -> str:
    """Return the SOP Instance UID of the heat map over a frame that belongs to the report of this UID."""
    return derived_uid("heat map", report, frame.instance_uid, frame.frame)


def series_uid(kind: str, report: str) -> str:
    """Return the UID of the series of the report of this UID, or of its heat maps, as `kind` says."""
    return derived_uid("series", kind, report)
