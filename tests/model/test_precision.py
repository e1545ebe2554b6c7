"""In bfloat16 a model answers as in float32 but for rounding, if its bundle and the machine allow it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from btray.bulk.classify import ClassifyJob
from btray.bulk.config import ClassifyConfig
from btray.core import cluster
from btray.core.errors import UserError
from btray.model import engines
from btray.model.bundle import Bundle, load_bundle, save_bundle
from btray.model.classifier import Classifier
from btray.model.config import EngineName, NetworkConfig
from btray.model.manifest import LARGEST_DIFFERENCE, LEAST_EQUAL_LABELS, Agreement
from btray.model.precision import measure_agreement
from btray.phantoms import encoded_phantom
from btray.serving.config import ServeConfig
from btray.serving.job import _verified
from tests.helpers.tiny_bundle import FILES, NETWORK, random_bundle

SCANS = [encoded_phantom(label, seed) for seed in range(4) for label in ("glioma", "no_tumor", "pituitary")]
GOOD = Agreement(images=100, equal_labels=1.0, largest_difference=0.01)


@pytest.fixture(autouse=True)
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the CPU is said to have; torch computes in bfloat16 on any."""
    path = tmp_path / "cpuinfo"
    path.write_text("model name\t: X\nflags\t\t: fpu avx512f avx512_bf16 hypervisor\n")
    monkeypatch.setattr(engines, "CPU_FLAGS", path)
    return path


def stored(folder: Path, agreement: Agreement | None) -> str:
    bundle = random_bundle()
    manifest = bundle.manifest.model_copy(update={"bf16": agreement})
    return save_bundle(Bundle("", manifest, bundle.weights), str(folder), FILES).uri


def frames_of(classifier: Classifier) -> np.ndarray:
    return np.stack([frame for scan in classifier.frames(SCANS) for frame in scan])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("engine", "network"),
    [
        ("frozen", NETWORK),
        ("eager", NETWORK),
        ("frozen", NETWORK.model_copy(update={"norm": "group", "activation": "gelu"})),
        ("frozen", NetworkConfig(architecture="mobile_cnn")),
        ("frozen", NetworkConfig(architecture="resnet18")),
        ("eager", NetworkConfig(architecture="densenet121")),
        ("eager", NetworkConfig(architecture="convnext_tiny")),
    ],
    ids=["cnn", "cnn, eager", "group norm", "mobile_cnn", "resnet18", "densenet121", "convnext_tiny"],
)
def test_answers_and_features_differ_by_rounding_alone(engine: EngineName, network: NetworkConfig) -> None:
    bundle = random_bundle(network=network)
    exact = Classifier(bundle, device="cpu", engine="eager")
    rounded = Classifier(bundle, device="cpu", engine=engine, precision="bf16")
    assert (exact.engine, rounded.engine) == ("eager float32", f"{engine} bf16")
    expected, found = exact.answer(frames_of(exact)), rounded.answer(frames_of(exact))
    assert found.logits.dtype == found.features.dtype == np.float32
    scale = np.abs(expected.logits).max()
    assert 0 < np.abs(found.logits - expected.logits).max() < 0.05 * scale, "nothing is rounded, or too much"
    np.testing.assert_allclose(found.features, expected.features, atol=0.03 * np.abs(expected.features).max())
    assert {tensor.dtype for tensor in rounded.network.parameters()} == {torch.float32}, "Grad-CAM needs it exact"


def test_answers_of_one_scan_do_not_depend_on_its_batch() -> None:
    lone, together = (Classifier(random_bundle(), device="cpu", batch_size=size, precision="bf16") for size in (1, 12))
    frames = frames_of(lone)
    np.testing.assert_allclose(lone.answer(frames).logits, together.answer(frames).logits, atol=0.02)


def test_a_cpu_without_the_instructions_is_refused_in_one_line(flags: Path) -> None:
    flags.write_text("flags\t\t: fpu avx2 avx512f\n")
    with pytest.raises(UserError, match="neither AVX512_BF16 nor AMX") as caught:
        Classifier(random_bundle(), device="cpu", precision="bf16")
    assert "\n" not in str(caught.value)
    Classifier(random_bundle(), device="cpu")
    flags.write_text("flags\t\t: fpu amx_bf16\n")
    Classifier(random_bundle(), device="cpu", precision="bf16")


