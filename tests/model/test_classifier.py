"""One answer for one scan, however it is handed over and whatever is beside it; a bad input is an answer too."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import btray
from btray.core.errors import UserError
from btray.data.preprocess import to_tensor
from btray.data.scans import REJECTION_CODES
from btray.model import engines
from btray.model.classifier import Classifier
from btray.model.config import EngineName, NetworkConfig, Precision
from btray.model.engines import make_engine
from btray.model.network import build_network
from btray.model.prediction import Prediction
from btray.phantoms import encoded_phantom, phantom
from btray.storage.errors import KINDS
from tests.helpers import scan_corpus
from tests.helpers.tiny_bundle import NETWORK, PREPROCESS, random_bundle, saved_bundle

LABELS = ("glioma", "no_tumor", "pituitary", "metastasis")


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(random_bundle(), device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def scans() -> list[bytes]:
    return [encoded_phantom(label, seed) for seed in range(3) for label in LABELS]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def values(predictions: list[Prediction]) -> np.ndarray:
    assert all(prediction.status == "ok" for prediction in predictions)
    return np.array([list(prediction.probabilities.values()) for prediction in predictions])


def test_a_prediction_is_complete_and_its_probabilities_sum_to_one(classifier: Classifier, scans: list[bytes]) -> None:
    predictions = classifier.predict(scans)
    assert [prediction.index for prediction in predictions] == list(range(len(scans)))
    for prediction in predictions:
        assert tuple(prediction.probabilities) == classifier.classes
        assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-6)
        assert min(prediction.probabilities.values()) >= 0
        assert prediction.label == max(prediction.probabilities, key=prediction.probabilities.__getitem__)
        assert prediction.confidence == max(prediction.probabilities.values())
        assert (prediction.status, prediction.error_code, prediction.error) == ("ok", None, None)
        assert prediction.model_id == classifier.model_id
    assert len(np.unique(values(predictions).round(5), axis=0)) > len(scans) // 2, "a model that says the same to all"


def test_the_temperature_divides_the_logits(classifier: Classifier, scans: list[bytes]) -> None:
    frames = np.stack([classifier.source.from_bytes(scan)[0] for scan in scans])  # type: ignore[index]
    expected = torch.from_numpy(classifier.answer(frames).logits / 1.5).softmax(1).numpy()
    np.testing.assert_allclose(values(classifier.predict(scans)), expected, atol=1e-6)


def test_bytes_paths_strings_and_arrays_give_the_same(classifier: Classifier, tmp_path: Path) -> None:
    picture = phantom("glioma", 3)
    path = tmp_path / "a scan, with % and ü#?.png"
    path.write_bytes(png(picture))
    predictions = classifier.predict([path.read_bytes(), path, str(path), picture])
    found = values(predictions)
    np.testing.assert_allclose(found, np.broadcast_to(found[0], found.shape), atol=1e-6)
    assert [prediction.uri for prediction in predictions] == [None, str(path), str(path), None]


def test_a_path_relative_to_the_working_directory_is_kept_as_given(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scan.png").write_bytes(png(phantom("glioma", 3)))
    monkeypatch.chdir(tmp_path)
    (prediction,) = classifier.predict(["scan.png"])
    assert (prediction.status, prediction.uri) == ("ok", "scan.png")


def test_order_is_kept_with_rejections_and_pages_between(classifier: Classifier, scans: list[bytes]) -> None:
    pages = scan_corpus.good_scans()["tiff_pages"]
    alone = classifier.predict([scans[0]]) + classifier.predict([pages]) + classifier.predict([scans[1]])
    mixed = classifier.predict([b"", scans[0], b"no image", pages, "/nowhere/at/all.png", scans[1], np.zeros((2, 2))])
    assert [(p.index, p.frame) for p in mixed] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (3, 0),
        (3, 1),
        (3, 2),
        (4, 0),
        (5, 0),
        (6, 0),
    ]
    codes = [p.error_code for p in mixed]
    assert codes == ["empty", None, "not_an_image", None, None, None, "not_found", None, "too_small"]
    np.testing.assert_allclose(values([p for p in mixed if p.status == "ok"]), values(alone), atol=1e-5)


@pytest.mark.parametrize("name", sorted(scan_corpus.bad_scans()))
def test_every_bad_scan_is_a_rejected_prediction_with_its_code(classifier: Classifier, name: str) -> None:
    data, code = scan_corpus.bad_scans()[name]
    (prediction,) = classifier.predict([data])
    assert (prediction.status, prediction.error_code) == ("rejected", code)
    assert prediction.error
    assert prediction.label is prediction.confidence is None
    assert prediction.probabilities == {}
    assert not prediction.retryable


@pytest.mark.parametrize("name", sorted(scan_corpus.good_scans()))
def test_every_good_scan_is_classified(classifier: Classifier, name: str) -> None:
    predictions = classifier.predict([scan_corpus.good_scans()[name]])
    assert len(predictions) == len(scan_corpus.expected(name))
    values(predictions)


def nowhere(tmp_path: Path) -> dict[str, tuple[Any, str]]:
    (tmp_path / "locked").write_bytes(b"x")
    return {
        "absent": (tmp_path / "absent.png", "not_found"),
        "folder": (tmp_path, "is_directory"),
        "below a file": (tmp_path / "locked" / "x", "not_found"),
        "other scheme": ("http://example.org/scan.png", "unsupported"),
        "no name": ("", "unsupported"),
        "zero byte": ("a\0b", "unsupported"),
        "nothing": (None, "unsupported"),
        "number": (7, "unsupported"),
        "tensor": (torch.zeros(64, 64), "unsupported"),
        "cube": (np.zeros((20, 20, 20), np.uint8), "unsupported"),
        "row": (np.zeros(400, np.uint8), "unsupported"),
        "no pixels": (np.zeros((0, 0), np.uint8), "too_small"),
        "thin": (np.zeros((15, 400), np.uint16), "too_small"),
        "nan": (np.full((64, 64), np.nan), "unsupported"),
        "infinite": (np.full((64, 64), np.inf, np.float32), "unsupported"),
        "complex": (np.zeros((64, 64), complex), "unsupported"),
        "objects": (np.full((64, 64), None, object), "unsupported"),
        "words": (np.full((64, 64), "x"), "unsupported"),
    }


def test_an_input_of_no_use_is_a_rejected_prediction_and_never_an_exception(
    classifier: Classifier, tmp_path: Path
) -> None:
    cases = nowhere(tmp_path)
    predictions = classifier.predict([given for given, _ in cases.values()])
    found = {name: prediction.error_code for name, prediction in zip(cases, predictions, strict=True)}
    assert found == {name: code for name, (_, code) in cases.items()}
    assert all(prediction.error and "\n" not in prediction.error for prediction in predictions)
    assert set(found.values()) <= {*REJECTION_CODES, *KINDS}


def test_no_input_gives_no_prediction(classifier: Classifier) -> None:
    assert classifier.predict([]) == []


def test_an_answer_depends_on_neither_batch_size_nor_neighbours(scans: list[bytes]) -> None:
    bundle = random_bundle()
    together = values(Classifier(bundle, device="cpu", batch_size=64).predict(scans))
    for batch_size in (1, 3, len(scans)):
        other = Classifier(bundle, device="cpu", batch_size=batch_size)
        np.testing.assert_allclose(values(other.predict(scans)), together, atol=1e-5)
        np.testing.assert_allclose(values(other.predict(scans[::-1]))[::-1], together, atol=1e-5)
    lone = Classifier(bundle, device="cpu")
    np.testing.assert_allclose(values([lone.predict([scan])[0] for scan in scans]), together, atol=1e-5)


@pytest.mark.parametrize("engine", ["frozen", "onnx", "auto"])
@pytest.mark.parametrize("network", [NETWORK, NetworkConfig(architecture="resnet18")], ids=["cnn", "backbone"])
def test_every_engine_gives_the_answers_of_the_network(
    scans: list[bytes], engine: EngineName, network: NetworkConfig
) -> None:
    bundle = random_bundle(network=network)
    fast, plain = (Classifier(bundle, device="cpu", batch_size=4, engine=name) for name in (engine, "eager"))
    assert fast.engine == f"{engine.replace('auto', 'frozen')} float32"  # it was not set aside for being wrong
    frames = np.stack([frame for scan in scans for frame in fast.source.from_bytes(scan)])
    expected, found = plain.answer(frames), fast.answer(frames)
    np.testing.assert_allclose(fast.calibrated(found.logits, 1.0), fast.calibrated(expected.logits, 1.0), atol=1e-5)
    np.testing.assert_allclose(found.features, expected.features, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 2, 32), (5, 2, 48), (7, 4, 32), (3, 4, 48), (3, 2, 33)])
def test_a_graph_takes_neighbouring_columns_for_channels_and_computes_the_same(
    kernel: int, stride: int, size: int, precision: Precision
) -> None:
    config = NETWORK.model_copy(update={"kernel": kernel, "stem_stride": stride, "norm": "batch"})
    network = build_network(config, 3).eval()
    torch.nn.init.normal_(network.parts[0][0][1].bias)
    torch.nn.init.normal_(network.head.weight)
    module = engines._WithSummary(network, precision)
    rewritten = engines._with_columns(module, size, torch.device("cpu"))
    assert (rewritten is module) == (size == 33), "columns are left over"
    images = torch.randn(3, 1, size, size).contiguous(memory_format=torch.channels_last)
    for run in (rewritten, engines._frozen(rewritten, images)):
        with torch.inference_mode():
            for got, own in zip(run(images), module(images), strict=True):
                limit = 1e-5 if precision == "float32" else 0.05
                assert float((got - own).abs().max()) <= limit * max(1.0, float(own.abs().max()))


def test_a_graph_with_other_answers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: torch.nn.Module, example: torch.Tensor) -> engines.Run:
        def run(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits, features = module(images)
            return logits + 0.01, features

        return run

    monkeypatch.setattr(engines, "_frozen", wrong)
    bundle = random_bundle()
    assert Classifier(bundle, device="cpu", engine="frozen").engine == "eager float32"


@pytest.mark.parametrize("engine", ["frozen", "eager"])
def test_the_network_is_built_when_it_is_asked_for_and_answers_stay_the_same(
    scans: list[bytes], engine: EngineName
) -> None:
    used = Classifier(random_bundle(), device="cpu", engine=engine)
    before = values(used.predict(scans))
    assert "network" not in vars(used)
    assert used.network is used.network
    frames = np.stack([used.source.from_bytes(scan)[0] for scan in scans])  # type: ignore[index]
    np.testing.assert_allclose(
        used.calibrated(used.network(to_tensor(torch.from_numpy(frames))).detach().numpy(), 1.5), before, atol=1e-5
    )
    np.testing.assert_array_equal(values(used.predict(scans)), before)


def test_a_process_may_freeze_one_network_after_another_for_ever() -> None:
    networks = [build_network(NetworkConfig(widths=(64, 128, 256), depths=(1, 1, 1)), 3).eval() for _ in range(2)]
    size = sum(parameter.nbytes for parameter in networks[0].parameters())
    assert size > 2_000_000

    def resident() -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def freeze(times: int) -> None:
        images = torch.rand(2, 1, 32, 32)
        for number in range(times):
            network = networks[number % 2]
            engine = make_engine("frozen", network, size=32, device=torch.device("cpu"))
            with torch.inference_mode():
                for got, own in zip(engine(images), network.with_summary(images), strict=True):
                    assert torch.allclose(got, own, atol=1e-5)

    freeze(4)
    before = resident()
    freeze(12)
    assert resident() - before < 3 * size


def test_networks_that_differ_in_no_layer_are_not_taken_for_one_another(caplog: pytest.LogCaptureFixture) -> None:
    images = torch.rand(2, 1, 32, 32)
    for pooling in ("average", "max"):
        network = build_network(NetworkConfig(widths=(8, 16), depths=(1, 1), pooling=pooling), 3).eval()
        engine = make_engine("frozen", network, size=32, device=torch.device("cpu"))
        with torch.inference_mode():
            assert torch.allclose(engine(images)[0], network(images), atol=1e-5)
    assert "eager is used instead" not in caplog.text


def test_full_gpu_memory_halves_the_batch_and_loses_no_answer(scans: list[bytes]) -> None:
    whole = Classifier(random_bundle(), device="cpu")
    tight = Classifier(random_bundle(), device="cpu", batch_size=64)

    def limited(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(images) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return tight.network.with_summary(images)

    tight._engine = replace(tight._engine, run=limited)
    np.testing.assert_allclose(values(tight.predict(scans)), values(whole.predict(scans)), atol=1e-5)
    assert tight.batch_size <= 3


def test_arrays_of_every_kind_of_number_show_the_same_picture(classifier: Classifier) -> None:
    picture = phantom("meningioma", 5)
    wide = picture.astype(np.uint16) * 257
    arrays = {
        "uint8": picture,
        "uint16": wide,
        "big-endian": wide.astype(">u2"),
        "int16": picture.astype(np.int16) - 90,
        "int64": picture.astype(np.int64) * 10**12,
        "float16": (picture / 255).astype(np.float16),
        "float32": (picture / 255).astype(np.float32),
        "float64": picture * 1e300 - 1e302,
        "huge": (picture / 255.0 * 2 - 1) * 1.7e308,
        "tiny": picture * 1e-300,
        "strided": np.repeat(np.repeat(picture, 2, 0), 2, 1)[::2, ::2],
        "column-major": np.asfortranarray(picture),
        "read-only": np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.shape),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = dict(zip(arrays, values(classifier.predict(list(arrays.values()))), strict=True))
    for name, probabilities in found.items():
        np.testing.assert_allclose(probabilities, found["uint8"], atol=0.03, err_msg=name)


def test_arrays_are_not_changed(classifier: Classifier) -> None:
    picture = phantom("meningioma", 5)
    before = picture.copy()
    classifier.predict([picture, picture.astype(float), 255 - picture])
    np.testing.assert_array_equal(picture, before)


def test_threads_get_what_one_caller_gets(classifier: Classifier, scans: list[bytes]) -> None:
    jobs = [[scan, b"", phantom("glioma", number)] for number, scan in enumerate(scans)] * 2
    alone = [classifier.predict(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(classifier.predict, jobs))
    for one, other in zip(alone, threaded, strict=True):
        assert [p.error_code for p in one] == [p.error_code for p in other]
        np.testing.assert_allclose(values([one[0], one[2]]), values([other[0], other[2]]), atol=1e-5)


def test_use_leaves_gradients_and_the_random_state_alone(classifier: Classifier, scans: list[bytes]) -> None:
    state = torch.get_rng_state()
    classifier.predict(scans[:2])
    assert torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size"):
        Classifier(random_bundle(), batch_size=0)


def test_any_number_of_classes_of_any_name(scans: list[bytes]) -> None:
    classes = ("a", "ü b", *(f"class {number}" for number in range(20)))
    (prediction,) = Classifier(random_bundle(classes=classes), device="cpu").predict(scans[:1])
    assert tuple(prediction.probabilities) == classes


def test_a_loaded_bundle_answers_like_the_one_in_memory(tmp_path: Path, scans: list[bytes]) -> None:
    saved_bundle(tmp_path / "model")
    loaded = btray.Classifier.load(tmp_path / "model", device="cpu").predict(scans)
    np.testing.assert_array_equal(values(loaded), values(Classifier(random_bundle(), device="cpu").predict(scans)))


@pytest.mark.s3
def test_scans_in_object_storage_are_read_and_missing_ones_named(classifier: Classifier, bucket: str) -> None:
    from btray import storage

    data = png(phantom("glioma", 3))
    storage.write_bytes(f"{bucket}/in/a b%20+ü.png", data)
    there, absent, no_bucket = classifier.predict(
        [f"{bucket}/in/a b%20+ü.png", f"{bucket}/in/absent.png", "s3://no-such-bucket-of-btray/x.png"]
    )
    np.testing.assert_allclose(values([there]), values(classifier.predict([data])), atol=1e-6)
    assert (absent.error_code, no_bucket.error_code) == ("not_found", "not_found")


def test_import_and_use_start_no_ray_and_draw_nothing(tmp_path: Path) -> None:
    saved_bundle(tmp_path / "model")
    code = (
        "import sys, numpy as np, btray\n"
        f"answer = btray.Classifier.load({str(tmp_path / 'model')!r}).predict([np.eye({PREPROCESS.size})])\n"
        "print(answer[0].status, sorted({'ray', 'matplotlib', 'sklearn', 'pandas', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ok []"
