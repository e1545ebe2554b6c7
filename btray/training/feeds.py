"""Frames for training: decoded by Ray Data, kept in memory while they fit, otherwise streamed again every epoch."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import ray.train
import torch
from ray.data import DataIterator, Dataset
from torch import Tensor

from btray.data.fingerprint import NO_FINGERPRINT, fingerprint_of, representative
from btray.data.frames import FRAMES_PER_SCAN, FrameSource, Rejection
from btray.data.modality import looks_like_ct
from btray.data.scans import Scan
from btray.training.feeding.loader import NOTHING, Batch
from btray.training.plan import Plan

_log = logging.getLogger(__name__)

# Rows per block of the decoding pipeline: some 9 MB of frames of 192 x 192, a second's work for one core.
_BLOCK_ROWS = 256
# CPUs of a task that decodes frames to be kept. When a node dies, its frames are decoded anew while the workers hold
# the rest of every CPU: if a task took more than that leaves, it and the workers would wait for each other for ever.
_KEPT_CPUS = 0.05
TRAINING_CPUS = 1.0 - _KEPT_CPUS
"""Most CPUs that a training worker may request."""
# Batches held back for shuffling when data are streamed; the driver has put the rows in random order before.
_SHUFFLED_BATCHES = 32
# The columns that the driver looks at: all but the frames.
_SURVEYED = ["sample", "label", "digest", "fingerprint", "patient", "is_ct", "code", "message"]

Arrays = dict[str, npt.NDArray[Any]]


def decode_rows(
    table: pa.Table, source: FrameSource, *, num_cpus: float = 1.0, kept: bool = False, find_ct: bool = False
) -> Dataset:
    """Decode the scans of `table` (columns row, uri, label as a number) to one row per frame.

    Columns: sample, label, frame (uint8 [size, size]), digest (of the frame), fingerprint (of the scan, packed),
    patient (a digest, empty if the file names none), is_ct (of the scan, false unless `find_ct`), code and message (of
    a rejection, whose frame is black). Nothing runs before the data set is used; each task then takes `num_cpus`, or,
    for frames that are `kept` while workers train, the little that these leave, with as many tasks at a time as there
    are CPUs. A cluster without a CPU grows by whole CPUs, so there `num_cpus` holds.
    """
    blocks = [table.slice(start, _BLOCK_ROWS) for start in range(0, len(table), _BLOCK_ROWS)]
    tasks = min(len(blocks), int(ray.cluster_resources().get("CPU", 0.0))) if kept else 0
    return ray.data.from_arrow(blocks).map_batches(
        partial(decode_block, source=source, find_ct=find_ct),
        batch_size=None,
        batch_format="numpy",
        num_cpus=_KEPT_CPUS if tasks else num_cpus,
        compute=ray.data.TaskPoolStrategy(size=tasks or None),
    )


def survey(frames: Dataset, *, keep: int = 0) -> tuple[Dataset | None, pa.Table]:
    """Collect all columns of decoded rows but their frames, by sample.

    Up to `keep` rows stay in Ray's object store with their frames, as the data set that is returned first. Frames are
    counted, not scans, of which some have hundreds: if there are more than `keep`, all are released and it is None.
    """
    if not keep:
        blocks = frames.select_columns(_SURVEYED).iter_batches(batch_size=None, batch_format="pyarrow")
        return None, pa.concat_tables(map(_without_frames, blocks)).sort_by("sample")
    kept: list[Any] = []  # references to blocks, which stay on the nodes where they were decoded
    surveyed, count = [], 0
    select = ray.remote(num_cpus=0)(_without_frames)
    for bundle in frames.iter_internal_ref_bundles():
        for block in bundle.blocks:
            if rows := block.metadata.num_rows:
                surveyed.append(select.remote(block.ref))
                count += rows
                kept.append(block.ref)
            if count > keep:
                kept.clear()
    columns: list[pa.Table] = ray.get(surveyed)
    return (ray.data.from_arrow_refs(kept) if kept else None), pa.concat_tables(columns).sort_by("sample")


def _without_frames(block: pa.Table) -> pa.Table:
    return block.select(_SURVEYED).take(np.arange(len(block)))  # a copy, which does not hold the frames


def decode_block(batch: Arrays, source: FrameSource, *, find_ct: bool = False) -> Iterator[Arrays]:
    """Yield blocks of up to _BLOCK_ROWS frames as they are decoded: scans of many frames do not fill the memory."""
    scans = source.scans(batch["uri"].tolist())
    made = partial(_frames, source, find_ct)
    frames = chain.from_iterable(map(made, batch["row"].tolist(), batch["label"].tolist(), scans))
    while rows := list(islice(frames, _BLOCK_ROWS)):
        columns = dict(zip([*_SURVEYED, "frame"], zip(*rows, strict=True), strict=True))
        # Fingerprints as objects: numpy's own bytes lose the zeros at their end.
        yield {name: np.array(values, object if name == "fingerprint" else None) for name, values in columns.items()}


def _frames(
    source: FrameSource, find_ct: bool, row: int, label: int, scan: Scan | Rejection
) -> Iterator[tuple[Any, ...]]:
    """Yield the values of _SURVEYED and the frame itself, for each frame of a scan."""
    if not isinstance(scan, Rejection) and len(scan.frames) > FRAMES_PER_SCAN:
        # The sample numbers of its last frames would be those of the next scan.
        reason = f"{len(scan.frames)} frames, more than the {FRAMES_PER_SCAN} that training takes per scan: split it"
        scan = Rejection("bomb", reason, retryable=False)
    if isinstance(scan, Rejection):
        frames = [np.zeros((source.preprocess.size,) * 2, np.uint8)]
        fingerprint, patient, code, message = NO_FINGERPRINT, "", scan.code, scan.message
    else:
        patient = next((info.patient_key for info in scan.slices or () if info.patient_key), "")
        frames, fingerprint, code, message = source.frames_of(scan), fingerprint_of(scan.frames), "", ""
    is_ct = find_ct and looks_like_ct(representative(frames))
    for number, frame in enumerate(frames):
        digest = hashlib.blake2b(frame.tobytes(), digest_size=16).hexdigest()
        yield row * FRAMES_PER_SCAN + number, label, digest, fingerprint, patient, is_ct, code, message, frame


class StreamSplit(ray.train.DataConfig):
    """Splits streamed rows among the workers, so that no validation image is lost.

    Ray makes the shares equal by dropping rows: fine for training, but a metric must count every image.
    """

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        """Return one mapping per worker, from the name of each data set to the worker's share."""
        equal = {name: rows for name, rows in datasets.items() if name != "validation"}
        shares: list[dict[str, DataIterator]]
        shares = super().configure(equal, world_size, worker_handles, worker_node_ids, **kwargs)
        rows = datasets.get("validation")
        if rows is not None:
            rows.context.execution_options = self.default_ingest_options()
            parts = rows.streaming_split(world_size, equal=False, locality_hints=worker_node_ids)
            for share, part in zip(shares, parts, strict=True):
                share["validation"] = part
        return shares


