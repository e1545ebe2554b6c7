"""The routes /v1: images in, answers and pictures out; and what answers."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.responses import Response

from btray.core.notice import NOTICE
from btray.data.frames import Rejection
from btray.explain import heat_png, overlay_png, slice_png
from btray.model.prediction import Prediction, answer_model_fields, as_answer
from btray.serving.gate import read_body
from btray.serving.models import DecodedImage, ModelFacts, ServedModel, SwitchReport
from btray.serving.openapi import BINARY, EXAMPLE_PNG, request_body
from btray.serving.problems import REJECTION_STATUS, Answer, Problem, problem_responses
from btray.serving.service import Service
from btray.serving.uploads import DICOM, RELATED, ClassifyRequest, Upload, images_in


class Explanation(Answer):
    """Grad-CAM pictures as PNG in base64; all show the frame that the network sees."""

    label: str
    """The label that is explained."""
    overlay_png: str
    """The slice with the heat map over it."""
    slice_png: str
    """The slice alone."""
    heat_png: str
    """The heat map alone, the more transparent the colder it is."""


class _ImageAnswer(Answer):
    index: int
    """Which image of the request it belongs to, from 0."""
    name: str | None
    """The name that the image came with."""
    explanation: Explanation | None = None
    """With explain=true."""


ImageAnswer = create_model(
    "ImageAnswer",
    __base__=_ImageAnswer,
    __doc__="The model's answer for one frame of one image, or why there is none.",
    **answer_model_fields(),
)


class ClassifyAnswer(Answer):
    """The answers for all images of a request."""

    model_id: str
    """The model that answered."""
    notice: str
    """What the answers must not be used for."""
    results: list[ImageAnswer]  # type: ignore[valid-type]
    """One for each frame of each image, in their order."""
    next_frame: int | None = None
    """With first_frame, if the image has more frames: the first_frame of the request for them."""


class ClassifyOptions(BaseModel):
    """What a caller asks for beside the answers."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())

    explain: bool = False
    """Add Grad-CAM pictures of what spoke for each label."""
    top_k: Annotated[int | None, Field(ge=1, le=1000)] = None
    """Most probabilities of each answer."""
    each: bool = False
    """Give a single image that cannot be used a status too, as one among several has, instead of an error."""
    first_frame: Annotated[int | None, Field(ge=0)] = None
    """Answer for a part of a single image of many frames: from this one on, as many as limits.max_images."""
    model_id: str | None = None
    """Answer with this model, as other requests for the same study were answered; 404 if it is not served."""


class ModelAnswer(ModelFacts):
    """A bundle in use."""

    name: str
    """The model's name in the Open Inference Protocol."""
    role: str
    """main or canary."""
    share: float
    """Share of the requests that it answers."""


class ModelsAnswer(Answer):
    """What answers, and the outcome of the latest switch to another config."""

    notice: str
    models: list[ModelAnswer]
    """The main model, and the canary if there is one."""
    switch: SwitchReport | None


_DESCRIPTION: Final = (
    "A request with one image that cannot be used is answered with an error whose code is that of the image: "
    + ", ".join(f"{code} ({status})" for code, status in REJECTION_STATUS.items())
    + ". Among several images each has a status of its own. No URL is ever fetched; images are not kept."
)
_MAX_NAME: Final = 255
_FORM: Final = {"type": "object", "properties": {"images": {"type": "array", "items": BINARY, "minItems": 1}}}
_BODY: Final = request_body(
    ClassifyRequest,
    {"images": [{"name": "scan.png", "data": EXAMPLE_PNG}]},
    **{"multipart/form-data": _FORM},
    **dict.fromkeys(("image/jpeg", "image/png", "image/tiff", "application/octet-stream", DICOM, RELATED), BINARY),
)


def classify_routes(service: Service) -> APIRouter:
    """Return the routes /v1 of `service`."""
    routes = APIRouter(responses=problem_responses(401, 403, 503))

    @routes.post(
        "/v1/classify",
        summary="Classify one or many images",
        description=_DESCRIPTION,
        response_model=ClassifyAnswer,
        responses={
            200: {"content": {"application/json": {"example": _example()}}},
            **problem_responses(400, 404, 408, 413, 415, 422),
        },
        openapi_extra=_BODY,
    )
    async def classify_images(request: Request, options: Annotated[ClassifyOptions, Query()]) -> Response:
        split = service.split()
        body = await read_body(request, service.limits)
        model = split.choose(options.model_id)
        async with service.in_time():
            uploads = await images_in(request.headers.get("content-type", ""), body, service.limits)
            content = await classify(service, model, uploads, options)
        return Response(content.model_dump_json(exclude_unset=True), media_type="application/json")

    @routes.get("/v1/models", summary="The models that answer, and the outcome of the latest switch")
    async def list_models() -> ModelsAnswer:
        split = service.split()
        models = [
            ModelAnswer(name=split.config.name, role=role, share=share, **dict(model.facts))
            for model, role, share in zip(split.models, ("main", "canary"), split.shares, strict=False)
        ]
        return ModelsAnswer(notice=NOTICE, models=models, switch=service.models.switch)

    return routes


