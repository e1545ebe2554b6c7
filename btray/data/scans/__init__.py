"""Scans: encoded bytes become gray frames, or a rejection with a code; each file format is read in here."""

from btray.data.scans.decoding import (
    REJECTION_CODES,
    FileFacts,
    Scan,
    ScanLimits,
    ScanRejected,
    count_pages,
    decode,
    examine,
)  # fmt: skip

__all__ = [
    "REJECTION_CODES", "FileFacts", "Scan", "ScanLimits", "ScanRejected", "count_pages", "decode", "examine",
]  # fmt: skip
