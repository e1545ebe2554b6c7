"""NIfTI-1 and -2: a volume becomes axial slices from foot to head, seen as those of DICOM are.

Only the header and the pixels are read; extensions, which may hold a whole DICOM header, are passed over. Pairs of
files (.hdr, .img) are refused in `formats`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from btray.data.scans.errors import ScanRejected
from btray.data.scans.gray import span_of, to_uint16
from btray.data.scans.orientation import resize, square_size
from btray.data.scans.slice_info import SliceInfo

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Header

Array = np.ndarray[Any, np.dtype[Any]]

_SIZES = {348: "NIfTI-1", 540: "NIfTI-2"}
_UNITS = {1: 1e3, 3: 1e-3}  # metres and micrometres, in mm; all else is taken for mm
_EXACT = 2**62  # integers below it are scaled as such
_FARTHEST = 1e9  # mm
_FLAT = 1e-3  # volume of a cell with edges of length 1


@dataclass(frozen=True)
class Volume:
    """What the header says, checked; pixels are read by `frames`."""

    header: Nifti1Header
    affine: Array
    """From indices of the turned volume to mm: to the left, posterior, to the head; [4, 4]."""
    turn: Array
    """How the stored axes become columns, rows and slices: nibabel's orientation, [3, 2]."""
    stored: tuple[int, int, int]
    """Pixels along the stored axes."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows and slices, as shown but before pixels are made square."""
        columns, rows, slices = (self.stored[axis] for axis in np.argsort(self.turn[:, 0]))
        return columns, rows, slices

    @property
    def size(self) -> tuple[int, int]:
        """[height, width] of a slice with square pixels."""
        columns, rows, _ = self.shape
        across, down, _ = self._distances()
        return square_size((rows, columns), (down, across))

    def infos(self) -> list[SliceInfo]:
        """Return what is known of each slice, from foot to head."""
        normal = np.cross(self.affine[:3, 0], self.affine[:3, 1])
        normal /= np.linalg.norm(normal)
        places = (self.affine @ [0, 0, number, 1] for number in range(self.shape[2]))
        spacing = min(self._distances()[:2])
        return [SliceInfo(plane="axial", position_mm=float(normal @ place[:3]), spacing_mm=spacing) for place in places]

    def frames(self, data: bytes) -> list[Array]:
        """Return the slices, gray uint8 or uint16 [height, width], from foot to head.

        Raises ScanRejected: `truncated` if the pixels end early, `decode_failed` if none is a finite number.
        """
        import nibabel

        stored, slope, offset = self._stored(data), *_scaling(self.header)
        turned = nibabel.orientations.apply_orientation(stored, self.turn)
        ends = sorted(_scaled(np.array(span_of(stored), stored.dtype), slope, offset).tolist())
        if not all(map(math.isfinite, ends)):
            raise ScanRejected("decode_failed", "its scale takes pixels beyond all numbers")
        frames = []
        for number in range(self.shape[2]):
            values = _scaled(turned[:, :, number].T, slope, offset)
            gray = values if values.dtype == np.uint8 else to_uint16(values, (ends[0], ends[1]))
            frames.append(np.require(resize(np.ascontiguousarray(gray), self.size), requirements=["W"]))
        return frames

    def check(self, *, max_pixels: int, max_volume_pixels: int, min_side: int) -> None:
        """Raise ScanRejected if slices are too large or small, by the header."""
        columns, rows, slices = self.shape
        height, width = self.size
        for pixels, name, limit in (
            (max(height * width, columns * rows), "max_pixels", max_pixels),
            (height * width * slices, "max_volume_pixels", max_volume_pixels),
        ):
            if pixels > limit:
                raise ScanRejected("bomb", f"{slices} slices of {width}x{height} pixels, above {name} {limit}")
        if min(columns, rows) < min_side:
            raise ScanRejected("too_small", f"axial slices of {columns}x{rows} pixels, below min_side {min_side}")

    def _distances(self) -> tuple[float, float, float]:
        """Return mm from one column, row and slice to the next."""
        across, down, up = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return across, down, up

    def _stored(self, data: bytes) -> Array:
        """Return the pixels [x, y, z] as they are stored, a view of `data`."""
        start = int(self.header["vox_offset"]) or self.header.single_vox_offset
        dtype, count = self.header.get_data_dtype(), math.prod(self.stored)
        if start + count * dtype.itemsize > len(data):
            raise ScanRejected("truncated", f"pixels up to byte {start + count * dtype.itemsize} of {len(data)}")
        return np.frombuffer(data, dtype, count, start).reshape(self.stored, order="F")


