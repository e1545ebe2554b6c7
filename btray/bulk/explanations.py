"""Grad-CAM pictures of classified frames as files: of all with chosen labels, or of the least certain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from btray import storage
from btray.bulk.clinical.pseudonyms import Pseudonyms
from btray.bulk.report import ClassifiedFrame
from btray.data.frames import Rejection
from btray.data.rejections import as_csv
from btray.explain import heat_maps, overlay_png
from btray.model.classifier import Classifier

FOLDER = "_explained"
_COLUMNS = ("uri", "frame", "label", "confidence", "picture")

Pixels = npt.NDArray[np.uint8]
"""Frames as the network sees them, [n, size, size]."""


def explain_frames(classifier: Classifier, pixels: Pixels, labels: Sequence[str]) -> list[bytes]:
    """Return a PNG for each frame: the slice, and over it what spoke for its label."""
    heats = heat_maps(classifier, pixels, labels)
    return [overlay_png(frame, heat) for frame, heat in zip(pixels, heats, strict=True)]


def write_explanations(
    folder: str, name: str, frames: Sequence[ClassifiedFrame], pixels: Pixels, classifier: Classifier
) -> None:
    """Write the pictures of `frames` into `folder`, and NAME.csv, which says what each shows.

    What is there from an earlier attempt is overwritten.
    """
    if not frames:
        return
    rows = []
    pictures = explain_frames(classifier, pixels, [frame.label for frame in frames])
    for frame, picture in zip(frames, pictures, strict=True):
        file = f"{frame.picture_name}.png"
        storage.write_bytes(storage.join(folder, file), picture)
        rows.append((frame.uri, frame.frame, frame.label, f"{frame.confidence:.4f}", file))
    storage.write_bytes(storage.join(folder, f"{name}.csv"), as_csv(_COLUMNS, rows))


def read_frames(
    classifier: Classifier, frames: Sequence[ClassifiedFrame], pseudonyms: Pseudonyms | None = None
) -> tuple[list[ClassifiedFrame], Pixels]:
    """Return those of `frames` that can still be read and may be shown, and their pixels."""
    scans = classifier.source.from_uris(
        [pseudonyms.place(frame.place) if pseudonyms else frame.place for frame in frames]
    )
    readable = [
        (frame, scan[frame.frame])
        for frame, scan in zip(frames, scans, strict=True)
        if not isinstance(scan, Rejection) and frame.frame < len(scan) and not scan.names_patient(frame.frame)
    ]
    size = classifier.manifest.preprocess.size
    pixels = np.stack([picture for _, picture in readable]) if readable else np.zeros((0, size, size), np.uint8)
    return [frame for frame, _ in readable], pixels
