"""An exported model gives the classifier's probabilities for any number of images, or it is not written."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc import model_config_pb2

from btray import storage
from btray.core.errors import Failed, UserError
from btray.data.config import PreprocessConfig
from btray.data.preprocess import make_frame, to_tensor
from btray.model import export as exports
from btray.model.bundle import load_bundle, save_bundle
from btray.model.classifier import Classifier
from btray.model.comparison import noise_frames
from btray.model.config import ExportConfig, NetworkConfig
from btray.model.export import export
from btray.model.manifest import Thresholds
from btray.model.ood import Distribution
from tests.conftest import ROOT
from tests.helpers.tiny_bundle import NETWORK, PREPROCESS, random_bundle

SIZE = PREPROCESS.size
SIDE = PreprocessConfig().size  # of which the docs speak
FAMILY = {
    "as it comes": {},
    "group norm": {"norm": "group", "activation": "silu"},
    "no norm, no gate": {"norm": "none", "squeeze_excite": 0.0, "activation": "gelu"},
    "max": {"pooling": "max", "squeeze_excite": 1.0, "kernel": 5},
    "average, plain": {"pooling": "average", "residual": False, "first_stride": 1, "stem_stride": 1},
    "resnet18": {"architecture": "resnet18"},
    "efficientnet_b0": {"architecture": "efficientnet_b0"},
}


def saved(folder: Path, network: NetworkConfig = NETWORK) -> str:
    """A bundle whose weights and statistics of norms are those of no initialisation, with a distribution."""
    torch.manual_seed(0)
    model = random_bundle(network=network).network().train()
    with torch.no_grad():
        for _ in range(3):
            model(to_tensor(torch.from_numpy(noise_frames(16, SIZE))))
    bundle = random_bundle(network=network, weights=model.state_dict())
    ood = Distribution.fit(Classifier(bundle).answer(noise_frames(40, SIZE)).features)
    bundle = random_bundle(
        network=network, weights=model.state_dict(), ood=ood, thresholds=Thresholds(ood_score=2.0, abstain_below=0.4)
    )
    return save_bundle(bundle, str(folder / "model"), {}).uri


def run_file(folder: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs by name, as someone without btray would get them."""
    description = json.loads((folder / "export.json").read_text())
    body = (folder / description["file"]).read_bytes()
    assert hashlib.sha256(body).hexdigest() == description["sha256"]
    names = [output["name"] for output in description["outputs"]]
    if description["file"] == "model.onnx":
        session = onnxruntime.InferenceSession(body, providers=["CPUExecutionProvider"])
        assert [one.name for one in session.get_inputs()] == [description["input"]["name"]]
        assert [one.name for one in session.get_outputs()] == names
        return dict(zip(names, session.run(None, {description["input"]["name"]: images}), strict=True))
    program = torch.export.load(io.BytesIO(body)).module()
    with torch.inference_mode():
        return dict(zip(names, (values.numpy() for values in program(torch.from_numpy(images))), strict=True))


def assert_same_answers(folder: Path, uri: str) -> None:
    bundle = load_bundle(uri)
    classifier = Classifier(bundle, device="cpu")
    random = np.random.default_rng(1)
    for count in (1, 3, 17):
        frames = random.integers(0, 256, (count, SIZE, SIZE), np.uint8)
        own = classifier.answer(frames)
        given = run_file(folder, to_tensor(torch.from_numpy(frames)).numpy())
        expected = Classifier.calibrated(own.logits, bundle.manifest.calibration.temperature)
        assert {values.dtype for values in given.values()} == {np.dtype(np.float32)}
        np.testing.assert_allclose(given["probabilities"], expected, atol=1e-4)
        assert bundle.ood is not None
        np.testing.assert_allclose(given["ood_score"][:, 0], bundle.ood.scores(own.features), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FAMILY)
def test_an_onnx_file_gives_the_classifiers_probabilities(name: str, tmp_path: Path) -> None:
    uri = saved(tmp_path, NETWORK.model_copy(update=FAMILY[name]))
    assert_same_answers(Path(export(ExportConfig(model=uri, out=str(tmp_path / "out")))), uri)


@pytest.mark.parametrize("name", ["as it comes", "group norm"])
def test_a_program_of_torch_gives_the_classifiers_probabilities(name: str, tmp_path: Path) -> None:
    uri = saved(tmp_path, NETWORK.model_copy(update=FAMILY[name]))
    assert_same_answers(Path(export(ExportConfig(model=uri, out=str(tmp_path / "out"), format="torch"))), uri)


