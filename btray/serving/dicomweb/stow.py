"""The routes /dicomweb/studies: what an archive pushes by STOW-RS (DICOM PS3.18, 10.5) is classified, and not kept.

The answer says of each instance whether it could be classified, in the standard's terms. It has no labels, for which
the standard has no place: these are in the study's report, or in the answer of /v1/classify to the same body.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from btray.data.scans import ScanRejected
from btray.data.scans.dicom import ObjectNames, name_object
from btray.serving.config import ServiceConfig
from btray.serving.dicomweb.pending import UID, PendingStudies
from btray.serving.gate import read_body
from btray.serving.openapi import BINARY
from btray.serving.problems import Problem, problem_responses
from btray.serving.service import Service
from btray.serving.uploads import RELATED, related_objects
from btray.storage import StorageError

_log = logging.getLogger(__name__)

ANSWER_TYPE: Final = "application/dicom+json"
# PS3.18, tables I.2-1 and I.2-2.
DISCARDED: Final = 0xB006
"""Warning: nothing of the instance was used."""
NO_RESOURCES, ANOTHER_STUDY, NOT_UNDERSTOOD, SYNTAX_UNKNOWN = 0xA700, 0xA900, 0xC000, 0xC122
_REASONS: Final = {"bomb": NO_RESOURCES, "too_large": NO_RESOURCES, "unsupported": SYNTAX_UNKNOWN}
"""Failure reason by the code of a rejection; of all others, `NOT_UNDERSTOOD`."""

_NOWHERE: Final = {"00081190": {"vr": "UR"}}
"""The URL to retrieve an instance from, which is empty: nothing is kept here."""
_TAKEN: Final = ("", "*/*", "application/*", ANSWER_TYPE, "application/json")
_DESCRIPTION: Final = (
    "Takes DICOM instances as an archive pushes them and classifies them; none is kept. The answer is the Store "
    "Instances Response Module: of each instance whether it could be classified, and if not why. Instances without "
    "slices are passed over, with a warning. Labels are in the answer of /v1/classify to the same body."
)
_ANSWER: Final[dict[str, Any]] = {"content": {ANSWER_TYPE: {"schema": {"type": "object"}}}}
_OPENAPI: Final[dict[str, Any]] = {
    "summary": "Take pushed instances (STOW-RS)",
    "description": _DESCRIPTION,
    "response_class": Response,
    "responses": {
        200: {"description": "All instances were classified.", **_ANSWER},
        202: {"description": "Some instances were not classified, or passed over.", **_ANSWER},
        409: {"description": "Not one instance could be classified.", **_ANSWER},
        **problem_responses(400, 406, 408, 413, 415),
    },
    "openapi_extra": {"requestBody": {"required": True, "content": {RELATED: {"schema": BINARY}}}},
}


@dataclass
class Instance:
    """One part of a request."""

    data: bytes
    names: ObjectNames | None
    """None if its header cannot be read, or does not name it."""
    failure: int = 0
    """Why it was not classified, or 0."""
    warning: int = 0
    """Why it was passed over, or 0."""


def stow_routes(service: Service) -> APIRouter:
    """Return the routes of STOW-RS of `service`."""
    routes = APIRouter(responses=problem_responses(401, 403, 503))

    @routes.post("/dicomweb/studies", **_OPENAPI)
    async def store_instances(request: Request) -> Response:
        return await _store(service, request, None)

    @routes.post("/dicomweb/studies/{study_uid}", **_OPENAPI)
    async def store_study(request: Request, study_uid: str) -> Response:
        if not UID.fullmatch(study_uid):
            raise Problem(400, "bad_request", "the last part of the path is not a UID")
        return await _store(service, request, study_uid)

    return routes


async def _store(service: Service, request: Request, study_uid: str | None) -> Response:
    split = service.split()
    _require_json_taken(request.headers.getlist("accept"))
    body = await read_body(request, service.limits)
    async with service.in_time():
        objects = await related_objects(request.headers.get("content-type", ""), body, service.limits)
        instances = await service.decoding(_read, objects, study_uid, service.limits.max_body)
        slices = [instance for instance in instances if not instance.failure and not instance.warning]
        if slices:
            images = [instance.data for instance in slices]
            _, predictions = await service.classify(split.choose(), images, lambda decoded: decoded)
            for prediction in predictions:
                if prediction.error_code is not None:
                    slices[prediction.index].failure = _REASONS.get(prediction.error_code, NOT_UNDERSTOOD)
        await _mark(split.config, slices)
    good = [instance for instance in instances if not instance.failure]
    status = 409 if not good else 200 if all(not each.failure and not each.warning for each in instances) else 202
    return Response(json.dumps(_answer(instances)), status, media_type=ANSWER_TYPE)


async def _mark(config: ServiceConfig, slices: Sequence[Instance]) -> None:
    """Note that the studies of classified slices wait for a report. Raises Problem if that cannot be written down."""
    if config.report_to is None or config.pending is None:
        return
    pending = PendingStudies(config.pending)
    try:
        for study_uid in {slice_.names.study_uid for slice_ in slices if slice_.names and not slice_.failure}:
            await asyncio.to_thread(pending.add, study_uid)
    except StorageError as error:
        _log.error("a pushed study cannot be marked: %s", error)
        raise Problem(503, "unavailable", "what is pushed cannot be noted for its report", retry_after=10) from error


def _require_json_taken(accepted: Sequence[str]) -> None:
    kinds = [kind.partition(";")[0].strip().lower() for kind in ",".join(accepted).split(",")]
    if not any(kind in _TAKEN for kind in kinds):
        raise Problem(406, "not_acceptable", f"the answer is {ANSWER_TYPE}, which the Accept header leaves out")


def _read(objects: Sequence[bytes], study_uid: str | None, max_bytes: int) -> list[Instance]:
    """Return the instances of a request, those that are not to be classified with the reason."""
    instances = []
    for data in objects:
        try:
            names = name_object(data, max_bytes)
        except ScanRejected:
            instances.append(Instance(data, None, failure=NOT_UNDERSTOOD))
            continue
        if not all(UID.fullmatch(uid) for uid in (names.sop_class, names.instance_uid, names.study_uid)):
            instances.append(Instance(data, None, failure=NOT_UNDERSTOOD))
        elif study_uid not in (None, names.study_uid):
            instances.append(Instance(data, names, failure=ANOTHER_STUDY))
        elif names.no_slice:
            _log.info("passed over instance %s: %s", names.instance_uid, names.no_slice)
            instances.append(Instance(data, names, warning=DISCARDED))
        else:
            instances.append(Instance(data, names))
    return instances


def _answer(instances: Sequence[Instance]) -> dict[str, Any]:
    """Return the Store Instances Response Module (PS3.18, table I.1-1) in JSON."""
    taken, failed, nameless = [], [], []
    for instance in instances:
        if instance.names is None:
            nameless.append(_us("00081197", instance.failure))
            continue
        reference = _ui("00081150", instance.names.sop_class) | _ui("00081155", instance.names.instance_uid)
        if instance.failure:
            failed.append(reference | _us("00081197", instance.failure))
        else:
            warning = _us("00081196", instance.warning) if instance.warning else {}
            taken.append(reference | _NOWHERE | warning)
    sequences = {"00081199": taken, "00081198": failed, "0008119A": nameless}
    return _NOWHERE | {tag: {"vr": "SQ", "Value": items} for tag, items in sequences.items() if items}


def _ui(tag: str, uid: str) -> dict[str, Any]:
    return {tag: {"vr": "UI", "Value": [uid]}}


def _us(tag: str, number: int) -> dict[str, Any]:
    return {tag: {"vr": "US", "Value": [number]}}
