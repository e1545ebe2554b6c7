"""Explanations: Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) over the last feature map, as pictures.

A heat map shows the evidence for a label, not the border of a lesion: it is as coarse as the feature map, and a
confident wrong answer has one too. The classifier stays as it is, so threads may explain while others predict.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from btray.data.preprocess import Frame, to_tensor
from btray.model.classifier import Classifier

Heat = npt.NDArray[np.float32]

# Red, green and blue at equal steps of heat: rising in lightness, so that it reads without telling red from green.
_COLOURS = np.array(
    [(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], np.float32
)


def heat_maps(classifier: Classifier, frames: npt.NDArray[np.uint8], labels: Sequence[str] | None = None) -> Heat:
    """Compute the evidence for `labels`, one per frame (default: the model's answer), in frames uint8 [n, size, size].

    Returns float32 [n, size, size] in 0 to 1: the hottest place of each frame is 1, and a frame without evidence for
    its label is 0 everywhere. Raises ValueError for a label that the model does not know.
    """
    if len(frames) == 0:
        return np.zeros(frames.shape, np.float32)
    for label in labels or ():
        if label not in classifier.classes:
            raise ValueError(f"label {label!r} is none of {', '.join(classifier.classes)}")
    outputs = None if labels is None else torch.tensor([classifier.classes.index(label) for label in labels])
    size = classifier.batch_size
    return np.concatenate(
        [
            _heat(classifier, frames[start : start + size], None if outputs is None else outputs[start : start + size])
            for start in range(0, len(frames), size)
        ]
    )


@torch.inference_mode(False)
def _heat(classifier: Classifier, frames: npt.NDArray[np.uint8], outputs: Tensor | None) -> Heat:
    """Compute heat maps of one batch for the network's `outputs` [n]; None: the largest of each frame."""
    network = classifier.network
    images = to_tensor(torch.from_numpy(frames).to(classifier.device)).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        features = network.feature_map(images)
    features.requires_grad_()
    with torch.enable_grad():
        logits = network.head(network.embed(features))
        rows = logits.argmax(1, keepdim=True) if outputs is None else outputs.to(logits.device)[:, None]
        # grad() leaves nothing in the parameters, as backward() would: other threads use them.
        (gradient,) = torch.autograd.grad(logits.gather(1, rows).sum(), features)
    with torch.no_grad():
        # Each channel is weighted by the mean of its gradient; only what speaks for the label counts (eq. 1 and 2).
        coarse = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).clamp(min=0)
        coarse /= coarse.amax((2, 3), keepdim=True).clamp(min=torch.finfo(coarse.dtype).tiny)
        heat = F.interpolate(coarse, frames.shape[1:], mode="bilinear", align_corners=False)[:, 0]
        return (heat / heat.amax((1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)).float().cpu().numpy()


def slice_png(frame: Frame) -> bytes:
    """Return a frame, uint8 [height, width], as a gray PNG."""
    return _png(frame)


def heat_png(heat: Heat) -> bytes:
    """Return a heat map, float [height, width] in 0 to 1, as a coloured PNG, the colder the more transparent."""
    alpha = np.rint(255 * heat).astype(np.uint8)
    return _png(np.dstack([_coloured(heat), alpha]))


def overlay(frame: Frame, heat: Heat, *, strength: float = 0.6) -> npt.NDArray[np.uint8]:
    """Return a frame, uint8 [height, width], under its heat map, float [height, width] in 0 to 1: [height, width, 3].

    `strength` in 0 to 1 is the opacity of the hottest place; without heat the slice stays as it is.
    """
    share = (strength * heat)[..., None]
    mixed = frame[..., None] * (1 - share) + _coloured(heat) * share
    return np.rint(mixed).astype(np.uint8)


def overlay_png(frame: Frame, heat: Heat, *, strength: float = 0.6) -> bytes:
    """Return the same as a PNG."""
    return _png(overlay(frame, heat, strength=strength))


def _coloured(heat: Heat) -> npt.NDArray[np.uint8]:
    steps = np.linspace(0, 1, len(_COLOURS))
    return np.dstack([np.rint(np.interp(heat, steps, band)) for band in _COLOURS.T]).astype(np.uint8)


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
