"""PNG, strictly: Pillow's load checks neither the checksums of the pixels, nor that all rows and the end are there."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile

from btray.data.scans.errors import ScanRejected

PNG_END = b"IEND\xaeB`\x82"
"""The last chunk, with its checksum."""
_FILLS = (0x55, 0)  # pixels of rows that are not decoded; two, since a whole picture may have such rows
_BITS_AT = 24  # the byte that says how many bits a level has


def check_png(data: bytes, image: ImageFile) -> None:
    """Raise an exception if any chunk is damaged; spread the transparent gray level over 8 bit, as pixels are."""
    if PNG_END not in data:
        raise ScanRejected("truncated", f"a PNG truncated after {len(data)} bytes: no end chunk")
    PngImageFile(io.BytesIO(data)).verify()  # it spends its object
    level, most = image.info.get("transparency"), (1 << data[_BITS_AT]) - 1
    if image.mode in ("1", "L") and isinstance(level, int):
        image.info["transparency"] = (level & most) * 0xFF // most
    image.im = Image.new(image.mode, image.size, _FILLS[0]).im  # where Pillow decodes to


def check_rows(data: bytes, image: ImageFile) -> None:
    """Raise `ScanRejected` if an image that is loaded after `check_png` lacks its last rows."""
    if _ends_with(image, _FILLS[0]):
        twin = PngImageFile(io.BytesIO(data))
        twin.im = Image.new(twin.mode, twin.size, _FILLS[1]).im
        if _ends_with(twin, _FILLS[1]):
            raise ScanRejected("truncated", "a PNG whose pixels end before its last row")


def _ends_with(image: ImageFile, fill: int) -> bool:
    """Return whether one of the last two rows is untouched; the last pass of an interlaced PNG is every other row."""
    width, height = image.size
    rows = np.asarray(image.crop((0, height - 2, width, height)))
    return bool((rows == np.asarray(Image.new(image.mode, (width, 2), fill))).reshape(2, -1).all(axis=1).any())
