"""The deterministic transform: it finds the head, keeps the picture, and gives the same bits wherever it runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw
from scipy import ndimage

from btray.data import preprocess
from btray.data.config import PreprocessConfig
from btray.data.frames import FrameSource
from btray.data.preprocess import Box, decode_side, make_frame, preprocess_digest, to_tensor
from btray.data.scans import Scan
from btray.evaluation import scoring
from btray.model.classifier import Classifier
from btray.phantoms import CLASSES, encoded_phantom, phantom
from btray.training.feeds import decode_rows
from tests.helpers import scan_corpus
from tests.helpers.digest_scorer import DigestScorer, digests
from tests.helpers.tiny_bundle import PREPROCESS, random_bundle

CONFIG = PreprocessConfig(size=160)
# What decoding makes of a fixed JPEG, and preprocessing by default of its test patterns. It may change only together
# with `manifest.FORMAT_VERSION`: every bundle that was trained before would be refused.
GOLDEN_DIGEST = "c28e23e5c66006c7b0aa498a78a8767dfaa53a266bf45cb5c155de58f09b739a"

Scene = tuple[np.ndarray, tuple[float, float, float, float]]


def drawn_head(seed: int, ground: int) -> Scene:
    """A textured ellipse with a rim somewhere on even ground: uint8 [height, width], and its box."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(200, 420, 2)
    tall, wide = rng.uniform(0.25, 0.4) * height, rng.uniform(0.25, 0.4) * width
    down, across = rng.uniform(tall + 12, height - tall - 12), rng.uniform(wide + 12, width - wide - 12)
    y, x = np.mgrid[:height, :width]
    radius = np.hypot((y - down) / tall, (x - across) / wide)
    texture = np.kron(rng.uniform(60, 160, (height // 10 + 1, width // 10 + 1)), np.ones((10, 10)))[:height, :width]
    gray = np.where(radius < 1, np.where(radius > 0.9, 110, texture), ground) + rng.normal(0, 3, (height, width))
    return np.clip(gray, 0, 255).astype(np.uint8), (down - tall, across - wide, down + tall, across + wide)


def placed_phantom(seed: int, ground: int) -> Scene:
    """A phantom's head, without its border and text, off centre on a larger even ground, and its box."""
    rng = np.random.default_rng(seed)
    picture = phantom(CLASSES[seed % 5], seed, size=240)[12:-12, 12:-12]
    blurred = ndimage.gaussian_filter(picture.astype(float), 2)
    labelled, _ = ndimage.label(blurred > np.median(blurred[:8, :8]) + 20)
    head = ndimage.binary_fill_holes(labelled == np.bincount(labelled.ravel())[1:].argmax() + 1)
    canvas = np.full((300, 340), ground, np.uint8)
    top, left = rng.integers(10, 70), rng.integers(10, 110)
    canvas[top : top + 216, left : left + 216][head] = picture[head]
    rows, columns = np.flatnonzero(head.any(1)), np.flatnonzero(head.any(0))
    return canvas, (top + rows[0], left + columns[0], top + rows[-1] + 1, left + columns[-1] + 1)


def framed(scene: Scene, *levels: int, width: int = 7) -> Scene:
    """Borders of these levels around it, the first one inside."""
    gray, box = scene
    for level in levels:
        gray = np.pad(gray, width, constant_values=level)
    shift = width * len(levels)
    return gray, tuple(edge + shift for edge in box)  # type: ignore[return-value]


def captioned(scene: Scene) -> Scene:
    """Text burned into its corners, as bright or dark as can be."""
    gray, box = scene
    image = Image.fromarray(gray)
    draw = ImageDraw.Draw(image)
    ink = 255 if gray[-1, -1] < 128 else 0
    for line in range(3):
        draw.text((3, 3 + 12 * line), "PATIENT 007 SE:3", fill=ink)
        draw.text((image.width - 60, image.height - 40 + 12 * line), "R  5 cm", fill=ink)
    return np.asarray(image), box


DECORATIONS: dict[str, Callable[[Scene], Scene]] = {
    "bare": lambda scene: scene,
    "white border": lambda scene: framed(scene, 255),
    "gray border": lambda scene: framed(scene, 128),
    "double border": lambda scene: framed(scene, 0, 255),
    "triple border": lambda scene: framed(scene, 255, 0, 255),
    "text": captioned,
    "text and border": lambda scene: framed(captioned(scene), 255, 0),
}


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, float, float]]:
    """The boxes that are cut out from here on, in pixels of the picture."""
    boxes = []
    real = preprocess._in_picture

    def in_picture(box: Box, shape: tuple[int, ...], picture: Image.Image, margin: float) -> Box:
        down, across = picture.height / shape[0], picture.width / shape[1]
        boxes.append((box.top * down, box.left * across, box.bottom * down, box.right * across))
        return real(box, shape, picture, margin)

    monkeypatch.setattr(preprocess, "_in_picture", in_picture)
    return boxes


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Intersection over union of two boxes."""

    def area(top: float, left: float, bottom: float, right: float) -> float:
        return max(0.0, bottom - top) * max(0.0, right - left)

    common = area(max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3]))
    return common / (area(*one) + area(*other) - common)


@pytest.mark.parametrize(
    ("make", "ground"),
    [(drawn_head, 0), (drawn_head, 30), (drawn_head, 255), (placed_phantom, 0), (placed_phantom, 255)],
)
@pytest.mark.parametrize("decoration", DECORATIONS)
def test_the_head_is_found(
    make: Callable[[int, int], Scene], ground: int, decoration: str, cuts: list[tuple[float, ...]]
) -> None:
    overlaps = []
    for seed in range(12):
        gray, box = DECORATIONS[decoration](make(seed, ground))
        make_frame(gray, CONFIG)
        overlaps.append(overlap(cuts.pop(), box))
    assert np.median(overlaps) > 0.9, np.round(overlaps, 2)
    assert min(overlaps) > 0.6, np.round(overlaps, 2)  # a thin scalp may be cut off, the brain never is


def test_a_white_ground_becomes_black_and_leaves_no_fringe() -> None:
    for seed in range(8):
        black, white = (make_frame(drawn_head(seed, ground)[0], CONFIG) for ground in (0, 255))
        assert np.corrcoef(black.ravel(), white.ravel())[0, 1] > 0.8, seed
        assert (white > 250).mean() < (black > 250).mean() + 0.001, seed


def test_where_no_head_is_nothing_is_cut_off(cuts: list[tuple[float, ...]]) -> None:
    specks = np.zeros((200, 300), np.uint8)
    specks[40:50, 40:50] = specks[150:160, 250:260] = 200
    noise = np.random.default_rng(0).integers(0, 12, (200, 300), np.uint8)
    for gray in (specks, noise, np.full((200, 300), 90, np.uint8)):
        make_frame(gray, CONFIG)
        assert overlap(cuts.pop(), (0, 0, *gray.shape)) > 0.97


def test_without_crop_the_whole_picture_is_fitted() -> None:
    gray = np.random.default_rng(3).integers(60, 120, (100, 200)).astype(np.uint8)
    gray[40:60, 90:110] = 255
    frame = make_frame(gray, PreprocessConfig(size=100, crop=False, high_percentile=100))
    rows, columns = np.nonzero(frame > 200)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == pytest.approx((45, 54, 45, 54), abs=1)
    assert not frame[:25].any()
    assert not frame[75:].any()
    assert frame[25:75].any(1).all()


@pytest.mark.parametrize("shape", [(320, 160), (160, 320), (400, 60), (61, 401)])
def test_the_aspect_is_kept_and_the_rest_is_black(shape: tuple[int, int]) -> None:
    gray = np.random.default_rng(1).integers(60, 200, shape, np.uint8)
    frame = make_frame(gray, PreprocessConfig(size=160, crop=False))
    rows, columns = np.flatnonzero(frame.any(1)), np.flatnonzero(frame.any(0))
    found = (rows[-1] - rows[0] + 1) / (columns[-1] - columns[0] + 1)
    assert found == pytest.approx(shape[0] / shape[1], rel=0.03)
    assert abs(rows[0] - (159 - rows[-1])) <= 1
    assert abs(columns[0] - (159 - columns[-1])) <= 1


def edge_cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    one = np.zeros((64, 64), np.uint8)
    one[5, 7] = 255
    return {
        "one pixel": np.array([[7]], np.uint8),
        "one column": rng.integers(0, 256, (500, 1), np.uint8),
        "one row": rng.integers(0, 256, (1, 500), np.uint8),
        "thread": rng.integers(0, 256, (4000, 16), np.uint8),
        "ribbon": rng.integers(0, 65536, (16, 6000), np.uint16),
        "black": np.zeros((64, 80), np.uint8),
        "white": np.full((64, 80), 255, np.uint8),
        "deep black": np.zeros((64, 80), np.uint16),
        "deep white": np.full((64, 80), 65535, np.uint16),
        "gray": np.full((17, 900), 128, np.uint8),
        "lone pixel": one,
        "checks": ((np.indices((90, 90)).sum(0) % 2) * 255).astype(np.uint8),
        "two levels": (np.indices((90, 90))[0] > 44).astype(np.uint16) * 65535,
    }


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("name", edge_cases())
def test_odd_pictures_give_a_frame_and_a_finite_tensor(name: str, crop: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = make_frame(edge_cases()[name], PreprocessConfig(size=64, crop=crop))
    assert (frame.shape, frame.dtype) == ((64, 64), np.uint8)
    assert torch.isfinite(to_tensor(torch.from_numpy(frame)[None])).all()


@settings(max_examples=150, deadline=None)
@given(
    gray=st.sampled_from((np.uint8, np.uint16)).flatmap(
        lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70))
    ),
    margin=st.floats(0, 0.5),
    low=st.floats(0, 49),
    high=st.floats(51, 100),
)
def test_no_picture_makes_it_fail(gray: np.ndarray, margin: float, low: float, high: float) -> None:
    before = gray.copy()
    config = PreprocessConfig(size=32, margin=margin, low_percentile=low, high_percentile=high)
    frame = make_frame(gray, config)
    assert (frame.shape, frame.dtype) == ((32, 32), np.uint8)
    np.testing.assert_array_equal(make_frame(gray.copy(), config), frame)
    np.testing.assert_array_equal(gray, before)


def test_8_and_16_bits_of_one_picture_give_the_same_frame_but_for_rounding() -> None:
    for seed in range(6):
        gray = phantom(CLASSES[seed % 5], seed, size=300)
        shallow, deep = make_frame(gray, CONFIG).astype(int), make_frame(gray.astype(np.uint16) * 257, CONFIG)
        assert np.abs(shallow - deep).max() <= 8
        assert np.abs(shallow - deep).mean() < 1


def test_brightness_and_contrast_of_the_export_do_not_count() -> None:
    gray = phantom("glioma", 4, size=300)
    faint = (gray.astype(np.uint16) * 40 + 3000).astype(np.uint16)
    difference = np.abs(make_frame(gray, CONFIG).astype(int) - make_frame(faint, CONFIG))
    assert difference.mean() < 2


def test_a_frame_of_a_frame_is_nearly_always_that_frame() -> None:
    alike = []
    for seed in range(12):
        frame = make_frame(phantom(CLASSES[seed % 5], seed, size=400), CONFIG)
        alike.append(np.corrcoef(frame.ravel(), make_frame(frame, CONFIG).ravel())[0, 1])
    assert np.median(alike) > 0.9, np.round(alike, 2)
    assert min(alike) > 0.4, np.round(alike, 2)


def test_the_size_of_the_export_hardly_ever_counts() -> None:
    alike = []
    for seed in range(12):
        gray = phantom("no_tumor", seed, size=512)
        half = np.asarray(Image.fromarray(gray).reduce(2))
        alike.append(np.corrcoef(make_frame(gray, CONFIG).ravel(), make_frame(half, CONFIG).ravel())[0, 1])
    assert np.median(alike) > 0.9, np.round(alike, 2)
    assert min(alike) > 0.4, np.round(alike, 2)


def test_decoding_leaves_room_for_the_crop() -> None:
    for size in (32, 160, 192, 193, 224, 400, 1024):
        assert decode_side(PreprocessConfig(size=size)) >= 4 / 3 * size
    assert decode_side(PreprocessConfig(size=400, crop=False)) == 400
    assert decode_side(PreprocessConfig(size=224)) == 299
    sides = {decode_side(PreprocessConfig(size=size)) for size in (32, 160, 192)}
    assert sides == {256}, "fingerprints do not depend on it, and 512 pixels are halved"


@pytest.mark.parametrize("gray", [np.zeros((9, 9)), np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.int16)])
def test_what_is_no_gray_picture_is_the_callers_mistake(gray: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8 or uint16"):
        make_frame(gray, CONFIG)


def test_a_tensor_is_standardised_and_depends_on_its_frame_alone() -> None:
    frames = np.stack([make_frame(phantom(CLASSES[seed % 5], seed), CONFIG) for seed in range(7)])
    batch = to_tensor(torch.from_numpy(frames))
    assert (batch.shape, batch.dtype) == ((7, 1, 160, 160), torch.float32)
    assert batch.mean((1, 2, 3)).abs().max() < 1e-4
    assert (batch.std((1, 2, 3), unbiased=False) - 1).abs().max() < 1e-4
    for index in range(7):
        assert torch.equal(to_tensor(torch.from_numpy(frames[index : index + 1])), batch[index : index + 1])
    order = torch.randperm(7)
    assert torch.equal(to_tensor(torch.from_numpy(frames)[order]), batch[order])
    black = to_tensor(torch.zeros(2, 32, 32, dtype=torch.uint8))
    assert torch.equal(black, torch.zeros(2, 1, 32, 32))
    assert to_tensor(torch.zeros(0, 32, 32, dtype=torch.uint8)).shape == (0, 1, 32, 32)


@pytest.mark.parametrize("size", [33, 192, 1024])
def test_a_tensor_is_made_of_exact_sums_whatever_the_gray_levels(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    frames = torch.randint(0, 256, (4, size, size), generator=generator, dtype=torch.uint8)
    frames[0], frames[1], frames[2, 1:] = 255, 1, 0
    wide = frames.flatten(1).to(torch.int64)
    mean = wide.sum(1).double() / size**2
    scale = 1 / ((wide * wide).sum(1).double() / size**2 - mean * mean).clamp(min=1.0).sqrt()
    shape = (-1, 1, 1, 1)
    expected = (frames.unsqueeze(1).float() - mean.float().view(shape)) * scale.float().view(shape)
    assert torch.equal(to_tensor(frames), expected)


def test_the_default_transform_is_the_one_that_bundles_were_made_with() -> None:
    assert preprocess_digest(CONFIG) == GOLDEN_DIGEST
    changed = [{"size": 96}, {"crop": False}, {"margin": 0.1}, {"low_percentile": 5}, {"high_percentile": 95}]
    assert len({preprocess_digest(CONFIG.model_copy(update=change)) for change in changed}) == len(changed)


def test_the_digest_notices_a_decoder_that_gives_other_pixels_at_any_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    real = preprocess.decode
    for side in (40, 20, 10, 5):

        def other(data: bytes, *, min_side: int, side: int = side) -> Scan:
            frame = real(data, min_side=min_side).frames[0]
            return Scan([frame ^ np.uint8(len(frame) == side)])

        monkeypatch.setattr(preprocess, "decode", other)
        assert preprocess_digest(CONFIG) != GOLDEN_DIGEST


@pytest.mark.cluster
def test_training_classifier_and_ray_data_see_the_same_bits(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = {name: data for name, data in scan_corpus.good_scans().items() if "16bit" in name or "pages" in name}
    scans |= {f"phantom{seed}.jpg": encoded_phantom(CLASSES[seed % 5], seed) for seed in range(10)}
    paths = [tmp_path / name for name in scans]
    for path, data in zip(paths, scans.values(), strict=True):
        path.write_bytes(data)
    uris = pa.chunked_array([list(map(str, paths))])
    bundle = random_bundle()
    classifier = Classifier(bundle, device="cpu")
    frames = [frame for data in scans.values() for frame in classifier.source.from_bytes(data)]
    expected = digests(np.stack(frames))  # type: ignore[arg-type]
    assert len(expected) > len(scans)

    rows = pa.table({"row": range(len(uris)), "uri": uris, "label": [0] * len(uris)})
    decoded = decode_rows(rows, FrameSource(PREPROCESS)).sort("sample").to_pandas()
    np.testing.assert_array_equal(digests(np.stack(decoded["frame"].tolist())), expected)

    monkeypatch.setattr(scoring, "_Scorer", DigestScorer)
    np.testing.assert_array_equal(scoring.score(bundle, np.arange(len(uris)), uris).answers.logits, expected)