@pytest.mark.parametrize(
    ("agreement", "message"),
    [
        (None, "does not say"),
        (GOOD.model_copy(update={"equal_labels": LEAST_EQUAL_LABELS - 0.001}), "98.9 %"),
        (GOOD.model_copy(update={"largest_difference": LARGEST_DIFFERENCE + 0.001}), "0.101"),
    ],
)
def test_a_bundle_that_disagrees_with_itself_is_refused_in_one_line(
    tmp_path: Path, agreement: Agreement | None, message: str
) -> None:
    uri = stored(tmp_path / "model", agreement)
    with pytest.raises(UserError, match=message) as caught:
        Classifier.load(uri, device="cpu", precision="bf16")
    assert uri in str(caught.value)
    assert "\n" not in str(caught.value)
    Classifier.load(uri, device="cpu")


def test_agreement_is_no_part_of_what_a_model_is_and_admits_it(tmp_path: Path) -> None:
    uris = [stored(tmp_path / str(number), agreement) for number, agreement in enumerate((None, GOOD))]
    assert len({load_bundle(uri).manifest.model_id for uri in uris}) == 1
    assert load_bundle(uris[1]).manifest.bf16 == GOOD
    (prediction,) = Classifier.load(uris[1], device="cpu", precision="bf16").predict(SCANS[:1])
    assert prediction.engine == "frozen bf16"
    (rejected,) = Classifier.load(uris[1], device="cpu", precision="bf16").predict([b"no image"])
    assert rejected.engine is None


def test_agreement_is_measured_on_what_can_be_read(tmp_path: Path, flags: Path) -> None:
    paths = [tmp_path / f"{number}.jpg" for number in range(len(SCANS))]
    for path, scan in zip(paths, SCANS, strict=True):
        path.write_bytes(scan)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    bundle, uris = random_bundle(), [str(path) for path in [*paths, tmp_path / "broken.jpg", tmp_path / "absent.jpg"]]
    found = measure_agreement(bundle, uris)
    assert found is not None
    exact, rounded = (Classifier(bundle, device="cpu", precision=precision) for precision in ("float32", "bf16"))
    pairs = list(zip(exact.predict(paths), rounded.predict(paths), strict=True))
    assert found.images == len(SCANS)
    assert found.equal_labels == np.mean([one.label == other.label for one, other in pairs])
    differences = [
        abs(one.probabilities[name] - other.probabilities[name]) for one, other in pairs for name in exact.classes
    ]
    assert found.largest_difference == pytest.approx(max(differences), abs=1e-5)
    assert measure_agreement(bundle, uris[-2:]) is measure_agreement(bundle, []) is None
    flags.write_text("flags\t\t: fpu\n")
    assert measure_agreement(bundle, uris) is None


def test_jobs_refuse_it_before_they_start_an_actor(
    tmp_path: Path, flags: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags.write_text("flags\t\t: fpu avx2\n")
    uri = stored(tmp_path / "model", GOOD)
    (tmp_path / "in").mkdir()
    places = {"model": uri, "input": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    job = ClassifyJob(ClassifyConfig(**places, precision="bf16"))
    monkeypatch.setattr(cluster, "started_ray_here", lambda: False)
    job.processor()  # of a cluster, whose nodes may have it
    monkeypatch.setattr(cluster, "started_ray_here", lambda: True)
    with pytest.raises(UserError, match="neither AVX512_BF16 nor AMX"):
        job.processor()
    ClassifyJob(ClassifyConfig(**places)).processor()
    with pytest.raises(UserError, match="neither AVX512_BF16 nor AMX"):
        _verified(ServeConfig(model=uri, precision="bf16"))
    _verified(ServeConfig(model=uri))


def test_onnx_in_bfloat16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="onnx has no bf16"):
        ClassifyConfig(model="m", input="i", output="o", engine="onnx", precision="bf16")
    with pytest.raises(UserError, match="ONNX Runtime"):
        Classifier(random_bundle(), device="cpu", engine="onnx", precision="bf16")
