"""What a caller is told when a request fails: problem+json (RFC 9457) with a code that programs can rely on."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any, Final

from starlette.responses import Response

PROBLEM_TYPE: Final = "application/problem+json"

PROBLEM_CODES: Final[dict[str, str]] = {
    "bad_request": "The request cannot be understood: see detail.",
    "bad_body": "The body is not what its content type says: see detail.",
    "unauthorized": "A key is needed: send it as Authorization: Bearer KEY.",
    "forbidden": "The service has no keys and answers this machine alone: give it keys.",
    "not_found": "There is no such path, model or version.",
    "method_not_allowed": "The path has another method: see the header Allow.",
    "timeout": "The body did not arrive, or the answer was not there, in time: try again.",
    "too_large": "The body has more bytes than the service takes: send less, or ask for a higher limit.",
    "too_many_images": "The request has more images than the service takes: send them in several requests.",
    "too_many_explanations": "The images have more pages than pictures are drawn of: ask without explain.",
    "too_many_frames": "The images have more pages than the service takes: send them in several requests.",
    "bomb": "Decoding would take too much memory or time: send a smaller image.",
    "unsupported_media_type": "The content type or encoding is not read here: see detail.",
    "invalid": "A value is out of range: see detail.",
    "busy": "The service has as much work as it takes: wait as long as Retry-After says.",
    "not_ready": "The service has no model yet: wait as long as Retry-After says.",
    "internal": "The service failed; its log says why.",
}

# What one rejected image means for a request that asked for nothing else; its code is that of the rejection.
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


class Problem(Exception):
    """A request that is answered with an error. `code` is a key of `PROBLEM_CODES` or of `REJECTION_STATUS`."""

    def __init__(self, status: int, code: str, detail: str, *, retry_after: int | None = None, **more: Any) -> None:
        super().__init__(status, code, detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.more = more
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status in (401, 403, 408, 413):
            self.headers["Connection"] = "close"  # what is left of the body is not waited for
        if status == 401:
            self.headers["WWW-Authenticate"] = 'Bearer realm="btray"'

    def response(self) -> Response:
        """The answer. `error` repeats the detail for clients of the Open Inference Protocol, which look there."""
        content = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            "error": self.detail,
            **self.more,
        }
        return Response(json.dumps(content), self.status, self.headers, PROBLEM_TYPE)
