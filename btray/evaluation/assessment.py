"""Measure a bundle on labelled data: metrics.json, plots, report.html; for `jobs/evaluate` and the end of training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from btray import storage
from btray.core.cluster import connected, require_gpus
from btray.core.errors import UserError
from btray.data.fingerprint import Fingerprints
from btray.data.frames import FrameSource, Rejection
from btray.data.labelled import read_labelled
from btray.data.labels import require_known_labels
from btray.data.rejections import REJECTED, as_csv, enforce_max_rejected, rejections_csv, report_rejections
from btray.evaluation import plots
from btray.evaluation.config import EvaluateConfig
from btray.evaluation.measures import measure
from btray.evaluation.metrics import worst_errors
from btray.evaluation.report import model_card, render_report
from btray.evaluation.report_sections import trust_sections
from btray.evaluation.scoring import Scores, score
from btray.model.bundle import Bundle, Manifest, load_bundle, read_fingerprints
from btray.model.classifier import Classifier, interpret
from btray.model.prediction import Place, csv_cells, csv_header

_SHOWN_ERRORS = 12


@dataclass(frozen=True)
class Assessment:
    """What was measured, and the files that show it, by name."""

    metrics: dict[str, Any]
    files: dict[str, bytes]


def evaluate(config: EvaluateConfig) -> str:
    """Measure a bundle on the test split of `config.data`, or on all of it where it has none.

    Writes metrics.json, plots, report.html, predictions.csv, rejected.csv and config.yaml to `config.out` and returns
    that URI. Raises UserError for unusable input and ThresholdExceeded above `max_rejected`, after writing.
    """
    out = storage.resolve(config.out)
    bundle = load_bundle(config.model, model_id=config.model_id).abstaining_below(config.abstain_below)
    table = read_labelled(config.data, least_classes=1)
    split = "test" if "test" in table["split"].to_pylist() else None
    if split:
        table = table.filter(pc.equal(table["split"], split))
    require_known_labels(table["label"].to_pylist(), bundle.manifest.classes, config.data)
    storage.require_writable(out, "--out")
    with connected():
        if config.use_gpu:
            require_gpus()
        scores = score(
            bundle, np.arange(len(table)), table["uri"], batch_size=config.batch_size, use_gpu=config.use_gpu
        )
    report_rejections(scores.rejected, table)
    storage.write_bytes(storage.join(out, REJECTED), rejections_csv(scores.rejected, table))
    measured_on = f"the test split of {config.data}" if split else f"all of {config.data}"
    learnt_from = read_fingerprints(bundle)
    assessment = assess(bundle, table, scores, measured_on=measured_on, learnt_from=learnt_from)
    files = assessment.files | {
        "predictions.csv": predictions_csv(bundle, table, scores),
        "config.yaml": config.to_yaml().encode(),
    }
    for name, body in files.items():
        storage.write_bytes(storage.join(out, name), body)
    print(summary(assessment.metrics), flush=True)
    enforce_max_rejected(scores.rejected, len(table), config.max_rejected)
    return out


def assess(
    bundle: Bundle,
    table: pa.Table,
    scores: Scores,
    *,
    measured_on: str,
    history: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    learnt_from: Fingerprints | None = None,
) -> Assessment:
    """Compute metrics and draw plots and report; `scores` belong to the rows of `table` (columns uri, label).

    `history` are the epochs of the training, where learning curves are to be shown; `learnt_from` are fingerprints of
    what the model was trained and validated with, where they are known. Raises UserError where no image
    could be read.
    """
    manifest = bundle.manifest
    labels, probabilities = _labelled(bundle, table, scores)
    if len(labels) == 0:
        raise UserError(f"{measured_on}: not one image could be read; see {REJECTED}")
    metrics = measure(bundle, labels, scores, learnt_from) | {
        "measured_on": measured_on,
        "rejected": len(scores.rejected),
        "model_id": manifest.model_id,
    }
    figures = {
        "confusion_matrix": plots.confusion_matrix(metrics),
        "roc_curves": plots.roc_curves(labels, probabilities, manifest.classes),
        "reliability": plots.reliability_diagram(labels, probabilities),
        "risk_coverage": plots.risk_coverage_curve(labels, probabilities, manifest.thresholds.abstain_below),
    }
    if history:
        counts = manifest.data["counts"]
        figures["learning_curves"] = plots.learning_curves(
            history,
            best_epoch=max(history, key=lambda record: record["score"])["epoch"],
            train_images=sum(counts["train"].values()),
            val_images=sum(counts["validation"].values()),
        )
    figures["worst_errors"] = _draw_errors(manifest, table, scores, labels, probabilities)
    rejected = len(scores.rejected)
    counted = [f"{rejected} of {len(table)} images could not be read and are in no figure."] if rejected else []
    page = render_report(
        title="Evaluation of a brain-tumor classifier",
        metrics=metrics,
        figures=figures,
        facts=model_facts(manifest) | {"Measured on": measured_on},
        classes=manifest.classes,
        notes=[*counted, *notes],
        sections=trust_sections(metrics),
    )
    files = {f"{name}.png": png for name, png in figures.items()}
    files["metrics.json"] = json.dumps(metrics, indent=2, allow_nan=False).encode()
    files["report.html"] = page.encode()
    return Assessment(metrics, files)


def summary(metrics: Mapping[str, Any]) -> str:
    """A few lines for a terminal."""
    low, high = metrics["accuracy_ci95"]
    accuracy = f"accuracy {metrics['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f})"
    lines = [
        f"measured on {metrics['measured_on']}: {metrics['n']} images, {metrics['rejected']} rejected",
        f"{accuracy}  macro-F1 {metrics['macro_f1']:.3f}  AUROC {_number(metrics['auroc_macro'])}  "
        f"ECE {metrics['ece']:.3f}",
        *_clean_line(metrics["clean"]),
        f"{'class':<16}{'precision':>10}{'recall':>8}{'F1':>8}{'AUROC':>8}{'images':>8}",
    ]
    lines += [
        f"{label:<16}{_number(row['precision']):>10}{_number(row['recall']):>8}{_number(row['f1']):>8}"
        f"{_number(row['auroc']):>8}{row['support']:>8}"
        for label, row in metrics["per_class"].items()
    ]
    return "\n".join(lines)


def _clean_line(clean: Mapping[str, Any] | None) -> list[str]:
    if clean is None:
        return []
    told = f"clean, with no twin among the images it was trained or validated with: {clean['n']} images"
    if not clean["n"]:
        return [told]
    intervals = {name: "{:.3f} to {:.3f}".format(*clean["bootstrap_ci95"][name]) for name in ("accuracy", "macro_f1")}
    return [
        f"{told}: accuracy {clean['accuracy']:.3f} ({intervals['accuracy']})  "
        f"macro-F1 {clean['macro_f1']:.3f} ({intervals['macro_f1']})"
    ]


def model_card_of(manifest: Manifest, metrics: Mapping[str, Any]) -> str:
    """MODEL_CARD.md of a model that was just trained."""
    training = {
        key: str(value) for key, value in manifest.training.items() if key not in {"data", "out", "storage", "mlflow"}
    }
    return model_card(
        model_id=manifest.model_id,
        classes=manifest.classes,
        metrics=metrics,
        evaluated_on=str(metrics["measured_on"]),
        counts=manifest.data["counts"],
        details=model_facts(manifest),
        training=training,
        audited=metrics["clean"] is not None,
        patient_ids=bool(manifest.data["patient_ids"]),
        limits=list(_leak_limit(metrics)),
    )


def _leak_limit(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What the model card says of test images that were learnt from."""
    clean = metrics["clean"]
    if clean is None or clean["n"] == metrics["n"]:
        return
    said = f"{metrics['n'] - clean['n']} of the {metrics['n']} images show an image that the model learnt from"
    if clean["n"]:
        low, high = clean["bootstrap_ci95"]["accuracy"]
        said += f"; on the other {clean['n']} its accuracy is {clean['accuracy']:.3f} ({low:.3f} to {high:.3f})"
    yield said + ". Figures over all images partly measure memory."


