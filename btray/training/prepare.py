"""Preparation of a run: which images are readable, which are held out, and how they reach the workers."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import ne
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import torch
from torch import Tensor

from btray import storage
from btray.core.cluster import cpus, require_gpus
from btray.core.errors import UserError
from btray.data.duplicates import group_by_fingerprint
from btray.data.fingerprint import unpack
from btray.data.frames import FRAMES_PER_SCAN, FrameSource
from btray.data.labelled import read_labelled
from btray.data.labels import class_order, require_known_labels, require_label
from btray.data.rejections import (
    REJECTED,
    enforce_max_rejected,
    rejections_csv,
    rejections_in,
    report_rejections,
    require_found,
)
from btray.data.splits import Flags, Leak, find_leak, hold_out, k_folds, leave_out_sources, report_leak
from btray.model.network import build_network
from btray.training.config import BATCH, TrainConfig
from btray.training.feeding.stream import scans_of
from btray.training.feeds import decode_rows, survey
from btray.training.plan import Indices, Plan, run_folder
from btray.training.pretrained import read_initial_weights

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """The labelled images of a run before any of them is read, and the weights to start from."""

    config: TrainConfig
    table: pa.Table
    """Every row of the source; rows are named by their position here."""
    classes: tuple[str, ...]
    """Labels of the training images, in the order of the network's outputs."""
    initial_weights: dict[str, Tensor] | None = None

    def listing_digest(self) -> str:
        """Compute the SHA-256 over names, labels, splits, sizes and tags of the files, none of which is read."""
        return hashlib.sha256(repr(self.table.to_pydict()).encode()).hexdigest()

    def decode(self, rows: Indices, **options: Any) -> ray.data.Dataset:
        """Decode the given rows, by their position and with their labels' numbers, as `feeds.decode_rows` says.

        The number of an outlier is -1.
        """
        labels = pc.index_in(self.table["label"].take(rows), pa.array(self.classes)).cast(pa.int64()).fill_null(-1)
        numbered = pa.table({"row": rows, "uri": self.table["uri"].take(rows), "label": labels})
        return decode_rows(numbered, FrameSource(self.config.preprocess), **options)

    def with_patients(self, surveyed: pa.Table) -> Source:
        """Take digests of patients from the files, as `feeds.survey` gives them, where the source names no patient.

        They stay in memory.
        """
        known = dict(
            zip(
                (surveyed["sample"].to_numpy() // FRAMES_PER_SCAN).tolist(),
                surveyed["patient"].to_pylist(),
                strict=True,
            )
        )
        found = pa.array([known.get(row) or None for row in range(len(self.table))], pa.string())
        column = self.table.schema.get_field_index("patient_id")
        named = pc.coalesce(self.table["patient_id"], found)
        return replace(self, table=self.table.set_column(column, "patient_id", named))


@dataclass(frozen=True)
class TrainingData:
    """The labelled images of a run, with all decisions about them."""

    source: Source
    frames: ray.data.Dataset | None
    """Decoded frames if they fit in memory."""
    rejected: pa.Table
    """The training and validation images that could not be read: columns row, code, message."""
    used: pa.Table
    """The rows of `feeds.survey` that are the samples of the plan, in their order."""
    look: Indices
    """Number of each sample, equal for those that look alike, also through others."""
    leak: Leak
    """Which images the test and val splits have in common with those that are learnt from."""
    plan: Plan
    rounds: Mapping[str, Flags]
    """With --validate-by sources or folds: what the plan's samples are held out of, bool [samples], by its name. The
    plan is then to train on all of them."""

    def without(self, name: str) -> TrainingData:
        """Return the data of a round: those held out by this name are, and nothing that looks like one of them is used.

        Folds cut no group of what looks alike, but sources may share pictures.
        """
        held = self.rounds[name]
        twins = np.isin(self.look, self.look[held]) & ~held
        if twins.any():
            _log.info("%d images look like some of %s, and are not used when it is held out", twins.sum(), name)
        return replace(self, plan=self.plan.hold_out(held, [*self.rounds].index(name) + 1, twins))

    def digest(self) -> str:
        """Compute the SHA-256 over digest, label and use of every image, whatever the files are called."""
        plan, digests = self.plan, self.used["digest"].to_pylist()
        use = np.where(np.isin(np.arange(len(digests)), [*plan.validation, *plan.held_outliers]), "validation", "train")
        use = np.select([*self.rounds.values()], [*self.rounds], use) if self.rounds else use
        images = zip(digests, plan.label_names(np.arange(len(digests))), use, strict=True)
        lines = sorted(f"{digest} {label} {use}" for digest, label, use in images)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def counts(self) -> dict[str, dict[str, int]]:
        """Count the images of each class in each part."""
        plan, test = self.plan, self.source.table.filter(in_splits(self.source.table, "test"))
        labels = {
            "train": plan.label_names(plan.train),
            "validation": plan.label_names(np.concatenate([plan.validation, plan.held_outliers])),
            "test": test["label"].to_pylist(),
        }
        order = (*plan.classes, plan.config.outliers or "")
        return {
            part: {label: values.count(label) for label in order if label in values}
            for part, values in labels.items()
            if values or part != "test"
        }

    def datasets(self) -> dict[str, ray.data.Dataset | Callable[[], ray.data.Dataset]]:
        """Return the data set of the workers: all decoded frames, or the scans that they decode every epoch."""
        if self.frames is not None:
            return {"frames": self.frames}
        return {"scans": scans_of(self.plan.rows(np.arange(len(self.plan.samples))), self.source.table["uri"])}


def in_splits(table: pa.Table, *splits: str) -> npt.NDArray[np.bool_]:
    """Return bool [rows]: which rows of a labelled table its source puts into one of `splits`."""
    return np.isin(np.array(table["split"].to_pylist(), object), splits)


def read_source(config: TrainConfig) -> Source:
    """List the labelled images and read the weights to start from.

    Raises:
        UserError: fewer than two classes outside val and test, a label there that no training image has, or nothing
            that can be read.
    """
    chosen = (*config.classes, config.outliers) if config.classes and config.outliers else config.classes
    table = read_labelled(config.data, classes=chosen, preprocess=config.preprocess)
    require_label(config.outliers, table["label"].unique().to_pylist(), config.data)
    learnt = table.filter(~in_splits(table, "val", "test"))["label"].to_pylist()
    classes = class_order(label for label in learnt if label != config.outliers)
    if len(classes) < 2:
        names = ", ".join(classes) or "none"
        raise UserError(
            f"{config.data}: training needs images of at least two classes outside val and test; found {names}"
        )
    require_known_labels(filter(partial(ne, config.outliers), table["label"].to_pylist()), classes, config.data)
    weights = read_initial_weights(config.start, config.network, len(classes)) if config.start else None
    return Source(config, table, classes, weights)


def prepare(source: Source) -> TrainingData:
    """Decode the training images once, see which are readable, and choose which are held out. Needs Ray.

    Raises:
        UserError: the config does not suit the cluster or the data.
        ThresholdExceeded: more images than `max_rejected` are unreadable, or images leak with `on_leak` "fail".
    """
    config, table, run_uri = source.config, source.table, run_folder(source.config)
    _check_workers(config)
    rows = np.flatnonzero(~in_splits(table, "test"))
    most = int(config.cache_gb * 1e9 / config.preprocess.size**2)  # a frame has a byte per pixel
    too_many = len(rows) > most
    _check_streaming(config, too_many)
    _log.info("reading %d images of %d classes from %s", len(rows), len(source.classes), config.data)
    decoded = source.decode(rows, kept=not too_many, find_ct="ct" in config.leave_out)
    frames, surveyed = survey(decoded, keep=0 if too_many else most)
    _check_streaming(config, frames is None)  # again: a scan may have many frames
    rejected = rejections_in(surveyed)
    report_rejections(rejected, table)
    if len(rejected):
        storage.write_bytes(storage.join(run_uri, REJECTED), rejections_csv(rejected, table))
    require_found(rejected["code"].to_pylist(), len(rows), config.data)
    enforce_max_rejected(rejected["code"].to_pylist(), len(rows), config.max_rejected)
    source = source.with_patients(surveyed)
    readable = surveyed.filter(pc.and_(pc.equal(surveyed["code"], ""), pc.invert(surveyed["is_ct"])))
    if left_out := pc.sum(surveyed["is_ct"]).as_py():
        labels = Counter(surveyed.filter(surveyed["is_ct"])["label"].to_pylist())
        names = ", ".join(f"{(*source.classes, config.outliers)[label]} {count}" for label, count in labels.items())
        _log.info("%d frames look like CT and are left out (%s)", left_out, names)
    leak, used, look = _resolve_leak(source, readable)
    labels = used["label"].to_numpy()
    held, rounds = _divide(source, used)
    plan = Plan(
        config=config,
        classes=source.classes,
        run_uri=run_uri,
        samples=used["sample"].to_numpy(),
        labels=labels,
        sources=_numbers(source.table["source"].take(used["sample"].to_numpy() // FRAMES_PER_SCAN)),
        train=np.flatnonzero(~held),
        validation=np.flatnonzero(held & (labels >= 0)),
        held_outliers=np.flatnonzero(held & (labels < 0)),
        streaming=frames is None,
        initial_weights=source.initial_weights,
    )
    _check_plan(plan, rounds)
    return TrainingData(source, frames, rejected, used, look, leak, plan, rounds)


def _resolve_leak(source: Source, readable: pa.Table) -> tuple[Leak, pa.Table, Indices]:
    """Compare the pixels of the splits and act on --on-leak.

    Returns the leak, the rows of the survey in use, and a number for each of these, equal for those that look alike.
    """
    test = np.flatnonzero(in_splits(source.table, "test"))
    surveyed = readable.slice(0, 0)
    if len(test):
        _, surveyed = survey(source.decode(test))
    everything = pa.concat_tables([readable, surveyed.filter(pc.equal(surveyed["code"], ""))])
    groups = group_by_fingerprint(unpack(everything["fingerprint"].to_pylist()))
    rows = everything["sample"].to_numpy() // FRAMES_PER_SCAN
    leak = find_leak(np.array(source.table["split"].take(rows).to_pylist(), object), groups)
    report_leak(leak, source.config.on_leak, source.config.data)
    used = np.flatnonzero(~leak.learnt[: len(readable)] | (source.config.on_leak != "drop"))
    return leak, readable.take(used), groups[used]


def _divide(source: Source, used: pa.Table) -> tuple[Flags, dict[str, Flags]]:
    """Choose the samples that are held out once, and those of each round.

    The val split is held out if there is one, else whole groups of the training images.
    """
    row_of_sample = used["sample"].to_numpy() // FRAMES_PER_SCAN
    rows, first, of_sample = np.unique(row_of_sample, return_index=True, return_inverse=True)
    chosen, config = source.table.take(rows), source.config
    prints = unpack(used["fingerprint"].take(first).to_pylist())
    held, rounds = in_splits(chosen, "val"), dict[str, Flags]()
    if held.any() and config.validate_by != "patients":
        raise UserError(
            f"{config.data} has a val split, which --validate-by {config.validate_by} would learn from; leave "
            "--validate-by out, or the split"
        )
    if config.validate_by == "sources":
        rounds = leave_out_sources(chosen)
    elif config.validate_by == "folds":
        folds = k_folds(chosen, k=config.folds, seed=config.seed, prints=prints)
        rounds = {f"fold {number + 1}": folds == number for number in range(config.folds)}
    elif not held.any():
        held = hold_out(chosen, fraction=config.validation, seed=config.seed, prints=prints)
    return held[of_sample], {name: part[of_sample] for name, part in rounds.items()}


def _numbers(names: pa.ChunkedArray) -> Indices:
    """Return numbers from 0 that tell distinct values apart; null is one of them."""
    return np.unique(np.array([name or "" for name in names.to_pylist()]), return_inverse=True)[1].astype(np.int64)


def _check_streaming(config: TrainConfig, streaming: bool) -> None:
    if streaming and config.optimiser.class_balance == "sampling":
        raise UserError(
            f"--optimiser.class-balance sampling needs the frames in memory, and they exceed --cache-gb "
            f"{config.cache_gb}; raise it or use weights"
        )


def _check_workers(config: TrainConfig, images: int | None = None) -> None:
    """Refuse a batch, of at most so many `images`, that leaves a worker without one in a part of a step."""
    workers, size = worker_range(config)[1], config.batch_size or BATCH
    if config.images_per_worker is not None:
        size = config.images_per_worker * config.accumulate * workers
    size = min(size, images or size)
    if size < workers * config.accumulate:
        parts = f", --accumulate {config.accumulate}" if config.accumulate > 1 else ""
        raise UserError(f"--batch-size {size} cannot feed --num-workers {workers}{parts}; use fewer of them")


def _check_plan(plan: Plan, rounds: Mapping[str, Flags]) -> None:
    counts = plan.class_counts()
    if 0 in counts:
        label = plan.classes[counts.index(0)]
        raise UserError(f"class {label!r} has no readable image to train on; add images or remove the class")
    if len(plan.validation) == 0 and not rounds:
        raise UserError(
            "no image can be held out for validation without cutting a group; add images or give a val split"
        )
    _check_workers(plan.config, len(plan.train))
    _check_norm(plan)
    held_out = np.bincount(plan.labels[plan.validation], minlength=len(plan.classes)).tolist()
    for label, count, validated in zip(plan.classes, counts, held_out, strict=True):
        _log.info("  %-16s %6d to train on, %5d held out", label, count, validated)


def _check_norm(plan: Plan) -> None:
    """Refuse a batch of one image whose last feature map is one pixel: batch norm needs two values per channel."""
    workers, size = worker_range(plan.config)[1], plan.config.preprocess.size
    plan = plan.for_workers(workers)
    if plan.batch_size // workers // plan.config.accumulate > 1:
        return
    network = build_network(plan.config.network, len(plan.classes)).train()
    try:
        with torch.no_grad():
            network(torch.zeros(1, 1, size, size))
    except ValueError as error:
        raise UserError(
            f"a batch of {plan.batch_size} leaves one of {workers} workers one image, of which batch norm learns "
            f"nothing at --preprocess.size {size}; raise --batch-size, or use fewer workers or another --network.norm"
        ) from error


def worker_range(config: TrainConfig) -> tuple[int, int]:
    """Return the least and the most data-parallel workers: as configured, else one per GPU, or per CPU up to four."""
    available = require_gpus() if config.use_gpu else min(4, int(cpus()))
    return config.worker_range or (max(1, available), max(1, available))
