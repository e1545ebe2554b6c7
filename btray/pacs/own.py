"""How btray's own objects in a PACS are known: they are never input, and make no study look changed."""

from __future__ import annotations

from typing import Final

from btray.data.scans.dicom import WRITER
from btray.pacs.address import Metadata, first_of

MANUFACTURER: Final = WRITER
"""Manufacturer (0008,0070) of every object that btray writes."""
SERIES_DESCRIPTION: Final = "btray: research, no diagnosis"
"""What the description (0008,103E) of every series that btray writes begins with: all servers tell it of a series."""


def is_own(series: Metadata) -> bool:
    """Return whether btray wrote a series, by the answer to a query."""
    return first_of(series, "00080070") == MANUFACTURER or first_of(series, "0008103E").startswith(SERIES_DESCRIPTION)
