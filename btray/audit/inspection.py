"""Inspection of single files: digests, fingerprint, size, gray levels, and why one is probably not an MRI slice.

`inspect_block` and `correlate_block` are what Ray Data runs: they read a block of rows and return a block of findings,
so that neither bytes nor pictures travel to the driver.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from btray.core.notice import percent
from btray.data import fingerprint
from btray.data.config import PreprocessConfig
from btray.data.modality import looks_like_ct
from btray.data.preprocess import Gray, make_frame
from btray.data.scans import FileFacts, Scan, ScanLimits, ScanRejected, decode, examine
from btray.storage import StorageError
from btray.storage.read_many import ReadResult, read_many

# Chosen on the 3264 slices of the public data set, of which 0.5 % are suspected, and on photographs, pages and noise;
# the rule for CT has its own, in `btray.data.modality`.
_COLOURED = 30  # gray levels between the channels of a pixel that has colour
_MOST_COLOURED = 0.05  # of the pixels: an arrow or a caption in colour is less
_LEAST_SPAN = 16  # gray levels between black and white
_LEAST_ADJACENT = 0.6  # correlation of neighbouring pixels; slices have 0.68 and more, white noise about 0
_MOST_WHITE = 0.35  # of the pixels; slices have at most 0.29
_DARKEST_LEVEL = 64  # that a picture with air around the head may begin at; slices begin at 61 at most
_LEAST_DARK_RIM = 0.5  # of the pixels near the edges; 99.5 % of the slices have more

NOT_MRI = {
    "blank": f"Black and white lie less than {_LEAST_SPAN} of 255 gray levels apart.",
    "colour": f"More than {percent(_MOST_COLOURED, 0)} of the pixels have colour: a photograph, a drawing, a "
    "colour map.",
    "noise": f"Neighbouring pixels correlate by less than {_LEAST_ADJACENT}: noise, or a texture.",
    "page": f"More than {percent(_MOST_WHITE, 0)} of the pixels are nearly white: a page, a drawing, an "
    "inverted picture.",
    "no_dark_background": f"Less than {percent(_LEAST_DARK_RIM, 0)} of the pixels near the edges are dark, or none is "
    "black: there is no air around a head.",
    "looks_like_ct": "A bright ring, closed and as thick all around, encloses what is even: the skull in CT. Training "
    "leaves such slices out with --leave-out ct.",
}
"""Reasons why an image is probably not an MRI slice, each with its rule."""

# Files read at a time: the encoded bytes that a block holds stay few however large its files are.
_READ_ROWS = 32

INSPECTED = pa.schema(
    [
        ("row", pa.int64()),
        ("code", pa.string()),
        ("message", pa.string()),
        ("byte_digest", pa.binary(16)),
        ("pixel_digest", pa.binary(16)),
        ("fingerprint", pa.binary(2 * fingerprint.VIEWS * fingerprint.LENGTH)),
        *((name, pa.int32()) for name in ("width", "height", "frames")),
        *((name, pa.string()) for name in ("mode", "format")),
        *((name, pa.float32()) for name in ("mean", "deviation", "black", "white")),
        ("not_mri", pa.string()),
    ]
)
"""What is known of each file: gray levels are shares of full white, `not_mri` is empty or a key of NOT_MRI.

