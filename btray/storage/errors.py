"""Why a path or object could not be read, listed or written: one error with a code, from what the OS and S3 raise."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final

import aiohttp
import botocore.exceptions as aws  # type: ignore[import-untyped]

from btray.core.errors import UserError

FAILURES = (OSError, ValueError, aws.BotoCoreError, aws.ClientError, aiohttp.ClientError)
"""What the OS, s3fs and botocore raise if a request fails."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One code of `StorageError`: what raises it, and what the user can do."""

    remedy: str
    s3_remedy: str = ""
    """Continues `remedy` for an s3:// URI."""
    unreachable: bool = False
    """Whether the store answers nothing, or nobody for now, so that the same request may succeed later."""
    responses: tuple[str, ...] = ()
    """S3 error codes and HTTP statuses: responses to HEAD give no S3 code, and batch deletes no status."""
    exceptions: tuple[type[Exception], ...] = ()
    """Raised if there is no response."""
    errnos: tuple[int, ...] = ()


# The first match counts: some stores send S3 codes of one kind with the HTTP status of another.
KINDS: Final[dict[str, Kind]] = {
    "throttled": Kind(
        remedy="the store asks for fewer requests; try again later or with fewer workers",
        unreachable=True,
        responses=(
            "429", "503", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests",
        ),
    ),
    "forbidden": Kind(
        remedy="access is refused; check the permissions",
        s3_remedy=", AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and AWS_ENDPOINT_URL",
        responses=(
            "401", "403", "AccessDenied", "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
            "AuthorizationHeaderMalformed",
        ),
        exceptions=(
            aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError, aws.NoAuthTokenError,
            aws.TokenRetrievalError, aws.ProfileNotFound,
        ),
        errnos=(errno.EACCES, errno.EPERM, errno.EROFS),
    ),
    "unavailable": Kind(
        remedy="the store does not answer; try again when it does",
        s3_remedy=", and check AWS_ENDPOINT_URL",
        unreachable=True,
        responses=("RequestTimeout", "RequestTimeoutException", "IncompleteBody", "ConditionalRequestConflict"),
        exceptions=(
            aws.ConnectionError, aws.HTTPClientError, aws.IncompleteReadError, aiohttp.ClientError, TimeoutError,
            ConnectionError,
        ),
        # a network file system that is down; a process or machine that has no file handle left
        errnos=(
            errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EAGAIN,
            errno.EMFILE, errno.ENFILE,
        ),
    ),
    "not_found": Kind(
        remedy="nothing is there; check the spelling",
        s3_remedy=" of bucket and key, and AWS_ENDPOINT_URL",
        responses=("404",),
        exceptions=(FileNotFoundError,),  # s3fs gives it no errno
        errnos=(errno.ENOENT, errno.ENOTDIR),
    ),
    "is_directory": Kind(remedy="this is a folder; name a file", errnos=(errno.EISDIR,)),
    "too_large": Kind(remedy="this is larger than allowed"),
    "changed": Kind(remedy="this was written anew in the meantime; run again"),
    "failed": Kind(remedy="this could not be read or written"),
}  # fmt: skip
UNREACHABLE_CODES: Final = frozenset(code for code, kind in KINDS.items() if kind.unreachable)
"""Codes of a store that answers nothing, or nobody for now: it is worth waiting for."""


class StorageError(UserError):
    """A path or object that could not be read, listed or written: one line that names it and the remedy.

    `code` is not_found, forbidden, throttled, unavailable, changed, is_directory, too_large or failed; `uri` is the
    path or object; `retryable` is true if the same request may succeed later (throttled, unavailable). A job that ends
    with it exits with 1 then, so that whatever supervises the job starts it again, and else with 2.
    """

    def __init__(self, code: str, uri: str, detail: str = "") -> None:
        super().__init__(code, uri, detail)  # all arguments, so that the error survives pickling between Ray workers
        self.code = code
        self.uri = uri
        self.detail = " ".join(detail.split())
        self.exit_code = 1 if self.retryable else 2

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return self.code in UNREACHABLE_CODES

    def __str__(self) -> str:
        kind = KINDS[self.code]
        remedy = kind.remedy + (kind.s3_remedy if self.uri.startswith("s3://") else "")
        return f"{self.uri}: {remedy}" + (f" ({self.detail})" if self.detail else "")


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
    """Return the StorageError for one of FAILURES."""
    # s3fs wraps server errors in built-in ones, which no longer tell a throttled request from a broken one
    response = error if isinstance(error, aws.ClientError) else error.__cause__
    if isinstance(response, aws.ClientError):
        status = response.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = str(response.response["Error"].get("Code", status))
        return StorageError(code_of_response(code, status), uri, f"{code}: {response.response['Error'].get('Message')}")
    number = getattr(error, "errno", None)
    matches = (code for code, kind in KINDS.items() if isinstance(error, kind.exceptions))
    by_errno = (code for code, kind in KINDS.items() if number in kind.errnos)
    code = next(matches, None) or next(by_errno, "failed")
    return StorageError(code, uri, getattr(error, "strerror", None) or str(error))


def code_of_response(s3_code: str, status: int = 0) -> str:
    """Return our code for an S3 error code and the HTTP status that came with it; 0: none did."""
    default = "unavailable" if status >= 500 else "failed"
    return next((code for code, kind in KINDS.items() if {s3_code, str(status)} & {*kind.responses}), default)


def check_file(uri: str, size: int, max_bytes: int | None, etag: str = "", expected_etag: str = "") -> None:
    """Raise StorageError if a file is not what the caller asked for.

    That is changed if `etag` is not the `expected_etag` (empty: any is fine), or too_large if `size` is above
    `max_bytes` (None: no limit).
    """
    if expected_etag and etag != expected_etag:
        raise StorageError("changed", uri, f"its etag is {etag or 'missing'}, it was listed with {expected_etag}")
    if max_bytes is not None and size > max_bytes:
        raise StorageError("too_large", uri, f"{size} bytes, more than {max_bytes}")
