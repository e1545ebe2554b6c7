"""Download one file over HTTP(S): taken up where it broke off, verified, kept in a cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import requests
import urllib3.exceptions
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from btray.core.errors import UserError

_log = logging.getLogger(__name__)
_CHUNK = 1 << 16
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
    """How stubborn a download is."""

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

    A whole file is fetched again only where its SHA-256 is not `sha256` or, without one, where the server has
    another version. A part is taken up where the server confirms (If-Range) that it still has the same version.

    Raises `UserError` for an address that gives no file, a server that stays away or never sends what it announces,
    a SHA-256 other than `sha256` (the file is removed), and a download of the same file that runs elsewhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    basename = re.sub(r"[^A-Za-z0-9._-]+", "-", unquote(urlsplit(url).path.rsplit("/", 1)[-1]))[-80:]
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{basename or 'file'}"
    with _locked(path, url):
        if sha256 and path.exists():
            if digest(path) == sha256:
                return path
            path.unlink()
        with _Fetch(url, path, retries or Retries()) as fetch:
            fetch.run()
        if sha256 and (found := digest(path)) != sha256:
            path.unlink()
            raise UserError(f"{without_secrets(url)} has the SHA-256 {found}, expected {sha256}; the file was removed")
    return path


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_secrets(url: str) -> str:
    """`url` as it may be shown and recorded: no password, no signature or token of a presigned address."""
    if not url.lower().startswith(("http://", "https://")):
        return url
    parts = urlsplit(url)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    if any(_SECRET_KEYS.search(key) for key, _ in pairs):
        query = urlencode([(key, "REDACTED" if _SECRET_KEYS.search(key) else value) for key, value in pairs])
        parts = parts._replace(query=query)
    return urlunsplit(parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1]))


class _Fetch:
    """One file on its way: `<path>.part` is what came so far, `<path>.json` tells of which version."""

    def __init__(self, url: str, path: Path, retries: Retries) -> None:
        self._url, self._path, self._retries = url, path, retries
        self._shown = without_secrets(url)
        self._part = path.with_name(path.name + ".part")
        self._note = path.with_name(path.name + ".json")
        self._version = self._read_note()
        self._session = requests.Session()
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task: TaskID = self._progress.add_task(path.name[17:], total=self._version.size)

    def __enter__(self) -> _Fetch:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._session.close()

    def run(self) -> None:
        """Request until the file is whole; then, and only then, it stands at its path."""
        _log.info("downloading %s", self._shown)
        most, failures = self._have(), 0
        while True:
            try:
                self._request()
            except requests.exceptions.SSLError as error:
                raise UserError(f"{self._shown}: the server's certificate is refused: {_explain(error)}") from error
            except (_IncompleteError, *_BROKEN) as error:
                failures = 0 if self._have() > most else failures + 1
                most = max(most, self._have())
                self._wait(error, failures)
            except requests.RequestException as error:
                raise UserError(f"{self._shown} cannot be fetched: {_explain(error)}") from error
            else:
                return

    def _wait(self, error: Exception, failures: int) -> None:
        if failures >= self._retries.attempts:
            raise UserError(
                f"{self._shown}: gave up after {failures} requests that brought nothing new: {_explain(error)}; "
                f"run again to go on from the {self._have()} bytes that came"
            ) from error
        wait = self._retries.first_wait * 2**failures * random.uniform(0.5, 1)  # noqa: S311 - jitter, no secret
        wait = min(max(wait, getattr(error, "wait", 0.0)), self._retries.longest_wait)
        _log.info("%s: %s; trying again in %.1f s", self._shown, _explain(error), wait)
        time.sleep(wait)

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
            self._receive(response)
        size, announced = self._part.stat().st_size, self._version.size
        if announced is not None and size != announced:
            raise _IncompleteError(f"the server announced {announced} bytes and sent {size}")
        self._finish()

    def _headers(self, have: int) -> dict[str, str]:
        # The bytes are wanted as they are stored: a compressed body has no lengths to resume by.
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
            self._start_over()
            length = response.headers.get("Content-Length", "")
            self._version = _Version(
                etag=response.headers.get("ETag"),
                modified=response.headers.get("Last-Modified"),
                size=int(length) if length.isdigit() else None,
            )
            self._note.write_text(json.dumps(asdict(self._version)), encoding="utf-8")
        elif status == requests.codes.partial_content and have:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            same_etag = response.headers.get("ETag", self._version.etag) == self._version.etag
            if not (found and int(found[1]) == have and found[2] in {"*", str(self._version.size)} and same_etag):
                self._start_over()
                raise _IncompleteError("the server has another version now")
        elif status == requests.codes.requested_range_not_satisfiable:
            self._start_over()
            raise _IncompleteError("the server has another version now")
        elif status in _RETRYABLE_STATUS:
            wait = response.headers.get("Retry-After", "")
            raise _IncompleteError(
                f"the server answered {status} {response.reason}", float(wait) if wait.isdigit() else 0.0
            )
        else:
            raise UserError(f"{self._shown}: the server answered {status} {response.reason}; check the address")

    def _receive(self, response: requests.Response) -> None:
        self._progress.update(self._task, total=self._version.size, completed=self._have())
        with self._part.open("ab") as file:
            for chunk in response.raw.stream(_CHUNK, decode_content=False):
                file.write(chunk)
                self._progress.advance(self._task, len(chunk))

    def _finish(self) -> None:
        with self._part.open("ab") as file:
            os.fsync(file.fileno())
        self._part.replace(self._path)
        _log.info("downloaded %s: %.1f MB", self._shown, self._path.stat().st_size / 1e6)

    def _have(self) -> int:
        """Bytes that can be built on; none where the server named no version to compare with."""
        return self._part.stat().st_size if self._version.validator and self._part.exists() else 0

    def _start_over(self) -> None:
        self._part.write_bytes(b"")

    def _read_note(self) -> _Version:
        try:
            return _Version(**json.loads(self._note.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return _Version()  # nothing came yet, or the note was cut off: start over


@contextmanager
def _locked(path: Path, url: str) -> Iterator[None]:
    with path.with_name(path.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            shown = without_secrets(url)
            raise UserError(f"{shown} is being downloaded by another process; wait, or give another --cache") from error
        yield


def _explain(error: Exception) -> str:
    """One line, without the query of an address, which may hold a signature."""
    return re.sub(r"\?[^\s')]*", "?...", " ".join(str(error).split())) or type(error).__name__
