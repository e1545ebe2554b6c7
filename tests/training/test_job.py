"""The training job end to end on tiny networks: curves, resuming, kills, rejected inputs, transfer, streaming, S3."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from btray import phantoms, storage
from btray.core.errors import ThresholdExceeded, UserError
from btray.data import labelled
from btray.data.frames import FrameSource, Rejection
from btray.model.bundle import load_bundle, read_fingerprints
from btray.model.classifier import Classifier
from btray.training import optimizer, prepare
from btray.training.checkpoints import Checkpoint
from btray.training.config import TrainConfig, TuneConfig
from btray.training.history import EpochRecord, best_record, score_of
from btray.training.job import train
from btray.training.optimizer import weighted_losses
from btray.training.plan import run_folder
from btray.training.run import best_weights, claim_run, is_finished, record_finished
from tests.conftest import ROOT
from tests.helpers.local_data import run_here
from tests.helpers.scan_corpus import bad_scans
from tests.helpers.training_helpers import (
    checkpoint_in,
    easy_picture,
    history_of,
    prepared,
    tiny,
    train_here,
    training_workers,
    write_tree,
)
from tools.processes import descendants, is_alive

pytestmark = pytest.mark.cluster

# Training and validation loss of the epochs of `unbalanced`, measured when the loop was written: no refactor may change
# them. One curve for each kind of oneDNN's convolutions: AVX2, and AVX-512 (ONEDNN_MAX_CPU_ISA chooses). They round
# differently, and Adam's first steps go by the signs of gradients, also of those that are nothing but rounding.
GOLDEN = [
    [1.11364, 0.93711, 0.90269, 0.63537, 0.71723, 0.57963, 0.64506, 0.52321, 0.59138, 0.45895, 0.58384, 0.43893],
    [1.11385, 0.93714, 0.91162, 0.63213, 0.72939, 0.58289, 0.65843, 0.5304, 0.5914, 0.45689, 0.58727, 0.43533],
]
LOSSES = ("train_loss", "val_loss")
# Of frames of 32 x 32 its last feature map is one pixel.
ONE_PIXEL = {"norm": "batch", "widths": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train looks at its workers ten times a second instead of every two; temporary files go with the test."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode in this process, for what is decided before a worker starts."""
    run_here(monkeypatch)


