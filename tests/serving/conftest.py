"""Fixtures shared by the tests of the service."""

from __future__ import annotations

import pytest

from btray.model.classifier import Classifier
from tests.helpers.serving_helpers import bundle_at


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of a tiny bundle; no test may change it."""
    return bundle_at(tmp_path_factory.mktemp("bundle"), "model")


@pytest.fixture(scope="session")
def classifier(model: str) -> Classifier:
    """Return the classifier of `model`."""
    return Classifier.load(model)
