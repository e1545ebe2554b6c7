"""Why a scan cannot be used: the codes of rejections, and the error that carries one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from btray.data.scans.slice_info import SliceInfo

REJECTION_CODES: Final[dict[str, str]] = {
    "empty": "The object has no bytes: the upload was interrupted; write it again.",
    "not_an_image": "The bytes are not an image (text, an error page, an archive): leave it out of the worklist.",
    "truncated": "The image ends too early: the upload or download was interrupted; copy it again from its source.",
    "bomb": "Decoding would take too much memory or time: inspect it, then split it or raise max_pixels if it is real.",
    "too_large": "The object has more bytes than max_bytes: split it or raise the limit.",
    "too_small": "The image is smaller than min_side: an icon or a placeholder; leave it out.",
    "animated": "The image is an animation: export its frames as single images.",
    "unsupported": "The file is of a kind that is not read here: convert it to PNG, TIFF or JPEG.",
    "not_selected": "The series is not one of those that were asked for.",
    "decode_failed": "The image is damaged: copy it again from its source.",
}


class ScanRejected(Exception):
    """A scan that cannot be used. `code` is a key of `REJECTION_CODES`, the text one line that says what was wrong."""

    retryable: Final = False
    """Bytes that were refused once are refused always."""
    info: SliceInfo | None = None
    """What the header says, if it could be read."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message
