"""PNG, strictly: Pillow's load checks neither the checksums of the pixels nor that the file ends."""

from __future__ import annotations

import io

from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile

from btray.data.scans.errors import ScanRejected

PNG_END = b"IEND\xaeB`\x82"
"""The last chunk, with its checksum."""
_BITS_AT = 24  # the byte that says how many bits a level has


def check_png(data: bytes, image: ImageFile) -> None:
    """Raise an exception if any chunk is damaged; spread the transparent gray level over 8 bit, as pixels are."""
    if PNG_END not in data:
        raise ScanRejected("truncated", f"a PNG truncated after {len(data)} bytes: no end chunk")
    PngImageFile(io.BytesIO(data)).verify()  # it spends its object
    level, most = image.info.get("transparency"), (1 << data[_BITS_AT]) - 1
    if image.mode in ("1", "L") and isinstance(level, int):
        image.info["transparency"] = (level & most) * 0xFF // most
