"""Tiny labelled trees and tiny training configs, and what a finished run left, for the tests of training."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import ray.train
from PIL import Image
from ray.train.torch import TorchTrainer

from btray import storage
from btray.data.config import PreprocessConfig
from btray.model.config import NetworkConfig
from btray.training.checkpoints import Checkpoint
from btray.training.config import AugmentConfig, OptimiserConfig, TrainConfig
from btray.training.history import EpochRecord, read_history
from btray.training.plan import Plan, run_folder
from btray.training.prepare import TrainingData, prepare, read_source
from btray.training.train_loop import Trainer, train_loop
from tools.processes import named

SIDE = 48
# All that the golden losses depend on is written out: the defaults may change.
NETWORK = NetworkConfig(
    stem_width=8, stem_stride=2, widths=(8, 16), depths=(1, 1), kernel=3, first_stride=2, norm="group",
    activation="relu", residual=True, squeeze_excite=0.25, pooling="average_max", dropout=0.0,
)  # fmt: skip
OPTIMISER = OptimiserConfig(
    learning_rate=0.02, final_learning_rate=0.01, warmup=0.1, schedule="cosine", weight_decay=0.05, clip_norm=1.0,
    label_smoothing=0.1, class_balance="weights", class_power=1.0, source_power=0.0, mixup=0.0, ema=0.9,
    freeze_epochs=3, frozen_stages=0, layer_decay=0.7,
)  # fmt: skip
AUGMENT = AugmentConfig(
    flip_horizontal=0.5, flip_vertical=0.0, rotation=15.0, scale=0.15, shear=6.0, translation=0.06, contrast=0.25,
    gamma=0.3, tone=0.0, bias_field=0.2, noise=0.03, blur=0.7, erase=0.0,
)  # fmt: skip
PREPROCESS = PreprocessConfig(size=32, crop=True, margin=0.02, low_percentile=0.5, high_percentile=99.5)


def easy_picture(kind: int, seed: int) -> bytes:
    """A noisy PNG of a head with a bright or dark spot, which tells the kinds 0 to 5 apart; mirror images are alike.

    Each head has a shape and a shading of its own: two pictures never count as the same image.
    """
    rng = np.random.default_rng([seed, kind])
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1) * 2 - 1
    width, height, tilt = rng.uniform(0.65, 0.95), rng.uniform(0.75, 0.95), rng.uniform(-0.3, 0.3)
    waves = np.cos(rng.uniform(2, 7, 4) @ np.stack([x, y, x + y, x - y]).reshape(4, -1) + rng.uniform(0, 6))
    gray = (110.0 + 14 * waves.reshape(x.shape)) * (((x + tilt * y) / width) ** 2 + (y / height) ** 2 < 1)
    place, brightness = [(0.0, 0), (0.0, 120), (0.0, -100), (-0.55, 120), (0.55, 120), (-0.55, -100)][kind]
    spot = (x - rng.uniform(-0.1, 0.1)) ** 2 + (y - place - rng.uniform(-0.1, 0.1)) ** 2 < rng.uniform(0.2, 0.3) ** 2
    gray += brightness * spot + rng.normal(0, 6, gray.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(gray, 0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(uri: str | Path, counts: Mapping[str, int], *, seed: int = 0) -> str:
    """Write easy pictures: `counts` says how many lie in each folder below `uri`, such as `Training/glioma`.

    Folders whose last part is equal hold pictures of one kind.
    """
    kinds = {name: index for index, name in enumerate(dict.fromkeys(key.split("/")[-1] for key in counts))}
    root = storage.resolve(uri)
    for place, (folder, count) in enumerate(counts.items()):
        for index in range(count):
            picture = easy_picture(kinds[folder.split("/")[-1]], seed * 1_000_000 + place * 1000 + index)
            storage.write_bytes(storage.join(root, folder, f"{index:03d}.png"), picture)
    return root


def tiny(data: str, out: str | Path, **changes: Any) -> TrainConfig:
    """A run of seconds with everything that makes results depend on the number of workers switched off."""
    defaults: dict[str, Any] = {
        "epochs": 6,
        "batch_size": 16,
        "num_workers": "1",
        "patience": 0,
        "precision": "float32",
        "refit_epochs": 0,
        "validation": 0.15,
        "preprocess": PREPROCESS,
        "augment": AUGMENT,
        "network": NETWORK.model_copy(update=changes.pop("network", {})),
        "optimiser": OPTIMISER.model_copy(update=changes.pop("optimiser", {})),
    }
    return TrainConfig(data=data, out=str(out), **{**defaults, **changes})


def history_of(config: TrainConfig) -> list[EpochRecord]:
    """Return the epochs that a run has recorded so far."""
    return read_history(run_folder(config))


def checkpoint_in(folder: str | Path) -> Checkpoint:
    """Read the checkpoint that a run keeps in `folder`."""
    return Checkpoint.load(ray.train.Checkpoint.from_directory(folder))


def train_here(config: TrainConfig) -> tuple[list[EpochRecord], Checkpoint]:
    """Run the training loop in this process, in Ray Train's local mode: one worker, no bundle, nothing resumed.

    Returns the epochs, and the last checkpoint. Needs a connection to Ray.
    """
    data = prepared(config)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"plan": data.plan, "threads": 1},
        scaling_config=ray.train.ScalingConfig(num_workers=0),
        datasets=data.datasets(),
    )
    # Local mode deletes no checkpoint, whatever it is told.
    with tempfile.TemporaryDirectory() as folder, patch("tempfile.tempdir", folder):
        checkpoint = trainer.fit().checkpoint
        assert checkpoint is not None
        return history_of(config), Checkpoint.load(checkpoint)


def train_and_collect(settings: dict[str, Any]) -> None:
    """For Ray Train: train as ever, then write down which samples count of those this worker is fed in two more epochs.

    One that was lost since the survey has a place in its batch, and no weight.
    """
    plan: Plan = settings["plan"]
    run = Trainer(plan)
    run.run()
    epochs = [
        [
            [batch.samples[batch.weights > 0].tolist() for batch in run.feed.train(epoch)],
            [batch.samples.tolist() for batch in run.feed.validation()],
        ]
        for epoch in (0, 1)
    ]
    Path(plan.run_uri, f"{run.collectives.rank}.json").write_text(json.dumps(epochs))


def prepared(config: TrainConfig) -> TrainingData:
    """What `config` works on, as `btray.training.job.train` prepares it."""
    return prepare(read_source(config))


def training_workers(root: int) -> list[int]:
    """The processes below `root` that Ray Train trains in."""
    return named(b"RayTrainWorker", root)


def latest_report(run: Path) -> dict[str, Any]:
    """The latest report that a run would resume from, {} before the first; its workers' files are there before it."""
    try:
        snapshot = json.loads((run / "checkpoint_manager_snapshot.json").read_text())
    except (OSError, ValueError):  # not there yet, or half written
        return {}
    latest: dict[str, Any] = snapshot["latest_checkpoint_result"]
    return latest["metrics"]