def model_facts(manifest: Manifest) -> dict[str, str]:
    """What identifies a model, for a reader."""
    return {
        "Model": manifest.model_id,
        "Classes": ", ".join(manifest.classes),
        "Architecture": manifest.network.architecture,
        "Trained": manifest.created_at,
        **_epochs_fact(manifest.data),
        "Data fingerprint": str(manifest.data.get("fingerprint", "")),
        "Temperature": f"{manifest.calibration.temperature:.3f}",
        "Versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }


def _epochs_fact(data: Mapping[str, Any]) -> dict[str, str]:
    """How long training really took; bundles of before do not say."""
    if "epochs" not in data:
        return {}
    said = f"{data['epochs']}, of which number {data['best_epoch']} was the best"
    return {"Epochs": said + (f"; then {data['refit_epochs']} on all images" if data["refit_epochs"] else "")}


def predictions_csv(bundle: Bundle, table: pa.Table, scores: Scores) -> bytes:
    """Return predictions.csv, one line per frame: URI, true label, and the fields of the answer."""
    uris, labels = table["uri"].to_pylist(), table["label"].to_pylist()
    places = [Place(row) for row in scores.row.tolist()]
    predictions = interpret(scores.answers, places, bundle.manifest, bundle.ood)
    header = ["predicted" if title == "label" else title for title in csv_header(bundle.manifest.classes)]
    lines = [(uris[said.index], labels[said.index], *csv_cells(said)) for said in predictions]
    return as_csv(("uri", "label", *header), lines)


def _labelled(bundle: Bundle, table: pa.Table, scores: Scores) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Label numbers [n] and calibrated probabilities [n, classes] of all scored frames."""
    classes = bundle.manifest.classes
    number = {label: index for index, label in enumerate(classes)}
    of_row = np.array([number[label] for label in table["label"].to_pylist()], np.int64)
    return of_row[scores.row], Classifier.calibrated(scores.answers.logits, bundle.manifest.calibration.temperature)


def _draw_errors(
    manifest: Manifest,
    table: pa.Table,
    scores: Scores,
    labels: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float32],
) -> bytes:
    """The surest errors, as the network saw them; a scan of several frames shows its first."""
    chosen = worst_errors(labels, probabilities, _SHOWN_ERRORS)
    uris = [table["uri"][int(scores.row[index])].as_py() for index in chosen]
    pictures = FrameSource(manifest.preprocess).from_uris(uris)
    kept = [
        (index, uri, found[0])
        for index, uri, found in zip(chosen, uris, pictures, strict=True)
        if not isinstance(found, Rejection)
    ]
    answers = probabilities.argmax(1)
    size = manifest.preprocess.size
    return plots.error_grid(
        np.stack([frame for _, _, frame in kept]) if kept else np.zeros((0, size, size), np.uint8),
        [manifest.classes[labels[index]] for index, _, _ in kept],
        [manifest.classes[answers[index]] for index, _, _ in kept],
        [float(probabilities[index].max()) for index, _, _ in kept],
        [storage.name(uri) for _, uri, _ in kept],
        errors=int((answers != labels).sum()),
        images=len(labels),
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
