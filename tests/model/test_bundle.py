"""A bundle is there whole and unchanged, or it is refused with one line that says why; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from btray import storage
from btray.core.errors import UserError
from btray.data.fingerprint import LENGTH, VIEWS
from btray.model.bundle import FINGERPRINTS, load_bundle, pack_fingerprints, read_fingerprints, save_bundle
from btray.model.bundle_files import WEIGHTS, WRITING, require_free
from btray.model.classifier import Classifier
from btray.model.config import MANIFEST
from btray.storage import StorageError
from tests.helpers.classify_helpers import part_classifier
from tests.helpers.forger import forge_weights, rewrite
from tests.helpers.tiny_bundle import FILES, NETWORK, PREPROCESS, random_bundle, saved_bundle

DESIGNED_KEYS = {
    "format_version", "classes", "model_id", "network", "preprocess", "preprocess_digest", "calibration", "thresholds",
    "training", "data", "versions", "code_version", "weights_sha256",
}  # fmt: skip


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


def refusal(uri: str | Path, **options: Any) -> str:
    """The one line with which everything that would use the model is refused."""
    with pytest.raises(UserError) as caught:
        Classifier.load(str(uri), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(uri) in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved_bundle(tmp_path / "model")
    return tmp_path / "model"


def test_what_is_saved_is_what_is_loaded(folder: Path) -> None:
    saved, loaded = random_bundle(), load_bundle(str(folder))
    assert loaded.manifest == saved.manifest.model_copy(update={"files": loaded.manifest.files})
    assert set(loaded.manifest.files) == set(FILES)
    assert loaded.weights.keys() == saved.weights.keys()
    assert all(torch.equal(tensor, loaded.weights[name]) for name, tensor in saved.weights.items())
    assert not loaded.network().training


def test_bundle_json_has_the_keys_of_the_design(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    assert set(content) >= DESIGNED_KEYS
    assert isinstance(content["format_version"], int)
    assert isinstance(content["classes"], list)
    assert content["weights_sha256"] == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert {"python", "torch", "btray"} <= set(content["versions"])
    assert sorted(path.name for path in folder.iterdir()) == sorted([MANIFEST, WEIGHTS, *FILES])


def test_the_forger_of_these_tests_would_succeed_were_there_nothing_to_find(folder: Path) -> None:
    forge_weights(folder, safetensors.torch.save(random_bundle(seed=1).weights))
    rewrite(folder, lambda content: content["data"].update(fingerprint="other"))
    assert Classifier.load(folder).manifest.data.fingerprint == "other"


def test_saving_twice_gives_the_same_model_id_and_what_decides_changes_it(tmp_path: Path) -> None:
    first = saved_bundle(tmp_path / "a").manifest.model_id
    assert saved_bundle(tmp_path / "b").manifest.model_id == first
    assert saved_bundle(tmp_path / "a").manifest.model_id == first
    assert random_bundle(created_at="2030-01-01T00:00:00+00:00", training={}).manifest.model_id == first
    others = [
        random_bundle(seed=1),
        random_bundle(classes=("meningioma", "glioma", "pituitary", "metastasis", "no_tumor")),
        random_bundle(preprocess=PREPROCESS.model_copy(update={"margin": 0.03})),
        random_bundle(network=NETWORK.model_copy(update={"dropout": 0.1})),
        random_bundle(temperature=1.6),
    ]
    assert len({first, *(other.manifest.model_id for other in others)}) == 6


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, *FILES])
def test_one_flipped_bit_anywhere_is_refused(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    rng = random.Random(name)
    places = {0, 7, 8 * len(whole) - 1, *(rng.randrange(8 * len(whole)) for _ in range(60 if name == MANIFEST else 8))}
    for place in sorted(places):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        (folder / name).write_bytes(flipped)
        assert name in refusal(folder), f"bit {place}"


def test_fingerprints_are_not_read_by_who_classifies_and_are_verified_by_who_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prints = np.random.default_rng(0).random((20, VIEWS, LENGTH)).astype(np.float16)
    uri = save_bundle(random_bundle(), str(tmp_path / "model"), FILES | {FINGERPRINTS: pack_fingerprints(prints)}).uri
    read, read_bytes = set(), storage.read_bytes

    def seen(uri: str, **options: Any) -> bytes:
        read.add(storage.name(uri))
        return read_bytes(uri, **options)

    monkeypatch.setattr(storage, "read_bytes", seen)
    Classifier.load(uri)
    assert read == {WEIGHTS, *FILES}
    part_classifier(monkeypatch, uri)  # what an actor of the classify job holds
    assert read == {WEIGHTS, *FILES}
    bundle, path = load_bundle(uri), tmp_path / "model" / FINGERPRINTS
    np.testing.assert_array_equal(read_fingerprints(bundle), prints)
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    Classifier.load(uri)
    with pytest.raises(UserError, match=FINGERPRINTS):
        read_fingerprints(bundle)
    path.unlink()
    assert FINGERPRINTS in refusal(uri)


def test_the_case_of_an_exponent_is_a_flipped_bit_too(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    assert "1e-05" in text
    (folder / MANIFEST).write_text(text.replace("1e-05", "1E-05"))
    assert "changed or damaged" in refusal(folder)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, *FILES])
@pytest.mark.parametrize("left", [None, 0, 1, 30])
def test_a_missing_or_cut_file_is_refused_by_name(folder: Path, name: str, left: int | None) -> None:
    path = folder / name
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: min(left, path.stat().st_size - 1)])
    assert name in refusal(folder)


@pytest.mark.parametrize("name", ["model.pkl", "model.pt", "data.pickle", "notes.txt"])
def test_a_file_that_is_not_listed_is_refused_and_not_opened(folder: Path, name: str, tmp_path: Path) -> None:
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    assert name in refusal(folder)
    assert not (tmp_path / "trace").exists()


def test_a_folder_that_is_not_listed_is_refused_but_a_run_beside_the_model_is_not(folder: Path) -> None:
    (folder / "_run").mkdir()
    (folder / ".cache").mkdir()
    Classifier.load(folder)
    (folder / "more").mkdir()
    assert "more" in refusal(folder)


def test_a_pickle_in_place_of_the_weights_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    archive = io.BytesIO()
    torch.save({"weight": Bomb(tmp_path / "trace")}, archive)
    for body in (pickle.dumps(Bomb(tmp_path / "trace")), archive.getvalue(), b"", bytes(8), b"\xff" * 64):
        (folder / WEIGHTS).write_bytes(body)
        assert WEIGHTS in refusal(folder)
        forge_weights(folder, body)
        assert WEIGHTS in refusal(folder)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop("head.weight"), "head.weight"),
        (lambda weights: weights.update({"head.scale": weights.pop("head.weight")}), "head.scale"),
        (lambda weights: weights.update(more=torch.zeros(2)), "more"),
        (lambda weights: weights.update({"head.bias": torch.zeros(7)}), "head.bias"),
        (lambda weights: weights["head.bias"].fill_(float("nan")), "not finite"),
    ],
)
def test_weights_that_do_not_fit_the_network_are_refused(
    folder: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    weights = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    change(weights)
    forge_weights(folder, safetensors.torch.save(weights))
    assert said in refusal(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.update(format_version=1), "format_version 1; this btray makes other frames"),
        (lambda content: content.update(format_version=3), "format_version 3"),
        (lambda content: content.update(format_version=10**30, more="x"), "upgrade"),
        (lambda content: content.update(format_version="1"), "format_version"),
        (lambda content: content.pop("format_version"), "format_version"),
        (lambda content: content["classes"].reverse(), "model_id"),
        (lambda content: content["classes"].pop(), "model_id"),
        (lambda content: content["preprocess"].update(size=64), "model_id"),
        (lambda content: content["calibration"].update(temperature=3.0), "model_id"),
        (lambda content: content["network"].update(dropout=0.4), "model_id"),
        (lambda content: content.update(model_id="0" * 32), "model_id"),
        (lambda content: content.update(weights_sha256="0" * 64), WEIGHTS),
        (lambda content: content["calibration"].update(temperature=0), "temperature"),
        (lambda content: content["network"].update(widths=[]), "network"),
        (lambda content: content.update(classes=["glioma"]), "classes"),
        (lambda content: content.pop("preprocess"), "preprocess"),
        (lambda content: content.update(extra=1), "extra"),
        (lambda content: content.update(preprocess_digest="0" * 64), "preprocessing gives other bits"),
    ],
)
def test_a_changed_manifest_is_refused_with_and_without_its_digest(
    folder: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    before = (folder / MANIFEST).read_text()
    rewrite(folder, change)
    assert said in refusal(folder)
    (folder / MANIFEST).write_text(before)
    rewrite(folder, change, reseal=False)
    refusal(folder)


@pytest.mark.parametrize("content", ["", "[]", "7", "null", "[" * 100_000, "{", '{"format_version": 2}', "\0", "{}"])
def test_a_manifest_that_is_no_manifest_is_refused(folder: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content)
    assert MANIFEST in refusal(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "", ".", "a/b", "sub/", "s3://bucket/key"])
def test_names_that_lead_out_of_the_folder_are_refused(folder: Path, name: str) -> None:
    secret = folder.parent / "secret"
    secret.write_text("mine")
    rewrite(folder, lambda content: content["files"].update({name: hashlib.sha256(b"mine").hexdigest()}))
    assert "not a plain file name" in refusal(folder)
    with pytest.raises(UserError):
        saved_bundle(folder)
    assert secret.read_text() == "mine"


def test_a_marker_of_a_killed_writer_cannot_delete_what_lies_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / WRITING).write_text('["../secret"]')
    with pytest.raises(UserError, match="not a plain file name"):
        saved_bundle(tmp_path / "model")
    assert (tmp_path / "secret").read_text() == "mine"


def test_the_pin_admits_one_model(folder: Path) -> None:
    right = load_bundle(str(folder)).manifest.model_id
    assert Classifier.load(folder, model_id=right).model_id == right
    for wrong in ("", "0" * 32, right[:-1], right.upper() + " "):
        message = refusal(folder, model_id=wrong)
        assert "--model-id" in message
        assert right in message


def test_what_is_no_bundle_is_named(tmp_path: Path) -> None:
    for place in (tmp_path / "absent", tmp_path):
        assert MANIFEST in refusal(place)
    (tmp_path / "file").write_text("x")
    refusal(tmp_path / "file")


@pytest.mark.parametrize("over", [None, "model", "other"])
def test_a_writer_that_is_killed_leaves_the_old_model_the_new_one_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: str | None
) -> None:
    """Killed before each change of the store in turn, then run again."""
    new, old_files = random_bundle(seed=1), {**FILES, "learning_curves.png": b"old"}
    seen = set()
    for calls in range(20):
        folder = str(tmp_path / f"{over}{calls}")
        if over:
            save_bundle(random_bundle(seed=1 if over == "model" else 2), folder, old_files)
        left = calls

        def killed(name: str, real: Callable[..., None]) -> Callable[..., None]:
            def call(*arguments: Any) -> None:
                nonlocal left
                if left == 0:
                    raise KeyboardInterrupt(name)
                left -= 1
                real(*arguments)

            return call

        with monkeypatch.context() as patch:
            for name in ("write_bytes", "delete"):
                patch.setattr(storage, name, killed(name, getattr(storage, name)))
            try:
                save_bundle(new, folder, FILES)
                finished = True
            except KeyboardInterrupt:
                finished = False
        if storage.exists(storage.join(folder, MANIFEST)):
            found = load_bundle(folder)
            seen.add(found.manifest.model_id)
            assert found.manifest.files.keys() in (old_files.keys(), FILES.keys())
        else:
            seen.add(None)
            with pytest.raises(UserError, match=MANIFEST):
                load_bundle(folder)
        save_bundle(new, folder, FILES)
        assert load_bundle(folder).manifest.files.keys() == FILES.keys()
        assert load_bundle(folder).manifest.model_id == new.manifest.model_id
        assert not [name for name in os.listdir(folder) if name.startswith(("_", "."))]
        if finished:
            break
    else:
        pytest.fail("saving never ended")
    allowed = {new.manifest.model_id, None} | ({random_bundle(seed=2).manifest.model_id} if over == "other" else set())
    assert seen == allowed


@pytest.mark.parametrize(
    "foreign", ["thesis.doc", "config.json", "model.safetensors", "metrics.json", "sub/file", "report.html"]
)
def test_a_folder_with_something_else_in_it_is_not_written_to(tmp_path: Path, foreign: str) -> None:
    path = tmp_path / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UserError, match="--out") as caught:
        saved_bundle(tmp_path)
    assert foreign.split("/", maxsplit=1)[0] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "mine"
    assert len(list(tmp_path.rglob("*"))) == foreign.count("/") + 1


def test_a_bundle_with_a_stranger_beside_it_is_not_written_over(folder: Path) -> None:
    (folder / "thesis.doc").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.doc"):
        saved_bundle(folder, seed=3)
    (folder / "thesis.doc").unlink()
    load_bundle(str(folder))


def test_a_file_or_an_unreadable_bundle_in_the_way_is_found_before_training(folder: Path) -> None:
    with pytest.raises(UserError, match="is a file"):
        require_free(str(folder / MANIFEST))
    for version, remedy in ((1, "train the model again, into another folder"), (3, "upgrade btray")):
        rewrite(folder, lambda content, version=version: content.update(format_version=version))  # type: ignore[misc]
        with pytest.raises(UserError, match=f"format_version {version}; .*{remedy}"):
            require_free(str(folder))


def test_an_empty_folder_and_one_with_only_a_run_are_free(tmp_path: Path) -> None:
    require_free(str(tmp_path / "absent" / "deep"))
    require_free(str(tmp_path))
    (tmp_path / "_run").mkdir()
    require_free(str(tmp_path))
    saved_bundle(tmp_path)
    require_free(str(tmp_path))


def test_a_store_that_fails_is_no_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(uri: str, **_: Any) -> bytes:
        raise StorageError("forbidden", uri, "not yours")

    monkeypatch.setattr(storage, "read_bytes", forbidden)
    assert "not yours" in refusal(folder)


def test_a_copy_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert load_bundle(str(tmp_path / "copy")).manifest == load_bundle(str(folder)).manifest


@pytest.mark.s3
def test_a_bundle_in_object_storage_is_whole_replaced_and_verified(bucket: str) -> None:
    uri = f"{bucket}/models/first"
    saved_bundle(uri)
    saved_bundle(uri, seed=1)
    assert storage.list_names(uri) == sorted([MANIFEST, WEIGHTS, *FILES])
    model_id = random_bundle(seed=1).manifest.model_id
    assert Classifier.load(uri, model_id=model_id).model_id == model_id
    storage.write_bytes(f"{uri}/model.pkl", b"x")
    assert "model.pkl" in refusal(uri)
    storage.delete(f"{uri}/model.pkl")
    storage.delete(f"{uri}/metrics.json")
    assert "metrics.json" in refusal(uri)
    storage.write_bytes(f"{bucket}/taken/thesis.doc", b"mine")
    with pytest.raises(UserError, match=r"thesis\.doc"):
        saved_bundle(f"{bucket}/taken")
    assert "s3://" in refusal("s3://no-such-bucket-of-btray/model")
