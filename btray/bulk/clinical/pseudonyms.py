"""Pseudonyms: with `--pseudonymize` no UID and no name or place of an object is written as it is.

All of it is replaced while the archive is listed, so that worklist, table, pages and logs never see it. A pseudonym is
an HMAC (RFC 2104) with the user's key: equal names get equal ones, so increments work, and only who has the key can
tell which name it was. Where the bytes are is needed by the actors and stands in the worklist, encrypted.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from btray import storage
from btray.core.errors import UserError
from btray.data.slice_facts import UIDS
from btray.storage import FileInfo, StorageError

CHECK = "_pseudonyms.json"
"""The file, below the root of a table, of what a key must give for a fixed text."""
_RUNS = "_runs"
_LEAST_KEY = 32  # bytes
_TAG = 16  # bytes
_UID = re.compile(r"[0-2](\.(0|[1-9]\d*))+")


class Pseudonyms:
    """The pseudonyms of one key."""

    def __init__(self, key: bytes) -> None:
        """Use a key of at least 32 bytes."""
        self._key = key
        self._cipher_key = self._digest("btray place")

    def __repr__(self) -> str:
        return "Pseudonyms(...)"  # Ray may log what it sends

    @classmethod
    def from_file(cls, path: str) -> Self:
        """Read the key, all bytes of a file. Raises UserError if others can read it or it is too short."""
        try:
            mode, key = stat.S_IMODE(Path(path).stat().st_mode), Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"--pseudonymize {path}: {error.strerror}; name a file with a key") from error
        if mode & 0o077:
            raise UserError(f"--pseudonymize {path}: others may use this file (mode {mode:o}); run chmod 600 on it")
        if len(key) < _LEAST_KEY:
            raise UserError(
                f"--pseudonymize {path} has {len(key)} bytes; a key needs {_LEAST_KEY}: head -c 32 /dev/urandom > FILE"
            )
        return cls(key)

    def name(self, text: str) -> str:
        """Return the pseudonym of a URI."""
        return f"hmac:{self._digest(text).hex()}"

    def uid(self, uid: str) -> str:
        """Return the pseudonym of a UID: a UID derived from a UUID, as PS3.5 B.2 has it, of 128 bits of the HMAC."""
        return f"2.25.{int.from_bytes(self._digest(uid)[:16])}"

    def conceal(self, info: FileInfo) -> FileInfo:
        """Return an object under its pseudonym; `reveal` gives it back."""
        etag = self.name(info.etag) if len(info.etag) <= 64 and _UID.fullmatch(info.etag) else info.etag
        place = self._encrypt(json.dumps([info.place or info.uri, info.etag]).encode())
        return replace(info, uri=self.name(info.uri), etag=etag, place=place)

    @contextmanager
    def listing_errors(self) -> Iterator[None]:
        """Let the errors of listing an archive, in this block, name and quote no object."""
        try:
            yield
        except StorageError as error:
            raise StorageError(error.code, self.name(error.uri)) from None
        except UserError:
            remedy = "to see why, which may name a patient, run --dry-run with another --output and no --pseudonymize"
            raise UserError(f"--input cannot be used; {remedy}") from None

    def reveal(self, info: FileInfo) -> FileInfo:
        """Return an object of `conceal` by the URI that its bytes are read from, with its own etag."""
        uri, etag = json.loads(self._decrypt(info.place))
        return replace(info, uri=uri, etag=etag, place="")

    def place(self, sealed: str) -> str:
        """Return the URI that the bytes of an object of `conceal` are read from, by its `place`."""
        uri, _ = json.loads(self._decrypt(sealed))
        return str(uri)

    def conceal_error(self, error: StorageError, info: FileInfo) -> StorageError:
        """Return an error of reading under the pseudonym of the object; what the store says may name it."""
        return StorageError(error.code, info.uri)

    def conceal_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row of the results table with pseudonyms for its UIDs."""
        return dict(row) | {name: self.uid(row[name]) for name in UIDS if row[name]}

    def check_value(self) -> str:
        """Return what tells this key from others and does not tell the key."""
        return self._digest("btray check").hex()

    def _digest(self, text: str) -> bytes:
        return hmac.digest(self._key, text.encode("utf-8", "surrogateescape"), "sha256")

    def _encrypt(self, text: bytes) -> str:
        """Encrypt with a tag of the text as the nonce, as SIV does (RFC 5297): equal texts look equal, no more."""
        tag = hmac.digest(self._cipher_key, text, "sha256")[:_TAG]
        return "sealed:" + base64.urlsafe_b64encode(tag + self._with_keystream(tag, text)).decode()

    def _decrypt(self, sealed: str) -> bytes:
        data = base64.urlsafe_b64decode(sealed.removeprefix("sealed:"))
        text = self._with_keystream(data[:_TAG], data[_TAG:])
        if not hmac.compare_digest(hmac.digest(self._cipher_key, text, "sha256")[:_TAG], data[:_TAG]):
            raise UserError("the worklist was written with another key than that of --pseudonymize")
        return text

    def _with_keystream(self, nonce: bytes, text: bytes) -> bytes:
        keystream = hashlib.shake_256(self._cipher_key + nonce).digest(len(text))
        return (np.frombuffer(text, np.uint8) ^ np.frombuffer(keystream, np.uint8)).tobytes()


def check_table(output: str, pseudonyms: Pseudonyms | None) -> None:
    """Raise UserError unless all of the table at `output` was written with this key, or all without one."""
    kept = storage.read_json(storage.join(output, CHECK), missing_ok=True)
    if kept is None and pseudonyms and storage.list_names(storage.join(output, _RUNS), missing_ok=True):
        raise UserError(f"{output} was written without --pseudonymize, and names its scans; choose another --output")
    if kept is not None and pseudonyms is None:
        raise UserError(f"{output} was written with --pseudonymize; give the same key, or choose another --output")
    if kept is not None and pseudonyms and not hmac.compare_digest(kept["check"], pseudonyms.check_value()):
        raise UserError(f"{output} was written with another key than that of --pseudonymize; give that one")


def claim_table(output: str, pseudonyms: Pseudonyms | None) -> None:
    """Check the table as `check_table` does, and keep what later keys are compared with. Needs the lease."""
    check_table(output, pseudonyms)
    if pseudonyms and not storage.exists(storage.join(output, CHECK)):
        storage.write_json(storage.join(output, CHECK), {"check": pseudonyms.check_value()})
