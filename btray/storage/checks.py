"""Checks of the places that a config names, before hours of work and before anything heavy is imported."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import yaml

from btray.core.config import flatten
from btray.core.errors import UserError
from btray.storage.errors import StorageError
from btray.storage.files import exists, join, read_text
from btray.storage.retry import retry_timeout

_QUICK = 0.1  # seconds of asking a store: one that does not answer is the job's to wait for


def may_exist(uri: str) -> bool:
    """Return False if nothing is at `uri`; True also if the store cannot tell now."""
    with retry_timeout(_QUICK), suppress(StorageError):
        return exists(uri)
    return True


def require_input(uri: str, flag: str) -> None:
    """Raise UserError, naming `flag`, if nothing is at `uri`. A store that cannot tell now is left to the job."""
    if not may_exist(uri):
        raise UserError(f"{flag} {uri}: nothing is there; check the spelling")


def require_own(out: str, settings: dict[str, Any], *, result: str, record: str = "config.yaml") -> None:
    """Raise UserError if `out` holds what a command with other settings wrote.

    Args:
        out: the folder that is about to be written to.
        settings: those that decide the result, as they stand in `record`.
        result: the file by which a result is recognised.
        record: the file with the settings that it was made with.
    """
    if not exists(join(out, result)):
        return
    before = yaml.safe_load(read_text(join(out, record))) if exists(join(out, record)) else {}
    different = differing_setting(before, settings)
    if different:
        raise UserError(
            f"--out {out} holds the result of another run, with another {different}; give another --out, or "
            "--overwrite to replace it"
        )


def differing_setting(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return the dotted name of the first setting of `now` that differs from `before`; None if none does."""
    flat = flatten(before)
    return next((name for name, value in flatten(now).items() if flat.get(name) != value), None)
