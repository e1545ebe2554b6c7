"""Scoring: run a bundle over many stored scans with Ray Data and return its answers in the order of the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from btray.core.cluster import cpus, gpus, own_device
from btray.data.fingerprint import Fingerprints, unpack
from btray.data.frames import Rejection, scan_fingerprint, scan_patient
from btray.model.bundle import Bundle
from btray.model.classifier import Classifier, NetworkOutput
from btray.model.ood import Distribution

_BLOCK_ROWS = 128  # some seconds' work for an actor: few enough that all actors end at about the same time
_FLOATS = pa.list_(pa.float32())
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("frame", pa.int64()),
        ("fingerprint", pa.binary()),
        ("patient", pa.string()),
        ("code", pa.string()),
        ("message", pa.string()),
        ("logits", _FLOATS),
        ("features", _FLOATS),
    ]
)
"""What actors return: one line per frame, or one with a code and null logits per rejected scan."""


@dataclass(frozen=True)
class Scores:
    """The network's answers to n frames, and the inputs that gave none; both in the order of the input rows."""

    row: npt.NDArray[np.int64]
    """Row of the table that each frame belongs to, [n]."""
    answers: NetworkOutput
    """Logits and features of each frame."""
    fingerprints: Fingerprints
    """Of the scan that each frame belongs to, [n, VIEWS, LENGTH]."""
    rejected: pa.Table
    """Columns row, code, message."""
    patients: npt.NDArray[np.object_]
    """Digest of the patient whom the file of that scan names, [n]; None if it names none. It stays in memory."""
    ood_scores: npt.NDArray[np.float32] | None = None
    """How unlike the images that the network learnt from each frame is, [n]; None if that is not known."""

    def compared_with(self, distribution: Distribution | None) -> Scores:
        """Return the same with the out-of-distribution scores that `distribution` gives."""
        if distribution is None or len(self.row) == 0:
            return replace(self, ood_scores=None)
        return replace(self, ood_scores=distribution.scores(self.answers.features))

    def of_rows(self, rows: npt.NDArray[np.int64]) -> Scores:
        """Return the part that belongs to `rows` of the table; their numbers stay as they are."""
        rejected = self.rejected.filter(np.isin(self.rejected["row"].to_numpy(), rows))
        return replace(self.where(np.isin(self.row, rows)), rejected=rejected)

    def where(self, chosen: npt.NDArray[np.bool_]) -> Scores:
        """Return some of the frames, bool [n], and all rejected inputs."""
        return Scores(
            row=self.row[chosen],
            answers=NetworkOutput(self.answers.logits[chosen], self.answers.features[chosen]),
            fingerprints=self.fingerprints[chosen],
            patients=self.patients[chosen],
            rejected=self.rejected,
            ood_scores=None if self.ood_scores is None else self.ood_scores[chosen],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Scores]) -> Scores:
        """Join one or more, of different rows. Features of different networks cannot be compared with one another."""
        answered = [part for part in parts if len(part.row)] or parts[:1]
        ood_scores = [part.ood_scores for part in answered if part.ood_scores is not None]
        return cls(
            row=np.concatenate([part.row for part in answered]),
            answers=NetworkOutput(
                np.concatenate([part.answers.logits for part in answered]),
                np.concatenate([part.answers.features for part in answered]),
            ),
            fingerprints=np.concatenate([part.fingerprints for part in answered]),
            patients=np.concatenate([part.patients for part in answered]),
            rejected=pa.concat_tables([part.rejected for part in parts]),
            ood_scores=np.concatenate(ood_scores) if len(ood_scores) == len(answered) else None,
        )


def score(
    bundle: Bundle,
    rows: npt.NDArray[np.int64],
    uris: pa.ChunkedArray,
    *,
    batch_size: int | None = None,
    use_gpu: bool = False,
) -> Scores:
    """Classify stored scans; each gives an entry per frame or a rejection. Needs a connection to Ray.

    Args:
        bundle: the model.
        rows: numbers of the scans in some table, [n], by which the answers name them.
        uris: of the scans, [n].
        batch_size: images per forward pass; default: 16 on a CPU, 64 on a GPU.
        use_gpu: run one actor per GPU; else one per CPU.
    """
    table = _SCHEMA.empty_table()
    if len(rows):
        scans = pa.table({"row": rows, "uri": uris})
        blocks = [scans.slice(start, _BLOCK_ROWS) for start in range(0, len(scans), _BLOCK_ROWS)]
        scored = ray.data.from_arrow(blocks).map_batches(
            _Scorer,
            fn_constructor_args=(bundle, batch_size),
            # As large as a block, so that none is cut. None would say the same, but Ray refuses it for actors on GPUs.
            batch_size=_BLOCK_ROWS,
            **actor_options(len(blocks), use_gpu=use_gpu),
        )
        table = pa.concat_tables(scored.iter_batches(batch_size=None, batch_format="pyarrow"))
        table = table.sort_by([("row", "ascending"), ("frame", "ascending")])
    answered = table.filter(pc.equal(table["code"], ""))
    return Scores(
        row=answered["row"].to_numpy(),
        answers=NetworkOutput(_matrix(answered["logits"]), _matrix(answered["features"])),
        fingerprints=unpack(answered["fingerprint"].to_pylist()),
        patients=np.array(answered["patient"].to_pylist(), object),
        rejected=table.filter(pc.not_equal(table["code"], "")).select(["row", "code", "message"]),
    )


def actor_options(blocks: int, *, use_gpu: bool) -> dict[str, Any]:
    """Return the arguments of `map_batches` that describe its actors: at most one per GPU or CPU, and per block."""
    actors = max(1, min(gpus() if use_gpu else int(cpus()), blocks))
    return {
        # Less than a CPU each, so that the tasks that feed them find some CPU left.
        "num_cpus": min(0.9, 0.9 * cpus() / actors),
        "num_gpus": 1 if use_gpu else None,
        "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
    }


def _matrix(lists: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """Return lists of equal length as [n, length]; [0, 0] if there is none."""
    values = np.array(lists.combine_chunks().flatten(), np.float32)  # a copy: torch needs memory that it may write
    return values.reshape(len(lists), -1) if len(lists) else np.zeros((0, 0), np.float32)


class _Scorer:
    """An actor that reads, decodes and classifies: a classifier on its own device."""

    def __init__(self, bundle: Bundle, batch_size: int | None) -> None:
        self.classifier = Classifier(bundle, device=own_device(), batch_size=batch_size)

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> pa.Table:
        source = self.classifier.source
        answered: list[dict[str, Any]] = []
        rejected: list[dict[str, Any]] = []
        frames: list[npt.NDArray[np.uint8]] = []
        for row, scan in zip(batch["row"].tolist(), source.scans(batch["uri"].tolist()), strict=True):
            if isinstance(scan, Rejection):
                rejected.append({"row": row, "frame": 0, "code": scan.code, "message": scan.message})
                continue
            patient = scan_patient(scan) or None
            entry = {"row": row, "fingerprint": scan_fingerprint(scan), "patient": patient, "code": "", "message": ""}
            answered += [entry | {"frame": number} for number in range(len(scan.frames))]
            frames += source.frames_of(scan)
        if frames:
            output = self.classifier.answer(np.stack(frames))
            for record, logits, features in zip(answered, output.logits, output.features, strict=True):
                record.update(logits=logits, features=features)
        return pa.Table.from_pylist(answered + rejected, schema=_SCHEMA)
