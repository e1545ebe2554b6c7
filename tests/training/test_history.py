"""The history of a run: its format, which earlier runs and other programs rely on, and how epochs are ranked."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from btray.training.history import HISTORY, EpochRecord, as_lines, best_record, read_history, score_of
from tests.conftest import ROOT

# A line as every version has written it.
LINE = (
    '{"epoch": 2, "train_loss": 1.6654082536697388, "learning_rate": 0.0016272549038401462, "images": 128, '
    '"images_per_second": 52.4486116636553, "feed_ratio": 0.998238989512339, "val_loss": 1.6082044839859009, '
    '"val_macro_f1": 0.1393939393939394, "val_accuracy": 0.25, "score": 0.1392331189455408, "rejected": 0, '
    '"seconds": 2.5781336169999918}\n'
)


def test_a_line_is_read_and_written_to_the_last_digit_and_its_keys_keep_their_order(tmp_path: Path) -> None:
    Path(tmp_path, HISTORY).write_text(LINE)
    (record,) = read_history(str(tmp_path))
    assert (record.epoch, record.images, record.val_accuracy) == (2, 128, 0.25)
    assert as_lines([record]) == LINE


def test_a_run_without_a_completed_epoch_has_no_history(tmp_path: Path) -> None:
    assert read_history(str(tmp_path)) == []


def test_every_key_is_documented() -> None:
    text = ROOT.joinpath("docs", "training.md").read_text()
    section = text[text.index("## History") : text.index("## GPUs")]
    documented = [key for row in re.findall(r"^\| (`.*?) \|", section, re.M) for key in re.findall(r"`(\w+)`", row)]
    assert documented == [field.name for field in fields(EpochRecord)]


def test_a_score_is_finite_and_that_of_a_diverged_epoch_below_every_other() -> None:
    for loss in (float("nan"), float("inf")):
        assert score_of(1.0, loss) < score_of(0.0, 1e9)


@given(st.lists(st.tuples(st.integers(0, 999), st.floats(0, 20)), min_size=1, max_size=6))
def test_the_loss_decides_between_equal_macro_f1_alone(measured: list[tuple[int, float]]) -> None:
    example = EpochRecord(
        epoch=1, train_loss=1.0, learning_rate=0.1, images=1, images_per_second=1.0, feed_ratio=1.0, val_loss=1.0,
        val_macro_f1=1.0, val_accuracy=1.0, score=1.0, rejected=0, seconds=1.0,
    )  # fmt: skip
    history = [
        replace(example, epoch=number, val_macro_f1=f1 / 999, val_loss=loss, score=score_of(f1 / 999, loss))
        for number, (f1, loss) in enumerate(measured, start=1)
    ]
    best = best_record(history)
    assert best.val_macro_f1 == max(record.val_macro_f1 or 0.0 for record in history)
