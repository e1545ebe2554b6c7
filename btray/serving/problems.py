"""The errors that callers get: problem+json (RFC 9457) with a code that programs can rely on.

docs/serving.md lists the codes.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any, Final, Self

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

PROBLEM_TYPE: Final = "application/problem+json"

# The status if one rejected image is all that a request asks for; the problem's code is that of the rejection.
REJECTION_STATUS: Final[dict[str, int]] = {
    "empty": 400,
    "not_an_image": 400,
    "truncated": 400,
    "decode_failed": 400,
    "too_large": 413,
    "bomb": 413,
    "unsupported": 415,
    "animated": 415,
    "too_small": 422,
}

_MEANINGS: Final = {
    400: "The request or its only image cannot be read.",
    401: "A key is needed.",
    403: "The service answers its own machine alone.",
    404: "There is no such model or version.",
    406: "The Accept header leaves out the kind of the answer.",
    408: "The body did not arrive in time.",
    413: "Too many bytes, images, frames or pixels.",
    415: "A content type, encoding or kind of image that is not supported.",
    422: "A value is out of range.",
    503: "Too much is in work, or no model is there yet: wait as long as Retry-After says.",
}


class Answer(BaseModel):
    """An answer in JSON; the strings below its fields describe them in OpenAPI."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class ProblemAnswer(Answer):
    """An error (RFC 9457)."""

    type: str = "about:blank"
    """Always about:blank."""
    title: str
    """The phrase of the status."""
    status: int
    """The HTTP status."""
    code: str
    """What is wrong, for programs."""
    detail: str
    """What is wrong, for people."""
    error: str
    """The same as detail, for clients of the Open Inference Protocol."""


class Problem(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str, detail: str, *, retry_after: int | None = None) -> None:
        """Describe the error; `retry_after` is in seconds."""
        super().__init__(status, code, detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status in (401, 403, 408, 413):
            self.headers["Connection"] = "close"  # what is left of the body is not waited for
        if status == 401:
            self.headers["WWW-Authenticate"] = 'Bearer realm="btray"'

    @classmethod
    def of_rejection(cls, code: str, message: str) -> Self:
        """Return the problem of a request whose only image was rejected."""
        return cls(REJECTION_STATUS.get(code, 422), code, message)

    def response(self) -> Response:
        """Return the answer."""
        title = HTTPStatus(self.status).phrase
        answer = ProblemAnswer(title=title, status=self.status, code=self.code, detail=self.detail, error=self.detail)
        # Not pydantic's own JSON, which fails if the detail quotes half a surrogate pair of the caller's.
        return Response(json.dumps(answer.model_dump()), self.status, self.headers, PROBLEM_TYPE)


def problem_of(error: Exception) -> Problem:
    """Return the problem that a request is answered with if it fails with `error`."""
    match error:
        case Problem():
            return error
        case HTTPException():
            code = HTTPStatus(error.status_code).name.lower()  # method_not_allowed, bad_request
            problem = Problem(error.status_code, code, str(error.detail))
            problem.headers |= dict(error.headers or {})
            return problem
        case RequestValidationError():
            return Problem(422, "invalid", first_error(error))
        case _:
            return Problem(500, "internal", "the service failed; its log says why")


def first_error(error: ValidationError | RequestValidationError) -> str:
    """Return where the first wrong value is and what is wrong with it, in one line."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))[:80] or 'body'}: {first['msg'].removeprefix('Value error, ')[:300]}"


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the errors of a route, for OpenAPI."""
    schema = {"schema": {"$ref": f"#/components/schemas/{ProblemAnswer.__name__}"}}
    return {status: {"description": _MEANINGS[status], "content": {PROBLEM_TYPE: schema}} for status in statuses}
