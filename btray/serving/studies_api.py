"""The route /v1/studies: answers for frames in, an answer for each series and study out.

The rule is that of the table of studies and of `btray predict`, so no caller needs a rule of its own; and since frames
come as answers, not as images, a study may be classified by any number of requests.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Request
from pydantic import BeforeValidator, ConfigDict, FailFast, Field

from btray.core.config import Probability
from btray.core.notice import NOTICE
from btray.model.prediction import Prediction
from btray.model.studies import Reader, StudyCollector
from btray.serving.config import LimitsConfig
from btray.serving.gate import read_body
from btray.serving.models import TrafficSplit
from btray.serving.openapi import request_body
from btray.serving.problems import Answer, Problem, problem_responses
from btray.serving.service import Service
from btray.serving.uploads import RequestObject, parse_json

# What a caller sends belongs in no log.
_Uid = Annotated[str | None, Field(max_length=255, repr=False)]
_MOST_CLASSES: Final = 1000


def _require_few(probabilities: Any) -> Any:
    """Refuse more than any model has, before each of them is looked at."""
    if isinstance(probabilities, dict) and len(probabilities) > _MOST_CLASSES:
        raise ValueError(f"{len(probabilities)} probabilities are more than {_MOST_CLASSES}")
    return probabilities


class StudyFrame(RequestObject):
    """What /v1/classify answers for one frame; its other fields are ignored."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())

    model_id: str
    """The model that answered, the same for all frames."""
    status: Literal["ok", "rejected"] = "ok"
    """A rejected frame is counted."""
    study_uid: _Uid = None
    """The UID, or any other text that tells studies apart."""
    series_uid: _Uid = None
    """The UID, or any other text that tells series apart. A frame with neither is left out."""
    probabilities: Annotated[dict[str, Probability], BeforeValidator(_require_few)] = Field(default_factory=dict)
    """Those of all classes."""
    abstained: bool = False
    out_of_distribution: bool = False


class StudiesRequest(RequestObject):
    """The `results` of one or several answers of /v1/classify."""

    frames: Annotated[list[StudyFrame], FailFast()] = Field(min_length=1)


class StudyAnswer(Answer):
    """What the frames of a series or study say together; label and so on are null if none was classified."""

    level: Literal["series", "study"]
    study_uid: str | None
    series_uid: str | None
    """Null for a study."""
    frames: int
    """Classified ones."""
    rejected: int
    abstained_frames: int
    ood_frames: int
    """Those unlike the training images."""
    label: str | None
    confidence: float | None
    probabilities: dict[str, float] | None
    agreement: float | None
    """Share of the classified frames whose own label it is."""
    abstained: bool
    """The confidence is below the model's threshold for frames, or there is none."""
    key_frames: list[int]
    """Numbers, from 0 in the request, of the frames with the most tumor, most first; ten at most."""


class StudiesAnswer(Answer):
    """The series and studies of a request."""

    model_id: str
    """The model whose rule it is."""
    notice: str
    """What the answers must not be used for."""
    rule: str
    """How frames become a series; a study is the mean of its series."""
    results: list[StudyAnswer]
    """The series of a study, then the study."""


_MODEL_ID: Final = "6c8ff0849668f68db3cba254da5c0b42"
_REMEDY: Final = "send fewer studies at a time, and of each frame only what the schema names"
_DESCRIPTION: Final = (
    "Takes the `results` of any number of answers of /v1/classify, without `top_k` and all by one model (`model_id`), "
    "and decides each series and study by the rule of that model, as the table of studies does."
)


def studies_routes(service: Service) -> APIRouter:
    """Return the route /v1/studies of `service`."""
    routes = APIRouter(responses=problem_responses(401, 403, 503))

    @routes.post(
        "/v1/studies",
        summary="Decide series and studies from the answers for their frames",
        description=_DESCRIPTION,
        responses=problem_responses(400, 404, 408, 413, 415, 422),
        openapi_extra=request_body(StudiesRequest, {"frames": [_example_frame(0.9), _example_frame(0.2)]}),
    )
    async def decide_studies(request: Request) -> StudiesAnswer:
        split = service.split()
        body = await read_body(request, service.limits)
        async with service.in_time():
            return await service.decoding(_decide, split, body, service.limits)

    return routes


def _decide(split: TrafficSplit, body: bytes, limits: LimitsConfig) -> StudiesAnswer:
    frames = parse_json(StudiesRequest, body, limits, _REMEDY).frames
    model_ids = {frame.model_id for frame in frames}
    if len(model_ids) > 1:
        detail = f"frames: answered by {len(model_ids)} models; classify all of a study with the same model_id"
        raise Problem(422, "invalid", detail)
    model = split.choose(model_ids.pop())
    reader = Reader.of(model.classifier.manifest)
    for number, frame in enumerate(frames):
        if frame.status == "ok" and frame.probabilities.keys() != set(reader.classes):
            detail = f"frames.{number}.probabilities: expected those of {', '.join(reader.classes)}, without top_k"
            raise Problem(422, "invalid", detail)
    collector = StudyCollector(reader)
    collector.add([Prediction(index=number, frame=number, **dict(frame)) for number, frame in enumerate(frames)])
    results = []
    for decision in collector.decisions():
        names = {name: getattr(decision, name) for name in ("level", "study_uid", "series_uid")}
        key_frames = [number for _, number in decision.key_frames]
        results.append(StudyAnswer.model_validate(names | asdict(decision.verdict) | {"key_frames": key_frames}))
    return StudiesAnswer(model_id=model.model_id, notice=NOTICE, rule=str(reader), results=results)


def _example_frame(tumor: float) -> dict[str, object]:
    shares = {"glioma": tumor, "meningioma": 0.0, "pituitary": 0.0, "metastasis": 0.0, "no_tumor": 1 - tumor}
    return {"model_id": _MODEL_ID, "study_uid": "1.2.3", "series_uid": "1.2.3.4", "probabilities": shares}