@pytest.fixture(scope="module")
def unbalanced(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three classes of 50, 26 and 12 images to train on, and a test split."""
    counts = {"glioma": 50, "meningioma": 26, "no_tumor": 12}
    tree = {f"Training/{label}": count for label, count in counts.items()}
    return write_tree(tmp_path_factory.mktemp("unbalanced"), {**tree, **{f"Testing/{label}": 6 for label in counts}})


@pytest.fixture(scope="module")
def with_val_split(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two classes with a split of their own for validation, and none for testing."""
    return write_tree(
        tmp_path_factory.mktemp("val"), {"train/glioma": 40, "train/no_tumor": 40, "val/glioma": 11, "val/no_tumor": 8}
    )


@pytest.fixture(scope="module")
def finished(ray_session: None, unbalanced: str, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of six epochs with two workers, which compute their images of a step in two parts, that has ended."""
    limits = {"abstain_target": 0.9, "conformal_error": 0.2}
    config = tiny(unbalanced, tmp_path_factory.mktemp("finished") / "model", num_workers="2", accumulate=2, **limits)
    train(config)
    return config


def losses(history: list[EpochRecord]) -> list[float]:
    return [getattr(record, name) for record in history for name in LOSSES]


def is_golden(curve: list[float]) -> bool:
    return any(curve == pytest.approx(golden, rel=1e-3) for golden in GOLDEN)


def read_rejected(config: TrainConfig) -> dict[str, str]:
    rows = csv.DictReader(io.StringIO(storage.read_text(storage.join(run_folder(config), "rejected.csv"))))
    return {row["uri"]: row["error_code"] for row in rows}


# ---- curves


def test_two_workers_with_half_the_batch_learn_like_one_with_the_whole(
    finished: TrainConfig, unbalanced: str, tmp_path: Path
) -> None:
    alone, _ = train_here(tiny(unbalanced, tmp_path))
    assert losses(history_of(finished)) == pytest.approx(losses(alone), rel=1e-4)


def test_every_image_counts_once_however_many_workers_train(finished: TrainConfig, unbalanced: str) -> None:
    images = sum("Training" in info.uri for info in storage.list_files(unbalanced))
    for record in history_of(finished):
        assert images / 2 < record.images <= images  # the rest is held out
        # `seconds` are those of the whole epoch, training and validation
        assert record.images_per_second > record.images / record.seconds


def test_validation_follows_what_a_run_of_a_few_steps_learns(ray_session: None, tmp_path: Path) -> None:
    """Running statistics of batch norms that lag behind the weights would keep it where it began."""
    data = write_tree(tmp_path / "data", {"glioma": 40, "meningioma": 40, "no_tumor": 40})
    config = tiny(data, tmp_path, epochs=4, batch_size=64, network={"norm": "batch"}, optimiser={"ema": 0.99})
    history, _ = train_here(config)
    losses = [record.val_loss or 0.0 for record in history]
    assert losses[0] - losses[-1] > 0.2, losses


def test_the_seed_decides_the_curve_and_the_golden_losses_stay(
    ray_session: None, unbalanced: str, tmp_path: Path
) -> None:
    first, _ = train_here(tiny(unbalanced, tmp_path / "first"))
    again, _ = train_here(tiny(unbalanced, tmp_path / "again"))
    other, _ = train_here(tiny(unbalanced, tmp_path / "other", seed=1))
    assert losses(first) == pytest.approx(losses(again), rel=1e-6)
    assert losses(first) != pytest.approx(losses(other), rel=1e-2)
    assert is_golden(losses(first)), str([round(loss, 5) for loss in losses(first)])


@pytest.mark.parametrize(
    "change",
    [
        {"optimiser": {"class_balance": "none"}},
        {"optimiser": {"class_balance": "sampling"}},
        {"optimiser": {"mixup": 0.4}},
        {"optimiser": {"ema": 0.0}},
        {"network": {"norm": "batch", "dropout": 0.3}},
    ],
    ids=str,
)
def test_each_way_of_training_learns_and_differs_from_the_default(
    ray_session: None, unbalanced: str, tmp_path: Path, change: dict[str, Any]
) -> None:
    history, _ = train_here(tiny(unbalanced, tmp_path, **change))
    assert history[-1].train_loss < history[0].train_loss
    assert not is_golden(losses(history))


def test_easy_pictures_are_learnt_and_the_bundle_says_how_it_was_measured(finished: TrainConfig) -> None:
    metrics = storage.read_json(storage.join(finished.out, "metrics.json"))
    assert metrics["n"] == 18
    assert metrics["macro_f1"] > 0.8  # chance gives a third
    assert "test split" in metrics["measured_on"]
    bundle = load_bundle(finished.out)
    assert bundle.manifest.classes == ("glioma", "meningioma", "no_tumor")
    assert bundle.manifest.data.counts["test"] == {"glioma": 6, "meningioma": 6, "no_tumor": 6}
    assert metrics["clean"]["n"] == metrics["n"] == 18, "no two of these pictures are the same image"
    prints = read_fingerprints(bundle)
    assert prints is not None
    assert len(prints) == sum(sum(bundle.manifest.data.counts[part].values()) for part in ("train", "validation"))
    history = history_of(finished)
    assert [record.epoch for record in history] == [1, 2, 3, 4, 5, 6]
    assert storage.read_text(storage.join(finished.out, "history.jsonl")) == storage.read_text(
        storage.join(run_folder(finished), "history.jsonl")
    )
    assert any("tfevents" in name for name in storage.list_names(storage.join(run_folder(finished), "tensorboard")))


def test_configured_limits_are_fitted_on_validation_images_and_marked_in_every_answer(finished: TrainConfig) -> None:
    limits = load_bundle(finished.out).manifest.thresholds
    assert limits.abstain_below is not None
    assert limits.conformal_error == 0.2
    assert limits.ood_score is not None
    metrics = storage.read_json(storage.join(finished.out, "metrics.json"))
    assert metrics["abstention"]["threshold"] == limits.abstain_below
    assert metrics["conformal"]["coverage"] >= 0.5
    assert metrics["out_of_distribution"]["threshold"] == limits.ood_score
    noise = np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8)
    slices = [info.uri for info in storage.list_files(storage.join(finished.data, "Testing"))]
    said, strange = (Classifier.load(finished.out).predict(inputs) for inputs in (slices, [noise]))
    assert strange[0].out_of_distribution
    assert sum(p.out_of_distribution for p in said) == metrics["out_of_distribution"]["flagged"]
    assert sum(not p.abstained for p in said) == metrics["abstention"]["answered"]
    assert all(p.label in p.label_set for p in said)


def test_an_epoch_without_a_finite_loss_ends_the_run_and_is_never_the_best(
    ray_session: None, with_val_split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_of_steps = iter(range(1000))

    def break_in_the_third_epoch(*arguments: Any) -> torch.Tensor:  # 80 images in batches of 16 are 5 steps
        return weighted_losses(*arguments) * (float("nan") if next(losses_of_steps) >= 12 else 1.0)

    monkeypatch.setattr(optimizer, "weighted_losses", break_in_the_third_epoch)
    config = tiny(with_val_split, tmp_path / "model", epochs=6, num_workers="1")
    history, _ = train_here(config)
    assert [record.train_loss is None for record in history] == [False, False, True]
    assert history[2].val_loss is None
    assert history[2].score < 0.0 <= history[0].val_macro_f1
    assert "NaN" not in storage.read_text(storage.join(run_folder(config), "history.jsonl"))


def test_the_best_finite_checkpoint_is_kept_and_if_there_is_none_the_remedy_is_named(tmp_path: Path) -> None:
    def checkpoint(epoch: int, value: float) -> ray.train.Checkpoint:
        folder = tmp_path / str(epoch)
        folder.mkdir()
        weights = {"w": torch.tensor([value])}
        content = Checkpoint(
            network=weights, optimiser={}, average=None, evaluated=weights, history=[], steps=0, totals=torch.zeros(3)
        )
        content.save(str(folder))
        return ray.train.Checkpoint.from_directory(folder)

    nan = float("nan")
    good, late = checkpoint(1, 3.0), checkpoint(2, nan)
    ranked = [(late, {"score": score_of(0.9, nan)}), (good, {"score": score_of(0.5, 0.7)})]
    assert best_weights(ranked, "train")["w"].item() == 3.0
    for score in (score_of(0.9, nan), 4.0):  # 4.0: of a refit's fifth epoch, which is not validated
        with pytest.raises(UserError, match=r"diverged.*--optimiser\.learning-rate.*--optimiser\.clip-norm.*--out"):
            best_weights([(late, {"score": score})], "train")


@pytest.mark.soak
def test_the_refit_continues_the_best_network_with_every_image_and_leaves_the_first_run_as_it_was(
    ray_session: None, unbalanced: str, tmp_path: Path
) -> None:
    config = tiny(unbalanced, tmp_path / "model", epochs=2, refit_epochs=3)
    train(config)
    assert [record.epoch for record in history_of(config)] == [1, 2]
    again = history_of(config.model_copy(update={"name": "train.refit-2-3"}))
    assert [record.val_loss for record in again] == [None] * 3
    assert again[-1].train_loss < history_of(config)[-1].train_loss
    bundle = load_bundle(config.out)
    last = checkpoint_in(storage.join(run_folder(config) + ".refit-2-3", "epoch_00003")).evaluated
    before = checkpoint_in(storage.join(run_folder(config), "epoch_00002")).evaluated
    assert all(torch.equal(tensor, last[name]) for name, tensor in bundle.weights.items())
    assert not all(torch.equal(tensor, before[name]) for name, tensor in bundle.weights.items())
    assert storage.read_json(storage.join(config.out, "metrics.json"))["n"] == 18


@pytest.mark.soak
def test_training_stops_at_patience_and_keeps_the_best_epoch(
    ray_session: None, with_val_split: str, tmp_path: Path
) -> None:
    # Far too high a rate, so that epochs are good and bad by turns.
    wild = {"learning_rate": 0.5, "warmup": 0.0, "schedule": "constant", "ema": 0.0}
    config = tiny(with_val_split, tmp_path / "model", epochs=30, patience=3, optimiser=wild, refit_epochs=2)
    train(config)
    history = history_of(config)
    best = best_record(history)
    assert len(history) == best.epoch + 3 < 30
    assert storage.list_names(config.storage_uri) == [config.name], "a val split of the data's own is never learnt from"
    bundle = load_bundle(config.out)
    of_best, of_last = (
        checkpoint_in(storage.join(run_folder(config), f"epoch_{epoch:05d}")).evaluated
        for epoch in (best.epoch, len(history))
    )
    assert all(torch.equal(bundle.weights[name], value) for name, value in of_best.items())
    assert not all(torch.equal(bundle.weights[name], value) for name, value in of_last.items())


# ---- runs of the same name


@pytest.mark.soak
def test_a_finished_run_returns_at_once_and_continues_with_more_epochs(
    finished: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    history, model_id = history_of(finished), load_bundle(finished.out).manifest.model_id
    with monkeypatch.context() as patch:
        patch.setattr("btray.training.job.prepare", None)  # not one image is read
        again = finished.model_copy(update={"num_workers": "1", "verbose": True, "max_rejected": 0.5})
        assert train(finished) == train(again) == finished.out
    assert "is finished" in capsys.readouterr().out
    assert history_of(finished) == history
    assert load_bundle(finished.out).manifest.model_id == model_id
    train(finished.model_copy(update={"epochs": 8, "num_workers": "1:2"}))
    assert load_bundle(finished.out).manifest.data.epochs == 8
    longer = history_of(finished)
    assert longer[:6] == history
    assert [record.epoch for record in longer] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_another_config_or_other_data_under_the_name_of_a_run_is_refused(
    finished: TrainConfig, unbalanced: str, tmp_path: Path
) -> None:
    before = history_of(finished)
    for change, key in (
        ({"seed": 1}, "seed"),
        ({"batch_size": 8}, "batch_size"),
        ({"optimiser": finished.optimiser.model_copy(update={"ema": 0.5})}, "optimiser.ema"),
        ({"network": finished.network.model_copy(update={"widths": (8, 24)})}, "network.widths"),
    ):
        with pytest.raises(UserError, match=rf"another {key};.*another --out, or --overwrite"):
            train(finished.model_copy(update=change))
    other = write_tree(tmp_path / "other", {"Training/glioma": 20, "Training/meningioma": 20}, seed=9)
    with pytest.raises(UserError, match=r"another data|another classes"):
        train(finished.model_copy(update={"data": other}))
    picture = Path(unbalanced, "Training/glioma/000.png")
    kept = picture.read_bytes()
    try:
        picture.write_bytes(easy_picture(0, 123456))
        with pytest.raises(UserError, match=r"another data;.*another --out"):
            train(finished)
    finally:
        picture.write_bytes(kept)
    assert history_of(finished) == before


def test_a_bundle_of_another_run_is_not_replaced_unless_asked(finished: TrainConfig, tmp_path: Path) -> None:
    bundle = Path(finished.out, "bundle.json").read_bytes()
    with pytest.raises(UserError, match=r"another name; give another --out, or --overwrite"):
        train(finished.model_copy(update={"name": "again"}))
    with pytest.raises(UserError, match=r"another storage; give another --out"):
        train(finished.model_copy(update={"storage": str(tmp_path)}))
    with pytest.raises(UserError, match=r"holds the result of another run"):
        TuneConfig(data=finished.data, out=finished.out).check()
    assert Path(finished.out, "bundle.json").read_bytes() == bundle
    finished.model_copy(update={"name": "again", "overwrite": True}).check()


def test_overwriting_deletes_the_run_of_the_same_name_and_no_other(
    here: None, with_val_split: str, tmp_path: Path
) -> None:
    config = tiny(with_val_split, tmp_path / "model")
    data = prepared(config)
    claim_run(data)
    runs = {name: Path(config.storage_uri, name, "state") for name in ("train", "train.refit-6-2", "train2", "other")}
    for path in runs.values():
        storage.write_text(str(path), "x")

    def claim(**changes: Any) -> None:
        changed = config.model_copy(update=changes)
        claim_run(replace(data, plan=replace(data.plan, config=changed)))

    claim(overwrite=True, epochs=99)
    assert all(path.exists() for path in runs.values()), "the same run is resumed"
    with pytest.raises(UserError, match=r"another seed;.*another --out.*--overwrite"):
        claim(seed=5)
    claim(seed=5, overwrite=True)
    assert {name for name, path in runs.items() if path.exists()} == {"train2", "other"}
    claim(seed=5)
    with pytest.raises(UserError, match="another seed"):
        claim()


def test_a_run_is_not_resumed_with_frames_of_another_preprocessing(
    here: None, with_val_split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(with_val_split, tmp_path / "model")
    data = prepared(config)
    claim_run(data)
    claim_run(data)
    storage.write_text(storage.join(config.out, "bundle.json"), "{}")
    storage.write_text(storage.join(config.out, "config.yaml"), config.to_yaml())
    record_finished(data.source)
    assert is_finished(data.source)
    monkeypatch.setattr("btray.training.run.preprocess_digest", lambda _: "that of another Pillow")
    assert not is_finished(data.source)
    with pytest.raises(UserError, match=r"another preprocessing;.*another --out.*--overwrite"):
        claim_run(data)


def test_the_same_files_under_another_path_are_the_same_run(
    here: None, with_val_split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(with_val_split, tmp_path / "model")
    data = prepared(config)
    claim_run(data)

    def claim(source: str) -> None:
        plan = replace(data.plan, config=TrainConfig(**dict(config) | {"data": source}))
        claim_run(replace(data, plan=plan))

    monkeypatch.chdir(Path(with_val_split).parent)
    for way in (Path(with_val_split).name, f"./{Path(with_val_split).name}/"):
        claim(way)
    with pytest.raises(UserError, match="another data;"):
        claim("elsewhere")


# ---- kills


def wait_for(condition: Callable[[], Any], seconds: float, failed: Callable[[], bool] = lambda: False) -> Any:
    """What `condition` gives once it is true; an AssertionError after `seconds`, or once `failed` is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        assert not failed(), "ended before it was to"
        time.sleep(0.02)
    return found


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_killed_worker_is_replaced_and_the_run_completes(
    ray_session: None, with_val_split: str, tmp_path: Path
) -> None:
    """Batch norm without averaging, too: what is validated must be what is kept, though statistics differ by worker."""
    config = tiny(
        with_val_split,
        tmp_path / "model",
        num_workers="2",
        epochs=16,
        batch_size=4,
        network={"norm": "batch"},
        optimiser={"ema": 0.0, "learning_rate": 0.002},
    )
    seen: list[EpochRecord] = []
    killed: list[int] = []
    ended = threading.Event()

    def kill_one() -> None:
        wait_for(lambda: len(history_of(config)) >= 3, 240, ended.is_set)
        killed.append(training_workers(os.getpid())[-1])
        os.kill(killed[0], signal.SIGKILL)
        seen.extend(history_of(config))

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        train(config)
    finally:
        ended.set()
        killer.join()
    assert killed
    assert 3 <= len(seen) < 16
    history = history_of(config)
    assert [record.epoch for record in history] == list(range(1, 17))
    assert history[0] == seen[0]  # to the last bit of its seconds: not trained anew

    best = best_record(history)
    bundle = load_bundle(config.out)
    pictures = [Path(info.uri) for info in storage.list_files(storage.join(with_val_split, "val"))]
    frames = FrameSource(config.preprocess).from_uris([str(path) for path in pictures])
    labels = [bundle.manifest.classes.index(path.parent.name) for path in pictures]
    logits = Classifier(bundle).answer(np.stack([f[0] for f in frames if not isinstance(f, Rejection)])).logits
    loss = F.cross_entropy(torch.as_tensor(logits), torch.tensor(labels)).item()
    assert loss == pytest.approx(best.val_loss, rel=1e-3)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_killed_job_that_is_run_again_resumes_where_it_was(with_val_split: str, tmp_path: Path) -> None:
    flags = {
        "data": with_val_split, "out": str(tmp_path / "model"), "num-workers": 1, "epochs": 12, "batch-size": 4,
        "preprocess.size": 32, "network.stem-width": 8, "network.widths": "8,16", "network.depths": "1,1",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "jobs" / "train.py")]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    environment = os.environ | {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    config = TrainConfig(data=with_val_split, out=str(tmp_path / "model"))
    log = tmp_path / "log"
    with log.open("w") as output, subprocess.Popen(command, env=environment, stdout=output, stderr=output) as job:
        try:
            wait_for(lambda: len(history_of(config)) >= 5, 400, lambda: job.poll() is not None)
        finally:
            started = descendants(job.pid)
            job.kill()
            end_all(started)
    seen = history_of(config)
    assert 5 <= len(seen) < 12, log.read_text()
    assert not Path(config.out, "bundle.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == config.out
    history = history_of(config)
    assert [record.epoch for record in history] == list(range(1, 13))
    assert history[:3] == seen[:3]
    load_bundle(config.out).network()


def end_all(pids: set[int]) -> None:
    """End what a killed job left of its Ray, by number."""
    for pid in pids:
        if is_alive(pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    wait_for(lambda: not any(map(is_alive, pids)), 30)


# ---- inputs


@pytest.fixture
def partly_broken(tmp_path: Path) -> tuple[str, dict[str, str]]:
    """Six classes without a test split, with bad files; and the code of each."""
    labels = ("glioma", "meningioma", "pituitary", "metastasis", "no_tumor", "Cavernoma 2")
    root = write_tree(tmp_path / "broken", dict.fromkeys(labels, 14))
    bad = {name: bad_scans()[name] for name in ("one_pixel_png", "png_flipped_bit", "png_header_bomb", "animated_gif")}
    codes = {}
    for name, (data, code) in bad.items():
        uri = storage.join(root, "glioma", name)
        storage.write_bytes(uri, data)
        codes[uri] = code
    return root, codes


def test_bad_files_are_named_and_a_source_without_test_split_with_six_classes_trains(
    ray_session: None, partly_broken: tuple[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, codes = partly_broken
    vanishing = storage.join(root, "glioma", "000.png")

    def list_then_lose(uri: str, **options: Any) -> Any:
        table = labelled.read_labelled(uri, **options)
        Path(vanishing).unlink()
        return table

    monkeypatch.setattr(prepare, "read_labelled", list_then_lose)
    config = tiny(root, tmp_path / "model", max_rejected=0.1, epochs=3, refit_epochs=2)
    train(config)
    assert read_rejected(config) == codes | {vanishing: "not_found"}
    manifest = load_bundle(config.out).manifest
    assert manifest.classes == ("glioma", "meningioma", "pituitary", "metastasis", "no_tumor", "Cavernoma 2")
    assert manifest.data.rejected == 5
    metrics = storage.read_json(storage.join(config.out, "metrics.json"))
    assert "validation images" in metrics["measured_on"]
    assert metrics["n"] == sum(manifest.data.counts["validation"].values())
    assert set(metrics["per_class"]) == set(manifest.classes)
    # The refit moves features away; by the limits of the network that answered, one image in a hundred is strange.
    assert metrics["out_of_distribution"]["flagged"] == 1
    assert metrics["model_id"] == manifest.model_id
    assert (manifest.data.epochs, manifest.data.refit_epochs) == (3, 2)
    best = best_record(history_of(config)).epoch
    assert manifest.data.best_epoch == best
    assert f"3, of which number {best} was the best; then 2 on all images" in storage.read_text(
        f"{config.out}/report.html"
    )
    assert storage.list_names(config.storage_uri) == ["train", "train.refit-3-2"]


def test_too_many_bad_files_stop_the_job_and_the_commonest_code_is_named(
    here: None, partly_broken: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    root, codes = partly_broken
    for number in range(3):
        uri = storage.join(root, "pituitary", f"empty{number}.jpg")
        storage.write_bytes(uri, b"")
        codes[uri] = "empty"
    config = tiny(root, tmp_path / "model", max_rejected=0.07)
    with pytest.raises(ThresholdExceeded, match=r"^7 of 91 inputs .*most often empty \(3\).*--max-rejected"):
        train(config)
    assert read_rejected(config) == codes
    assert not history_of(config)
    assert not storage.exists(storage.join(config.out, "bundle.json"))


@pytest.mark.soak
def test_unreadable_test_images_are_named_and_too_many_of_them_fail_the_job_after_the_bundle_is_written(
    ray_session: None, tmp_path: Path
) -> None:
    root = write_tree(
        tmp_path / "data", {f"{split}/{label}": 20 for split in ("train", "test") for label in ("glioma", "no_tumor")}
    )
    bad = {storage.join(root, f"test/glioma/bad{n}.jpg"): b"" for n in range(3)}
    for uri, data in bad.items():
        storage.write_bytes(uri, data)
    config = tiny(root, tmp_path / "model", epochs=1)
    with pytest.raises(ThresholdExceeded, match=r"^3 of 43 inputs .*empty \(3\)"):
        train(config)
    assert read_rejected(config) == dict.fromkeys(bad, "empty")
    assert storage.read_json(storage.join(config.out, "metrics.json"))["n"] == 40


@pytest.mark.parametrize(
    ("counts", "changes", "message"),
    [
        ({"glioma": 9, "Testing/glioma": 3, "Testing/no_tumor": 3}, {}, "at least two classes outside val and test"),
        ({"glioma": 9, "no_tumor": 9, "Testing/other": 3}, {}, "other"),
        ({"glioma": 9, "no_tumor": 9}, {"batch_size": 3, "num_workers": "2", "network": ONE_PIXEL}, "batch norm"),
        ({"glioma": 9, "no_tumor": 9}, {"cache_gb": 0, "optimiser": {"class_balance": "sampling"}}, "--cache-gb"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_input_is_one_line(
    here: None, tmp_path: Path, counts: dict[str, int], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train(tiny(write_tree(tmp_path / "data", counts), tmp_path / "model", **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"batch_size": 1, "num_workers": "2"}, "--batch-size 1 cannot feed"), ({"use_gpu": True}, "--use-gpu: .*no GPU")],
    ids=["batch", "gpu"],
)
def test_a_config_that_cannot_work_is_refused_before_an_image_is_read(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(prepare, "decode_rows", None)
    with pytest.raises(UserError, match=message):
        train(tiny(write_tree(tmp_path / "data", {"glioma": 9, "no_tumor": 9}), tmp_path / "model", **changes))


def test_a_class_whose_images_are_all_broken_is_named(here: None, tmp_path: Path) -> None:
    root = write_tree(tmp_path / "data", {"glioma": 20, "no_tumor": 20})
    storage.write_bytes(storage.join(root, "pituitary/broken.png"), b"broken")
    with pytest.raises(UserError, match="'pituitary' has no readable image"):
        train(tiny(root, tmp_path / "model"))


def test_the_val_split_alone_is_held_out(here: None, with_val_split: str, tmp_path: Path) -> None:
    data = prepared(tiny(with_val_split, tmp_path))
    rows = data.plan.samples[data.plan.validation] // 1024
    assert set(data.source.table.take(rows)["split"].to_pylist()) == {"val"}
    assert len(rows) == 19
    assert len(data.plan.train) == 80


# ---- transfer


@pytest.fixture
def leaking(tmp_path: Path) -> tuple[str, set[str]]:
    """Phantoms of which three test slices stand among the training slices too, changed; and the latter's names."""
    root = storage.resolve(tmp_path / "leaking")
    phantoms.write_data_set(root, per_class={"Training": 6, "Testing": 3}, seed=2)
    twins = set()
    for number, change in enumerate((ImageOps.mirror, ImageOps.flip, lambda picture: picture.resize((150, 150)))):
        picture = Image.open(Path(root, "Testing", "glioma", f"{number:05d}.jpg"))
        twins.add(storage.join(root, "Training", "glioma", f"twin{number}.png"))
        change(picture).save(Path(root, "Training", "glioma", f"twin{number}.png"))
    return root, twins


def test_twins_of_test_images_are_counted_and_left_out_only_when_asked(
    here: None, leaking: tuple[str, set[str]], tmp_path: Path
) -> None:
    root, twins = leaking
    used = {}
    for on_leak in ("warn", "drop"):
        data = prepared(tiny(root, tmp_path / on_leak, on_leak=on_leak, validation=0.3))
        assert data.leak.tested == {"test": (3, 15)}
        used[on_leak] = set(data.source.table["uri"].take(data.plan.samples // 1024).to_pylist())
        assert not any("/Testing/" in uri for uri in used[on_leak])
    assert used["warn"] - used["drop"] == twins
    assert len(used["drop"]) == 30


def test_a_leak_stops_the_job_before_training_when_asked(
    here: None, leaking: tuple[str, set[str]], tmp_path: Path
) -> None:
    config = tiny(leaking[0], tmp_path / "model", on_leak="fail")
    with pytest.raises(ThresholdExceeded, match="3 of 15 test images"):
        train(config)
    assert not history_of(config)


def test_files_of_the_same_image_are_never_on_both_sides_of_the_validation_split(here: None, tmp_path: Path) -> None:
    root = storage.resolve(tmp_path / "twins")
    phantoms.write_data_set(root, per_class={"Training": 24}, seed=4)
    for label in phantoms.CLASSES:
        for number in range(0, 24, 2):
            picture = Image.open(Path(root, "Training", label, f"{number:05d}.jpg"))
            ImageOps.mirror(picture).save(Path(root, "Training", label, f"again{23 - number:05d}.png"))
    for seed in range(3):
        data = prepared(tiny(root, tmp_path / str(seed), seed=seed, validation=0.25))
        rows = data.plan.samples // 1024
        held = np.isin(np.arange(len(rows)), data.plan.validation)
        side = dict(zip(data.source.table["uri"].take(rows).to_pylist(), held.tolist(), strict=True))
        for label in phantoms.CLASSES:
            for number in range(0, 24, 2):
                original, again = f"{number:05d}.jpg", f"again{23 - number:05d}.png"
                folder = storage.join(root, "Training", label)
                assert side[storage.join(folder, original)] == side[storage.join(folder, again)]


def test_a_frozen_body_stays_for_its_epochs_and_then_learns(
    ray_session: None, with_val_split: str, tmp_path: Path
) -> None:
    start = tiny(with_val_split, tmp_path / "start", network={"norm": "batch"}, epochs=1)
    _, state = train_here(start)
    weights = tmp_path / "start.safetensors"
    safetensors.torch.save_file({name: value.contiguous() for name, value in state.evaluated.items()}, weights)

    def tuned(epochs: int, freeze_epochs: int) -> set[str]:
        optimiser = {"freeze_epochs": freeze_epochs, "weight_decay": 0.1}
        config = start.model_copy(
            update={
                "out": str(tmp_path / f"{epochs}-{freeze_epochs}"),
                "epochs": epochs,
                "init_from": str(weights),
                "optimiser": start.optimiser.model_copy(update=optimiser),
            }
        )
        _, end = train_here(config)
        return {
            name
            for part in ("network", "evaluated")
            for name, value in getattr(end, part).items()
            if not torch.equal(value, state.evaluated[name])
        }

    assert tuned(2, 2) == {"head.weight", "head.bias"}
    assert tuned(3, 2) == set(state.evaluated)
    assert tuned(1, 0) == set(state.evaluated)


def test_a_bundle_is_a_start_and_weights_that_fit_nothing_are_refused(
    finished: TrainConfig, with_val_split: str, tmp_path: Path
) -> None:
    first, _ = train_here(tiny(with_val_split, tmp_path / "out", init_from=finished.out, epochs=1))
    assert first[0].val_loss > 0  # three classes before, two now: all but the head is taken over
    with pytest.raises(UserError, match=r"not one of its .* tensors fits .*resnet18"):
        prepared(tiny(with_val_split, tmp_path / "out", init_from=finished.out, network={"architecture": "resnet18"}))
    with pytest.raises(UserError, match=r"absent\.safetensors: nothing is there"):
        prepared(tiny(with_val_split, tmp_path / "out", init_from=str(tmp_path / "absent.safetensors")))
    pickled = tmp_path / "pickled.pt"
    torch.save({"state_dict": {"head.weight": torch.zeros(1)}, "other": Path("x")}, pickled)
    with pytest.raises(UserError, match="neither a safetensors file nor a plain state dict"):
        prepared(tiny(with_val_split, tmp_path / "out", init_from=str(pickled)))


# ---- object storage


@pytest.mark.soak
@pytest.mark.s3
def test_data_run_and_bundle_may_all_lie_in_object_storage(ray_session: None, bucket: str) -> None:
    data = write_tree(f"{bucket}/scans", {"train/glioma": 20, "train/no_tumor": 20, "val/glioma": 5, "val/no_tumor": 5})
    config = tiny(data, f"{bucket}/model", storage=f"{bucket}/runs", num_workers="1:1", epochs=2)
    assert train(config) == f"{bucket}/model"
    assert load_bundle(f"{bucket}/model").manifest.data.uri == data
    assert [record.epoch for record in history_of(config)] == [1, 2]
    names = storage.list_names(f"{bucket}/runs/train")
    assert {"config.yaml", "history.jsonl", "run.json", "tensorboard"} <= set(names)
    assert "epoch_00002" in names
