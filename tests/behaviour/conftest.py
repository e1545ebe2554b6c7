"""A small network that has learnt phantoms, for tests of what a trained model must and must not care about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from btray import phantoms
from btray.data.config import PreprocessConfig
from btray.data.frames import FrameSource, Rejection
from btray.model.bundle import make_bundle
from btray.model.classifier import Classifier
from btray.model.config import NetworkConfig
from btray.model.manifest import Thresholds
from btray.model.ood import FLAGGED, Distribution
from btray.storage import list_files
from btray.training.config import OptimiserConfig, TrainConfig
from tests.helpers.tiny_bundle import TRAINED_ON
from tests.helpers.training_helpers import train_here

PER_CLASS = {"Training": 200, "Testing": 1}


@pytest.fixture(scope="session")
def trained(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    """A minute of training; the distribution of features is that of its training images."""
    folder = tmp_path_factory.mktemp("model")
    phantoms.write_data_set(str(folder / "scans"), per_class=PER_CLASS, seed=5)
    config = TrainConfig(
        data=str(folder / "scans"),
        out=str(folder / "model"),
        epochs=14,
        batch_size=32,
        num_workers="1",
        patience=0,
        precision="float32",  # the same on every CPU
        preprocess=PreprocessConfig(size=80),
        network=NetworkConfig(stem_width=16, widths=(24, 48, 96), depths=(1, 1, 1)),
        optimiser=OptimiserConfig(learning_rate=4e-3),
    )
    _, checkpoint = train_here(config)
    arguments = {
        "weights": checkpoint.evaluated,
        "classes": phantoms.CLASSES,
        "network": config.network,
        "preprocess": config.preprocess,
        "temperature": 1.0,
        "training": {},
        "data": TRAINED_ON,
        "created_at": "",
    }
    features = Classifier(make_bundle(**arguments)).answer(_frames(folder / "scans" / "Training", config)).features
    half = len(features) // 2
    distribution = Distribution.fit(features[::2])
    limit = float(np.quantile(distribution.scores(features[1::2]), 1 - FLAGGED))
    assert half > 100
    return Classifier(make_bundle(**arguments, ood=distribution, thresholds=Thresholds(ood_score=limit)))


def _frames(folder: Path, config: TrainConfig) -> np.ndarray:
    uris = [info.uri for info in list_files(str(folder))]
    found = FrameSource(config.preprocess).from_uris(uris)
    return np.stack([frames[0] for frames in found if not isinstance(frames, Rejection)])
