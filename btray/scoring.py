"""Run a bundle over many stored scans with Ray Data and bring back what it said, in order; metrics are made of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from btray.bundle import Bundle
from btray.classifier import Classifier
from btray.cluster import cpus
from btray.frames import Rejection

_BLOCK_ROWS = 128

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Scores:
    """What the network said of n frames, and which inputs gave none; both in the order of the input rows."""

    row: npt.NDArray[np.int64]
    """Row of the table that each frame belongs to, [n]."""
    logits: npt.NDArray[np.float32]
    """Raw outputs, [n, classes]."""
    rejected: pa.Table
    """Columns row, code, message."""

    def of_rows(self, rows: npt.NDArray[np.int64]) -> Scores:
        """The part that belongs to `rows` of the table; their numbers stay as they are."""
        chosen = np.isin(self.row, rows)
        return Scores(
            self.row[chosen], self.logits[chosen], self.rejected.filter(np.isin(self.rejected["row"].to_numpy(), rows))
        )


def score(bundle: Bundle, rows: npt.NDArray[np.int64], uris: pa.ChunkedArray, *, batch_size: int = 64) -> Scores:
    """Classify every scan of `uris`, which stand in `rows` of some table; each gives an entry a frame or a rejection.

    Needs a connection to Ray. Actors read, decode and predict in one go and take less than a CPU each, so that they
    never starve what feeds them.
    """
    wanted = pa.table({"row": rows, "uri": uris})
    blocks = [wanted.slice(start, _BLOCK_ROWS) for start in range(0, len(wanted), _BLOCK_ROWS)]
    actors = max(1, min(int(cpus()), len(blocks)))
    scored = ray.data.from_arrow(blocks).map_batches(
        _Scorer,
        fn_constructor_args=(bundle, batch_size),
        batch_size=None,
        num_cpus=min(0.9, 0.9 * cpus() / actors),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
    )
    table = pa.concat_tables(scored.iter_batches(batch_size=None, batch_format="pyarrow"))
    table = table.sort_by([("row", "ascending"), ("frame", "ascending")])
    answered = table.filter(pc.equal(table["code"], ""))
    return Scores(
        row=answered["row"].to_numpy(),
        logits=np.array(answered["logits"].to_pylist() or np.zeros((0, len(bundle.manifest.classes))), np.float32),
        rejected=table.filter(pc.not_equal(table["code"], "")).select(["row", "code", "message"]),
    )


class _Scorer:
    """One actor: a classifier on its device."""

    def __init__(self, bundle: Bundle, batch_size: int) -> None:
        self.classifier = Classifier(bundle, batch_size=batch_size)

    def __call__(self, batch: Arrays) -> pa.Table:
        entries: list[tuple[int, int, str, str]] = []
        frames = []
        for row, found in zip(batch["row"], self.classifier.source.from_uris(batch["uri"].tolist()), strict=True):
            if isinstance(found, Rejection):
                entries.append((int(row), 0, found.code, found.message))
                continue
            entries += [(int(row), number, "", "") for number in range(len(found))]
            frames += found
        logits = iter(self.classifier.logits(np.stack(frames)).tolist() if frames else ())
        columns = zip(*entries, strict=True)
        named = dict(zip(("row", "frame", "code", "message"), map(list, columns), strict=True))
        said = [next(logits) if code == "" else None for code in named["code"]]
        return pa.table({**named, "logits": pa.array(said, pa.list_(pa.float32()))})
