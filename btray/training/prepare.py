"""What a training run works on: which images are readable, which are held out, how they reach the workers."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import ray.train
import torch

from btray import storage
from btray.core.cluster import cpus, require_gpus
from btray.core.errors import UserError
from btray.data.duplicates import group_by_fingerprint
from btray.data.fingerprint import unpack
from btray.data.frames import FRAMES_PER_SCAN, FrameSource
from btray.data.labels import class_order, require_known_labels
from btray.data.rejections import REJECTED, enforce_max_rejected, rejections_csv, rejections_in, report_rejections
from btray.data.splits import Leak, find_leak, hold_out, report_leak
from btray.model.network import build_network
from btray.training.config import TrainConfig
from btray.training.feeds import Plan, decode_rows, keep, survey

_log = logging.getLogger(__name__)

# Peak learning rate of the refit, as a share of the first one: high enough to learn the images that are new to it.
_REFIT_RATE = 0.3


@dataclass(frozen=True)
class TrainingData:
    """The labelled data of a run and what was decided about them."""

    table: pa.Table
    """Every row of the source; rows are named by their position here."""
    frames: ray.data.Dataset | None
    """Decoded frames where they fit in memory."""
    survey: pa.Table
    """What `feeding.survey` tells of the training and validation rows."""
    used: pa.Table
    """The rows of `survey` that the samples of the plan are, in their order."""
    leak: Leak
    """What the test and val splits have in common with what is learnt from."""
    plan: Plan


def training_classes(table: pa.Table, source: str) -> tuple[str, ...]:
    """The classes that the training images have, in their order. Raises UserError for one class or a stray label."""
    held_out = pc.is_in(table["split"], value_set=pa.array(["val", "test"]))
    training = table.filter(pc.invert(held_out))
    classes = class_order(training["label"].to_pylist())
    if len(classes) < 2:
        found = ", ".join(classes) or "none"
        raise UserError(f"{source}: training needs images of at least two classes outside val and test; found {found}")
    require_known_labels(table["label"].to_pylist(), classes, source)
    return classes


def prepare(
    config: TrainConfig, table: pa.Table, classes: tuple[str, ...], run_uri: str, initial: dict[str, Any] | None
) -> TrainingData:
    """Decode the training images once, see which are readable, and choose which are held out."""
    _check_workers(config, config.batch_size)
    rows = np.flatnonzero(np.array(table["split"].to_pylist(), object) != "test")
    source = FrameSource(config.preprocess)
    numbered = _numbered(table, rows, classes)
    most = int(config.cache_gb * 1e9 / config.preprocess.size**2)
    too_many = len(rows) > most
    _check_streaming(config, too_many)
    _log.info("reading %d images of %d classes from %s", len(rows), len(classes), config.data)
    decoded = decode_rows(numbered, source, kept=not too_many)
    frames, found = (None, survey(decoded)) if too_many else keep(decoded, most)
    _check_streaming(config, frames is None)
    rejected = rejections_in(found)
    report_rejections(rejected, table)
    if len(rejected):
        storage.write_bytes(storage.join(run_uri, REJECTED), rejections_csv(rejected, table))
    enforce_max_rejected(rejected, len(rows), config.max_rejected)
    leak, used, twins = _settle_leak(config, table, found.filter(pc.equal(found["code"], "")))
    validation = _choose_validation(config, table, used, twins)
    plan = Plan(
        config=config,
        classes=classes,
        run_uri=run_uri,
        samples=used["sample"].to_numpy(),
        labels=used["label"].to_numpy(),
        train=np.flatnonzero(~validation),
        validation=np.flatnonzero(validation),
        streaming=frames is None,
        initial_weights=initial,
    )
    _check_plan(plan)
    return TrainingData(table, frames, found, used, leak, plan)


def _settle_leak(
    config: TrainConfig, table: pa.Table, readable: pa.Table
) -> tuple[Leak, pa.Table, npt.NDArray[np.int64]]:
    """What leaks, the rows of the survey that are trained on, and a number for each that twins share."""
    test = np.flatnonzero(np.array(table["split"].to_pylist(), object) == "test")
    source = FrameSource(config.preprocess)
    # The labels of the test split are not read: only its pixels are compared.
    unlabelled = pa.table({"row": test, "uri": table["uri"].take(test), "label": np.zeros(len(test), np.int64)})
    seen = survey(decode_rows(unlabelled, source)) if len(test) else readable.slice(0, 0)
    everything = pa.concat_tables([readable, seen.filter(pc.equal(seen["code"], ""))])
    groups = group_by_fingerprint(unpack(everything["fingerprint"].to_pylist()))
    leak = find_leak(np.array(table["split"].take(_rows(everything)).to_pylist(), object), groups)
    report_leak(leak, config.on_leak, config.data)
    here = np.arange(len(readable))
    if config.on_leak == "drop":
        here = here[~leak.learnt[: len(readable)]]
    return leak, readable.take(here), groups[here]


def _rows(survey: pa.Table) -> npt.NDArray[np.int64]:
    """The row of the source that each sample of a survey belongs to."""
    rows: npt.NDArray[np.int64] = survey["sample"].to_numpy() // FRAMES_PER_SCAN
    return rows


def _numbered(table: pa.Table, rows: npt.NDArray[np.int64], classes: Sequence[str]) -> pa.Table:
    """The chosen rows with their number in `table` and their label as a number."""
    number = {label: index for index, label in enumerate(classes)}
    labels = [number[label] for label in table["label"].take(rows).to_pylist()]
    return pa.table({"row": rows, "uri": table["uri"].take(rows), "label": np.array(labels, np.int64)})


def _choose_validation(
    config: TrainConfig, table: pa.Table, used: pa.Table, twins: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Which samples are held out: the val split where there is one, else whole groups of the training images."""
    rows, first, of_sample = np.unique(_rows(used), return_index=True, return_inverse=True)
    chosen = table.take(rows)
    splits = np.array(chosen["split"].to_pylist(), object)
    if (splits == "val").any():
        held_out = splits == "val"
    else:
        held_out = hold_out(chosen, fraction=config.validation, seed=config.seed, duplicate_of=twins[first])
    return np.asarray(held_out[of_sample])