def test_the_example_lets_others_check_their_preprocessing_and_all_that_follows(tmp_path: Path) -> None:
    uri = saved(tmp_path)
    out = Path(export(ExportConfig(model=uri, out=str(tmp_path / "out"))))
    description = json.loads((out / "export.json").read_text())
    bundle, example = load_bundle(uri), description["example"]
    assert {path.name for path in out.iterdir()} == {"export.json", "model.onnx", example["image"], example["frame"]}
    frame = np.asarray(Image.open(out / example["frame"]))
    assert np.array_equal(make_frame(np.asarray(Image.open(out / example["image"])), bundle.manifest.preprocess), frame)
    (own,) = Classifier(bundle, device="cpu").predict([out / example["image"]])
    assert example["probabilities"] == pytest.approx(list(own.probabilities.values()), abs=1e-4)
    assert example["ood_score"] == pytest.approx([own.ood_score], rel=1e-3)
    assert description["classes"] == list(own.probabilities)
    assert description["thresholds"]["abstain_below"] == 0.4
    assert description["input"]["shape"] == ["n", 1, SIZE, SIZE]
    assert "not a diagnosis" in description["notice"]
    assert len(description["preprocessing"]["steps"]) == 10
    assert description["preprocessing"]["settings"] == PREPROCESS.model_dump()


def test_a_model_without_a_distribution_has_no_score(tmp_path: Path) -> None:
    uri = save_bundle(random_bundle(), str(tmp_path / "model"), {}).uri
    out = Path(export(ExportConfig(model=uri, out=str(tmp_path / "out"))))
    assert run_file(out, np.zeros((4, 1, SIZE, SIZE), np.float32)).keys() == {"probabilities"}


def test_a_file_that_answers_differently_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, as_onnx = saved(tmp_path), exports._as_onnx

    def wrong(module: Any, example: torch.Tensor) -> Any:
        module.temperature *= 1.01
        return as_onnx(module, example)

    monkeypatch.setattr(exports, "_as_onnx", wrong)
    with pytest.raises(Failed, match=r"model\.onnx answers differently"):
        export(ExportConfig(model=uri, out=str(tmp_path / "out")))
    assert storage.list_names(str(tmp_path / "out"), missing_ok=True) == []


def test_an_export_is_not_replaced_unasked(tmp_path: Path) -> None:
    uri = saved(tmp_path)
    export(ExportConfig(model=uri, out=str(tmp_path / "out")))
    with pytest.raises(UserError, match="--overwrite"):
        export(ExportConfig(model=uri, out=str(tmp_path / "out")))
    export(ExportConfig(model=uri, out=str(tmp_path / "out"), overwrite=True))


def blocks(language: str) -> list[str]:
    """The code of docs/export.md."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "export.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_model_repository_of_the_docs_has_the_names_and_shapes_of_an_export(tmp_path: Path) -> None:
    out = Path(export(ExportConfig(model=saved(tmp_path), out=str(tmp_path / "out"))))
    description = json.loads((out / "export.json").read_text())
    (text,) = blocks("protobuf")
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.backend == "onnxruntime"
    (given,) = config.input
    assert (given.name, given.data_type) == (description["input"]["name"], model_config_pb2.TYPE_FP32)
    assert [1, *given.dims[1:]] == [1, SIDE, SIDE] == list(given.dims)
    assert [one.name for one in config.output] == [output["name"] for output in description["outputs"]]
    assert [len(one.dims) for one in config.output] == [1, 1]
    assert config.max_batch_size > 1
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [one.shape[0] for one in (*session.get_inputs(), *session.get_outputs())] == ["n"] * 3


def test_the_code_of_the_docs_runs_and_gives_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(export(ExportConfig(model=saved(tmp_path), out=str(tmp_path / "out"))))
    monkeypatch.chdir(out)
    (code,) = blocks("python")
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["probabilities"][0] == pytest.approx(found["description"]["example"]["probabilities"], abs=1e-4)


def test_the_metadata_of_the_docs_is_json_with_the_shapes_of_an_export() -> None:
    (text,) = blocks("json")
    formats = json.loads(text)["network_data_format"]
    assert formats["inputs"]["images"]["spatial_shape"] == [SIDE, SIDE]
    assert formats["outputs"].keys() == {"probabilities", "ood_score"}
