"""DICOM objects for tests, written by pydicom in every transfer syntax that can be encoded here.

Each holds identifiers of a patient who does not exist, which must not come out of any reader: `IDENTIFIERS`.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import imagecodecs
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID
from rle.rle import encode_frame

IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN = (f"1.2.840.10008.1.2{rest}" for rest in ("", ".1", ".1.99", ".2"))
RLE = "1.2.840.10008.1.2.5"
JPEG, JPEG_EXTENDED, JPEG_LOSSLESS, JPEG_LOSSLESS_1, JPEG_LS, JPEG_LS_NEAR, JPEG_2000, JPEG_2000_LOSSY = (
    f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70, 80, 81, 90, 91)
)
HTJ2K, HTJ2K_RPCL = "1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202"
DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"
LOSSLESS = (
    IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN, RLE, JPEG_LOSSLESS, JPEG_LOSSLESS_1, JPEG_LS, JPEG_2000, HTJ2K,
    HTJ2K_RPCL, DEFLATED_FRAMES,
)  # fmt: skip
"""Every syntax that keeps all pixels and is read."""
MR, ENHANCED_MR, SECONDARY = (f"1.2.840.10008.5.1.4.1.1.{rest}" for rest in ("4", "4.1", "7"))
STUDY, SERIES, INSTANCE = (f"1.2.826.0.1.3680043.10.{number}" for number in (1, 2, 3))
BIRTH_DATE, STUDY_DATE = "19500102", "20200304"
IDENTIFIERS = ("PLANTED", BIRTH_DATE, STUDY_DATE)
"""Parts of all that names the patient."""
_NATIVE = (IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN)


def _encode_rle(frame: np.ndarray) -> bytes:
    samples = frame.shape[2] if frame.ndim == 3 else 1
    return bytes(encode_frame(frame.tobytes(), *frame.shape[:2], samples, 8 * frame.dtype.itemsize, "<"))


def _deflate(frame: np.ndarray) -> bytes:
    packing = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    data = packing.compress(frame.tobytes()) + packing.flush()
    return data + bytes(len(data) % 2)


def _bits(frame: np.ndarray) -> int:
    return 8 if frame.dtype == np.uint8 else 16


ENCODERS: dict[str, Callable[[np.ndarray], bytes]] = {
    RLE: _encode_rle,
    JPEG: lambda frame: imagecodecs.jpeg8_encode(frame, level=95),
    JPEG_EXTENDED: lambda frame: imagecodecs.jpeg8_encode(frame, level=98, bitspersample=12),
    JPEG_LOSSLESS: lambda frame: imagecodecs.jpeg8_encode(
        frame, lossless=True, predictor=4, bitspersample=_bits(frame)
    ),
    JPEG_LOSSLESS_1: lambda frame: imagecodecs.jpeg8_encode(
        frame, lossless=True, predictor=1, bitspersample=_bits(frame)
    ),
    JPEG_LS: imagecodecs.jpegls_encode,
    JPEG_LS_NEAR: lambda frame: imagecodecs.jpegls_encode(frame, level=2),
    JPEG_2000: lambda frame: imagecodecs.jpeg2k_encode(frame, codecformat="j2k", reversible=True, level=0),
    JPEG_2000_LOSSY: lambda frame: imagecodecs.jpeg2k_encode(frame, codecformat="j2k", level=50),
    HTJ2K: imagecodecs.htj2k_encode,
    HTJ2K_RPCL: imagecodecs.htj2k_encode,
    DEFLATED_FRAMES: _deflate,
}
"""Encoders of one frame, uint8 or uint16 [height, width(, 3)], by transfer syntax."""


def mr_slice(pixels: np.ndarray, **changed: Any) -> Dataset:
    """Return an MR slice, or a multi-frame one, of `pixels` [(frames, )height, width(, 3)] without its pixel data.

    `changed` are elements by their keyword; None takes one out.
    """
    frames = pixels.shape[0] if pixels.ndim == (4 if pixels.shape[-1] == 3 else 3) else 0
    colour = pixels.shape[-1] == 3
    height, width = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    bits = 8 * pixels.dtype.itemsize
    dataset = Dataset()
    for name, value in {
        "SpecificCharacterSet": "ISO_IR 100", "ImageType": ["ORIGINAL", "PRIMARY", "M"], "SOPClassUID": MR,
        "SOPInstanceUID": INSTANCE, "StudyDate": STUDY_DATE, "AccessionNumber": "PLANTEDACCESSION", "Modality": "MR",
        "InstitutionName": "PLANTEDHOSPITAL", "SeriesDescription": "PLANTEDTEXT ax t1 post",
        "PatientName": "PLANTEDNAME^A", "PatientID": "PLANTEDID", "PatientBirthDate": BIRTH_DATE,
        "StudyInstanceUID": STUDY, "SeriesInstanceUID": SERIES, "BodyPartExamined": "HEAD",
        "ProtocolName": "PLANTEDTEXT", "ImagePositionPatient": [-50, -60, 12.5],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "SamplesPerPixel": 3 if colour else 1,
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2", "PlanarConfiguration": 0 if colour else None,
        "NumberOfFrames": frames or None, "Rows": height, "Columns": width, "PixelSpacing": [0.5, 0.5],
        "BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"), **changed,
    }.items():  # fmt: skip
        if value is not None:
            setattr(dataset, name, value)
    block = dataset.private_block(0x0009, "PLANTEDPRIVATE", create=True)
    block.add_new(0x01, "LO", "PLANTEDPRIVATE")
    return dataset


def write(
    dataset: Dataset,
    pixels: np.ndarray | None = None,
    *,
    syntax: str = EXPLICIT,
    streams: Sequence[bytes] | None = None,
    fragments: int = 1,
    offsets: str = "basic",
    meta: bool = True,
) -> bytes:
    """Return the file of an object. `streams` are its frames, if these are not what `pixels` give in `syntax`.

    `offsets` is "basic", "extended" or "none", `meta` whether the file has a preamble and a header of its own.
    """
    if syntax not in _NATIVE:
        if streams is None:
            frames = pixels if "NumberOfFrames" in dataset else [pixels]  # type: ignore[list-item]
            streams = [ENCODERS[syntax](np.ascontiguousarray(frame)) for frame in frames]  # type: ignore[union-attr]
        if offsets == "extended":
            dataset.PixelData, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = encapsulate_extended(
                list(streams)
            )
        else:
            dataset.PixelData = encapsulate(list(streams), fragments_per_frame=fragments, has_bot=offsets == "basic")
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
    elif pixels is not None:
        order = ">" if syntax == BIG_ENDIAN else "<"
        data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
        dataset.PixelData = data + bytes(len(data) % 2)
        dataset["PixelData"].VR = "OW" if pixels.dtype.itemsize > 1 else "OB"
    stream = io.BytesIO()
    if meta:
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = UID(syntax)
        dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID", MR)
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID", INSTANCE)
        dataset.file_meta.FileMetaInformationGroupLength = 0
        dataset.preamble = bytes(128)
    # pydicom does not know every syntax
    layout: dict[str, bool] = {"implicit_vr": syntax == IMPLICIT, "little_endian": syntax != BIG_ENDIAN}
    dataset.save_as(stream, **layout, force_encoding=True)
    return stream.getvalue()


def slice_file(pixels: np.ndarray, *, syntax: str = EXPLICIT, **changed: Any) -> bytes:
    """Return the file of one MR slice; `changed` are elements by their keyword."""
    return write(mr_slice(pixels, **changed), pixels, syntax=syntax)


def item(**elements: Any) -> Dataset:
    """Return a dataset of elements by their keyword, an item of a sequence."""
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def sequence(**elements: Any) -> Items:
    """Return a sequence of one item."""
    return Items([item(**elements)])


def element(group: int, number: int, vr: str, value: bytes = b"", *, length: int | None = None) -> bytes:
    """Return one element in explicit VR, little endian; `length` is what it says, if that is not true."""
    size = len(value) if length is None else length
    if vr in ("OB", "OW", "SQ", "UN", "UT"):
        return struct.pack("<HH2sHI", group, number, vr.encode(), 0, size) + value
    return struct.pack("<HH2sH", group, number, vr.encode(), size) + value


def with_element(data: bytes, added: bytes) -> bytes:
    """Return a file in explicit VR, little endian, with elements put before those of the patient (group 10)."""
    at = data.index(struct.pack("<HH2s", 0x0010, 0x0010, b"PN"))
    return data[:at] + added + data[at:]


def nested(depth: int, *, defined: bool = False) -> bytes:
    """Return a private sequence that holds another, and so on: `depth` of them."""
    inner = b""
    for _ in range(depth):
        if defined:
            body = struct.pack("<HHI", 0xFFFE, 0xE000, len(inner)) + inner
            inner = element(0x0009, 0x1002, "SQ", body)
        else:
            start, end = (0xFFFE, 0xE000, 0xFFFFFFFF), (0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
            body = struct.pack("<HHI", *start) + inner + struct.pack("<HHIHHI", *end)
            inner = element(0x0009, 0x1002, "SQ", length=0xFFFFFFFF) + body
    return inner
