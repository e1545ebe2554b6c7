"""Training from a pack of frames: the run on Ray ends with a bundle, and learns what the files would have taught."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from btray import storage
from btray.bulk.config import PackConfig
from btray.bulk.pack import pack
from btray.model.bundle import load_bundle
from btray.training.job import train
from tests.helpers.classify_helpers import without_ray
from tests.helpers.training_helpers import PREPROCESS, history_of, tiny, train_here, write_tree

pytestmark = [pytest.mark.cluster, pytest.mark.soak, pytest.mark.timeout(900)]
COUNTS = {
    "train/glioma": 40,
    "train/no_tumor": 40,
    "val/glioma": 8,
    "val/no_tumor": 8,
    "test/glioma": 5,
    "test/no_tumor": 5,
}


@pytest.fixture
def sources(tmp_path: Path) -> tuple[str, str]:
    """Return a manifest, which says in which order images are numbered, and the pack of its frames."""
    tree, output = write_tree(tmp_path / "tree", COUNTS), str(tmp_path / "packed")
    names = [info.uri.removeprefix(f"{tree}/") for info in storage.list_files(tree)]
    lines = [f"{name},{name.split('/')[1]},{name.split('/')[0]}" for name in names]
    storage.write_text(manifest := f"{tree}/labels.csv", "\n".join(["uri,label,split", *lines]))
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        return manifest, pack(PackConfig(input=manifest, output=output, frames=True, preprocess=PREPROCESS))


def test_a_run_on_ray_streams_the_frames_of_files_that_are_gone_and_makes_a_bundle(
    ray_session: None, sources: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    manifest, packed = sources
    shutil.rmtree(Path(manifest).parent)
    config = tiny(packed, tmp_path / "model", epochs=2, cache_gb=0)
    train(config)
    assert [record.images for record in history_of(config)] == [80, 80]
    bundle = load_bundle(config.out)
    assert {part: sum(labels.values()) for part, labels in bundle.manifest.data.counts.items()} == {
        "train": 80, "validation": 16, "test": 10
    }  # fmt: skip
    assert bundle.manifest.data.rejected == 0
    assert storage.read_json(storage.join(config.out, "metrics.json"))["n"] == 10


def test_frames_teach_what_the_files_teach(ray_session: None, sources: tuple[str, str], tmp_path: Path) -> None:
    runs = [train_here(tiny(data, tmp_path / f"run{number}", epochs=2)) for number, data in enumerate(sources)]
    (of_files, _), (of_frames, _) = runs
    assert [(record.train_loss, record.val_loss) for record in of_frames] == [
        pytest.approx((record.train_loss, record.val_loss), rel=1e-5) for record in of_files
    ]
