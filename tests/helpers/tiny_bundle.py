"""A small model with random weights that differ for each seed, and its bundle, for the tests of what uses bundles."""

from __future__ import annotations

from typing import Any

import torch

from btray.data.config import PreprocessConfig
from btray.data.labels import CANONICAL
from btray.model.bundle import Bundle, make_bundle, save_bundle
from btray.model.config import NetworkConfig
from btray.model.manifest import TrainedOn
from btray.model.network import build_network

NETWORK = NetworkConfig(stem_width=8, widths=(8, 16), depths=(1, 1))
PREPROCESS = PreprocessConfig(size=48)
TRAINED_ON = TrainedOn(
    uri="scans",
    fingerprint="f" * 64,
    counts={"train": {"glioma": 3}},
    rejected=0,
    leak={},
    on_leak="warn",
    epochs=3,
    best_epoch=2,
    refit_epochs=0,
    patient_ids=False,
)
FILES = {"metrics.json": b'{"accuracy": 0.5}', "MODEL_CARD.md": b"# A card\n", "roc_curves.png": b"\x89PNG picture"}


def random_bundle(*, seed: int = 0, classes: tuple[str, ...] = CANONICAL, **changes: Any) -> Bundle:
    """A bundle in memory; `changes` replace arguments of `make_bundle`."""
    torch.manual_seed(seed)
    network = build_network(changes.get("network", NETWORK), len(classes))
    torch.nn.init.normal_(network.head.weight, std=2.0)  # as it is made it answers the same to everything
    arguments: dict[str, Any] = {
        "weights": network.state_dict(),
        "classes": classes,
        "network": NETWORK,
        "preprocess": PREPROCESS,
        "temperature": 1.5,
        "training": {"epochs": 3, "optimiser": {"learning_rate": 1e-05}},
        "data": TRAINED_ON,
        "created_at": "2026-11-22T10:00:00+00:00",
    }
    return make_bundle(**{**arguments, **changes})


def saved_bundle(uri: Any, **options: Any) -> Bundle:
    """`random_bundle`, written to `uri`."""
    return save_bundle(random_bundle(**options), str(uri), FILES)
