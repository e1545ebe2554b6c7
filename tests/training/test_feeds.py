"""How samples reach the workers: each once per epoch, in an order that depends on seed and epoch alone."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from btray.data import labelled
from btray.data.frames import FRAMES_PER_SCAN, FrameSource
from btray.data.scans import Scan, SliceInfo
from btray.data.splits import hold_out
from btray.training import feeds, run
from btray.training.config import OptimiserConfig, TrainConfig
from btray.training.feeds import decode_block, decode_rows, survey
from btray.training.plan import Plan
from btray.training.prepare import Source
from btray.training.run import fit
from tests.helpers.training_helpers import PREPROCESS, history_of, prepared, tiny, train_and_collect, write_tree


def plan_of(labels: list[int], train: list[int], **settings: Any) -> Plan:
    balance = settings.pop("class_balance", "weights")
    config = TrainConfig(
        data="d", out="o", optimiser=OptimiserConfig(class_balance=balance, class_power=1.0), **settings
    )
    everything = np.arange(len(labels))
    return Plan(
        config=config,
        classes=tuple(f"class {index}" for index in range(max(labels) + 1)),
        run_uri="",
        samples=everything * FRAMES_PER_SCAN,
        labels=np.array(labels),
        sources=np.zeros(len(labels), np.int64),
        train=np.array(train),
        validation=np.setdiff1d(everything, train),
        streaming=False,
    )


@given(seed=st.integers(0, 1000), n=st.integers(2, 60), epoch=st.integers(0, 100))
def test_an_epoch_takes_every_training_sample_once_and_no_other(seed: int, n: int, epoch: int) -> None:
    train = list(range(0, 2 * n, 2))
    plan = plan_of([index % 3 for index in range(2 * n)], train, seed=seed)
    assert sorted(plan.epoch_order(epoch).tolist()) == train
    assert plan.epoch_order(epoch).tolist() == plan.epoch_order(epoch).tolist()


def test_order_differs_by_epoch_and_by_seed() -> None:
    orders = {
        tuple(plan_of([0, 1] * 20, list(range(40)), seed=seed).epoch_order(epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_sampling_draws_rare_classes_as_often_as_common_ones() -> None:
    labels = [0] * 900 + [1] * 90 + [2] * 10
    plan = plan_of(labels, list(range(1000)), class_balance="sampling")
    drawn = np.concatenate([plan.labels[plan.epoch_order(epoch)] for epoch in range(10)])
    assert np.bincount(drawn) / len(drawn) == pytest.approx([1 / 3] * 3, abs=0.03)


def test_a_batch_is_never_larger_than_the_training_data() -> None:
    plan = plan_of([0, 1] * 5, list(range(9)), batch_size=64)
    assert (plan.batch_size, plan.steps_per_epoch) == (9, 1)


def tiff(pages: int) -> bytes:
    """Pages that all differ."""
    first, *others = (Image.new("L", (40, 40), 10 + page) for page in range(pages))
    body = io.BytesIO()
    first.save(body, "TIFF", save_all=True, append_images=others)
    return body.getvalue()


def decoded(folder: Path, pages: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """The blocks that decoding makes of a TIFF for each of `pages`, labelled 0, 1, ..."""
    uris = [str(folder / f"{number}.tiff") for number in range(len(pages))]
    for uri, count in zip(uris, pages, strict=True):
        Path(uri).write_bytes(tiff(count))
    places = np.arange(len(pages))
    return list(decode_block({"uri": np.array(uris), "row": places, "label": places}, FrameSource(PREPROCESS)))


def test_no_frame_has_the_sample_number_of_another_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "FRAMES_PER_SCAN", 4)
    (block,) = decoded(tmp_path, [4, 5, 2])
    assert block["sample"].tolist() == [0, 1, 2, 3, 4, 8, 9]
    assert block["label"].tolist() == (block["sample"] // 4).tolist()
    assert block["code"].tolist() == [""] * 4 + ["bomb"] + [""] * 2
    assert "5 frames" in block["message"][4]


def test_blocks_hold_few_frames_however_many_a_scan_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "_BLOCK_ROWS", 6)
    blocks = decoded(tmp_path, [5, 5, 1, 5, 5])
    assert [len(block["frame"]) for block in blocks] == [6, 6, 6, 3]
    assert np.concatenate([block["label"] for block in blocks]).tolist() == [0] * 5 + [1] * 5 + [2] + [3] * 5 + [4] * 5


@pytest.mark.cluster
def test_frames_are_kept_while_they_fit_however_few_scans_they_are_of(ray_session: None, tmp_path: Path) -> None:
    root = Path(write_tree(tmp_path / "data", {"train/glioma": 6, "train/no_tumor": 6, "val/glioma": 2}))
    Path(root, "train", "no_tumor", "many.tiff").write_bytes(tiff(50))
    frames = 6 + 6 + 2 + 50
    for room, streaming in ((frames, False), (frames - 1, True)):
        data = prepared(tiny(str(root), tmp_path / "out", cache_gb=room * PREPROCESS.size**2 / 1e9))
        assert data.plan.streaming == streaming
        assert len(data.plan.samples) == frames
        assert (data.frames is None) == streaming
        if data.frames is not None:
            assert sorted(row["sample"] for row in data.frames.take_all()) == data.plan.samples.tolist()


@pytest.mark.cluster
def test_frames_that_are_kept_do_not_pass_through_the_driver(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = decoded_pictures(tmp_path, 9)
    rows = pa.table({"row": np.arange(9), "uri": names, "label": np.zeros(9, np.int64)})
    fetched: list[int] = []
    get = ray.get
    monkeypatch.setattr(ray, "get", lambda refs, **options: noted(get(refs, **options), fetched))
    kept, surveyed = survey(decode_rows(rows, FrameSource(PREPROCESS)), keep=9)
    assert surveyed["sample"].to_pylist() == [row * FRAMES_PER_SCAN for row in range(9)]
    assert kept is not None
    assert 0 < sum(fetched) < 9 * PREPROCESS.size**2, "bytes of the columns, not of the frames"


def noted(objects: Any, sizes: list[int]) -> Any:
    """Note the bytes of the tables among what was fetched."""
    sizes += [
        table.nbytes for table in (objects if isinstance(objects, list) else [objects]) if isinstance(table, pa.Table)
    ]
    return objects


def decoded_pictures(folder: Path, count: int) -> list[str]:
    root = Path(write_tree(folder / "pictures", {"glioma": count}))
    return sorted(map(str, root.rglob("*.png")))


@pytest.mark.soak
@pytest.mark.cluster
@pytest.mark.parametrize("workers", [1, 2])
def test_streaming_feeds_every_sample_on_two_cpus(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    monkeypatch.setattr(run, "train_loop", train_and_collect)
    source = write_tree(
        tmp_path / "data", {"train/glioma": 33, "train/no_tumor": 31, "val/glioma": 9, "val/no_tumor": 8}
    )
    config = tiny(source, tmp_path / "out", num_workers=str(workers), cache_gb=0, epochs=2)
    data = prepared(config)
    assert data.plan.streaming
    assert len(data.plan.validation) == 17
    Path(source, "train/glioma/000.png").unlink()  # it could be read when the run began
    fit(data)
    assert [record.rejected for record in history_of(config)] == [1, 1]
    parts = [json.loads(Path(data.plan.run_uri, f"{rank}.json").read_text()) for rank in range(workers)]
    orders = []
    for epoch in (0, 1):
        trained = [sample for part in parts for batch in part[epoch][0] for sample in batch]
        validated = [sample for part in parts for batch in part[epoch][1] for sample in batch]
        assert sorted(validated) == data.plan.samples[data.plan.validation].tolist()
        assert len(set(trained)) == len(trained)
        assert set(trained) <= set(data.plan.samples[data.plan.train].tolist())
        assert len(trained) == 63  # four whole batches but for the lost image
        orders.append([part[epoch][0] for part in parts])
    assert orders[0] != orders[1]


def test_patients_named_by_the_files_keep_their_slices_on_one_side_and_stay_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two slices of each patient, under names that are no neighbours; the manifest names none."""

    def decode_named(data: bytes, **_: Any) -> Scan:
        pixels = np.arange(2500, dtype=np.uint16).reshape(50, 50)
        return Scan([pixels], [SliceInfo(patient_key=data.decode())] if data else None)

    monkeypatch.setattr("btray.data.frames.decode", decode_named)
    patients = [f"digest {number % 10}" for number in range(20)]
    contents = [*map(str.encode, patients), b""]
    count = len(contents)
    batch = {"uri": np.array(["x"] * count), "row": np.arange(count), "label": np.zeros(count, np.int64)}
    (block,) = decode_block(batch, FrameSource(PREPROCESS, read=lambda uris, **_: contents))
    assert block["patient"].tolist() == [*patients, ""]
    uris = [f"scans/{name}.dcm" for name in np.random.default_rng(0).permutation(count)]
    empty = [None] * count
    table = pa.table(
        {
            "uri": uris,
            "label": ["a"] * count,
            "split": empty,
            "patient_id": ["of the manifest", *empty[1:]],
            "source": empty,
        },
        schema=pa.schema([labelled.SCHEMA.field(name) for name in ("uri", "label", "split", "patient_id", "source")]),
    )
    surveyed = pa.table({name: block[name] for name in ("sample", "patient")})
    source = Source(TrainConfig(data="d", out="o"), table, ("a", "b")).with_patients(surveyed)
    assert source.table["patient_id"].to_pylist() == ["of the manifest", *patients[1:], None]
    held = hold_out(source.table.slice(1, 19), fraction=0.3, seed=1, prints=None)
    sides = {(name, bool(side)) for name, side in zip(patients[1:], held, strict=False)}
    assert len(sides) == len({name for name, _ in sides}), "a patient is on both sides"
