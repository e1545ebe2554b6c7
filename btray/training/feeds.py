"""Frames for training, decoded by Ray Data; `btray.training.feeding` brings them to the workers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from ray.data import Dataset

from btray.data.fingerprint import NO_FINGERPRINT, representative
from btray.data.frames import FRAMES_PER_SCAN, FrameSource, Rejection, scan_fingerprint, scan_patient
from btray.data.modality import looks_like_ct
from btray.data.preprocess import Frame
from btray.data.scans import Scan

# Rows per block of the decoding pipeline: some 9 MB of frames of 192 x 192, a second's work for one core.
_BLOCK_ROWS = 256
# CPUs of a task that decodes frames to be kept. When a node dies, its frames are decoded anew while the workers hold
# the rest of every CPU: if a task took more than that leaves, it and the workers would wait for each other for ever.
_KEPT_CPUS = 0.05
TRAINING_CPUS = 1.0 - _KEPT_CPUS
"""Most CPUs that a training worker may request."""
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
    scans = _scans(batch, source)
    frames = chain.from_iterable(map(partial(_surveyed, source, find_ct), batch["row"], batch["label"], scans))
    return _in_blocks([*_SURVEYED, "frame"], frames)


def stream_block(batch: Arrays, source: FrameSource) -> Iterator[Arrays]:
    """Do the same for scans that were surveyed before: columns sample, code, message and frame alone."""
    frames = chain.from_iterable(map(partial(_streamed, source), batch["row"], _scans(batch, source)))
    return _in_blocks(["sample", "code", "message", "frame"], frames)


def _in_blocks(names: list[str], frames: Iterator[tuple[Any, ...]]) -> Iterator[Arrays]:
    while rows := list(islice(frames, _BLOCK_ROWS)):
        columns = dict(zip(names, zip(*rows, strict=True), strict=True))
        # Fingerprints as objects: numpy's own bytes lose the zeros at their end.
        yield {name: np.array(values, object if name == "fingerprint" else None) for name, values in columns.items()}


def _scans(batch: Arrays, source: FrameSource) -> Iterator[Scan | Rejection]:
    for scan in source.scans(batch["uri"].tolist()):
        if not isinstance(scan, Rejection) and len(scan.frames) > FRAMES_PER_SCAN:
            # The sample numbers of its last frames would be those of the next scan.
            count = len(scan.frames)
            reason = f"{count} frames, more than the {FRAMES_PER_SCAN} that training takes per scan: split it"
            yield Rejection("bomb", reason, retryable=False)
        else:
            yield scan


def _surveyed(
    source: FrameSource, find_ct: bool, row: int, label: int, scan: Scan | Rejection
) -> Iterator[tuple[Any, ...]]:
    """Yield the values of _SURVEYED and the frame itself, for each frame of a scan."""
    fingerprint, patient, is_ct = NO_FINGERPRINT, "", False
    if not isinstance(scan, Rejection):
        patient = scan_patient(scan)
        fingerprint = scan_fingerprint(scan)
    frames = list(_streamed(source, row, scan))
    if find_ct:
        is_ct = looks_like_ct(representative([frame for *_, frame in frames]))
    for sample, code, message, frame in frames:
        digest = hashlib.blake2b(frame.tobytes(), digest_size=16).hexdigest()
        yield sample, label, digest, fingerprint, patient, is_ct, code, message, frame


def _streamed(source: FrameSource, row: int, scan: Scan | Rejection) -> Iterator[tuple[int, str, str, Frame]]:
    """Yield sample, code, message and frame for each frame of a scan, or a black one for one that has none."""
    if isinstance(scan, Rejection):
        yield row * FRAMES_PER_SCAN, scan.code, scan.message, np.zeros((source.preprocess.size,) * 2, np.uint8)
        return
    for number, frame in enumerate(source.frames_of(scan)):
        yield row * FRAMES_PER_SCAN + number, "", "", frame
