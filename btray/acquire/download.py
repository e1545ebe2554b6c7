"""Download one file over HTTP(S): resumed where it broke off, verified, kept in a cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import requests
import urllib3.exceptions

from btray.core.console import ProgressLine
from btray.core.errors import UserError
from btray.storage.retry import backoff_delays

_log = logging.getLogger(__name__)
_CHUNK = 1 << 16  # bytes; small, since what a broken connection had in a chunk is lost
_TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of the body
_RETRYABLE_STATUS = {408, 425, 429, 500, 502, 503, 504}
_BROKEN = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    urllib3.exceptions.HTTPError,
)
_SECRET_KEYS = re.compile(r"sig|token|secret|password|credential|key|auth", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How long a download is tried."""

    attempts: int = 6
    """Requests in a row that bring nothing new before the download fails."""
    first_wait: float = 1.0
    """Seconds before the second request; doubled each time, with jitter."""
    longest_wait: float = 60.0
    """Seconds; also the most that a server's Retry-After is obeyed."""


@dataclass(frozen=True, kw_only=True)
class _Version:
    """Which version of the file is in the cache, as its server names it."""

    etag: str | None = None
    modified: str | None = None
    size: int | None = None

    @property
    def validator(self) -> str | None:
        """For If-Range, which accepts no weak ETag (RFC 9110, 13.1.5)."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified


class _IncompleteError(Exception):
    """The request brought too little; `wait` is what the server asked for, in seconds."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


