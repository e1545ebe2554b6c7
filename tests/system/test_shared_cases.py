"""The inputs that people sent give what their README says, through the jobs that take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from btray import results, storage
from btray.acquire.config import AcquireConfig
from btray.acquire.job import acquire
from btray.audit.config import AuditConfig
from btray.audit.job import audit
from btray.bulk.classify import classify
from btray.bulk.config import ClassifyConfig
from btray.core.errors import UserError
from btray.evaluation.config import EvaluateConfig
from btray.evaluation.job import evaluate
from btray.training.config import TrainConfig
from btray.training.job import train
from tests.helpers.classify_helpers import without_ray
from tests.helpers.local_data import run_here
from tests.helpers.tiny_bundle import saved_bundle

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not CASES.is_dir(), reason=f"CASES ABSENT: {CASES} does not exist, so they are NOT shown here"),
]
WHOLE = {"jpeg_whole.jpg", "tiff_int8.tif", "bmp32_v5_zero_alpha.bmp", "png_2bit_trns_white.png"}
UNSUPPORTED = {
    "jpegls.jpg": "JPEG-LS", "tiff_jpeg2000.tif": "JPEG 2000", "matlab73.mat": "MATLAB 7.3", "slice.npy": "NumPy",
    "tiff_imagej_one_directory.tif": "5 slices",
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in this process: what each input gives does not depend on Ray."""
    run_here(monkeypatch)
    without_ray(monkeypatch)


def classified(folder: Path, given: Path) -> list[dict[str, Any]]:
    saved_bundle(folder / "model", classes=("glioma", "no_tumor"))
    output = str(folder / "results")
    classify(ClassifyConfig(model=str(folder / "model"), input=str(given), output=output, actors=1))
    rows: list[dict[str, Any]] = results.current(output).to_pylist()
    return rows


def test_of_the_images_each_has_the_status_that_is_right(tmp_path: Path) -> None:
    rows = {storage.name(row["uri"]): row for row in classified(tmp_path, CASES / "images")}
    assert set(rows) == {path.name for path in (CASES / "images").iterdir()}
    assert {name for name, row in rows.items() if row["status"] == "ok"} == WHOLE
    for name in ("jpeg_zero_hole.jpg", "jpeg_cut_with_eoi.jpg"):
        assert rows[name]["error_code"] in ("truncated", "decode_failed")
    for name, kind in UNSUPPORTED.items():
        assert rows[name]["error_code"] == "unsupported"
        assert kind in rows[name]["error"]


@pytest.mark.parametrize("name", ["list_bom.txt", "backslash.csv", "spaces.csv"])
def test_of_each_list_all_eight_are_classified(tmp_path: Path, name: str) -> None:
    assert [row["status"] for row in classified(tmp_path, CASES / "lists" / name)] == ["ok"] * 8


def test_an_archive_of_another_method_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a compression that is not read") as caught:
        acquire(AcquireConfig(source=(str(CASES / "archives" / "deflate64.zip"),), out=str(tmp_path / "out")))
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("name", ["br35h", "nested_copy"])
def test_trees_that_hold_more_than_classes_are_refused_or_named(tmp_path: Path, name: str) -> None:
    named = {"br35h": ("pred", "Br35H-Mask-RCNN"), "nested_copy": ("brain_tumor_dataset",)}[name]
    data, out = str(CASES / "trees" / name), str(tmp_path / "out")
    saved_bundle(tmp_path / "model")
    for job in (
        lambda: train(TrainConfig(data=data, out=out, epochs=1)),
        lambda: evaluate(EvaluateConfig(model=str(tmp_path / "model"), data=data, out=out)),
    ):
        with pytest.raises(UserError, match="--classes") as caught:
            job()
        assert all(folder in str(caught.value) for folder in named)
    audit(AuditConfig(data=data, out=out))
    assert all(folder in (tmp_path / "out" / "report.html").read_text() for folder in named)


def test_junk_beside_the_images_is_in_no_figure(tmp_path: Path) -> None:
    saved_bundle(tmp_path / "model", classes=("glioma", "no_tumor"))
    config = EvaluateConfig(
        model=str(tmp_path / "model"), data=str(CASES / "trees" / "junk"), out=str(tmp_path / "out")
    )
    evaluate(config)
    assert storage.read_json(str(tmp_path / "out" / "metrics.json"))["n"] == 16
