"""The model that ships is used if no other is named, says so, and holds nothing that must not be passed on."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from btray import Classifier, cli
from btray.bulk.classify import ClassifyJob
from btray.bulk.config import ClassifyConfig
from btray.core.errors import UserError
from btray.evaluation.config import EvaluateConfig
from btray.model import shipped
from btray.model.bundle import FINGERPRINTS, load_bundle
from btray.model.config import ExportConfig, PredictConfig
from btray.model.shipped import FOLDER, SHIPPED
from btray.phantoms import encoded_phantom
from btray.serving.config import ApplicationConfig, CanaryConfig, ServeConfig
from btray.serving.job import _verified
from tests.conftest import ROOT
from tests.helpers.tiny_bundle import random_bundle, saved_bundle

MODEL_ID = random_bundle().manifest.model_id


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where btray looks for its shipped models: an empty folder."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scan.jpg").write_bytes(encoded_phantom("glioma", 1))
    return tmp_path / "pretrained"


def predict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[object, list[str], list[str]]:
    """Exit code and the lines of both streams."""
    monkeypatch.setattr(sys, "argv", ["btray", "predict", *flags, "scan.jpg"])
    code: object = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err.splitlines()


def test_without_a_shipped_model_the_remedy_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = predict(monkeypatch, capsys)
    assert (code, out, len(err)) == (2, [], 1)
    assert "no shipped model brain-mri" in err[0]
    assert "--model" in err[0]
    with pytest.raises(UserError, match="no shipped model"):
        Classifier.load()
    for config in (ServeConfig(port=65000), ClassifyConfig(input=str(ROOT), output="o"), ExportConfig(out="o")):
        with pytest.raises(UserError, match="no shipped model"):
            config.check()


def test_predict_uses_the_shipped_model_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_bundle(folder / SHIPPED)
    saved_bundle("brain-mri", seed=1)
    saying = f"using the shipped model brain-mri ({MODEL_ID}): research use, not a diagnosis; --model takes your own"
    code, out, err = predict(monkeypatch, capsys)
    assert (code, err[0]) == (0, saying)
    assert predict(monkeypatch, capsys, "--model", "brain-mri") == (code, out, err), "its name is not a folder here"
    for own in ("./brain-mri", str(folder.parent / "brain-mri")):
        code, other, err = predict(monkeypatch, capsys, "--model", own)
        assert code == 0
        assert other != out
        assert "shipped" not in " ".join(err)
    assert Classifier.load().model_id == MODEL_ID
    assert predict(monkeypatch, capsys, "--model-id", "0" * 32)[0] == 2


@pytest.mark.parametrize("config", [PredictConfig, ClassifyConfig, EvaluateConfig, ServeConfig, ApplicationConfig])
def test_every_job_that_takes_a_model_takes_the_shipped_one_by_default(config: type[BaseModel]) -> None:
    assert config.model_fields["model"].default == SHIPPED


def test_processes_elsewhere_get_the_name_and_no_folder_of_this_machine(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved_bundle(folder / SHIPPED)
    with caplog.at_level("INFO"):
        service = _verified(ServeConfig(canary=CanaryConfig(model=SHIPPED)))
        job = ClassifyJob(ClassifyConfig(input=str(ROOT / "docs"), output="results"))
    assert service.canary is not None
    for config in (service, service.canary):
        assert (config.model, config.model_id) == (SHIPPED, MODEL_ID)
    assert job.config.model == SHIPPED
    assert len([line for line in caplog.messages if f"brain-mri ({MODEL_ID})" in line]) == 3


def test_what_is_shipped_may_be_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "FOLDER", FOLDER)
    if not (FOLDER / SHIPPED).is_dir():
        pytest.skip(f"NO SHIPPED MODEL: {FOLDER / SHIPPED} does not exist, so what this test shows is NOT shown here")
    bundle, files = load_bundle(SHIPPED), sorted((FOLDER / SHIPPED).iterdir())
    assert sum(file.stat().st_size for file in files) <= 6_000_000
    assert {file.suffix for file in files} <= {"", ".html", ".json", ".md", ".safetensors"}, "no picture"
    assert {"LICENSE", "MODEL_CARD.md", "metrics.json", "report.html", FINGERPRINTS} <= bundle.manifest.files.keys()
    assert (FOLDER / SHIPPED / "LICENSE").read_bytes() == (FOLDER / "LICENSE").read_bytes()
    for file in files:
        if file.suffix != ".safetensors":
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w/:<.])/(home|work|root|tmp|mnt|data|srv)/|[Ww]orst_errors", text), file.name
    assert "worst" not in (FOLDER / SHIPPED / "report.html").read_text(encoding="utf-8").lower()
    assert 0 < sum(values.numel() for values in bundle.weights.values()) <= 3_100_000
