"""The history of a run: one record per epoch, how epochs are ranked, and `history.jsonl`, which keeps the records."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from btray import storage

HISTORY = "history.jsonl"
DIVERGED = -1.0
"""Score of an epoch whose loss is not finite: below every other epoch's. NaN would compare as the best or the worst,
depending on the order of the comparison."""
INTERRUPTED = -2.0
"""Score of a checkpoint written in the middle of an epoch: it must be resumed from, but never chosen as the best."""

# The validation loss decides between equal macro-F1 scores, which are common on small sets. Macro-F1 on fewer than
# 1,000 images moves in steps above 10 * 1e-4, so the loss never outweighs it.
_TIE_BREAK = 1e-4
_LARGEST_LOSS = 10.0


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch over all workers: a line of `history.jsonl`, whose keys are these fields in this order.

    Losses that are not finite are None, since JSON has no NaN. What is measured on validation images is None too in a
    refit, which holds no image out.
    """

    epoch: int
    """From 1."""
    train_loss: float | None
    """Mean cross-entropy of the training images, each weighted by its class, with label smoothing and mixup."""
    learning_rate: float
    """Of the last step."""
    images: int
    """Images that all workers trained on since the epoch began or was resumed."""
    images_per_second: float
    """`images` per second of training, validation aside."""
    feed_ratio: float
    """Share of the training time in which rank 0 did not wait for images."""
    val_loss: float | None
    """Mean cross-entropy of the validation images, unweighted."""
    val_macro_f1: float | None
    """F1 averaged over the classes that occur among the validation images."""
    val_accuracy: float | None
    score: float
    """Ranks epochs, see `score_of`; in a refit the number of epochs before, so that the last one is kept."""
    rejected: int
    """Scans that were readable when the run began and could not be read in this epoch."""
    seconds: float
    """Duration of the epoch with its validation."""


def score_of(macro_f1: float, loss: float) -> float:
    """Return the score of an epoch: its validation macro-F1, then a lower validation loss."""
    return macro_f1 - _TIE_BREAK * min(loss, _LARGEST_LOSS) if math.isfinite(loss) else DIVERGED


def finite_or_none(value: float) -> float | None:
    """Return the value, or None if it is not finite."""
    return value if math.isfinite(value) else None


def best_record(history: Sequence[EpochRecord]) -> EpochRecord:
    """Return the epoch with the highest score, the first of equal ones."""
    return max(history, key=lambda record: record.score)


def as_lines(history: Sequence[EpochRecord]) -> str:
    """Format the text of `history.jsonl`: one JSON object per epoch."""
    return "".join(json.dumps(asdict(record), allow_nan=False) + "\n" for record in history)


def read_history(run_uri: str) -> list[EpochRecord]:
    """Read the epochs that the run in `run_uri` has completed; none before its first one ended."""
    uri = storage.join(run_uri, HISTORY)
    if not storage.exists(uri):
        return []
    return [EpochRecord(**json.loads(line)) for line in storage.read_text(uri).splitlines()]
