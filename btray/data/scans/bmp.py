"""BMP, strictly."""

from __future__ import annotations

from typing import Any

from PIL.ImageFile import ImageFile

from btray.data.scans.errors import ScanRejected


def check_bmp(data: bytes, image: ImageFile) -> None:
    """Raise `ScanRejected` if the rows end before the last one, whatever Pillow is told to do about that."""
    tile: Any = image.tile[0]
    if tile.codec_name == "raw":
        stride, start = tile.args[1], tile.offset
        if start + stride * image.height > len(data):
            raise ScanRejected("truncated", f"a BMP truncated after {len(data)} bytes: pixels lie after that")
