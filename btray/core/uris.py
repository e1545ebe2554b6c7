"""What a URI is: an absolute local path, or `s3://bucket/key`, both taken literally."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from btray.core.errors import UserError


def resolve(uri: str | Path) -> str:
    """Return an absolute local path or s3:// URI, without a trailing slash.

    Raises:
        UserError: the URI is empty, names no bucket, or has a scheme other than s3.
    """
    text = str(uri)
    if not text or "\0" in text:
        raise UserError(f"{text!r} is not a path: give a local path or s3://bucket/key.")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme is None:
        return os.path.abspath(os.path.expanduser(text))
    if scheme[1] != "s3":
        raise UserError(f"{text}: {scheme[1]}:// is not supported; give a local path or s3://bucket/key.")
    if text.startswith("s3:///") or text == "s3://":
        raise UserError(f"{text} names no bucket: write s3://bucket/key.")
    return text.rstrip("/")


def resolved(*, unless: str = "(?!)") -> AfterValidator:
    """Return what makes a setting the URI that it stands for in this folder, but for values that `unless` matches.

    Configs travel to processes that run in other folders, where a relative path would be another one.
    """

    def validate(value: str) -> str:
        if re.match(unless, value, re.IGNORECASE):
            return value
        try:
            return resolve(value)
        except UserError as error:
            raise ValueError(str(error)) from error

    return AfterValidator(validate)


Uri = Annotated[str, resolved()]
"""A setting that is a URI, resolved when the config is read."""


def _tracking_uri(value: str) -> str:
    """Resolve a tracking URI of MLflow that is a folder, or a SQLite file, so that workers log to the same one."""
    if value.startswith("sqlite:///"):
        return "sqlite:///" + resolve(value.removeprefix("sqlite:///"))
    return value if ":" in value or value == "databricks" else resolve(value)


TrackingUri = Annotated[str, AfterValidator(_tracking_uri)]
"""A setting that is a tracking URI of MLflow."""
