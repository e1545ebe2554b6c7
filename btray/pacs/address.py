"""Where a PACS is, and which of its studies are meant: `dicomweb://HOST[:PORT]/ROOT?KEY=VALUE&...`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple, Self
from urllib.parse import quote, unquote, urlsplit

from btray.core.errors import UserError

Metadata = Mapping[str, Any]
"""Elements by their tag, eight hexadecimal digits, in DICOM's JSON (PS3.18 F)."""

SCHEME: Final = re.compile(r"dicomweb(\+http)?://", re.IGNORECASE)
_UID = r"[0-9.]{1,64}"
_INSTANCE: Final = re.compile(
    rf"(?P<root>https?://.+)/studies/(?P<study>{_UID})/series/(?P<series>{_UID})/instances/(?P<instance>{_UID})"
)


class Key(NamedTuple):
    """What studies and series may be chosen by."""

    level: str
    tag: str
    kind: str
    """Of its values, one of `_SENT`."""


_DATES: Final = r"\d{8}|\d{8}-(\d{8})?|-\d{8}"
_SENT: Final = {"uid": r"[0-9.]+(,[0-9.]+)*", "date": _DATES, "code": r"[A-Z0-9*?]+", "text": r"(?!)"}
"""Values that the PACS is asked for as well; no other leaves this machine. None has a `%` or a blank in it, which some
servers do not decode."""
KEYS: Final[dict[str, Key]] = {
    "StudyInstanceUID": Key("study", "0020000D", "uid"),
    "StudyDate": Key("study", "00080020", "date"),
    "ModalitiesInStudy": Key("study", "00080061", "code"),
    "StudyDescription": Key("study", "00081030", "text"),
    "SeriesInstanceUID": Key("series", "0020000E", "uid"),
    "SeriesDate": Key("series", "00080021", "date"),
    "Modality": Key("series", "00080060", "code"),
    "SeriesDescription": Key("series", "0008103E", "text"),
    "ProtocolName": Key("series", "00181030", "text"),
    "BodyPartExamined": Key("series", "00180015", "text"),
}
"""By the names that a query has."""


class InstanceUrl(NamedTuple):
    """The parts of an instance's URL, which is the `uri` of its rows."""

    root: str
    """URL of the service."""
    study: str
    series: str
    instance: str

    @classmethod
    def parse(cls, uri: str) -> Self | None:
        """Return the parts of `uri`; None if it is not that of an instance."""
        match = _INSTANCE.fullmatch(uri) if uri.startswith("http") else None
        return cls(**match.groupdict()) if match else None

    def __str__(self) -> str:
        return f"{self.root}/studies/{self.study}/series/{self.series}/instances/{self.instance}"


@dataclass(frozen=True)
class Address:
    """A service, and the query that chooses among its studies."""

    root: str
    """URL of the service, `https://` or `http://`, without a slash at its end."""
    query: tuple[tuple[str, str], ...] = ()
    """Names of KEYS and the values that are wanted."""

    @classmethod
    def parse(cls, uri: str, *, insecure: bool = False) -> Self:
        """Read a URI. `insecure` allows clear text to other machines than this.

        Raises UserError, which quotes no credentials, for anything else than `dicomweb://HOST[:PORT]/ROOT[?QUERY]` or
        `dicomweb+http://`.
        """
        scheme = SCHEME.match(uri)
        parts = urlsplit(uri)
        host = _host(uri)
        if scheme is None or not host:
            raise UserError(f"{_shown(uri)} names no PACS: write dicomweb://HOST/ROOT")
        if "@" in parts.netloc:
            raise UserError(
                f"{_shown(uri)}: credentials do not belong in a URI, which is written with the results; set "
                "BTRAY_PACS_USER and BTRAY_PACS_PASSWORD, or BTRAY_PACS_TOKEN"
            )
        if parts.fragment:
            raise UserError(f"{_shown(uri)}: leave out what follows #")
        if scheme[1] and not (insecure or _is_loopback(host)):
            raise UserError(
                f"{_shown(uri)}: dicomweb+http:// sends scans and password in clear text; write dicomweb://, or add "
                "--insecure"
            )
        root = f"{'http' if scheme[1] else 'https'}://{parts.netloc}{quote(unquote(parts.path), safe='/')}".rstrip("/")
        return cls(root, tuple(_term(part, uri) for part in parts.query.split("&") if part))

    def sent(self, level: str) -> dict[str, str]:
        """Return the terms of a `level` (study, series) that the PACS is asked for."""
        return {name: value for name, value in self.query if KEYS[name].level == level and _is_sent(KEYS[name], value)}

    def matches(self, level: str, found: Metadata) -> bool:
        """Return whether a study or series that was found fulfils all terms of its `level`.

        What the PACS was asked for counts as fulfilled if the answer does not tell.
        """
        terms = ((KEYS[name], value) for name, value in self.query)
        return all(_matches(key, value, values_of(found, key.tag)) for key, value in terms if key.level == level)


def series_of(uri: str) -> str:
    """Return what the URLs of a series' instances have in common; any other URI as it is."""
    return uri.rpartition("/instances/")[0] if uri.startswith("http") else uri


def values_of(found: Metadata, tag: str) -> list[Any]:
    """Return the values of an element, none if it is absent or empty."""
    element = found.get(tag)
    values = element.get("Value") if isinstance(element, Mapping) else None
    return [value for value in values if value is not None] if isinstance(values, list) else []


def first_of(found: Metadata, tag: str) -> str:
    """Return the first value of an element as text; empty if there is none."""
    return next((str(value).strip(" \0") for value in values_of(found, tag)), "")


def is_dicomweb(uri: str) -> bool:
    """Return whether `uri` begins as the address of a PACS does."""
    return SCHEME.match(uri) is not None


def _shown(uri: str) -> str:
    """Return what may be shown of a URI: not its query, and nothing before an @."""
    begin, _, rest = uri.partition("://")
    return f"{begin}://{re.split('[?#]', rest)[0].rpartition('@')[2]}"


def _host(uri: str) -> str | None:
    try:
        parts = urlsplit(uri)
        _ = parts.port  # raises if it is none
        return parts.hostname
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _term(text: str, uri: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if name not in KEYS:
        raise UserError(
            f"{_shown(uri)}: {name} chooses no studies here; a query, which is written with the results and names no "
            f"patient, has {', '.join(KEYS)}"
        )
    value = unquote(value).strip()
    if not value:
        raise UserError(f"{_shown(uri)}: {name} has no value; give one, or leave it out")
    if KEYS[name].kind == "date" and not re.fullmatch(_DATES, value):
        raise UserError(f"{_shown(uri)}: {name}={value} is not a date: YYYYMMDD, YYYYMMDD-, -YYYYMMDD or both ends")
    return name, value


def _is_sent(key: Key, value: str) -> bool:
    return re.fullmatch(_SENT[key.kind], value) is not None


def _matches(key: Key, wanted: str, values: Sequence[Any]) -> bool:
    if not values:
        return _is_sent(key, wanted)
    test = (_date_test if key.kind == "date" else _text_test)(wanted)
    return any(test(str(value).strip(" \0")) for value in values)


def _date_test(wanted: str) -> Callable[[str], bool]:
    first, dash, last = wanted.partition("-")
    return lambda value: (first or "0") <= value <= (last or "9" * 8 if dash else first)


def _text_test(wanted: str) -> Callable[[str], bool]:
    patterns = [part.strip().replace("[", "[[]").casefold() for part in wanted.split(",")]
    return lambda value: any(fnmatchcase(value.casefold(), pattern) for pattern in patterns)
