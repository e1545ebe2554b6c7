"""Predictions say when not to rely on them: abstained, label sets, out of distribution; and without limits nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from btray import cli
from btray.core.errors import UserError
from btray.model.bundle import OOD, Bundle, load_bundle, save_bundle
from btray.model.classifier import Classifier
from btray.model.manifest import Thresholds
from btray.model.ood import Distribution
from btray.model.prediction import Prediction
from btray.phantoms import encoded_phantom
from tests.helpers.forger import forge_file
from tests.helpers.tiny_bundle import FILES, random_bundle

SCANS = [encoded_phantom(label, seed) for seed in range(8) for label in ("glioma", "no_tumor")]
NOISE = np.random.default_rng(0).integers(0, 256, (200, 200), dtype=np.uint8)


def limited(**limits: float) -> Bundle:
    """A bundle that knows phantoms and has these thresholds."""
    classifier = Classifier(random_bundle())
    frames = [frame for scan in SCANS for frame in classifier.source.from_bytes(scan)]
    features = classifier.answer(np.stack(frames)).features  # type: ignore[arg-type]
    return random_bundle(ood=Distribution.fit(features), thresholds=Thresholds(**limits))


def predict(bundle: Bundle) -> list[Prediction]:
    return Classifier(bundle).predict(SCANS)


def test_a_bundle_without_limits_marks_nothing() -> None:
    for prediction in predict(random_bundle()):
        assert not prediction.abstained
        assert not prediction.out_of_distribution
        assert prediction.ood_score is None
        assert prediction.label_set == ()


def test_it_abstains_below_its_threshold_and_still_says_what_it_would_have_said() -> None:
    free = predict(random_bundle())
    threshold = float(np.median([prediction.confidence or 0 for prediction in free]))
    marked = predict(limited(abstain_below=threshold))
    assert [prediction.label for prediction in marked] == [prediction.label for prediction in free]
    assert [prediction.abstained for prediction in marked] == [(p.confidence or 0) < threshold for p in free]
    assert 0 < sum(prediction.abstained for prediction in marked) < len(marked)


def test_the_user_may_set_another_threshold_and_leaves_the_model_what_it_is(tmp_path: Path) -> None:
    saved = save_bundle(limited(abstain_below=0.0), str(tmp_path / "model"), FILES)
    own = Classifier.load(saved.uri).predict(SCANS)
    strict = Classifier.load(saved.uri, abstain_below=1.0).predict(SCANS)
    assert not any(prediction.abstained for prediction in own)
    assert all(prediction.abstained for prediction in strict)
    assert {prediction.model_id for prediction in own + strict} == {saved.manifest.model_id}


def test_label_sets_hold_the_labels_that_reach_the_threshold_and_the_one_that_is_said() -> None:
    for prediction in predict(limited(conformal=0.25, conformal_error=0.1)):
        expected = {label for label, share in prediction.probabilities.items() if share >= 0.25} | {prediction.label}
        assert set(prediction.label_set) == expected


def test_noise_is_unlike_phantoms_and_phantoms_are_not() -> None:
    classifier = Classifier(limited(ood_score=2.5))
    assert not any(prediction.out_of_distribution for prediction in classifier.predict(SCANS))
    for prediction in classifier.predict([NOISE, np.zeros((64, 64), np.uint8)]):
        assert prediction.out_of_distribution
        assert prediction.ood_score is not None
        assert prediction.ood_score > 2.5


def test_a_rejected_input_has_no_mark() -> None:
    (prediction,) = Classifier(limited(abstain_below=1.0, ood_score=0.0)).predict([b"no image"])
    assert (prediction.status, prediction.abstained, prediction.out_of_distribution) == ("rejected", False, False)


def test_limits_survive_storage(tmp_path: Path) -> None:
    bundle = limited(abstain_below=0.4, ood_score=2.0, conformal=0.2, conformal_error=0.05)
    saved = save_bundle(bundle, str(tmp_path / "model"), FILES)
    assert predict(load_bundle(saved.uri)) == predict(bundle)


@pytest.mark.parametrize("body", [b"", b"no tensors", safetensors.torch.save({})], ids=("empty", "text", "no tensor"))
def test_a_forged_distribution_is_refused_in_one_line(tmp_path: Path, body: bytes) -> None:
    saved = save_bundle(limited(), str(tmp_path / "model"), FILES)
    forge_file(Path(saved.uri), OOD, body)
    with pytest.raises(UserError, match=OOD) as caught:
        load_bundle(saved.uri)
    assert "\n" not in str(caught.value)


def test_the_command_shows_the_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = save_bundle(limited(ood_score=2.5, conformal=0.01, conformal_error=0.1), str(tmp_path / "model"), FILES)
    (tmp_path / "scan.jpg").write_bytes(SCANS[0])
    Image.fromarray(NOISE).save(tmp_path / "noise.bmp")
    paths = [str(tmp_path / "scan.jpg"), str(tmp_path / "noise.bmp")]
    monkeypatch.setattr("sys.argv", ["btray", "predict", "--model", saved.uri, "--abstain-below", "1", *paths])
    cli.main()
    _, scan, noise = capsys.readouterr().out.splitlines()
    assert "ABSTAINED" in scan
    assert "UNLIKE" not in scan
    assert "UNLIKE THE TRAINING IMAGES" in noise
    monkeypatch.setattr("sys.argv", ["btray", "predict", "--model", saved.uri, "--json", *paths])
    cli.main()
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["out_of_distribution"] for record in records] == [False, True]
    assert [record["abstained"] for record in records] == [False, False]
    assert all(record["label"] in record["label_set"] for record in records)
    assert records[1]["ood_score"] > 2.5
