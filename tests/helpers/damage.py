"""Whole pictures in every format, what transfers do to files, and how much of it is seen: for the damage tests."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from btray.data.scans import ScanRejected, decode
from btray.phantoms import CLASSES, encoded_phantom, phantom
from tests.helpers.jpeg_stream import fault_of
from tests.helpers.scan_corpus import encode

KINDS = ("cut", "hole", "lost", "flip")
PROMISED = {"JPEG": KINDS[:3], "PNG": KINDS, "TIFF": KINDS[:1], "WebP": KINDS[:1], "BMP": KINDS[:1]}
"""The kinds of damage that must be noticed if it is seen, by format; the others can leave a valid file."""

_SEEN_LEVELS, _SEEN_SHARE = 24, 0.05
_WRITERS: dict[str, tuple[Callable[[Image.Image], bytes], ...]] = {
    "PNG": (
        lambda image: encode(image, "PNG"),
        lambda image: encode(image.convert("RGB"), "PNG"),
        lambda image: encode(np.asarray(image.convert("L")).astype(np.uint16) * 257, "PNG"),
    ),
    "TIFF": (
        lambda image: encode(image, "TIFF"),
        lambda image: encode(image, "TIFF", compression="tiff_lzw"),
        lambda image: encode(image, "TIFF", compression="tiff_adobe_deflate"),
        lambda image: encode(image, "TIFF", compression="packbits"),
        lambda image: encode(image, "TIFF", compression="jpeg"),
        lambda image: encode(np.asarray(image.convert("L")).astype(np.uint16) * 257, "TIFF"),
    ),
    "WebP": (
        lambda image: encode(image.convert("RGB"), "WEBP", quality=80),
        lambda image: encode(image.convert("RGB"), "WEBP", lossless=True),
    ),
    "BMP": (lambda image: encode(image.convert("L"), "BMP"), lambda image: encode(image.convert("RGB"), "BMP")),
}


@dataclass
class Tally:
    """What became of the damaged files of one format."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: {kind: Counter() for kind in KINDS})

    def share_rejected(self, kinds: tuple[str, ...], *, valid_count: bool) -> float:
        """Return the share of damage that is seen and was rejected; files that are valid may be left out."""
        seen = sum((self.outcomes[kind] for kind in kinds), Counter[str]())
        missed = seen["accepted"] + valid_count * seen["accepted, valid"]
        return seen["rejected"] / max(1, seen["rejected"] + missed)

    def __str__(self) -> str:
        return "\n".join(
            f"  {kind:5}" + "".join(f"{counts[name]:6} {name}" for name in sorted(counts))
            for kind, counts in self.outcomes.items()
        )


def whole_phantoms(kind: str, count: int) -> Iterator[bytes]:
    """Yield phantoms in a format, in all its variants in turn."""
    for seed in range(count):
        label = CLASSES[seed % len(CLASSES)]
        if kind == "JPEG":
            yield encoded_phantom(label, seed)
        else:
            yield _WRITERS[kind][seed % len(_WRITERS[kind])](Image.fromarray(phantom(label, seed)))


def whole_slices(kind: str, folder: Path, count: int) -> Iterator[bytes]:
    """Yield real slices in a format: as they are stored if some are, else written again."""
    suffix = ".png" if kind == "PNG" else ".jpg"
    paths = sorted(folder.rglob(f"*{suffix}"))
    for number, path in enumerate(random.Random(0).sample(paths, count)):
        if kind in ("JPEG", "PNG"):
            yield path.read_bytes()
        else:
            yield _WRITERS[kind][number % len(_WRITERS[kind])](Image.open(path).convert("L"))


def damage(data: bytes, file_format: str, kind: str, rng: random.Random) -> bytes:
    """Return `data` after an accident of a kind: in the entropy-coded data of a JPEG, behind the magic of others."""
    start, end = _codes(data) if file_format == "JPEG" else (16, len(data))
    at = rng.randrange(start, end)
    if kind == "cut":
        return data[:at] + (rng.choice((b"", b"\xff\xd9")) if file_format == "JPEG" else b"")
    if kind == "hole":
        # up to the end, too: downloads that reserve room first leave it so
        size = min(end - at, rng.choice((16, 64, 256, 512, 1024, 4096, len(data))))
        return data[:at] + bytes(size) + data[at + size :]
    if kind == "lost":
        return data[:at] + data[min(end, at + rng.choice((1, 1, 2, 16, 512))) :]
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _codes(data: bytes) -> tuple[int, int]:
    """Return where the entropy-coded data of a JPEG begins and ends."""
    at = 2
    while data[at + 1] != 0xDA:  # a scan
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big"), data.index(b"\xff\xd9", at)


def tally(wholes: list[bytes], file_format: str, each: int, rng: random.Random, min_side: int | None = None) -> Tally:
    """Damage each of `wholes` `each` times, and say what became of it. No whole one may be rejected."""
    counted = Tally()
    for whole in wholes:
        picture = decode(whole, min_side=min_side).frames[0]
        for number in range(each):
            kind = KINDS[number % len(KINDS)]
            damaged = damage(whole, file_format, kind, rng)
            counted.outcomes[kind][_outcome(damaged, picture, file_format, min_side)] += 1
    return counted


def _outcome(damaged: bytes, picture: np.ndarray, file_format: str, min_side: int | None) -> str:
    try:
        found = decode(damaged, min_side=min_side).frames[0]
    except ScanRejected:
        lenient = _lenient(damaged, min_side)
        return "rejected" if lenient is None or _is_seen(lenient, picture) else "rejected, not seen"
    if not _is_seen(found, picture):
        return "accepted, not seen"
    return "accepted, valid" if _is_valid(damaged, file_format) else "accepted"


def _is_valid(damaged: bytes, file_format: str) -> bool:
    """Return whether no reader could know from the file alone that it is damaged, as far as that can be told here."""
    if file_format != "JPEG":
        return False
    try:
        return fault_of(damaged) is None
    except NotImplementedError:
        return False


def _is_seen(found: np.ndarray, picture: np.ndarray) -> bool:
    if found.shape != picture.shape:
        return True
    scale = np.iinfo(picture.dtype).max / 255
    differs = np.abs(found.astype(np.int32) - picture.astype(np.int32)) > _SEEN_LEVELS * scale
    return bool(differs.mean() > _SEEN_SHARE)


def _lenient(damaged: bytes, min_side: int | None) -> np.ndarray | None:
    """Return what a reader that forgives everything makes of a file; None if even that one gives up."""
    ImageFile.LOAD_TRUNCATED_IMAGES, before = True, ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        image = Image.open(io.BytesIO(damaged))
        image.draft("L", (min_side, min_side) if min_side else None)
        return np.asarray(image if image.mode.startswith(("L", "I;16")) else image.convert("L"))
    except Exception:
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