async def classify(
    service: Service, model: ServedModel, uploads: Sequence[Upload], options: ClassifyOptions
) -> ClassifyAnswer:
    """Return the answer of /v1/classify. Raises Problem for a single image that cannot be used."""
    first, most = options.first_frame, service.limits.max_images
    if first is not None and len(uploads) > 1:
        raise Problem(422, "invalid", f"first_frame is for one image, not for {len(uploads)}")
    frames = 0

    def choose_frames(images: list[DecodedImage]) -> list[DecodedImage]:
        nonlocal frames
        frames = sum(len(image) for image in images if not isinstance(image, Rejection))
        if first is not None:
            return [_part(image, first, most) for image in images]
        if options.explain and frames > most:
            detail = f"{frames} frames, above the {most} explained: ask without explain, or with first_frame"
            raise Problem(413, "too_many_explanations", detail)
        return images

    data = [upload.data for upload in uploads]
    images, predictions = await service.classify(model, data, choose_frames, at_once=not first)
    if len(images) == 1 and isinstance(images[0], Rejection) and not options.each:
        raise Problem.of_rejection(images[0].code, images[0].message)
    results = [_image_answer(p, uploads[p.index], options.top_k, first or 0) for p in predictions]
    answer = ClassifyAnswer(model_id=model.model_id, notice=NOTICE, results=results)
    if first is not None and first + most < frames:
        answer.next_frame = first + most
    if options.explain:
        await _explain(service, model, images, predictions, results)
    return answer


def _part(image: DecodedImage, first: int, most: int) -> DecodedImage:
    """Return the frames of an image from number `first` on, `most` at most. Raises Problem if there is none."""
    if isinstance(image, Rejection):
        return image
    if first >= len(image):
        raise Problem(422, "invalid", f"first_frame {first}: the image has {len(image)} frames")
    return image.part(first, first + most)


async def _explain(
    service: Service,
    model: ServedModel,
    images: Sequence[DecodedImage],
    predictions: Sequence[Prediction],
    results: Sequence[_ImageAnswer],
) -> None:
    """Add pictures to the results of predictions, which are of `images`."""
    # no picture shows a frame with text in it, which may name the patient
    shown = zip(predictions, results, strict=True)
    answers = [pair for pair in shown if pair[0].label and not pair[0].burned_in]
    if not answers:
        return
    labels = [str(prediction.label) for prediction, _ in answers]
    frames = [images[prediction.index][prediction.frame] for prediction, _ in answers]  # type: ignore[index]
    heats = await model.explain(frames, labels)
    drawing = [service.decoding(_explanation, *drawn) for drawn in zip(labels, frames, heats, strict=True)]
    for (_, result), explanation in zip(answers, await asyncio.gather(*drawing), strict=True):
        result.explanation = explanation


def _image_answer(
    prediction: Prediction, upload: Upload, top_k: int | None = None, first_frame: int = 0
) -> _ImageAnswer:
    fields = as_answer(replace(prediction, frame=first_frame + prediction.frame))
    if prediction.status == "ok":
        ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
        fields["probabilities"] = dict(ranked[:top_k])
    return ImageAnswer(index=prediction.index, name=upload.name and upload.name[:_MAX_NAME], **fields)


def _example() -> dict[str, Any]:
    """Return an answer for OpenAPI: of a scan, and of a file that is not an image."""
    model_id, shares = "6c8ff0849668f68db3cba254da5c0b42", {"glioma": 0.91, "metastasis": 0.06, "meningioma": 0.03}
    good = Prediction(index=0, label="glioma", confidence=0.91, probabilities=shares, ood_score=1.1, model_id=model_id)
    error = "no known image: it begins with text"
    bad = Prediction(index=1, status="rejected", error_code="not_an_image", error=error, model_id=model_id)
    named = ((good, "scan.jpg"), (bad, "notes.txt"))
    results = [_image_answer(prediction, Upload(data=b"", name=name)) for prediction, name in named]
    answer = ClassifyAnswer(model_id=model_id, notice=NOTICE, results=results)
    return answer.model_dump(mode="json", exclude_unset=True)


def _explanation(label: str, frame: npt.NDArray[np.uint8], heat: npt.NDArray[np.float32]) -> Explanation:
    """Draw the frame, its heat and one over the other."""
    pictures = (overlay_png(frame, heat), slice_png(frame), heat_png(heat))
    overlay, plain, heat_map = (base64.b64encode(picture).decode("ascii") for picture in pictures)
    return Explanation(label=label, overlay_png=overlay, slice_png=plain, heat_png=heat_map)
