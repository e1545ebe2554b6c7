"""A DICOMweb client: QIDO-RS, WADO-RS and STOW-RS of PS3.18, with patience for a PACS that is away or busy.

What is sent in a query is UIDs, dates and modality, without percent-encoding: Debian's Orthanc, for one, decodes none.
An answer of several instances that was cut short is noticed (`multipart`), and what is missing is asked for again.
Proxies and ~/.netrc of the environment are not used: scans go to the PACS and to nobody else. Nothing is logged.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter

from btray.data.scans.dicom_header import instance_uid
from btray.pacs.address import Address, InstanceUrl, Metadata, first_of, values_of
from btray.pacs.config import PacsConfig
from btray.pacs.multipart import CutShort, boundary_of, read_parts, write_parts
from btray.storage import StorageError
from btray.storage.errors import code_of_response
from btray.storage.retry import DEFAULT_TIMEOUT, backoff_delays

ReadResult = bytes | StorageError
"""What an instance holds, or why it could not be read."""

AT_A_TIME: Final = 4
"""Requests that one client makes at a time: a PACS has other users."""
_PAGE: Final = 200  # results of a query
_TIMEOUT: Final = (10, 60)  # seconds to connect, and between two pieces of an answer
_CHUNK: Final = 256 << 10  # bytes
_AGAIN: Final = 3  # times that a request is made which the PACS fails at, though it answers others
_LONGEST_WAIT: Final = 30.0  # seconds that a Retry-After is obeyed
_JSON: Final = "application/dicom+json"
_AS_STORED: Final = 'multipart/related; type="application/dicom"; transfer-syntax=*'
_BROKEN: Final = (requests.RequestException, urllib3.exceptions.HTTPError, CutShort)


@dataclass(frozen=True)
class Stored:
    """What a PACS says of instances that it was sent."""

    stored: frozenset[str] = frozenset()
    """SOP Instance UIDs that it holds now; also one that it held before, with whatever content."""
    failed: Mapping[str, int] = field(default_factory=dict)
    """SOP Instance UID -> failure reason (PS3.18 table I.2-2) of those that it refused."""


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

    def studies(self, address: Address | None = None) -> Iterator[Metadata]:
        """Yield the studies that the query of `address` chooses, all if it is None, page by page."""

    def series(self, study: str, address: Address | None = None) -> Iterator[Metadata]:
        """Yield the series of a study, those that the query chooses."""

    def instances(self, study: str, series: str) -> Iterator[Metadata]:
        """Yield the instances of a series."""

    def metadata(self, study: str, series: str, instance: str = "") -> list[Metadata]:
        """Return the headers of the instances of a series, or of one of them, without pixels."""

    def retrieve_series(self, study: str, series: str, wanted: Sequence[str]) -> Iterator[tuple[str, ReadResult]]:
        """Yield each of the `wanted` SOP Instance UIDs once, in any order, with the file as stored or the reason."""

    def retrieve_instance(self, study: str, series: str, instance: str) -> bytes:
        """Return the file of an instance, as stored."""

    def store(self, instances: Sequence[bytes], study: str = "") -> Stored:
        """Send files to the PACS, of any studies or of one."""
