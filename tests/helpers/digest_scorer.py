"""Show which tensors the actors of `btray.evaluation.scoring` hand to the network. Ray's workers import it."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from btray.data.preprocess import to_tensor
from btray.evaluation import scoring
from btray.model.classifier import NetworkOutput


class DigestScorer(scoring._Scorer):
    """Gives digests of the tensors in place of what the network says of them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.classifier.answer = answer_digests  # type: ignore[method-assign]


def answer_digests(frames: np.ndarray) -> NetworkOutput:
    """`digests` in the place of the logits."""
    return NetworkOutput(digests(frames), np.zeros((len(frames), 0), np.float32))


def digests(frames: np.ndarray) -> np.ndarray:
    """The SHA-256 of the tensor of each of `frames` (uint8 [n, size, size]), as float32 [n, 32]."""
    tensors = to_tensor(torch.from_numpy(frames)).numpy()
    return np.array([list(hashlib.sha256(tensor.tobytes()).digest()) for tensor in tensors], np.float32)
