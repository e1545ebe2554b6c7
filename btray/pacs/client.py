"""A DICOMweb client: QIDO-RS, WADO-RS and STOW-RS of PS3.18, with patience for a PACS that is away or busy.

What is sent in a query is UIDs, dates and modality, without percent-encoding: Debian's Orthanc, for one, decodes none.
An answer of several instances that was cut short is noticed (`multipart`), and what is missing is asked for again.
Proxies and ~/.netrc of the environment are not used: scans go to the PACS and to nobody else. Nothing is logged.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from requests.auth import HTTPBasicAuth

from btray.data.scans.dicom_header import instance_uid
from btray.pacs.address import Address, InstanceUrl, Metadata, first_of, values_of
from btray.pacs.config import PacsConfig
from btray.pacs.multipart import CutShort, Part, boundary_of, read_parts, write_parts
from btray.storage import StorageError, suppress_missing
from btray.storage.errors import code_of_response
from btray.storage.read_many import ReadResult, until_dead
from btray.storage.retry import DEFAULT_TIMEOUT, backoff_delays

Result = TypeVar("Result")

STUDY, SERIES, INSTANCE, SOP_CLASS = "0020000D", "0020000E", "00080018", "00080016"
"""Tags of the UIDs in answers to queries."""

AT_A_TIME: Final = 4
"""Requests that one client makes at a time: a PACS has other users."""
_PAGE: Final = 200  # results of a query
_TIMEOUT: Final = (10, 60)  # seconds to connect, and between two pieces of an answer
_CHUNK: Final = 256 << 10  # bytes
_AGAIN: Final = 3  # times that a request is made which the PACS fails at, though it answers others
_LONGEST_WAIT: Final = 30.0  # seconds that a Retry-After is obeyed
_JSON: Final = "application/dicom+json"
_AS_STORED: Final = 'multipart/related; type="application/dicom"; transfer-syntax=*'
_COUNT: Final = "00201209"  # NumberOfSeriesRelatedInstances
_SOP_INSTANCE: Final = "00081155"  # as an answer to STOW-RS refers to it
_INCLUDED: Final[dict[str, tuple[str, ...]]] = {
    "study": (),
    "series": ("00080021", "00080070", "00180015", "00181030"),
    "instance": (),
}
"""What is asked for by level, besides what every server tells: date, manufacturer, body part and protocol."""
_UID: Final = re.compile(r"[0-9.]{1,64}")
_NO_CONTENT: Final = 204
_GOOD: Final = (200, 202, _NO_CONTENT, 206)
_NOT_ALL: Final = 409  # of STOW-RS: some or all instances were refused, and the answer says which
_BUSY: Final = (408, 429, 502, 503, 504)
_BROKEN: Final = (OSError, urllib3.exceptions.HTTPError, CutShort)  # requests' errors are OSErrors


@dataclass(frozen=True)
class Stored:
    """What a PACS says of instances that it was sent."""

    stored: frozenset[str] = frozenset()
    """SOP Instance UIDs that it holds now; also one that it held before, with whatever content."""
    failed: Mapping[str, int] = field(default_factory=dict)
    """SOP Instance UID -> failure reason (PS3.18 table I.2-2) of those that it refused."""


class _Attempt(Exception):
    """A request that brought nothing: why, the seconds that the PACS wants to be left alone, and whether it answers."""

    def __init__(self, error: StorageError, wait: float = 0.0, *, answers: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.wait, self.answers = error, wait, answers


class DicomWeb:
    """A service. Safe in threads, which together make at most AT_A_TIME requests at a time.

    Every method raises StorageError: forbidden, not_found and so on; unavailable or throttled once the PACS has not
    answered for `patience` seconds.
    """

    def __init__(
        self, root: str, access: PacsConfig, *, patience: float = DEFAULT_TIMEOUT, max_bytes: int = 1 << 30
    ) -> None:
        """Use the service at the URL `root` with the credentials of `access`; connect when it is first asked.

        No instance above `max_bytes` is held in memory.
        """
        self.root = root
        self._patience, self._max_bytes = patience, max_bytes
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.mount(root, HTTPAdapter(1, AT_A_TIME, pool_block=True))
        self._session.headers["Accept-Encoding"] = "identity"
        self._session.verify = access.pacs_ca or True
        if access.pacs_cert:
            self._session.cert = (access.pacs_cert, access.pacs_key or access.pacs_cert)
        if access.pacs_user and access.pacs_password:
            user, password = access.pacs_user.get_secret_value(), access.pacs_password.get_secret_value()
            self._session.auth = HTTPBasicAuth(user.encode(), password.encode())
        elif access.pacs_token:
            self._session.headers["Authorization"] = f"Bearer {access.pacs_token.get_secret_value()}"

    # ---- QIDO-RS

    def studies(self, address: Address | None = None) -> Iterator[Metadata]:
        """Yield the studies that the query of `address` chooses, all if it is None, page by page."""
        return self._query("studies", "study", STUDY, address)

    def series(self, study: str, address: Address | None = None) -> Iterator[Metadata]:
        """Yield the series of a study, those that the query chooses, with their Manufacturer if the PACS tells it."""
        return self._query(f"studies/{study}/series", "series", SERIES, address)

    def instances(self, study: str, series: str) -> Iterator[Metadata]:
        """Yield the instances of a series."""
        return self._query(f"studies/{study}/series/{series}/instances", "instance", INSTANCE)

    def count(self, study: str, series: str) -> int:
        """Return how many instances the PACS says that a series has; 0 if it does not say, and without patience."""
        path = f"studies/{study}/series?SeriesInstanceUID={series}&includefield={_COUNT}"
        try:
            return max((int(first_of(found, _COUNT) or 0) for found in self._parsed("GET", path) or ()), default=0)
        except (*_BROKEN, _Attempt, ValueError):
            return 0

    def _query(self, path: str, level: str, uid_tag: str, address: Address | None = None) -> Iterator[Metadata]:
        """Yield answers until a page is empty; each has a valid UID, and comes once. Of what is gone there are none."""
        terms = [
            *(address.sent(level).items() if address else ()),
            *(("includefield", tag) for tag in _INCLUDED[level]),
        ]
        seen: set[str] = set()
        offset = 0
        while True:
            # not by `params`, which would encode what some servers do not decode
            query = "&".join(f"{name}={value}" for name, value in (*terms, ("limit", _PAGE), ("offset", offset)))
            page = None
            with suppress_missing() if level != "study" else nullcontext():  # removed since it was found
                page = self._json("GET", path, query)
            if not page:
                return
            if not isinstance(page, list):
                raise StorageError("failed", f"{self.root}/{path}", "the PACS answers a query with no list")
            offset += len(page)
            new = {first_of(found, uid_tag): found for found in page}
            if not all(map(_UID.fullmatch, new)):
                raise StorageError("failed", f"{self.root}/{path}", "the PACS answers a query without UIDs")
            if seen.issuperset(new):
                raise StorageError("failed", f"{self.root}/{path}", "the PACS gives the same page again and again")
            yield from (
                found
                for uid, found in new.items()
                if uid not in seen and (address is None or address.matches(level, found))
            )
            seen.update(new)

    def _json(self, method: str, path: str, query: str = "", **request: Any) -> Any:
        """Return an answer in JSON; None if there is nothing to tell."""
        return self._patiently(path, lambda: self._parsed(method, f"{path}?{query}" if query else path, **request))

    def _parsed(self, method: str, path: str, **request: Any) -> Any:
        """Return one answer. Raises _Attempt, one of _BROKEN or ValueError."""
        with self._open(method, path, _JSON, **request) as response:
            # a body that is empty though there should be one was cut
            return None if response.status_code == _NO_CONTENT else response.json()

    # ---- WADO-RS

    def metadata(self, study: str, series: str, instance: str = "") -> list[Metadata]:
        """Return the headers of the instances of a series, or of one of them, without pixels."""
        path = f"studies/{study}/series/{series}" + (f"/instances/{instance}" if instance else "")
        return self._json("GET", f"{path}/metadata") or []

    def retrieve_series(self, study: str, series: str, wanted: Sequence[str]) -> Iterator[tuple[str, ReadResult]]:
        """Yield each of the `wanted` SOP Instance UIDs once, in any order, with the file as stored or the reason.

        The series is asked for as a whole, and again as long as answers are cut short and most of it is missing; then
        instances are, one by one.
        """
        path = f"studies/{study}/series/{series}"
        missing = dict.fromkeys(wanted)
        delays, answers = backoff_delays(self._patience), 0
        while missing and 2 * len(missing) >= len(wanted):
            before = len(missing)
            try:
                with closing(self._parts(path)) as parts:
                    for part in parts:
                        uid = instance_uid(part.body)
                        if uid in missing:
                            del missing[uid]
                            yield uid, self._whole(part, str(InstanceUrl(self.root, study, series, uid)))
                        if not missing:
                            return
                break  # what is missing may have come after the query
            except (*_BROKEN, _Attempt) as error:
                attempt = self._failed(path, error)
            if len(missing) < before:
                delays, answers = backoff_delays(self._patience), 0
            answers += attempt.answers
            delay = next(delays, None) if attempt.error.retryable and answers < _AGAIN else None
            if delay is None and attempt.error.retryable and not answers:
                failed = attempt.error
                urls = (str(InstanceUrl(self.root, study, series, uid)) for uid in missing)
                yield from zip(missing, (StorageError(failed.code, url, failed.detail) for url in urls), strict=True)
                return
            if delay is None:
                break  # each instance gets an error of its own, or is there after all
            time.sleep(max(delay, attempt.wait))
        yield from self.retrieve_instances(study, series, list(missing))

    def retrieve_instances(self, study: str, series: str, wanted: Sequence[str]) -> Iterator[tuple[str, ReadResult]]:
        """Yield each of the `wanted` SOP Instance UIDs, in their order, with the file as stored or the reason."""
        if not wanted:
            return
        read = until_dead(lambda _, uid: self.retrieve_instance(study, series, uid))
        with ThreadPoolExecutor(min(AT_A_TIME, len(wanted))) as pool:
            for start in range(0, len(wanted), AT_A_TIME):
                some = wanted[start : start + AT_A_TIME]
                uris = [str(InstanceUrl(self.root, study, series, uid)) for uid in some]
                yield from zip(some, pool.map(read, uris, some), strict=True)

    def retrieve_instance(self, study: str, series: str, instance: str) -> bytes:
        """Return the file of an instance, as stored."""
        path = str(InstanceUrl(self.root, study, series, instance)).removeprefix(self.root + "/")

        def attempt() -> bytes | StorageError:
            with closing(self._parts(path)) as parts:
                found = [self._whole(part, f"{self.root}/{path}") for part in parts]
            if len(found) != 1:
                raise CutShort(f"{len(found)} parts in place of one")
            return found[0]

        result = self._patiently(path, attempt)
        if isinstance(result, StorageError):
            raise result
        return result

    def _parts(self, path: str) -> Generator[Part]:
        """Yield the parts of one answer. Raises _Attempt or one of _BROKEN."""
        with self._open("GET", path, _AS_STORED, stream=True) as response:
            boundary = boundary_of(response.headers.get("Content-Type", ""))
            if boundary is None:
                raise CutShort("an answer that is not in parts")
            chunks = response.raw.stream(_CHUNK, decode_content=True)
            yield from read_parts(chunks, boundary, max_bytes=self._max_bytes)

    def _whole(self, part: Part, uri: str) -> ReadResult:
        if part.size > self._max_bytes:
            return StorageError("too_large", uri, f"{part.size} bytes, more than {self._max_bytes}")
        return part.body

    # ---- STOW-RS

    def store(self, instances: Sequence[bytes], study: str = "") -> Stored:
        """Send files to the PACS, of any studies or of one."""
        boundary = secrets.token_hex(16)
        answer = self._json(
            "POST",
            f"studies/{study}" if study else "studies",
            data=write_parts(instances, boundary.encode(), "application/dicom"),
            headers={"Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}'},
        )
        stored = (first_of(item, _SOP_INSTANCE) for item in values_of(answer or {}, "00081199"))
        refused = values_of(answer or {}, "00081198")
        failed = {first_of(item, _SOP_INSTANCE): int(first_of(item, "00081197") or 0x0110) for item in refused}
        return Stored(frozenset(stored), failed)

    # ---- one request

    def answers(self) -> bool:
        """Return whether the PACS answers now, with whatever status but those of one that is busy: no waiting."""
        try:
            self._open("GET", "studies?limit=1", _JSON).close()
        except _Attempt as attempt:
            return attempt.answers
        except _BROKEN:
            return False
        return True

    def _patiently(self, path: str, attempt: Callable[[], Result]) -> Result:
        """Return what `attempt` gives, made again while the PACS is away or busy. Raises StorageError."""
        delays, answers = backoff_delays(self._patience), 0
        while True:
            try:
                return attempt()
            except (*_BROKEN, _Attempt, ValueError) as error:
                failed = self._failed(path, error)
            answers += failed.answers
            delay = next(delays, None) if failed.error.retryable and answers < _AGAIN else None
            if delay is None:
                raise failed.error
            time.sleep(max(delay, failed.wait))

    def _failed(self, path: str, error: Exception) -> _Attempt:
        """Return why an attempt failed."""
        if isinstance(error, _Attempt):
            return error
        uri = f"{self.root}/{path}"
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            detail = (
                "its certificate is of no known authority, or of another machine; name the authority, BTRAY_PACS_CA"
            )
            return _Attempt(StorageError("withheld", uri, detail))
        return _Attempt(StorageError("unavailable", uri, _reason(error)))

    def _open(self, method: str, path: str, accept: str, **request: Any) -> requests.Response:
        """Send a request. Raises _Attempt if the answer is none of success, or one of _BROKEN."""
        headers = {"Accept": accept} | request.pop("headers", {})
        response = self._session.request(
            method, f"{self.root}/{path}", headers=headers, timeout=_TIMEOUT, allow_redirects=False, **request
        )
        status = response.status_code
        if status in _GOOD or (method == "POST" and status == _NOT_ALL):
            return response
        response.close()
        uri = f"{self.root}/{path.partition('?')[0]}"
        detail = f"HTTP {status} {response.reason}"
        if status in (401, 403):
            detail += "; BTRAY_PACS_USER and BTRAY_PACS_PASSWORD, BTRAY_PACS_TOKEN or BTRAY_PACS_CERT say who asks"
        wait = response.headers.get("Retry-After", "")
        raise _Attempt(
            StorageError(code_of_response(str(status), status), uri, detail),
            min(float(wait), _LONGEST_WAIT) if wait.isdecimal() else 0.0,
            answers=status not in _BUSY,
        )


def _reason(error: BaseException) -> str:
    """Return what lies under an error of requests, whose own text quotes the whole URL."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return getattr(error, "strerror", None) or (str(error) if isinstance(error, CutShort) else type(error).__name__)
