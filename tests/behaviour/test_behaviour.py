"""What a trained model must not care about, what must move it and which way, and what it must be able to do at all.

After Ribeiro et al. 2020, Beyond Accuracy (arXiv:2005.04118): invariance, direction, minimum functionality.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import chain

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.metrics import roc_auc_score

from btray.model.classifier import Classifier
from btray.phantoms import CLASSES, phantom
from tests.helpers.strange_images import strange_images

pytestmark = pytest.mark.slow

LESIONS = [label for label in CLASSES if label != "no_tumor"]
FRESH = 90_000  # seeds from here on were not trained on


def encoded(picture: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        lambda picture: encoded(picture, "JPEG", quality=60),
        lambda picture: encoded(picture.convert("RGB"), "WEBP", quality=80),
        lambda picture: encoded(picture.point(lambda level: min(255, level * 1.2 + 8))),
        lambda picture: encoded(ImageOps.expand(picture, 40, 0)),
        lambda picture: encoded(picture.resize((picture.width * 3 // 4, picture.height * 3 // 4))),
    ],
    ids=("JPEG", "WebP", "brighter", "padded", "smaller"),
)
def test_how_a_slice_is_stored_does_not_change_its_label(
    trained: Classifier, change: Callable[[Image.Image], bytes]
) -> None:
    slices = [Image.fromarray(phantom(CLASSES[seed % 5], FRESH + seed)) for seed in range(60)]
    before = trained.predict([encoded(picture) for picture in slices])
    after = trained.predict([change(picture) for picture in slices])
    kept = [a.label == b.label for a, b in zip(before, after, strict=True)]
    assert np.mean(kept) >= 0.9
    sure = [same for same, prediction in zip(kept, before, strict=True) if (prediction.confidence or 0) > 0.8]
    assert len(sure) > 15
    assert np.mean(sure) >= 0.95


@pytest.mark.parametrize("label", LESIONS)
def test_a_lesion_painted_into_a_clean_head_lowers_the_probability_of_no_tumor(trained: Classifier, label: str) -> None:
    seeds = range(FRESH + 1000, FRESH + 1040)
    clean = trained.predict([phantom("no_tumor", seed) for seed in seeds])
    painted = trained.predict([phantom(label, seed) for seed in seeds])
    pairs = zip(clean, painted, strict=True)
    falls = np.array([before.probabilities["no_tumor"] - after.probabilities["no_tumor"] for before, after in pairs])
    assert np.mean(falls > 0) >= 0.8
    assert falls.mean() > 0.15


@pytest.mark.parametrize("label", CLASSES)
def test_each_class_is_found_far_more_often_than_by_chance(trained: Classifier, label: str) -> None:
    said = trained.predict([phantom(label, seed) for seed in range(FRESH + 2000, FRESH + 2040)])
    assert np.mean([prediction.label == label for prediction in said]) >= 0.5


def test_strange_images_are_told_from_fresh_slices_by_the_score(trained: Classifier) -> None:
    kinds = strange_images()
    usual = trained.predict([phantom(CLASSES[seed % 5], FRESH + 3000 + seed) for seed in range(100)])
    strange = {kind: trained.predict(images) for kind, images in kinds.items()}
    scores = [prediction.ood_score for prediction in chain(usual, *strange.values())]
    assert roc_auc_score(np.arange(len(scores)) >= len(usual), scores) >= 0.95
    assert np.mean([prediction.out_of_distribution for prediction in usual]) <= 0.1
    for kind, predictions in strange.items():
        assert np.mean([prediction.out_of_distribution for prediction in predictions]) >= 0.75, kind
