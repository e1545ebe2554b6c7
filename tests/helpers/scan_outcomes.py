"""Decodes any bytes, and checks that the outcome is sound whatever they are."""

from __future__ import annotations

import time
import warnings

import numpy as np

from btray.data.scans import REJECTION_CODES, Scan, ScanLimits, ScanRejected, decode
from tests.helpers.dicom_files import IDENTIFIERS

_SECONDS = 10  # of CPU, for whatever a file is
SMALL = ScanLimits(max_bytes=2**20, max_pixels=200_000, max_volume_pixels=400_000)


def attempt(data: bytes, limits: ScanLimits = SMALL) -> Scan | ScanRejected:
    """Return the scan, or why there is none. Nothing else is raised, warned of, or quoted from the file."""
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            scan: Scan | ScanRejected = decode(data, limits=limits)
        except ScanRejected as error:
            scan = error
    assert time.process_time() - started < _SECONDS
    if isinstance(scan, ScanRejected):
        assert scan.code in REJECTION_CODES
        assert str(scan).isprintable()
        assert not [word for word in IDENTIFIERS if word in f"{scan!r} {scan.info!r} {scan.__cause__!r}"]
        return scan
    assert scan.slices is not None
    assert len(scan.slices) == len(scan.frames) > 0
    assert not [word for word in IDENTIFIERS if word in repr(scan.slices)]
    for frame in scan.frames:
        assert frame.dtype in (np.uint8, np.uint16)
        assert frame.ndim == 2
        assert frame.flags.c_contiguous
        assert frame.flags.writeable
    return scan


def outcome(data: bytes, limits: ScanLimits = SMALL) -> str:
    """Return the code of the rejection, or "ok"."""
    found = attempt(data, limits)
    return found.code if isinstance(found, ScanRejected) else "ok"
