"""Two models on the same labelled images: how many more or fewer of them one gets right."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from btray.core.cluster import connected
from btray.core.console import ProgressLine
from btray.core.errors import UserError
from btray.data.labelled import read_labelled
from btray.data.labels import require_known_labels
from btray.evaluation.scoring import score
from btray.model.bundle import Bundle, load_bundle
from btray.model.classifier import interpret


@dataclass(frozen=True)
class Comparison:
    """What a data set says of two models."""

    data: str
    images: int
    """Frames that both answered."""
    accuracy: float
    """Of the model that may be promoted."""
    promoted_accuracy: float
    """Of the model that it is compared with."""
    better: int
    """Frames that the first alone gets right."""
    worse: int
    """Frames that the second alone gets right."""

    @property
    def difference(self) -> float:
        """The first accuracy less the second."""
        return self.accuracy - self.promoted_accuracy

    def record(self) -> dict[str, Any]:
        """Return it for the history."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"on {self.images} images of {self.data} its accuracy is {self.accuracy:.3f}, that of the other "
            f"{self.promoted_accuracy:.3f}: {self.difference:+.3f} ({self.better} better, {self.worse} worse)"
        )


def measure(data: str, uri: str, other: str) -> Comparison:
    """Return how the bundles `uri` and `other` do on the test split of `data`, or on all of it if it has none.

    Raises UserError if one of them does not know a label, or if they answer no image in common.
    """
    bundles = [load_bundle(one) for one in (uri, other)]
    table = read_labelled(data, least_classes=1)
    if "test" in table["split"].to_pylist():
        table = table.filter(pc.equal(table["split"], "test"))
    for bundle in bundles:
        require_known_labels(set(table["label"].to_pylist()), bundle.manifest.classes, data)
    with connected(), ProgressLine(f"classifying {len(table)} images twice", keep=False):
        (rows, right), (other_rows, other_right) = (_right(bundle, table) for bundle in bundles)
    common = np.intersect1d(rows, other_rows)
    first, second = right[np.isin(rows, common)], other_right[np.isin(other_rows, common)]
    if len(first) == 0 or len(first) != len(second):
        raise UserError(f"--require {data}: the two models answer no image in common; look at it with jobs/audit.py")
    return Comparison(
        data, len(first), float(first.mean()), float(second.mean()), int((first & ~second).sum()),
        int((second & ~first).sum()),
    )  # fmt: skip


def _right(bundle: Bundle, table: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the row of each frame that was answered, and whether its label is right."""
    scores = score(bundle, np.arange(len(table)), table["uri"])
    labels = np.array(table["label"].to_pylist())[scores.row]
    predictions = interpret(scores.answers, bundle.manifest, None)
    return scores.row, labels == np.array([prediction.label for prediction in predictions])
