"""A heat map lies where the evidence is, has the frame's size, and explaining leaves no trace in the classifier."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from btray.data.config import PreprocessConfig
from btray.data.preprocess import make_frame
from btray.explain import heat_maps, heat_png, overlay_png, slice_png
from btray.model.classifier import Classifier
from btray.model.config import NetworkConfig
from btray.phantoms import phantom
from tests.helpers.tiny_bundle import PREPROCESS, random_bundle

SIZE = PREPROCESS.size


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(random_bundle(), device="cpu")


def frames(count: int, size: int = SIZE) -> np.ndarray:
    config = PreprocessConfig(size=size)
    return np.stack([make_frame(phantom("glioma", seed, size=128), config) for seed in range(count)])


def blob_detector(pooling: str) -> Classifier:
    """Two classes by hand: the first is told by bright places alone, the second by dark ones."""
    config = NetworkConfig(
        stem_width=2, widths=(2,), depths=(1,), norm="none", squeeze_excite=0, residual=True, pooling=pooling
    )
    bundle = random_bundle(classes=("bright", "dark"), network=config, preprocess=PreprocessConfig(size=64))
    weights = {name: torch.zeros_like(tensor) for name, tensor in bundle.weights.items()}
    weights["parts.0.0.0.weight"][0, 0, 1, 1] = 1.0  # the stem passes the image, and its negative
    weights["parts.0.0.0.weight"][1, 0, 1, 1] = -1.0
    skip = next(name for name in weights if "skip" in name and name.endswith("weight"))
    weights[skip][:, :, 0, 0] = torch.eye(2)
    weights["head.weight"] = torch.eye(2).repeat(1, 2 if pooling == "average_max" else 1)
    arguments = {"weights": weights, "network": config, "preprocess": PreprocessConfig(size=64)}
    return Classifier(random_bundle(classes=("bright", "dark"), **arguments), device="cpu")


@pytest.mark.parametrize("pooling", ["average", "max", "average_max"])
@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_heat_lies_in_the_corner_where_the_evidence_is(pooling: str, rows: int, columns: int) -> None:
    frame = np.full((1, 64, 64), 40, np.uint8)
    frame[0, rows * 40 : rows * 40 + 20, columns * 40 : columns * 40 + 20] = 250
    (heat,) = heat_maps(blob_detector(pooling), frame, ["bright"])
    quarters = heat.reshape(2, 32, 2, 32).sum((1, 3))
    assert quarters[rows, columns] > 0.9 * quarters.sum()
    assert heat[rows * 40 + 10, columns * 40 + 10] > 0.9


def test_another_label_has_another_map() -> None:
    frame = np.full((1, 64, 64), 120, np.uint8)
    frame[0, :20, :20], frame[0, 44:, 44:] = 250, 0
    model = blob_detector("average")
    (bright,), (dark,) = heat_maps(model, frame, ["bright"]), heat_maps(model, frame, ["dark"])
    assert bright[10, 10] > 0.9
    assert dark[10, 10] < 0.1
    assert dark[54, 54] > 0.9
    assert bright[54, 54] < 0.1


def test_by_default_the_label_that_the_model_gives_is_explained(classifier: Classifier) -> None:
    given = frames(6)
    labels = [classifier.classes[row] for row in classifier.answer(given).logits.argmax(1)]
    assert np.array_equal(heat_maps(classifier, given), heat_maps(classifier, given, labels))


@pytest.mark.parametrize("architecture", ["cnn", "resnet18", "densenet121"])
def test_every_architecture_gives_maps_of_the_frames_size(architecture: str) -> None:
    config = NetworkConfig(architecture=architecture)
    given = frames(2, 64)
    model = Classifier(random_bundle(network=config, preprocess=PreprocessConfig(size=64)), device="cpu")
    heat = heat_maps(model, given)
    assert heat.shape == given.shape
    assert heat.dtype == np.float32
    assert heat.min() >= 0
    assert all(map_.max() in (0, 1) for map_ in heat)


def test_explaining_leaves_nothing_behind_and_answers_stay_equal(classifier: Classifier) -> None:
    given = frames(5)
    before, weights = classifier.answer(given), {k: v.clone() for k, v in classifier.network.state_dict().items()}
    heat_maps(classifier, given)
    after = classifier.answer(given)
    assert np.array_equal(before.logits, after.logits)
    assert np.array_equal(before.features, after.features)
    assert all(torch.equal(weights[name], tensor) for name, tensor in classifier.network.state_dict().items())
    assert all(parameter.grad is None for parameter in classifier.network.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in classifier.network.modules())
    assert not any(module.training for module in classifier.network.modules())


def test_a_map_does_not_depend_on_what_other_threads_do(classifier: Classifier) -> None:
    given = frames(4)
    alone, answer = heat_maps(classifier, given), classifier.answer(given).logits

    def both(_: int) -> tuple[np.ndarray, np.ndarray]:
        return heat_maps(classifier, given), classifier.answer(given).logits

    with ThreadPoolExecutor(4) as pool:
        for heat, logits in pool.map(both, range(16)):
            assert np.array_equal(heat, alone)
            assert np.array_equal(logits, answer)


def test_a_caller_in_inference_mode_gets_the_same_map(classifier: Classifier) -> None:
    given = frames(2)
    with torch.inference_mode():
        inside = heat_maps(classifier, given)
    assert np.array_equal(inside, heat_maps(classifier, given))


def test_more_frames_than_a_batch_are_each_explained_as_if_alone() -> None:
    given = frames(5)
    model = Classifier(random_bundle(), device="cpu", batch_size=2)
    labels = ["glioma", "no_tumor", "pituitary", "glioma", "meningioma"]
    single = [heat_maps(model, given[n : n + 1], labels[n : n + 1])[0] for n in range(5)]
    np.testing.assert_allclose(heat_maps(model, given, labels), np.stack(single), atol=1e-4)


def test_no_frames_give_no_maps_and_an_unknown_label_is_refused(classifier: Classifier) -> None:
    assert heat_maps(classifier, np.zeros((0, SIZE, SIZE), np.uint8)).shape == (0, SIZE, SIZE)
    with pytest.raises(ValueError, match="lung"):
        heat_maps(classifier, frames(1), ["lung"])


def test_pictures_show_the_slice_where_it_is_cold_and_colour_where_it_is_hot() -> None:
    frame = np.full((20, 30), 90, np.uint8)
    heat = np.zeros((20, 30), np.float32)
    heat[5, 7] = 1
    overlay = np.asarray(Image.open(io.BytesIO(overlay_png(frame, heat))))
    assert overlay.shape == (20, 30, 3)
    assert (overlay[0, 0] == 90).all()
    assert len(set(overlay[5, 7].tolist())) == 3
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(overlay_png(frame, heat, strength=0)))).max(2), frame)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(slice_png(frame)))), frame)
    layer = np.asarray(Image.open(io.BytesIO(heat_png(heat))))
    assert layer.shape == (20, 30, 4)
    assert layer[5, 7, 3] == 255
    assert layer[..., 3].sum() == 255
