"""Every failure has one code, from one table, whoever raises it: the OS, S3 or what lies between."""

from __future__ import annotations

import errno
import os
import re

import botocore.exceptions  # type: ignore[import-untyped]
import pytest

from btray.storage import StorageError, storage_errors_for, suppress_missing
from btray.storage.errors import KINDS, as_storage_error, code_of_response
from tests.conftest import ROOT


@pytest.mark.parametrize("code", KINDS)
def test_what_the_table_says_of_a_code_leads_to_it(code: str) -> None:
    kind = KINDS[code]
    for number in kind.errnos:
        assert as_storage_error(OSError(number, os.strerror(number)), "/x").code == code
    for response in kind.responses:
        status = int(response) if response.isdigit() else 0
        assert code_of_response(response, status) == code
    assert StorageError(code, "/x").retryable == (code in ("throttled", "unavailable"))


def test_no_sign_stands_for_two_codes() -> None:
    for signs in ("errnos", "responses", "exceptions"):
        found = [sign for kind in KINDS.values() for sign in getattr(kind, signs)]
        assert len(found) == len(set(found)), signs


@pytest.mark.parametrize(
    ("s3_code", "status", "code"),
    [
        ("NoSuchKey", 404, "not_found"),
        ("SlowDown", 0, "throttled"),
        ("InternalError", 500, "unavailable"),
        ("AccessDenied", 403, "forbidden"),
        ("InvalidRequest", 400, "failed"),
        ("NotImplemented", 501, "failed"),
        ("KeyTooLongError", 400, "failed"),
        ("InvalidObjectState", 403, "archived"),
        ("KMS.DisabledException", 400, "withheld"),
        ("KMS.KMSInvalidStateException", 400, "withheld"),
        ("KMS.NotFoundException", 400, "withheld"),
        ("KMS.AccessDeniedException", 403, "forbidden"),
        ("KMS.ThrottlingException", 400, "throttled"),
        ("KMS.KeyUnavailableException", 400, "unavailable"),
        ("CloudKmsDisabledKey", 403, "forbidden"),  # Google's
        ("CloudKmsDisabledKey", 400, "withheld"),
        ("InvalidArgument", 400, "withheld"),  # Ceph's gateway if it cannot get the key of an object
        ("QuotaExceeded", 403, "withheld"),
        ("XMinioServerNotInitialized", 503, "throttled"),
        ("SlowDownRead", 503, "throttled"),
        ("XMinioStorageFull", 507, "withheld"),
        ("AccountProblem", 403, "withheld"),
        ("RequestTimeTooSkewed", 403, "withheld"),
        ("ExpiredToken", 400, "forbidden"),
        ("TokenRefreshRequired", 400, "forbidden"),
        ("OperationAborted", 409, "unavailable"),
        ("BadDigest", 400, "unavailable"),
        ("PermanentRedirect", 301, "withheld"),
        ("400", 400, "withheld"),  # of a HEAD
        ("AnythingNew", 418, "withheld"),
        ("Unheard", 0, "failed"),
    ],
)
def test_a_response_is_known_by_its_code_or_its_status(s3_code: str, status: int, code: str) -> None:
    response = {"Error": {"Code": s3_code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    server_error = botocore.exceptions.ClientError(response, "GetObject")
    wrapped = OSError(errno.EIO, "s3fs")  # s3fs raises what the server said so
    wrapped.__cause__ = server_error
    assert as_storage_error(server_error, "s3://b/k").code == code
    assert as_storage_error(wrapped, "s3://b/k").code == code
    assert s3_code in as_storage_error(wrapped, "s3://b/k").detail


def test_what_is_missing_is_suppressed_and_nothing_else() -> None:
    with suppress_missing(), storage_errors_for("/x"):
        raise FileNotFoundError("not there")
    with pytest.raises(StorageError, match="permissions"), suppress_missing(), storage_errors_for("/x"):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(KeyError), suppress_missing():
        raise KeyError("not storage's")


def test_one_module_makes_the_clients_of_object_storage() -> None:
    client = re.compile(
        r"^(import|from) (s3fs|obstore|botocore\.session|boto3|aiobotocore)|S3FileSystem\(", re.MULTILINE
    )
    found = [path for path in (ROOT / "btray").rglob("*.py") if client.search(path.read_text())]
    assert found == [ROOT / "btray" / "storage" / "s3_clients.py"]
