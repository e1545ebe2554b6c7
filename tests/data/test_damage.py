"""Damaged pictures are rejected, whole ones are not: the share is counted over pictures, formats and accidents."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.helpers.damage import PROMISED, tally, whole_phantoms, whole_slices

FORMATS = tuple(PROMISED)
LEAST = 0.99


@pytest.mark.parametrize("file_format", FORMATS)
def test_damage_that_is_seen_is_rejected_and_whole_phantoms_are_not(file_format: str) -> None:
    counted = tally(list(whole_phantoms(file_format, 12)), file_format, 16, random.Random(1))
    assert counted.share_rejected(PROMISED[file_format], valid_count=False) >= LEAST, f"\n{counted}"


@pytest.mark.realdata
@pytest.mark.parametrize("file_format", FORMATS)
def test_damage_that_is_seen_is_rejected_and_whole_slices_are_not(file_format: str, real_data: Path) -> None:
    counted = tally(list(whole_slices(file_format, real_data.parent, 12)), file_format, 16, random.Random(1))
    assert counted.share_rejected(PROMISED[file_format], valid_count=False) >= LEAST, f"\n{counted}"