class StreamFeed:
    """Frames decoded anew every epoch, each worker reading its own share; for data larger than memory."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.weights = plan, plan.loss_weights()
        self.share = max(1, plan.batch_size // ray.train.get_context().get_world_size())
        self.rejected = 0  # scans that were readable when the run began

    def train(self, epoch: int, trained: Tensor = NOTHING) -> Iterator[Batch]:
        """Yield this worker's batches of one epoch: rows in the driver's random order, shuffled again in a buffer.

        All workers get equally many, also if there are fewer rows than when the run began.
        """
        left = self.plan.steps_left(len(trained))
        stream = self._stream(
            "train",
            drop_last=True,  # so that all steps weigh the same
            local_shuffle_buffer_size=_SHUFFLED_BATCHES * self.share,
            local_shuffle_seed=self.plan.config.seed + epoch,
        )
        first = self.plan.steps_per_epoch - left
        for batch in islice(stream, first, first + left):
            left -= 1
            yield batch
        for _ in range(left):
            yield replace(batch, weights=torch.zeros_like(batch.weights))

    def validation(self) -> Iterator[Batch]:
        """Yield this worker's share of the held-out samples."""
        return self._stream("validation")

    def _stream(self, name: str, **options: Any) -> Iterator[Batch]:
        shard = ray.train.get_dataset_shard(name)
        for arrays in shard.iter_batches(batch_size=self.share, batch_format="numpy", **options):
            readable = arrays["code"] == ""
            for code, message in zip(arrays["code"][~readable], arrays["message"][~readable], strict=True):
                self.rejected += 1
                _log.warning("rejected, though readable when the run began (%s): %s", code, message)
            if readable.any():
                kept = {key: torch.from_numpy(arrays[key][readable]) for key in ("frame", "label", "sample")}
                # A scan that was exchanged since may have more frames than it had.
                places = np.searchsorted(self.plan.samples, kept["sample"]).clip(max=len(self.weights) - 1)
                weights = torch.from_numpy(self.weights[places])
                yield Batch(kept["frame"], kept["label"], kept["sample"], weights)
