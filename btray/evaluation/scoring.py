"""Run a bundle over many stored scans with Ray Data and bring back what it said, in order; metrics are made of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from btray.core.cluster import cpus, gpus, own_device
from btray.data.fingerprint import Fingerprints, fingerprint_of, unpack
from btray.data.frames import Rejection
from btray.model.bundle import Bundle
from btray.model.classifier import Classifier, NetworkOutput

_BLOCK_ROWS = 128

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Scores:
    """What the network said of n frames, and which inputs gave none; both in the order of the input rows."""

    row: npt.NDArray[np.int64]
    """Row of the table that each frame belongs to, [n]."""
    answers: NetworkOutput
    """Logits and features of each frame."""
    fingerprints: Fingerprints
    """Of the scan that each frame belongs to, [n, VIEWS, LENGTH]."""
    rejected: pa.Table
    """Columns row, code, message."""

    def of_rows(self, rows: npt.NDArray[np.int64]) -> Scores:
        """The part that belongs to `rows` of the table; their numbers stay as they are."""
        rejected = self.rejected.filter(np.isin(self.rejected["row"].to_numpy(), rows))
        return self.where(np.isin(self.row, rows), rejected)

    def where(self, chosen: npt.NDArray[np.bool_], rejected: pa.Table) -> Scores:
        """The frames of a mask [n], with other rejections."""
        answers = NetworkOutput(self.answers.logits[chosen], self.answers.features[chosen])
        return Scores(self.row[chosen], answers, self.fingerprints[chosen], rejected)


def score(
    bundle: Bundle,
    rows: npt.NDArray[np.int64],
    uris: pa.ChunkedArray,
    *,
    batch_size: int | None = None,
    use_gpu: bool = False,
) -> Scores:
    """Classify every scan of `uris`, which stand in `rows` of some table; each gives an entry a frame or a rejection.

    Needs a connection to Ray. Actors read, decode and predict in one go, each on a GPU of its own with `use_gpu`.
    """
    if len(rows) == 0:
        return _no_scores()
    wanted = pa.table({"row": rows, "uri": uris})
    blocks = [wanted.slice(start, _BLOCK_ROWS) for start in range(0, len(wanted), _BLOCK_ROWS)]
    scored = ray.data.from_arrow(blocks).map_batches(
        _Scorer,
        fn_constructor_args=(bundle, batch_size),
        batch_size=_BLOCK_ROWS,  # a block; None, which would do, Ray refuses to actors with GPUs
        **scorers(len(blocks), use_gpu=use_gpu),
    )
    table = pa.concat_tables(scored.iter_batches(batch_size=None, batch_format="pyarrow"))
    table = table.sort_by([("row", "ascending"), ("frame", "ascending")])
    answered = table.filter(pc.equal(table["code"], ""))
    return Scores(
        row=answered["row"].to_numpy(),
        answers=NetworkOutput(_matrix(answered["logits"]), _matrix(answered["features"])),
        fingerprints=unpack(answered["fingerprint"].to_pylist()),
        rejected=table.filter(pc.not_equal(table["code"], "")).select(["row", "code", "message"]),
    )


def scorers(blocks: int, *, use_gpu: bool) -> dict[str, Any]:
    """What the actors are, as `map_batches` takes it: no more than GPUs or CPUs, or blocks to score.

    They take less than a CPU each, so that they never starve what feeds them.
    """
    actors = max(1, min(gpus() if use_gpu else int(cpus()), blocks))
    return {
        "num_cpus": min(0.9, 0.9 * cpus() / actors),
        "num_gpus": 1 if use_gpu else None,
        "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
    }


def _no_scores() -> Scores:
    nothing = np.zeros((0, 0), np.float32)
    rejected = pa.table({"row": pa.array([], pa.int64()), "code": pa.array([], pa.string()), "message": []})
    return Scores(np.zeros(0, np.int64), NetworkOutput(nothing, nothing), unpack([]), rejected)


def _matrix(lists: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """Lists of equal length as [n, length]; [0, 0] where there is none."""
    values = np.array(lists.combine_chunks().flatten(), np.float32)  # a copy: torch wants to own what it reads
    return values.reshape(len(lists), -1) if len(lists) else np.zeros((0, 0), np.float32)


class _Scorer:
    """One actor: a classifier on its device."""

    def __init__(self, bundle: Bundle, batch_size: int | None) -> None:
        self.classifier = Classifier(bundle, device=own_device(), batch_size=batch_size)

    def __call__(self, batch: Arrays) -> pa.Table:
        source = self.classifier.source
        entries: list[tuple[int, int, bytes, str, str]] = []
        frames = []
        for row, scan in zip(batch["row"], source.scans(batch["uri"].tolist()), strict=True):
            if isinstance(scan, Rejection):
                entries.append((int(row), 0, b"", scan.code, scan.message))
                continue
            fingerprint = fingerprint_of(scan.frames)
            entries += [(int(row), number, fingerprint, "", "") for number in range(len(scan.frames))]
            frames += source.frames_of(scan)
        columns = zip(*entries, strict=True)
        named = dict(zip(("row", "frame", "fingerprint", "code", "message"), map(list, columns), strict=True))
        answers = (
            self.classifier.answer(np.stack(frames)) if frames else NetworkOutput(*[np.zeros((0, 0), np.float32)] * 2)
        )
        for name, values in (("logits", answers.logits), ("features", answers.features)):
            said = iter(values.tolist())
            rows = [next(said) if code == "" else None for code in named["code"]]
            named[name] = pa.array(rows, pa.list_(pa.float32()))
        return pa.table(named)
