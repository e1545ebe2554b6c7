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
    """S3 error codes and HTTP statuses: responses to HEAD give no S3 code, and batch deletes no status. Codes are those
    of AWS (API reference, "Error responses"), Ceph's gateway, MinIO and Google's XML API."""
    exceptions: tuple[type[Exception], ...] = ()
    """Raised if there is no response."""
    errnos: tuple[int, ...] = ()


KINDS: Final[dict[str, Kind]] = {
    "throttled": Kind(
        remedy="the store asks for fewer requests; try again later or with fewer workers",
        unreachable=True,
        responses=(
            "429", "503", "SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling", "ThrottlingException",
            "RequestLimitExceeded", "TooManyRequests", "BandwidthLimitExceeded", "ServiceUnavailable",
            "KMS.ThrottlingException",
        ),
    ),
    "archived": Kind(
        remedy="this is in an archive storage class; restore it first, then run again",
        responses=("InvalidObjectState",),  # a listing shows the class of a restored object too: only a read tells
    ),
    "withheld": Kind(
        remedy="the store does not give this for a reason of its own; mend what it says, then run again",
        # besides all responses that stand nowhere here: see `code_of_response`
        responses=(
            "AccountProblem", "UserProjectAccountProblem", "AllAccessDisabled", "InvalidPayer", "NotSignedUp",
            "OptInRequired", "UserSuspended", "RequestTimeTooSkewed", "QuotaExceeded", "InsufficientStorage", "507",
            "XMinioStorageFull",
        ),
    ),
    "forbidden": Kind(
        remedy="access is refused; check the permissions",
        s3_remedy=", AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and AWS_ENDPOINT_URL; a public "
        "bucket may need AWS_NO_SIGN_REQUEST=true, one whose requester pays AWS_REQUEST_PAYER=requester",
        responses=(
            "401", "403", "AccessDenied", "ExpiredToken", "ExpiredTokenException", "InvalidToken",
            "TokenRefreshRequired", "AuthorizationHeaderMalformed",
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
        responses=(
            "408", "RequestTimeout", "RequestTimeoutException", "RequestAbortedException", "IncompleteBody",
            "OperationAborted", "ConditionalRequestConflict", "InternalError", "InternalFailure",
            # damaged on the way
            "BadDigest", "CrcMismatch", "XAmzContentSHA256Mismatch",
            "KMS.KeyUnavailableException", "KMS.DependencyTimeoutException", "KMS.KMSInternalException",
        ),
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
    "failed": Kind(
        remedy="this could not be read or written",
        # what the object or the request itself is to blame for, so that another run gets the same
        responses=(
            "405", "411", "412", "413", "414", "416", "501", "InvalidRequest", "InvalidRange", "InvalidURI",
            "InvalidBucketName", "InvalidStorageClass", "KeyTooLong", "KeyTooLongError", "EntityTooLarge",
            "EntityTooSmall", "MetadataTooLarge", "MalformedXML", "MethodNotAllowed", "NotImplemented",
            "PreconditionFailed",
        ),
    ),
}  # fmt: skip
UNREACHABLE_CODES: Final = frozenset(code for code, kind in KINDS.items() if kind.unreachable)
"""Codes of a store that answers nothing, or nobody for now: it is worth waiting for."""


class StorageError(UserError):
    """A path or object that could not be read, listed or written: one line that names it and the remedy.

    `code` is one of KINDS (not_found, forbidden, withheld and so on); `uri` is the path or object; `retryable` is true
    if the same request may succeed later (throttled, unavailable). A job that ends with it exits with 1 then, so that
    whatever supervises the job starts it again, and else with 2.
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
    """Return our code for an S3 error code and the HTTP status that came with it; 0: none did.

    What is not known is a condition of the store, which may end: taken for one of the object, it would settle it for
    good. The S3 code counts first, since some stores send one with the status of another kind.
    """
    for response in (s3_code, str(status)):
        if found := next((code for code, kind in KINDS.items() if response in kind.responses), None):
            return found
    return "unavailable" if status >= 500 else "withheld" if status else "failed"


def check_file(uri: str, size: int, max_bytes: int | None, etag: str = "", expected_etag: str = "") -> None:
    """Raise StorageError if a file is not what the caller asked for.

    That is changed if `etag` is not the `expected_etag` (empty: any is fine), or too_large if `size` is above
    `max_bytes` (None: no limit).
    """
    if expected_etag and etag != expected_etag:
        raise StorageError("changed", uri, f"its etag is {etag or 'missing'}, it was listed with {expected_etag}")
    if max_bytes is not None and size > max_bytes:
        raise StorageError("too_large", uri, f"{size} bytes, more than {max_bytes}")
