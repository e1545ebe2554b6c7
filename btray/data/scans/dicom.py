"""DICOM objects -> gray frames as people see them, and what is known of each.

Values of an object name patients. None stands in a message: those raised here are made of our words and of numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from btray.data.scans.dicom_codecs import DECODERS, decode_frame, find_frames, join
from btray.data.scans.dicom_header import (
    FLOAT_PIXELS,
    MAX_ELEMENTS,
    PIXEL_DATA,
    UNDEFINED,
    Dataset,
    FileMeta,
    Malformed,
    read_elements,
    read_meta,
)
from btray.data.scans.dicom_pixels import ROWS, PixelFormat, read_format
from btray.data.scans.dicom_slices import FrameHeader, frame_headers
from btray.data.scans.errors import ScanRejected
from btray.data.scans.orientation import resize, square_size
from btray.data.scans.slice_info import SliceInfo

Array = np.ndarray[Any, np.dtype[Any]]

_NATIVE: Final = ("", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2")
_STORAGE: Final = "1.2.840.10008.5.1.4.1.1."
_JPEG_XL: Final = "1.2.840.10008.1.2.4.11"  # and a digit
_SOP_CLASS, _MODALITY, _MANUFACTURER, _DIRECTORY = 0x00080016, 0x00080060, 0x00080070, 0x00041220
_SOP_INSTANCE, _STUDY = 0x00080018, 0x0020000D
WRITER: Final = "btray"
"""Manufacturer of every object that btray writes: a picture of an answer is never taken for a scan."""
# Objects that are no slices, though some have pixels: by class or what its UID begins with, and by modality.
_OTHER_CLASSES: Final = {
    "1.2.840.10008.1.3.10": "a DICOMDIR",
    _STORAGE + "4.2": "MR spectroscopy",
    _STORAGE + "9": "a waveform",
    _STORAGE + "11": "a presentation state",
    _STORAGE + "30": "a parametric map",
    _STORAGE + "66": "raw data, a registration or a segmentation",
    _STORAGE + "67": "a mapping of values",
    _STORAGE + "68": "a surface",
    _STORAGE + "77.1.1.1": "a video",
    _STORAGE + "77.1.2.1": "a video",
    _STORAGE + "77.1.4.1": "a video",
    _STORAGE + "88": "a structured report",
    _STORAGE + "104": "a document",
    _STORAGE + "481": "an object of radiotherapy",
}
_OTHER_MODALITIES: Final = (
    "AU", "DOC", "ECG", "FID", "HC", "HD", "KO", "M3D", "PLAN", "PR", "REG", "RTDOSE", "RTIMAGE", "RTPLAN", "RTRECORD",
    "RTSTRUCT", "RWV", "SEG", "SMR", "SR",
)  # fmt: skip


class NoSlice(ScanRejected):
    """An object of a kind that has no slices, such as a report."""


@dataclass(frozen=True)
class ObjectNames:
    """What names an object: UIDs as they stand there, empty if they do not."""

    sop_class: str
    instance_uid: str
    study_uid: str
    no_slice: str
    """Why there is no slice in it; empty if there should be one."""


@dataclass(frozen=True)
class DicomImage:
    """An object whose header is read and found possible; its pixels are read by `slices`."""

    elements: Dataset
    pixels: PixelFormat
    transfer_syntax: str

    def slices(self, *, max_pixels: int, max_volume_pixels: int) -> tuple[list[Array], list[SliceInfo]]:
        """Return frames, uint8 or uint16 [height, width], and what is known of each. Raises ScanRejected."""
        frames: list[Array] = []
        infos: list[SliceInfo] = []
        total = 0
        decoded = _decoded_frames(self.elements, self.pixels, self.transfer_syntax)
        with _silently():
            for header in frame_headers(self.elements, self.pixels.frames):
                infos.append(header.info)
                try:
                    shape = square_size(self.pixels.shape, header.spacing) if header.spacing else self.pixels.shape
                    total += shape[0] * shape[1]
                    if shape[0] * shape[1] > max_pixels or total > max_volume_pixels:
                        raise ScanRejected(
                            "bomb", f"{total} pixels once they are square, above max_pixels {max_pixels}"
                        )
                    gray = self.pixels.gray(next(decoded), header.slope, header.intercept)
                except ScanRejected as error:
                    error.info = infos[0]
                    raise
                frames.append(_shown(gray, header, shape))
        return frames, infos


def open_image(data: bytes, *, max_bytes: int, max_pixels: int, max_volume_pixels: int, min_side: int) -> DicomImage:
    """Read the header of a DICOM object, of which nothing is decoded. Raises ScanRejected and nothing else."""
    with _silently():
        meta = read_meta(data)
        _check_class(meta.media_class, "")
        elements = read_elements(data, meta, max_bytes)
        _check_kind(elements, meta)
        pixels = read_format(elements)
    size = f"{pixels.columns}x{pixels.rows}"
    frame = pixels.rows * pixels.columns
    if frame > max_pixels:
        raise ScanRejected("bomb", f"frames of {size} pixels, above max_pixels {max_pixels}")
    if frame * pixels.frames > max_volume_pixels:
        text = f"{pixels.frames} frames of {size} pixels, above max_volume_pixels {max_volume_pixels}"
        raise ScanRejected("bomb", text)
    if pixels.frames > MAX_ELEMENTS:
        raise ScanRejected("bomb", f"a DICOM object of {pixels.frames} frames, above {MAX_ELEMENTS}")
    if min(pixels.shape) < min_side:
        raise ScanRejected("too_small", f"{size} pixels, below min_side {min_side}")
    return DicomImage(elements, pixels, meta.transfer_syntax)


def name_object(data: bytes, max_bytes: int) -> ObjectNames:
    """Return what names an object. Raises ScanRejected if its header cannot be read."""
    no_slice = ""
    with _silently():
        meta = read_meta(data)
        elements = read_elements(data, meta, max_bytes)
        try:
            _check_kind(elements, meta)
        except NoSlice as reason:
            no_slice = str(reason)
        except ScanRejected:  # it is a slice that is not read
            pass
    sop_class = elements.text(_SOP_CLASS) or meta.media_class
    return ObjectNames(sop_class, elements.text(_SOP_INSTANCE), elements.text(_STUDY), no_slice)


def read_slice_info(data: bytes, max_bytes: int) -> SliceInfo:
    """Return what the header of an object says of its first frame; `data` may end anywhere after the header.

    Raises ScanRejected: `truncated` if it ends before, and whatever else is wrong.
    """
    with _silently():
        elements = read_elements(data, read_meta(data), max_bytes)
        if PIXEL_DATA not in elements:
            raise ScanRejected("truncated", "a DICOM object that ends before its pixels")
        return next(frame_headers(elements, 1)).info


@contextlib.contextmanager
def _silently() -> Iterator[None]:
    """Raise ScanRejected for whatever fails, without the text of other exceptions, which may quote values."""
    try:
        yield
    except ScanRejected:
        raise
    except Malformed:
        raise ScanRejected("decode_failed", "a DICOM object whose elements cannot be told apart") from None
    except Exception:  # the numbers of a damaged header make libraries raise nearly anything
        raise ScanRejected("decode_failed", "a damaged DICOM object") from None


def other_kind(uid: str, modality: str) -> str:
    """Return what the objects of a class are if they are no slices, else nothing; of no class, those of a modality."""
    name = next((name for begin, name in _OTHER_CLASSES.items() if f"{uid}.".startswith(f"{begin}.")), "")
    return "of another kind" if not name and not uid and modality in _OTHER_MODALITIES else name


def _check_class(uid: str, modality: str) -> None:
    """Raise ScanRejected, `unsupported`, if objects of a class or modality are no slices."""
    if name := other_kind(uid, modality):
        raise NoSlice("unsupported", f"a DICOM object that is no slice, but {name}: leave it out")


def _check_kind(elements: Dataset, meta: FileMeta) -> None:
    """Raise ScanRejected if an object is of a kind that is not read, or has no pixels."""
    sop_class = elements.text(_SOP_CLASS) or meta.media_class
    _check_class(sop_class, elements.text(_MODALITY).upper())
    if elements.text(_MANUFACTURER) == WRITER:
        raise NoSlice("unsupported", "a DICOM object that is no slice, but an answer of btray: leave it out")
    if _DIRECTORY in elements:
        _check_class("1.2.840.10008.1.3.10", "")
    if any(tag in elements for tag in FLOAT_PIXELS):
        raise ScanRejected("unsupported", "a DICOM object of floating-point pixels: that is not read")
    if PIXEL_DATA not in elements:
        if ROWS in elements or "Image Storage" in _registered_name(sop_class, "Image Storage"):
            raise ScanRejected("decode_failed", "a DICOM image without pixels")
        raise NoSlice("unsupported", "a DICOM object that is no image: leave it out")
    if meta.transfer_syntax not in _NATIVE and meta.transfer_syntax not in DECODERS:
        name = _registered_name(meta.transfer_syntax, "one that DICOM does not define")
        raise ScanRejected("unsupported", f"a DICOM object whose transfer syntax is not read ({name}): convert it")


def _registered_name(uid: str, otherwise: str) -> str:
    """Return the standard's name of a class or transfer syntax; `otherwise` for a UID that it does not have."""
    import pydicom.uid  # takes a while, which good objects do without

    if uid.startswith(_JPEG_XL):  # too new for pydicom
        return "JPEG XL"
    return str(pydicom.uid.UID_dictionary.get(uid, (otherwise,))[0])


