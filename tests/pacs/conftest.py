"""A real Orthanc for all tests of this folder, which keep their studies apart by the UIDs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from btray.pacs.config import PacsConfig
from tests.helpers.orthanc import Orthanc


@pytest.fixture(scope="session")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """Run Orthanc until the session ends; skip with a message if it cannot be installed."""
    with Orthanc(tmp_path_factory.mktemp("orthanc")) as server:
        yield server


@pytest.fixture(scope="session")
def access(orthanc: Orthanc) -> PacsConfig:
    """Return the settings of who may use it."""
    return PacsConfig(**orthanc.credentials)