If `code` is not empty, the file is unreadable and everything after `message` is null.
"""


def inspect_block(rows: pa.Table) -> pa.Table:
    """Inspect the files of some rows, with columns row and uri: return them as INSPECTED. A task of Ray Data."""
    records: list[dict[str, Any]] = []
    for row, data in _read(rows["row"].to_pylist(), rows["uri"].to_pylist()):
        try:
            records.append({"row": row, "code": "", "message": "", **inspect(data)})
        except (StorageError, ScanRejected) as error:
            records.append({"row": row, "code": error.code, "message": str(error)})
    return pa.Table.from_pylist(records, schema=INSPECTED)


def correlate_block(pairs: pa.Table) -> pa.Table:
    """Compare the pictures of some pairs: return their correlations, with columns place and correlation.

    A task of Ray Data. Pairs have columns place, first, second, first_uri and second_uri. Each image of the block is
    read once. A pair of which one cannot be read any more has correlation 0.
    """
    of_image = dict(zip(pairs["first"].to_pylist(), pairs["first_uri"].to_pylist(), strict=True))
    of_image |= dict(zip(pairs["second"].to_pylist(), pairs["second_uri"].to_pylist(), strict=True))
    pictures: dict[int, fingerprint.Thumbnails] = {}
    for image, data in _read(list(of_image), list(of_image.values())):
        with suppress(StorageError, ScanRejected):  # it was readable a while ago: the pair stays unproven
            pictures[image] = fingerprint.thumbnails(fingerprint.representative(decode(contents(data)).frames))
    firsts, seconds = pairs["first"].to_numpy(), pairs["second"].to_numpy()
    there = np.array([a in pictures and b in pictures for a, b in zip(firsts, seconds, strict=True)], bool)
    values = np.zeros(len(pairs), np.float32)
    if there.any():
        values[there] = fingerprint.correlations(
            np.stack([pictures[image] for image in firsts[there]]),
            np.stack([pictures[image] for image in seconds[there]]),
        )
    return pa.table({"place": pairs["place"], "correlation": values})


def contents(data: ReadResult) -> bytes:
    """Return the bytes of a file that was read. Raises StorageError if it could not be."""
    if isinstance(data, StorageError):
        raise data
    return data


def inspect(result: ReadResult) -> dict[str, Any]:
    """Return the columns of INSPECTED of one file, except row, code and message.

    Raises:
        StorageError: if `result` is one.
        ScanRejected: the file cannot be decoded.
    """
    data = contents(result)
    scan = decode(data)
    facts = examine(data)
    frame = fingerprint.representative(scan.frames)
    small = fingerprint.reduced(frame)
    return {
        "byte_digest": hashlib.sha256(data).digest()[:16],
        "pixel_digest": pixel_digest(scan),
        "fingerprint": fingerprint.fingerprint_of([small]),
        "width": facts.width,
        "height": facts.height,
        "frames": len(scan.frames),
        "mode": facts.mode,
        "format": facts.format,
        "not_mri": why_not_mri(small, facts),
        **gray_levels(frame),
    }


def pixel_digest(scan: Scan) -> bytes:
    """Return 16 bytes that are equal for scans with equal pixels in all frames, however they were encoded."""
    digest = hashlib.sha256()
    for frame in scan.frames:
        digest.update(f"{frame.dtype.str} {frame.shape};".encode())
        digest.update(frame.data)  # frames are C-contiguous
    return digest.digest()[:16]


def gray_levels(gray: Gray) -> dict[str, float]:
    """Return mean, standard deviation, black (1st percentile) and white (99th) of an image, as shares of full white."""
    counts = np.array(Image.fromarray(gray).histogram()) if gray.dtype == np.uint8 else np.bincount(gray.ravel())
    levels = np.arange(len(counts)) / np.iinfo(gray.dtype).max
    mean = float(counts @ levels / gray.size)
    black, white = levels[np.searchsorted(counts.cumsum(), (0.01 * gray.size, 0.99 * gray.size))].tolist()
    return {
        "mean": mean,
        "deviation": float(np.sqrt(counts @ (levels - mean) ** 2 / gray.size)),
        "black": black,
        "white": white,
    }


def why_not_mri(small: npt.NDArray[np.uint8], facts: FileFacts) -> str:
    """Return the first reason of NOT_MRI that holds of an image, as `fingerprint.reduced` gives it; "" if none does.

    But for the skull in CT nothing here knows anatomy: the rules find what has strayed into a data set, not a slice of
    another organ.
    """
    cumulative = np.cumsum(Image.fromarray(small).histogram())
    black, white = np.searchsorted(cumulative, (0.01 * small.size, 0.99 * small.size)).tolist()
    span = white - black
    if span < _LEAST_SPAN:
        return "blank"
    if facts.colours is not None and (np.ptp(facts.colours, axis=2) > _COLOURED).mean() > _MOST_COLOURED:
        return "colour"
    with np.errstate(invalid="ignore"):  # rows of one gray level have no correlation: they are no noise
        adjacent = np.corrcoef(small[::2, :-1].ravel(), small[::2, 1:].ravel())[0, 1]
    if adjacent < _LEAST_ADJACENT:
        return "noise"
    if (small >= black + 0.8 * span).mean() > _MOST_WHITE:
        return "page"
    wide = max(2, min(small.shape) // 12)
    rim = np.ones(small.shape, bool)
    rim[wide:-wide, wide:-wide] = False
    if black > _DARKEST_LEVEL or (small[rim] <= black + span // 4).mean() < _LEAST_DARK_RIM:
        return "no_dark_background"
    return "looks_like_ct" if looks_like_ct(make_frame(small, PreprocessConfig())) else ""


def _read(names: Sequence[int], uris: Sequence[str]) -> Iterator[tuple[int, ReadResult]]:
    for start in range(0, len(uris), _READ_ROWS):
        part = slice(start, start + _READ_ROWS)
        yield from zip(names[part], read_many(uris[part], max_bytes=ScanLimits.max_bytes), strict=True)
