"""The numbers that a DICOM object stores -> gray levels (PS3.3 C.7.6.3, C.11.1), exact where 16 bits hold them.

No window is applied: preprocessing stretches the gray levels by their percentiles, whatever format they come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from btray.data.scans.dicom_header import Dataset
from btray.data.scans.errors import ScanRejected
from btray.data.scans.gray import to_luma, to_uint16

Array = np.ndarray[Any, np.dtype[Any]]

ROWS, COLUMNS, FRAMES = 0x00280010, 0x00280011, 0x00280008
_SAMPLES, _PHOTOMETRIC, _PLANAR = 0x00280002, 0x00280004, 0x00280006
_ALLOCATED, _STORED, _HIGH_BIT, _SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
_PADDING, _PADDING_LIMIT = 0x00280120, 0x00280121
_PALETTE_SIZES, _PALETTES = (0x00281101, 0x00281102, 0x00281103), (0x00281201, 0x00281202, 0x00281203)
_GRAY: Final = ("MONOCHROME1", "MONOCHROME2")
_COLOURS: Final = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_RCT", "YBR_ICT")
_HALF_CHROMA: Final = ("YBR_FULL_422", "YBR_PARTIAL_422")
_BLACK_LUMA, _WHITE_LUMA = 16, 235  # of YBR_PARTIAL (ITU-R 601)


@dataclass(frozen=True, kw_only=True)
class PixelFormat:
    """How the pixels of an object are stored, checked."""

    rows: int
    columns: int
    frames: int
    samples: int
    """1, or 3 if pixels have a colour."""
    photometric: str
    planar: bool
    """Whether the samples of a frame lie one after the other, not pixel by pixel."""
    allocated: int
    """Bits of a sample: 8, 16 or 32."""
    stored: int
    """Those of them that mean something, up to the bit `high`, counted from 0."""
    high: int
    signed: bool
    padding: tuple[int, int] | None
    """The least and the greatest value of pixels that show nothing."""
    palette: Array | None
    """Gray levels of the entries of a palette, uint8 or uint16."""
    first_entry: int
    """The value that the palette's first entry stands for."""

    @property
    def shape(self) -> tuple[int, int]:
        """[height, width]."""
        return self.rows, self.columns

    @property
    def frame_bytes(self) -> int:
        """Bytes of a frame that is not compressed."""
        samples = 2 if self.photometric in _HALF_CHROMA else self.samples
        return self.rows * self.columns * samples * self.allocated // 8

    def native(self, data: bytes, at: int, order: str) -> Array:
        """Return what is stored of the uncompressed frame at a byte of `data`: [height, width], or [..., 3] of colours.

        Only luma is returned of colours that are stored as luma and two halves of chroma.
        """
        dtype = np.dtype(f"{order}u{self.allocated // 8}")
        values = np.frombuffer(data, dtype, self.frame_bytes // dtype.itemsize, at)
        if not dtype.isnative:
            values = values.astype(dtype.newbyteorder("="))
        if self.samples == 1:
            return values.reshape(self.shape)
        if self.photometric in _HALF_CHROMA:
            # luma of two pixels, then their chroma (PS3.3 C.7.6.3.1.2)
            return values.reshape(-1, 4)[:, :2].reshape(self.shape)
        if self.planar:
            return np.moveaxis(values.reshape(3, *self.shape), 0, 2)
        return values.reshape(*self.shape, 3)

    def gray(self, values: Array, slope: float, intercept: float) -> Array:
        """Return gray levels, uint8 or uint16 [height, width], of stored or decoded `values`.

        Colours are RGB [..., 3]; what has but two dimensions is luma already. Slope and intercept are those of the
        frame's rescaling.
        """
        if self.samples == 3:
            return self._luma(values)
        numbers, as_stored = self._numbers(values)
        if self.palette is not None:
            entries = numbers.astype(np.int64) - self.first_entry
            return self.palette[np.clip(entries, 0, len(self.palette) - 1)]
        inverted = self.photometric == "MONOCHROME1"
        shown = slope if not inverted else -slope
        if self.padding is not None:
            numbers = self._without_padding(numbers, as_stored, darkest_is_least=shown > 0)
        if slope == 1 and not intercept and not inverted and numbers.dtype in (np.uint8, np.uint16):
            return numbers
        return _rescaled(numbers, slope, intercept, inverted, -1 if self.signed else 2**self.stored - 1)

    def _numbers(self, values: Array) -> tuple[Array, Array]:
        """Return the numbers that the stored bits mean, and what they are with all bits."""
        bits = 8 * values.dtype.itemsize
        stored = min(self.stored, bits)
        high = min(self.high, bits - 1)
        words: Array = values.view(f"u{values.dtype.itemsize}")
        kind = f"{'i' if self.signed else 'u'}{values.dtype.itemsize}"
        left, right = bits - 1 - high, bits - stored
        if right and left == right and not self.signed:
            return words & (2**stored - 1), words
        numbers = words << left if left else words
        numbers = numbers.view(kind)
        return numbers >> right if right else numbers, words.view(kind)

    def _without_padding(self, numbers: Array, as_stored: Array, *, darkest_is_least: bool) -> Array:
        least, greatest = self.padding or (0, 0)
        low, high = (-(2 ** (self.stored - 1)), 2 ** (self.stored - 1)) if self.signed else (0, 2**self.stored)
        seen = numbers if low <= least and greatest < high else as_stored
        padding = (seen >= least) & (seen <= greatest)
        if not padding.any() or padding.all():
            return numbers
        rest = numbers[~padding]
        return np.where(padding, rest.min() if darkest_is_least else rest.max(), numbers)

    def _luma(self, values: Array) -> Array:
        if values.dtype.itemsize > 2:
            raise ScanRejected("unsupported", "a DICOM object of colours of more than 16 bits: that is not read")
        if self.photometric.startswith("YBR") and values.ndim == 3 and self.photometric not in ("YBR_RCT", "YBR_ICT"):
            values = values[..., 0]
        if values.ndim == 3:
            return to_luma(values)
        if self.photometric != "YBR_PARTIAL_422":
            return values
        scaled = (values.astype(np.int32) - _BLACK_LUMA) * 255 // (_WHITE_LUMA - _BLACK_LUMA)
        return np.clip(scaled, 0, 255).astype(np.uint8)


def read_format(elements: Dataset) -> PixelFormat:
    """Return how an object stores its pixels. Raises ScanRejected: `decode_failed` or `unsupported`."""

    def number(tag: int, default: int = 0, binary: str = "H") -> int:
        value = next(iter(elements.numbers(tag, binary)), default)
        return int(value) if math.isfinite(value) else -1

    rows, columns, samples = number(ROWS), number(COLUMNS), number(_SAMPLES, 1)
    allocated = number(_ALLOCATED)
    stored = number(_STORED, allocated)
    high, signed = number(_HIGH_BIT, stored - 1), number(_SIGNED)
    photometric = elements.text(_PHOTOMETRIC).upper() or ("RGB" if samples == 3 else "MONOCHROME2")
    is_gray = photometric in _GRAY or photometric == "PALETTE COLOR"
    if not is_gray and photometric not in _COLOURS:
        raise ScanRejected("unsupported", "a DICOM object of a photometric interpretation that is not read")
    if allocated in (1, 12, 24, 64):
        raise ScanRejected("unsupported", f"a DICOM object of {allocated} bits per pixel: that is not read")
    frames = number(FRAMES, 1, "") or 1  # some writers say 0
    possible = (
        min(rows, columns, frames) > 0
        and samples == (1 if is_gray else 3)
        and allocated in (8, 16, 32)
        and 0 < stored <= high + 1 <= allocated
        and signed in (0, 1)
    )
    if not possible:
        raise ScanRejected("decode_failed", "a DICOM object whose header is impossible: sizes or bits of its pixels")
    palette, first_entry = None, 0
    if photometric == "PALETTE COLOR":
        palette, first_entry = _read_palette(elements)
    return PixelFormat(
        rows=rows, columns=columns, frames=frames, samples=samples, photometric=photometric,
        planar=number(_PLANAR) == 1, allocated=allocated, stored=stored, high=high, signed=bool(signed),
        padding=_read_padding(elements, signed=bool(signed)), palette=palette, first_entry=first_entry,
    )  # fmt: skip


def _read_padding(elements: Dataset, *, signed: bool) -> tuple[int, int] | None:
    ends = []
    for tag in (_PADDING, _PADDING_LIMIT):
        value = elements.raw(tag)
        if len(value) in (2, 4):
            ends.append(int.from_bytes(value, "little" if elements.order == "<" else "big", signed=signed))
    return (min(ends), max(ends)) if ends and _PADDING in elements else None


def _read_palette(elements: Dataset) -> tuple[Array, int]:
    """Return the gray level of each entry, and the value of the first (PS3.3 C.7.6.3.1.5)."""
    bands = []
    first = 0
    for sizes, entries in zip(_PALETTE_SIZES, _PALETTES, strict=True):
        if entries not in elements:
            raise ScanRejected("unsupported", "a DICOM object of a segmented palette, or none: that is not read")
        described = elements.numbers(sizes, "H")
        if len(described) != 3 or described[2] not in (8, 16):
            raise ScanRejected("decode_failed", "a DICOM object whose palette is impossible")
        count, first, bits = (int(value) for value in described)
        count = (count & 0xFFFF) or 2**16
        packed = elements.raw(entries)
        dtype = np.dtype("u1" if len(packed) < 2 * count else f"{elements.order}u2")
        if len(packed) < count * dtype.itemsize:
            raise ScanRejected("decode_failed", "a DICOM object whose palette is shorter than it says")
        band = np.frombuffer(packed, dtype, count)
        # entries of 8 bits may stand in words, in their low bytes or in both
        bands.append(band & 0xFF if bits == 8 else band)
    if len({len(band) for band in bands}) > 1:
        raise ScanRejected("decode_failed", "a DICOM object whose palettes have different lengths")
    colours = np.stack(bands, axis=-1)
    return to_luma(colours.astype(np.uint8 if colours.max() <= 0xFF and bits == 8 else np.uint16)), first


def _rescaled(numbers: Array, slope: float, intercept: float, inverted: bool, ends: int) -> Array:
    """Return slope * number + intercept as uint8 or uint16; `ends` is the sum of the least and the greatest number.

    What is no integer, or does not fit, stays in units of the stored numbers, of which it is a linear function.
    """
    low, high = int(numbers.min()), int(numbers.max())
    factor, shift = int(slope), int(intercept)
    if factor != slope or shift != intercept or abs(factor) * (high - low) > 0xFFFF:
        factor, shift = (1 if slope > 0 else -1), 0
    if inverted:
        factor, shift = -factor, factor * ends + shift
    least, greatest = sorted((factor * low + shift, factor * high + shift))
    if greatest - least > 0xFFFF:
        levels = to_uint16(numbers)
        return levels if factor > 0 else np.invert(levels)
    if least < 0 or greatest > 0xFFFF:
        shift, greatest = shift - least, greatest - least
    # modulo 2^16, which is exact
    levels = numbers.astype(np.uint16) * np.uint16(factor & 0xFFFF) + np.uint16(shift & 0xFFFF)
    return levels.astype(np.uint8) if greatest <= 0xFF and numbers.dtype.itemsize == 1 else levels
