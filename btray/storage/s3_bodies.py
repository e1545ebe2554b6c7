"""Bodies of whole objects for a fifth of the CPU time that botocore takes; use `btray.storage` instead.

obstore (Rust's object_store) asks and carries; endpoint, region and credentials are what botocore finds. It answers
the good case only: whatever goes wrong gives None, and the request through botocore says what it is and tries again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import botocore.exceptions  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

# Keys that object_store would write otherwise, or not at all: empty, `.` and `..` parts, control characters.
_REWRITTEN = re.compile(r"(^|/)\.{0,2}(/|$)|[\x00-\x1f\x7f]")
_CREDENTIALS_HOLD = timedelta(minutes=1)  # botocore, asked again, renews those that run out


def fetch(bucket: str, key: str, check: Callable[[int, str], None]) -> bytes | None:
    """The object's bytes; None where they could not be had this way.

    `check` is given size and entity tag (without quotes) before the body is fetched, and may raise.
    """
    if _REWRITTEN.search(key) or _first_user() != os.getpid():
        return None
    store = _store(bucket)
    if store is None:
        return None
    try:
        answer = obstore.get(store, key)
    except (BaseError, OSError, ValueError):
        return None
    check(answer.meta["size"], plain(answer.meta["e_tag"]))
    try:
        return answer.bytes().to_bytes()
    except (BaseError, OSError):
        return None


def plain(etag: str | None) -> str:
    """An entity tag as listings give it, without quotes and without the mark of proxies that compress."""
    return (etag or "").removeprefix("W/").strip('"')


def forget() -> None:
    """Find endpoint and credentials anew for what is asked for next."""
    _store.cache_clear()


@cache
def _first_user() -> int:
    """The process that obstore's threads belong to: one forked from it has none."""
    return os.getpid()


@cache
def _store(bucket: str) -> S3Store | None:
    """A client for one bucket; None where botocore finds no credentials."""
    session = botocore.session.get_session()
    try:
        credentials = session.get_credentials()
        if credentials is None:
            return None
        client = session.create_client("s3")
        signed = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"})
    except botocore.exceptions.BotoCoreError:
        return None
    where = signed.partition("?")[0].removesuffix("/k")
    by_path = where.endswith(f"/{bucket}")

    def current() -> Any:
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_HOLD,
        }

    return S3Store(
        bucket,
        endpoint=where.removesuffix(f"/{bucket}") if by_path else where,
        region=client.meta.region_name,
        virtual_hosted_style_request=not by_path,
        credential_provider=current,
        client_options={"allow_http": True, "connect_timeout": "3s", "read_timeout": "20s", "timeout": "10min"},
        retry_config={"max_retries": 0},
    )
