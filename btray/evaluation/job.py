"""The evaluate job: measure a bundle on stored labelled scans and write what was measured."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from btray import storage
from btray.core.cluster import connected, require_gpus
from btray.core.console import ProgressLine
from btray.core.errors import UserError
from btray.data.labelled import read_labelled
from btray.data.labels import require_known_labels, require_label
from btray.data.rejections import (
    REJECTED,
    as_csv,
    enforce_max_rejected,
    rejections_csv,
    report_rejections,
    require_found,
)
from btray.evaluation.assessment import assess
from btray.evaluation.config import EvaluateConfig
from btray.evaluation.report import summary
from btray.evaluation.scoring import Scores, score
from btray.model.bundle import Bundle, load_bundle, read_fingerprints
from btray.model.classifier import interpret
from btray.model.prediction import csv_cells, csv_header
from btray.model.promotion import pinned
from btray.model.shipped import announce


def evaluate(config: EvaluateConfig) -> str:
    """Measure a bundle on the test split of `config.data`, or on all of it if it has none.

    Writes metrics.json, plots, report.html, predictions.csv, rejected.csv and config.yaml to `config.out`.

    Returns:
        The URI of that folder.

    Raises:
        UserError: the input is unusable.
        ThresholdExceeded: more than `max_rejected` of the images cannot be read; raised after all is written.
    """
    config = pinned(config)
    config.check()
    out = config.out
    bundle = load_bundle(config.model, model_id=config.model_id).abstaining_below(config.abstain_below)
    announce(config.model, bundle.manifest.model_id)
    chosen = (*config.classes, config.outliers) if config.classes and config.outliers else config.classes
    preprocess = bundle.manifest.preprocess
    table = read_labelled(config.data, classes=chosen, least_classes=1, preprocess=preprocess)
    split = "test" if "test" in table["split"].to_pylist() else None
    if split:
        table = table.filter(pc.equal(table["split"], split))
    labels, classes = set(table["label"].to_pylist()), bundle.manifest.classes
    require_label(config.outliers, labels, config.data)
    if config.outliers in classes:
        raise UserError(f"--outliers {config.outliers}: the model knows this class; leave --outliers out to measure it")
    require_known_labels(labels - {config.outliers}, classes, config.data)
    with connected(), ProgressLine(f"classifying {len(table)} images", keep=False):
        if config.use_gpu:
            require_gpus()
        scores = score(
            bundle, np.arange(len(table)), table["uri"], batch_size=config.batch_size, use_gpu=config.use_gpu
        )
    report_rejections(scores.rejected, table)
    # Before anything is measured: if not one image can be read, this list is all that tells why.
    storage.write_bytes(storage.join(out, REJECTED), rejections_csv(scores.rejected, table))
    require_found(scores.rejected["code"].to_pylist(), len(table), config.data)
    measured_on = f"the test split of {config.data}" if split else f"all of {config.data}"
    assessment = assess(bundle, table, scores, measured_on=measured_on, learnt_from=read_fingerprints(bundle))
    files = assessment.files | {
        "predictions.csv": predictions_csv(bundle, table, scores),
        "config.yaml": config.to_yaml().encode(),
    }
    for name, body in files.items():
        storage.write_bytes(storage.join(out, name), body)
    print(summary(assessment.metrics), flush=True)
    enforce_max_rejected(scores.rejected["code"].to_pylist(), len(table), config.max_rejected)
    return out


def predictions_csv(bundle: Bundle, table: pa.Table, scores: Scores) -> bytes:
    """Return predictions.csv, one line per frame: URI, true label, and the fields of the answer."""
    images = table.take(scores.row)
    predictions = interpret(scores.answers, bundle.manifest, bundle.ood)
    header = ["predicted" if title == "label" else title for title in csv_header(bundle.manifest.classes)]
    answers = zip(images["uri"].to_pylist(), images["label"].to_pylist(), predictions, strict=True)
    return as_csv(("uri", "label", *header), [(uri, label, *csv_cells(answer)) for uri, label, answer in answers])