def _check_streaming(config: TrainConfig, streaming: bool) -> None:
    if streaming and config.optimiser.class_balance == "sampling":
        raise UserError(
            f"--optimiser.class-balance sampling needs the frames in memory, and they exceed --cache-gb "
            f"{config.cache_gb}; raise it or use weights"
        )


def _check_workers(config: TrainConfig, batch_size: int) -> None:
    workers = worker_range(config)[1]
    if batch_size < workers:
        raise UserError(f"--batch-size {batch_size} cannot feed --num-workers {workers}; use fewer workers")


def _check_norm(plan: Plan) -> None:
    """Batch norm needs more than one value a channel: of one image, a last feature map of more than one pixel."""
    workers, size = worker_range(plan.config)[1], plan.config.preprocess.size
    if plan.batch_size // workers > 1:
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


def _check_plan(plan: Plan) -> None:
    counts = dict(zip(plan.classes, plan.class_counts(), strict=True))
    empty = [label for label, count in counts.items() if count == 0]
    if empty:
        raise UserError(f"class {empty[0]!r} has no readable image to train on; add images or remove the class")
    if len(plan.validation) == 0:
        raise UserError(
            "no image can be held out for validation without cutting a group; add images or give a val split"
        )
    _check_workers(plan.config, plan.batch_size)
    _check_norm(plan)
    held_out = np.bincount(plan.labels[plan.validation], minlength=len(plan.classes)).tolist()
    for label, count, validated in zip(plan.classes, counts.values(), held_out, strict=True):
        _log.info("  %-16s %6d to train on, %5d held out", label, count, validated)


def worker_range(config: TrainConfig) -> tuple[int, int]:
    """Least and most data-parallel workers."""
    available = require_gpus() if config.use_gpu else min(4, int(cpus()))
    if config.worker_range:
        return config.worker_range
    return max(1, available), max(1, available)


