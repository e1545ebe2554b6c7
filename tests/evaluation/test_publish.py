"""A published bundle answers as the trained one does, is small, and holds no picture and no place of its data."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from btray import phantoms, storage
from btray.core.errors import UserError
from btray.data.duplicates import have_twin
from btray.data.fingerprint import SHORT, fingerprint_of, unpack
from btray.data.labelled import SCHEMA
from btray.data.scans import decode
from btray.evaluation.assessment import assess
from btray.evaluation.config import PublishConfig
from btray.evaluation.metrics import Evaluation
from btray.evaluation.publish import publish
from btray.evaluation.report import model_card
from btray.evaluation.scoring import Scores
from btray.model.bundle import FINGERPRINTS, LARGE, load_bundle, pack_fingerprints, read_fingerprints, save_bundle
from btray.model.classifier import Classifier
from btray.model.config import NetworkConfig
from btray.model.drift import REFERENCE, Profile
from btray.model.manifest import Thresholds
from btray.model.ood import Distribution
from btray.reports.plot_style import PALETTE
from tests.helpers.tiny_bundle import TRAINED_ON, random_bundle

TERMS = "**Use.** For research | teaching.\n\n- *Source one*, CC BY 4.0\n"
# What nobody else must read: where the data of the training lay.
SECRET = "/secret-hospital/archive"
KEPT = {"bundle.json", "model.safetensors", "ood.safetensors", "fingerprints.safetensors", "reference.json",
        "metrics.json", "report.html", "MODEL_CARD.md", "LICENSE"}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    phantoms.write_data_set(str(folder), per_class={"Training": 3, "Testing": 2}, seed=0)
    (folder / "Testing" / "glioma" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def train_in(folder: Path, data: Path, **changes: Any) -> str:
    """A bundle with all that a training leaves, pictures of scans too."""
    changes["network"] = NetworkConfig(stem_width=8, widths=(48, 64), depths=(1, 1))
    files = sorted(data.glob("*/*/0*.jpg"))
    frames = np.stack([scan[0] for scan in Classifier(random_bundle(**changes)).frames(files)])
    answers = Classifier(random_bundle(**changes)).answer(frames)
    bundle = random_bundle(
        ood=Distribution.fit(answers.features),
        thresholds=Thresholds(ood_score=2.0, abstain_below=0.4),
        training={
            "data": f"{SECRET}/scans",
            "init_from": "s3://secret-hospital/x.safetensors",
            "epochs": 3,
            "out": "file:/secret/out",
            "mlflow": "http://secret.hospital:5000",
            "teachers": [f"{SECRET}/first", {"second": "~/secret-hospital/second"}],
        },
        data=TRAINED_ON.model_copy(update={"uri": f"{SECRET}/scans"}),
        **changes,
    )
    prints = [fingerprint_of(decode(path.read_bytes()).frames) for path in files]
    table = pa.Table.from_pylist(
        [{"uri": str(path), "label": path.parent.name, "source": f"{SECRET}/pacs"} for path in files], schema=SCHEMA
    )
    rejected = pa.table({"row": pa.array([], pa.int64()), "code": pa.array([], pa.string())})
    epoch = {"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "val_macro_f1": 0.5, "learning_rate": 0.1, "score": 0.5}
    assessment = assess(
        bundle,
        table,
        Scores(np.arange(len(files)), answers, unpack(prints), rejected, np.full(len(files), None)),
        measured_on=f"the test split of {SECRET}/scans",
        learnt_from=unpack(prints[:9]),
        curves={"history": [epoch], "train_images": 3, "val_images": 1},
    )
    others = {
        "MODEL_CARD.md": model_card(bundle.manifest, assessment.metrics).encode(),
        "config.yaml": f"data: {SECRET}/scans".encode(),
        "patients.png": assessment.files["worst_errors.png"],
        FINGERPRINTS: pack_fingerprints(unpack(prints[:9])),
        REFERENCE: Profile().model_dump_json().encode(),
    }
    return save_bundle(bundle, str(folder / "trained"), assessment.files | others).uri


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> str:
    return train_in(tmp_path_factory.mktemp("model"), data)


def settings(trained: str, tmp_path: Path, **changes: Any) -> PublishConfig:
    (tmp_path / "TERMS").write_text(TERMS)
    arguments = {"model": trained, "out": str(tmp_path / "out"), "license": str(tmp_path / "TERMS")}
    return PublishConfig(**{**arguments, **changes})


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, trained: str, data: Path) -> str:
    return publish(settings(trained, tmp_path_factory.mktemp("published"), data=str(data)))


def test_a_published_bundle_answers_as_the_trained_one_in_half_the_size(
    trained: str, published: str, data: Path
) -> None:
    before, after, out = load_bundle(trained), load_bundle(published), published
    assert after.manifest.model_id != before.manifest.model_id
    assert set(storage.list_names(out)) == KEPT
    for name, values in after.weights.items():
        expected = torch.float16 if before.weights[name].numel() >= LARGE else before.weights[name].dtype
        assert values.dtype == expected, name
    size = {uri: Path(uri, "model.safetensors").stat().st_size for uri in (trained, out)}
    assert size[out] < 0.7 * size[trained]
    assert {values.dtype for values in after.network().parameters()} == {torch.float32}
    scans = sorted(data.glob("Testing/*/0*.jpg"))
    for own, answer in zip(Classifier(before).predict(scans), Classifier(after).predict(scans), strict=True):
        assert answer.label == own.label
        assert answer.ood_score == pytest.approx(own.ood_score, abs=1e-2)
        for label, probability in own.probabilities.items():
            assert answer.probabilities[label] == pytest.approx(probability, abs=1e-3)


def test_no_picture_and_no_place_is_left_anywhere(trained: str, published: str) -> None:
    out = Path(published)
    pictures = [path for path in Path(trained).glob("*.png") if path.stem in ("worst_errors", "patients")]
    assert len(pictures) == 2
    for file in out.iterdir():
        body = file.read_bytes()
        assert b"secret" not in body, file.name
        for picture in pictures:
            assert base64.b64encode(picture.read_bytes())[:400] not in body, file.name
    report = (out / "report.html").read_text()
    assert report.count("data:image/png") == 5, "plots of numbers stay"
    assert "Pictures of scans are left out" in report
    assert "the test split of scans" in report


def test_lines_of_a_published_plot_keep_the_colours_that_tell_them_apart(published: str) -> None:
    report = (Path(published) / "report.html").read_text()
    _, roc, *_ = re.findall(r"data:image/png;base64,([^\"]+)", report)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(roc))).convert("RGB")).reshape(-1, 3).astype(int)
    for colour in PALETTE[:5]:  # of the five classes; each stands in the legend at least
        wanted = np.array(to_rgb(colour)) * 255
        assert np.abs(pixels - wanted).max(1).min() < 24, colour


def test_figures_card_and_licence_are_those_of_the_published_model(trained: str, published: str) -> None:
    out = Path(published)
    model_id, card = load_bundle(str(out)).manifest.model_id, (out / "MODEL_CARD.md").read_text()
    assert (out / "LICENSE").read_text() == TERMS
    assert TERMS.strip() in card, "as it was written"
    assert card.startswith(f"# Model card: {model_id}")
    assert "half precision" in card
    before = json.loads((Path(trained) / "metrics.json").read_text())
    after = json.loads((out / "metrics.json").read_text())
    assert {name for name in before if before[name] != after[name]} == {"model_id", "measured_on", "sources"}
    assert list(after["sources"]) == ["pacs"]
    assert after["model_id"] == model_id


def test_short_fingerprints_tell_the_same_twins(trained: str, published: str, data: Path) -> None:
    whole = read_fingerprints(load_bundle(trained))
    short = read_fingerprints(load_bundle(published))
    assert whole is not None
    assert short is not None
    assert (short.shape, short.dtype) == ((len(whole), 2, SHORT), np.uint8)
    pictures = [decode(path.read_bytes()).frames[0] for path in sorted(data.glob("*/*/0*.jpg"))]
    halved = [np.asarray(Image.fromarray(picture).reduce(2)) for picture in pictures]
    copies = [np.rot90(picture[::-1]) for picture in halved]  # half as large, mirrored and turned
    prints = unpack([fingerprint_of([picture]) for picture in [*pictures, *copies]])
    assert have_twin(prints, short).tolist() == have_twin(prints, whole).tolist()
    assert have_twin(prints, short).sum() == 2 * len(whole)


def test_a_bundle_that_is_too_large_is_refused_and_nothing_is_written(trained: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"report\.html .* above --max-mb 0\.01$"):
        publish(settings(trained, tmp_path, max_mb=0.01))
    assert not (tmp_path / "out").exists()


def test_neither_the_trained_bundle_nor_another_one_is_replaced_unasked(
    trained: str, published: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is the trained bundle"):
        publish(settings(trained, tmp_path, out=trained, overwrite=True))
    with pytest.raises(UserError, match="--overwrite"):
        publish(settings(trained, tmp_path, out=published))
    save_bundle(random_bundle(), str(tmp_path / "out"), {"old.png": b"x"})
    again = publish(settings(published, tmp_path, overwrite=True))
    assert set(storage.list_names(again)) == KEPT
    assert load_bundle(again).manifest.model_id == load_bundle(published).manifest.model_id, "it is published already"


def test_where_half_precision_changes_answers_single_precision_stays(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btray.evaluation.publish.TOLERANCE", 1e-9)
    bundle = load_bundle(publish(settings(trained, tmp_path)))
    assert bundle.manifest.model_id == load_bundle(trained).manifest.model_id
    assert torch.float16 not in {values.dtype for values in bundle.weights.values()}
    assert "single precision, as they were trained" in (tmp_path / "out" / "MODEL_CARD.md").read_text()


def test_a_bundle_without_figures_and_data_without_images_are_refused(trained: str, tmp_path: Path) -> None:
    save_bundle(random_bundle(), str(tmp_path / "bare"), {})
    with pytest.raises(UserError, match=r"no metrics\.json"):
        publish(settings(str(tmp_path / "bare"), tmp_path))
    save_bundle(random_bundle(), str(tmp_path / "old"), {"metrics.json": b'{"accuracy": 0.5}'})
    with pytest.raises(UserError, match=r"metrics\.json"):
        publish(settings(str(tmp_path / "old"), tmp_path))
    (tmp_path / "scans" / "glioma").mkdir(parents=True)
    (tmp_path / "scans" / "glioma" / "x.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match="not one of 1 images"):
        publish(settings(trained, tmp_path, data=str(tmp_path / "scans")))


@pytest.mark.parametrize("learnt", ["nothing", "some", "all", "unknown"])
def test_metrics_are_read_as_they_were_written(trained: str, learnt: str) -> None:
    metrics = Evaluation.from_json((Path(trained) / "metrics.json").read_bytes())
    written = metrics.to_json()
    changed = json.loads(written)
    if learnt == "unknown":
        changed["clean"] = None
    elif learnt == "nothing":
        changed["clean"] = {name: changed[name] for name in changed["clean"]}
    elif learnt == "all":
        changed["clean"] = dict.fromkeys(changed["clean"]) | {"n": 0}
    assert json.loads(Evaluation.from_json(json.dumps(changed).encode()).to_json()) == changed
