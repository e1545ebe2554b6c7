"""Fixtures shared by the tests of the service."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from btray.model.classifier import Classifier
from tests.helpers.browser import Browser, find_chromium
from tests.helpers.serving_helpers import bundle_at

INSTALL_SECONDS = 240


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of a tiny bundle; no test may change it."""
    return bundle_at(tmp_path_factory.mktemp("bundle"), "model")


@pytest.fixture(scope="session")
def classifier(model: str) -> Classifier:
    """Return the classifier of `model`."""
    return Classifier.load(model)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Debian's Chromium; installed here where that is possible, else the tests are skipped and say so."""
    if find_chromium() is None and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            command = ["timeout", str(INSTALL_SECONDS), "apt-get", "-qq", *words]
            subprocess.run(command, env=quiet, capture_output=True, check=False)
    found = find_chromium()
    if found is None:
        pytest.skip("CHROMIUM ABSENT: apt-get install chromium; that the page works is NOT shown here")
    return found


@pytest.fixture(scope="module")
def window(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Return a browser."""
    with Browser(chromium, tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def browser(window: Browser) -> Browser:
    """Return the same without what an earlier test left."""
    window.resize(1100, 900)
    window.events.clear()
    return window