def _decoded_frames(elements: Dataset, pixels: PixelFormat, transfer_syntax: str) -> Iterator[Array]:
    """Yield the stored numbers, or colours, of each frame."""
    element, data = elements.get(PIXEL_DATA), elements.data
    assert element is not None  # noqa: S101 - as `open_image` has seen
    if transfer_syntax in DECODERS:
        frames = find_frames(elements, pixels.frames)
        yield from (decode_frame(DECODERS[transfer_syntax], join(data, pieces), pixels) for pieces in frames)
        return
    if element.length == UNDEFINED:
        raise ScanRejected("decode_failed", "a DICOM object whose pixels are in fragments, though not compressed")
    size = pixels.frame_bytes
    if pixels.photometric.endswith("422") and element.length >= pixels.frames * size * 3 // 2:
        pixels = replace(pixels, photometric="YBR_FULL")  # as some writers have it
        size = pixels.frame_bytes
    if element.start + element.length > len(data):
        raise ScanRejected("truncated", f"a DICOM object truncated after {len(data)} bytes, in its pixels")
    if element.length < pixels.frames * size:
        raise ScanRejected("truncated", f"a DICOM object with less than the {pixels.frames * size} bytes of its pixels")
    if element.length >= (pixels.frames + 1) * size:
        raise ScanRejected("decode_failed", f"a DICOM object with more pixels than those of {pixels.frames} frames")
    at = element.start
    if elements.order == ">" and element.vr == b"OW" and pixels.allocated == 8:
        words = np.frombuffer(data, ">u2", -(-pixels.frames * size // 2), at)  # two pixels each
        data, at = words.astype("<u2").tobytes(), 0
    for number in range(pixels.frames):
        yield pixels.native(data, at + number * size, elements.order)


def _shown(gray: Array, header: FrameHeader, shape: tuple[int, int]) -> Array:
    """Return gray levels as people see them: resized to `shape`, turned and flipped."""
    resized = resize(gray, shape)
    shown = header.view.show(resized) if header.view else np.ascontiguousarray(resized)
    return shown if shown.flags.writeable else shown.copy()
