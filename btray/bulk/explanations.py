"""Grad-CAM pictures of classified scans as files: of all with chosen labels, or of the least certain."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from btray import storage
from btray.data.frames import Rejection
from btray.explain import heat_maps, overlay_png
from btray.model.classifier import Classifier

FOLDER = "_explained"
_COLUMNS = ("uri", "frame", "label", "confidence", "picture")


def explain_scans(classifier: Classifier, frames: npt.NDArray[np.uint8], labels: Sequence[str]) -> list[bytes]:
    """A PNG for each of `frames`, uint8 [n, size, size]: the slice, and over it what spoke for its label."""
    heats = heat_maps(classifier, frames, labels)
    return [overlay_png(frame, heat) for frame, heat in zip(frames, heats, strict=True)]


def write_explanations(
    folder: str, name: str, said: Sequence[Mapping[str, Any]], frames: npt.NDArray[np.uint8], classifier: Classifier
) -> None:
    """Write the pictures of `frames`, uint8 [n, size, size], into `folder`, and NAME.csv, which says what each shows.

    `said` are rows with uri, frame, label and confidence. What is there from an attempt before is written over.
    """
    if not said:
        return
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    for row, picture in zip(said, explain_scans(classifier, frames, [row["label"] for row in said]), strict=True):
        digest = hashlib.sha256(f"{row['uri']}\0{row['frame']}".encode("utf-8", "backslashreplace")).hexdigest()[:20]
        file = f"{digest}.png"
        storage.write_bytes(storage.join(folder, file), picture)
        table.writerow([row["uri"], row["frame"], row["label"], f"{row['confidence']:.4f}", file])
    storage.write_text(storage.join(folder, f"{name}.csv"), text.getvalue())


def read_frames(
    classifier: Classifier, scans: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], npt.NDArray[np.uint8]]:
    """Those of `scans` (place, frame) that can still be read, and their frames, uint8 [n, size, size]."""
    found = classifier.source.from_uris([scan["place"] for scan in scans])
    kept = [
        (scan, frames[scan["frame"]])
        for scan, frames in zip(scans, found, strict=True)
        if not isinstance(frames, Rejection) and scan["frame"] < len(frames)
    ]
    size = classifier.manifest.preprocess.size
    pictures = np.stack([frame for _, frame in kept]) if kept else np.zeros((0, size, size), np.uint8)
    return [scan for scan, _ in kept], pictures
