"""Whether a model may answer in bfloat16: its answers are compared with those in float32 when its bundle is made."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from btray.data.fingerprint import representative
from btray.data.frames import FrameSource, PackedScan, Rejection
from btray.data.preprocess import Frame, make_frame
from btray.model.bundle import Bundle
from btray.model.classifier import Classifier
from btray.model.engines import supports_bf16
from btray.model.manifest import Agreement

_log = logging.getLogger(__name__)

MOST_IMAGES = 1024
"""Validation images that are compared, at most."""
_AT_A_TIME = 32  # scans in memory


def measure_agreement(bundle: Bundle, uris: Sequence[str]) -> Agreement | None:
    """Compare the answers of a model that is being made on one frame of each of some stored scans.

    Returns None, and says why, if this machine's CPU does not compute in bfloat16 or no scan can be read.
    """
    device = torch.device("cpu")
    if not supports_bf16(device):
        _log.info("this CPU has no bfloat16: --precision bf16 is not measured and will be refused for this model")
        return None
    chosen = uris[:: -(-len(uris) // MOST_IMAGES) or 1]
    frames = list(_frames(FrameSource(bundle.manifest.preprocess), chosen))
    if not frames:
        return None
    exact, rounded = (
        Classifier.calibrated(
            Classifier(bundle, device=device, precision=precision).answer(np.stack(frames)).logits,
            bundle.manifest.calibration.temperature,
        )
        for precision in ("float32", "bf16")
    )
    return Agreement(
        images=len(frames),
        equal_labels=float((exact.argmax(1) == rounded.argmax(1)).mean()),
        largest_difference=float(np.abs(exact - rounded).max()),
    )


def _frames(source: FrameSource, uris: Sequence[str]) -> Iterator[Frame]:
    for start in range(0, len(uris), _AT_A_TIME):
        for scan in source.scans(uris[start : start + _AT_A_TIME]):
            if not isinstance(scan, Rejection):
                # those of a pack of frames are made already
                frame = representative(scan.frames)
                yield frame if isinstance(scan, PackedScan) else make_frame(frame, source.preprocess)
