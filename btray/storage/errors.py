"""Why a path or object could not be read, listed or written: one error with a code, from what the OS and S3 raise."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import aiohttp
import botocore.exceptions  # type: ignore[import-untyped]

from btray.core.errors import UserError

PATIENCE = 8.0
"""Seconds during which a throttled or unavailable store is asked again before the failure is reported."""

# fsspec's thread, where S3 requests are made, runs each in the context of the thread that asked for it
_patience: ContextVar[float | None] = ContextVar("_patience", default=None)

_REMEDIES = {
    "not_found": "nothing is there; check the spelling",
    "forbidden": "access is refused; check the permissions",
    "throttled": "the store asks for fewer requests; try again later or with fewer workers",
    "unavailable": "the store does not answer; try again when it does",
    "is_directory": "this is a folder; name a file",
    "too_large": "this is larger than allowed",
    "changed": "this was written anew in the meantime; run again",
    "failed": "this could not be read or written",
}
_AWS_REMEDIES = {
    "not_found": " of bucket and key, and AWS_ENDPOINT_URL",
    "forbidden": ", AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and AWS_ENDPOINT_URL",
    "unavailable": ", and check AWS_ENDPOINT_URL",
}


class StorageError(Exception):
    """A path or object that could not be read, listed or written.

    `code` is not_found, forbidden, throttled, unavailable, changed, is_directory, too_large or failed; `uri` says
    where; `retryable` is true where the same request may succeed later (throttled, unavailable).
    """

    def __init__(self, code: str, uri: str, detail: str = "") -> None:
        super().__init__(code, uri, detail)  # all arguments, so that the error survives pickling between Ray workers
        self.code = code
        self.uri = uri
        self.detail = " ".join(detail.split())

    @property
    def retryable(self) -> bool:
        return self.code in ("throttled", "unavailable")

    def __str__(self) -> str:
        return f"{self.uri}: {self.code}" + (f" ({self.detail})" if self.detail else "")


def user_error(error: StorageError) -> UserError:
    """The same failure as one line with a remedy, for a URI that the user named."""
    remedy = _REMEDIES[error.code] + (_AWS_REMEDIES.get(error.code, "") if error.uri.startswith("s3://") else "")
    return UserError(f"{error.uri}: {remedy}" + (f" ({error.detail})." if error.detail else "."))


_FORBIDDEN_CODES = {
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "AuthorizationHeaderMalformed",
    "401",
    "403",
}
_THROTTLED_CODES = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "TooManyRequests",
    "429",
    "503",
}
_UNAVAILABLE_CODES = {"RequestTimeout", "RequestTimeoutException", "IncompleteBody", "ConditionalRequestConflict"}
_FORBIDDEN_KINDS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.NoAuthTokenError,
    botocore.exceptions.TokenRetrievalError,
    botocore.exceptions.ProfileNotFound,
)
_UNAVAILABLE_KINDS = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    aiohttp.ClientError,
    TimeoutError,
    ConnectionError,
)
FAILURES = (
    OSError,
    ValueError,
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    aiohttp.ClientError,
)
_ERRNO_CODES = {
    errno.ENOENT: "not_found",
    errno.ENOTDIR: "not_found",
    errno.EACCES: "forbidden",
    errno.EPERM: "forbidden",
    errno.EROFS: "forbidden",
    errno.EISDIR: "is_directory",
    # network file systems that are away, and a process or machine out of file handles
    errno.ESTALE: "unavailable",
    errno.EIO: "unavailable",
    errno.ENOTCONN: "unavailable",
    errno.EHOSTDOWN: "unavailable",
    errno.EHOSTUNREACH: "unavailable",
    errno.EAGAIN: "unavailable",
    errno.EMFILE: "unavailable",
    errno.ENFILE: "unavailable",
}


@contextmanager
def storage_errors_for(uri: str) -> Iterator[None]:
    """Turn what the OS, s3fs and botocore raise within into a StorageError for `uri`."""
    try:
        yield
    except FAILURES as error:
        raise as_storage_error(error, uri) from error


class suppress_missing(AbstractContextManager[None]):  # noqa: N801 - it is `contextlib.suppress` for one code
    """Leave the block without an error at the first file, object or folder that is not there."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        return isinstance(error, StorageError) and error.code == "not_found"


def as_storage_error(error: Exception, uri: str) -> StorageError:
    """The StorageError for one of FAILURES."""
    # s3fs wraps what the server said in built-in errors that no longer tell a throttled request from a broken one
    said = error if isinstance(error, botocore.exceptions.ClientError) else error.__cause__
    if not isinstance(said, botocore.exceptions.ClientError):
        return StorageError(_code_of_failure(error), uri, getattr(error, "strerror", None) or str(error))
    status = said.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = str(said.response["Error"].get("Code", status))
    return StorageError(_code_of_answer(code, status), uri, f"{code}: {said.response['Error'].get('Message')}")


def _code_of_answer(code: str, status: int) -> str:
    if code in _THROTTLED_CODES or status in (429, 503):
        return "throttled"
    if code in _FORBIDDEN_CODES or status in (401, 403):
        return "forbidden"
    if code in _UNAVAILABLE_CODES or status >= 500:
        return "unavailable"
    return "not_found" if status == 404 else "failed"


def _code_of_failure(error: Exception) -> str:
    if isinstance(error, _FORBIDDEN_KINDS):
        return "forbidden"
    if isinstance(error, _UNAVAILABLE_KINDS):
        return "unavailable"
    return _ERRNO_CODES.get(getattr(error, "errno", None) or 0, "failed")


def check_size(uri: str, size: int, max_bytes: int | None) -> None:
    """Raise StorageError too_large where `size` is above `max_bytes`; None: no limit."""
    if max_bytes is not None and size > max_bytes:
        raise StorageError("too_large", uri, f"{size} bytes, more than {max_bytes}")


def check_found(uri: str, size: int, found: str, *, max_bytes: int | None, etag: str) -> None:
    """Raise StorageError: too_large, or changed where the entity tag `found` is not `etag`; empty: any is welcome."""
    if etag and found != etag:
        raise StorageError("changed", uri, f"its etag is {found or 'missing'}, it was listed with {etag}")
    check_size(uri, size, max_bytes)


@contextmanager
def retry_timeout(seconds: float) -> Iterator[None]:
    """Within the block, ask a store for `seconds` in place of PATIENCE; holds for this thread and not for others."""
    before = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(before)


def backoff_delays() -> Iterator[float]:
    """Growing, jittered pauses between attempts, in seconds; none that would end later than patience lasts."""
    return _waits(time.monotonic() + (_patience.get() or PATIENCE))


def _waits(deadline: float) -> Iterator[float]:
    longest = 0.1
    while True:
        pause = random.uniform(longest / 2, longest)  # noqa: S311 - jitter
        if time.monotonic() + pause > deadline:
            return
        yield pause
        longest = min(2 * longest, 2.0)