def datasets(data: TrainingData) -> dict[str, ray.data.Dataset | Callable[[], ray.data.Dataset]]:
    """What workers draw from: all decoded frames, or rows in random order that are decoded as they are needed."""
    if data.frames is not None:
        return {"frames": data.frames}
    plan = data.plan
    shuffled = np.random.default_rng(plan.config.seed).permutation(plan.train)
    source = FrameSource(plan.config.preprocess)
    rows = {"train": _rows_of(plan, shuffled)}
    if len(plan.validation):
        rows["validation"] = _rows_of(plan, plan.validation)
    return {
        name: decode_rows(_numbered(data.table, chosen, plan.classes), source, num_cpus=0.5)
        for name, chosen in rows.items()
    }


class StreamSplit(ray.train.DataConfig):
    """Shares streamed rows out to the workers; held-out rows to the last one.

    Ray makes the shares equal by dropping rows: fine for training, but a metric must count every image.
    """

    def configure(
        self,
        datasets: dict[str, ray.data.Dataset],
        world_size: int,
        worker_handles: list[Any] | None,
        worker_node_ids: list[str] | None,
        **kwargs: Any,
    ) -> list[dict[str, ray.data.DataIterator]]:
        """One mapping a worker, from the name of each data set to its share."""
        equal = {name: rows for name, rows in datasets.items() if name != "validation"}
        shares: list[dict[str, ray.data.DataIterator]] = super().configure(
            equal, world_size, worker_handles, worker_node_ids, **kwargs
        )
        for name in datasets.keys() - equal.keys():
            rows = datasets[name]
            rows.context.execution_options = self.default_ingest_options()
            parts = rows.streaming_split(world_size, equal=False, locality_hints=worker_node_ids)
            for share, part in zip(shares, parts, strict=True):
                share[name] = part
        return shares


def refit_plan(plan: Plan, weights: dict[str, Any], epochs_before: int) -> Plan:
    """The plan of the last epochs: from `weights`, on all samples, at a lower rate, and but for flips as they are.

    Strong augmentation teaches the network images that nobody will show it; ending on clean ones closes that gap (He et
    al. 2019, Data Augmentation Revisited, arXiv:1909.09148). Its run stands beside the first one and is named after the
    epochs that came before and its own, so that a longer first run, or another length, means a refit of its own.
    """
    config = plan.config
    name = f"{config.name}.refit-{epochs_before}-{config.refit_epochs}"
    optimiser = config.optimiser.model_copy(
        update={
            "learning_rate": config.optimiser.learning_rate * _REFIT_RATE,
            "freeze_epochs": 0,
            "layer_decay": 1.0,
        }
    )
    changes = {"name": name, "epochs": config.refit_epochs, "patience": 0, "optimiser": optimiser}
    return replace(
        plan,
        config=config.model_copy(update=changes | {"augment": config.augment.only_flips()}),
        run_uri=storage.join(storage.resolve(config.storage_uri), name),
        train=np.arange(len(plan.samples)),
        validation=np.zeros(0, np.int64),
        initial_weights=weights,
    )


def _rows_of(plan: Plan, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows of some samples, each once, in the order in which they come first."""
    rows = plan.samples[positions] // FRAMES_PER_SCAN
    _, first = np.unique(rows, return_index=True)
    return rows[np.sort(first)]


def data_digest(data: TrainingData) -> str:
    """SHA-256 over digest, label and use of every image: what they show counts, not where they lie."""
    used, plan = data.used, data.plan
    held_out = np.zeros(len(used), bool)
    held_out[plan.validation] = True
    lines = sorted(
        f"{digest} {plan.classes[label]} {'validation' if held else 'train'}"
        for digest, label, held in zip(used["digest"].to_pylist(), plan.labels.tolist(), held_out, strict=True)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def counts(data: TrainingData) -> dict[str, dict[str, int]]:
    """Images of each class in each part."""
    plan = data.plan
    parts = {"train": plan.train, "validation": plan.validation}
    counts = {
        part: {
            plan.classes[label]: number for label, number in sorted(Counter(plan.labels[positions].tolist()).items())
        }
        for part, positions in parts.items()
    }
    test = data.table.filter(pc.equal(data.table["split"], "test"))
    if len(test):
        counts["test"] = dict(Counter(test["label"].to_pylist()))
    return counts