def read_header(data: bytes) -> Volume:
    """Return what the header of a NIfTI file says, of which `data` may be but the first 540 bytes.

    Raises ScanRejected: `truncated`, `unsupported` (several volumes, colour, complex numbers) or `decode_failed`.
    """
    import nibabel
    from nibabel.spatialimages import HeaderDataError

    sizes = (int.from_bytes(data[:4], order) for order in ("little", "big"))
    size = next((size for size in sizes if size in _SIZES), None)
    if size is None:
        raise ScanRejected("decode_failed", "a NIfTI header of an impossible size")
    if len(data) < size:
        raise ScanRejected("truncated", f"a {_SIZES[size]} header that ends after {len(data)} bytes")
    order = "<" if data[:4] == size.to_bytes(4, "little") else ">"
    of_kind = nibabel.Nifti1Header if size == 348 else nibabel.Nifti2Header
    header = of_kind(data[:size], order, check=False)
    try:
        _check_kind(header)
        shape = _shape(header)
        affine = np.array(header.get_best_affine())
        _scaling(header)
    except (HeaderDataError, KeyError, ValueError) as error:
        raise ScanRejected("decode_failed", f"an impossible {_SIZES[size]} header") from error
    start = float(header["vox_offset"])
    if not (start == 0 or start >= header.single_vox_offset):
        raise ScanRejected("decode_failed", "a NIfTI header that says that pixels begin within it")
    affine[:3] *= _UNITS.get(int(header["xyzt_units"]) & 7, 1.0)
    # as DICOM counts: to the left and posterior, where NIfTI counts to the right and anterior
    affine[:2] *= -1
    if not _is_regular(affine):
        raise ScanRejected("decode_failed", "a NIfTI header that does not say how the volume lies")
    turn = nibabel.orientations.io_orientation(affine)
    return Volume(header, affine @ nibabel.orientations.inv_ornt_aff(turn, shape), turn, shape)


def _check_kind(header: Nifti1Header) -> None:
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        kind = {"c": "complex numbers", "V": "colours"}.get(dtype.kind, str(dtype))
        raise ScanRejected("unsupported", f"a NIfTI volume of {kind}; write gray levels")


def _shape(header: Nifti1Header) -> tuple[int, int, int]:
    dimensions = [int(number) for number in header["dim"]]
    if not 1 <= dimensions[0] <= 7 or min(dimensions[1 : dimensions[0] + 1]) < 1:
        raise ScanRejected("decode_failed", "a NIfTI header with impossible dimensions")
    shape = (*dimensions[1 : dimensions[0] + 1], 1, 1)
    if (volumes := math.prod(shape[3:])) > 1:
        raise ScanRejected("unsupported", f"a NIfTI file of {volumes} volumes; write each as a file")
    return shape[0], shape[1], shape[2]


def _is_regular(affine: Array) -> bool:
    """Return whether its three axes have a length each that pixels can have, and do not lie in one plane."""
    if not (np.abs(affine) < _FARTHEST).all():  # NaN too
        return False
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return bool((lengths > 1 / _FARTHEST).all() and abs(np.linalg.det(affine[:3, :3] / lengths)) > _FLAT)


def _scaling(header: Nifti1Header) -> tuple[float, float]:
    """Return slope and offset of the gray levels. Raises HeaderDataError if they are not finite."""
    slope, offset = header.get_slope_inter()
    return (1.0, 0.0) if slope is None or offset is None else (float(slope), float(offset))


def _scaled(values: Array, slope: float, offset: float) -> Array:
    """Return gray levels: integers stay such if the scale is of integers, so that none is rounded."""
    if (slope, offset) == (1, 0):
        return values
    if values.dtype.kind in "iu" and slope.is_integer() and offset.is_integer():
        most = max(abs(int(values.min())), abs(int(values.max())))
        if most * abs(slope) + abs(offset) < _EXACT:
            return values.astype(np.int64) * int(slope) + int(offset)
    with np.errstate(all="ignore"):
        return values.astype(np.float64) * slope + offset
