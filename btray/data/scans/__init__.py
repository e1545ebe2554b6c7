"""Scans: encoded bytes become gray frames, or a rejection with a code; each file format is read in here."""

from btray.data.scans.decoding import FileFacts, Scan, ScanLimits, count_pages, decode, examine, read_info
from btray.data.scans.errors import REJECTION_CODES, ScanRejected
from btray.data.scans.slice_info import SliceInfo

__all__ = [
    "REJECTION_CODES", "FileFacts", "Scan", "ScanLimits", "ScanRejected", "SliceInfo", "count_pages", "decode",
    "examine", "read_info",
]  # fmt: skip