def download(url: str, folder: Path, *, sha256: str | None = None, retries: Retries | None = None) -> Path:
    """Download `url` into `folder` and return the file; what `folder` holds of it already is not fetched again.

    A whole file is fetched again only if its SHA-256 is not `sha256` or, without one, if the server has another
    version. A part is resumed if the server confirms (If-Range) that it still has the same version.

    Raises:
        UserError: the address gives no file, the server stays down or never sends what it announces, the SHA-256 is
            not `sha256` (the file is removed), or another process downloads the same file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    basename = re.sub(r"[^A-Za-z0-9._-]+", "-", unquote(urlsplit(url).path.rsplit("/", 1)[-1]))[-80:]
    # the digest of the address too: several sources may call their files data.zip
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{basename or 'file'}"
    # the kernel frees this lock when its process ends, however it ends
    with path.with_name(path.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            shown = without_secrets(url)
            raise UserError(f"{shown} is being downloaded by another process; wait, or give another --cache") from error
        # what is whole and has the wanted digest needs no server at all
        if sha256 and path.exists():
            if digest(path) == sha256:
                return path
            path.unlink()
        _Fetch(url, path, retries or Retries()).run()
        if sha256 and (actual := digest(path)) != sha256:
            path.unlink()
            raise UserError(f"{without_secrets(url)} has the SHA-256 {actual}, expected {sha256}; the file was removed")
    return path


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_secrets(url: str) -> str:
    """Return `url` as it may be shown and recorded: without password, signature or token of a presigned address."""
    if not url.lower().startswith(("http://", "https://")):
        return url
    parts = urlsplit(url)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    if any(_SECRET_KEYS.search(key) for key, _ in pairs):
        query = urlencode([(key, "REDACTED" if _SECRET_KEYS.search(key) else value) for key, value in pairs])
        parts = parts._replace(query=query)
    return urlunsplit(parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1]))


class _Fetch:
    """A file being downloaded: `<path>.part` is what came so far, `<path>.json` says of which version."""

    def __init__(self, url: str, path: Path, retries: Retries) -> None:
        self._url, self._path, self._retries = url, path, retries
        self._shown, self._name = without_secrets(url), path.name[17:]
        self._part = path.with_name(path.name + ".part")
        self._note = path.with_name(path.name + ".json")
        self._session, self._progress = requests.Session(), ProgressLine(keep=False)
        try:
            self._version = _Version(**json.loads(self._note.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self._version = _Version()  # nothing came yet, or a kill cut the note short: start over

    def run(self) -> None:
        """Request until the file is whole; then, and only then, it stands at its path."""
        _log.info("downloading %s", self._shown)
        with self._session, self._progress:
            try:
                self._request_until_whole()
            except requests.exceptions.SSLError as error:
                raise UserError(f"{self._shown}: the server's certificate is refused: {_explain(error)}") from error
            except requests.RequestException as error:
                raise UserError(f"{self._shown} cannot be fetched: {_explain(error)}") from error

    def _request_until_whole(self) -> None:
        retries = self._retries
        new_delays = partial(backoff_delays, math.inf, first=retries.first_wait, longest=retries.longest_wait)
        most, failures, delays = self._have(), 0, new_delays()
        while True:
            try:
                self._request()
                return
            except requests.exceptions.SSLError:  # a kind of ConnectionError, but no accident of the network
                raise
            except (_IncompleteError, *_BROKEN) as error:
                failures += 1
                if self._have() > most:
                    most, failures, delays = self._have(), 0, new_delays()
                if failures >= self._retries.attempts:
                    raise UserError(
                        f"{self._shown}: gave up after {failures} requests that brought nothing new: "
                        f"{_explain(error)}; run again to continue from the {self._have()} bytes that came"
                    ) from error
                delay = min(max(next(delays), getattr(error, "wait", 0.0)), self._retries.longest_wait)
                _log.info("%s: %s; trying again in %.1f s", self._shown, _explain(error), delay)
                time.sleep(delay)

    def _request(self) -> None:
        have = self._have()
        if have and have == self._version.size:
            self._finish()
            return
        with self._session.get(self._url, headers=self._headers(have), stream=True, timeout=_TIMEOUT) as response:
            if self._url.lower().startswith("https:") and response.url.lower().startswith("http:"):
                raise UserError(f"{self._shown} leads to an unencrypted address; give that one if you trust it")
            if response.status_code == requests.codes.not_modified:
                return
            self._accept(response, have)
            announced = self._version.size
            total = f" of {announced / 1e6:.1f}" if announced is not None else ""
            with self._part.open("ab") as file:
                for chunk in response.raw.stream(_CHUNK, decode_content=False):
                    file.write(chunk)
                    self._progress.update(f"{self._name}: {file.tell() / 1e6:.1f}{total} MB")
        size = self._part.stat().st_size
        if announced is not None and size != announced:
            raise _IncompleteError(f"the server announced {announced} bytes and sent {size}")
        self._finish()

    def _headers(self, have: int) -> dict[str, str]:
        # The bytes as they are stored: a body compressed on its way has no lengths to resume by.
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": str(self._version.validator)}
        elif self._path.exists() and self._path.stat().st_size == self._version.size:
            if self._version.etag:
                headers["If-None-Match"] = self._version.etag
            elif self._version.modified:
                headers["If-Modified-Since"] = self._version.modified
        return headers

    def _accept(self, response: requests.Response, have: int) -> None:
        """Get `.part` ready for the body of `response`, or raise."""
        status = response.status_code
        if status == requests.codes.ok:
            self._path.unlink(missing_ok=True)  # of an older version, which the note below no longer describes
            self._part.write_bytes(b"")
            length = response.headers.get("Content-Length", "")
            self._version = _Version(
                etag=response.headers.get("ETag"),
                modified=response.headers.get("Last-Modified"),
                size=int(length) if length.isdigit() else None,
            )
            self._note.write_text(json.dumps(asdict(self._version)), encoding="utf-8")
        elif status == requests.codes.requested_range_not_satisfiable or (
            status == requests.codes.partial_content and have and not self._continues(response, have)
        ):
            self._part.write_bytes(b"")
            raise _IncompleteError("the server has another version now")
        elif status in _RETRYABLE_STATUS:
            wait = response.headers.get("Retry-After", "")
            raise _IncompleteError(
                f"the server answered {status} {response.reason}", float(wait) if wait.isdigit() else 0.0
            )
        elif not (status == requests.codes.partial_content and have):
            raise UserError(f"{self._shown}: the server answered {status} {response.reason}; check the address")

    def _continues(self, response: requests.Response, have: int) -> bool:
        """Return whether a partial response continues from byte `have` of the same version."""
        content_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if content_range is None or response.headers.get("ETag", self._version.etag) != self._version.etag:
            return False
        return int(content_range[1]) == have and content_range[2] in {"*", str(self._version.size)}

    def _finish(self) -> None:
        # before the rename: after a power cut the final name must not stand for a file that the disk has in part
        with self._part.open("ab") as file:
            os.fsync(file.fileno())
        self._part.replace(self._path)
        _log.info("downloaded %s: %.1f MB", self._shown, self._path.stat().st_size / 1e6)

    def _have(self) -> int:
        """Return how many bytes there are to resume from; none if the server named no version to compare with."""
        return self._part.stat().st_size if self._version.validator and self._part.exists() else 0


def _explain(error: Exception) -> str:
    """Return one line, without the query of an address, which may hold a signature."""
    return re.sub(r"\?[^\s')]*", "?...", " ".join(str(error).split())) or type(error).__name__
