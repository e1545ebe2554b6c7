"""Measure how far confidence can be trusted at a source that nothing was learnt from, by how it was calibrated.

python benchmarks/unseen.py --runs runs/recipes

`runs` is what `benchmarks/recipes.py` left of the rows default and `without SOURCE`, of two sources at least. Each
network without a source answers the images of that source. The expected calibration error of these answers is printed
with two temperatures: by patients, that of the default row, which is fitted on held-out patients of sources that it
knows (as `--validate-by patients` and `folds` do); and by sources, fitted on what the networks without each of the
*other* sources say of these (as `--validate-by sources` does), so that the source itself has no part in it. The default
row's own held-out patients show what the second costs where the source is known.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from btray.data.frames import FrameSource, Rejection
from btray.evaluation.metrics import fit_temperature, reliability
from btray.model.bundle import load_bundle
from btray.model.classifier import Classifier


@dataclass(frozen=True)
class Answers:
    """A network's answers to n images that were held out of its training."""

    left_out: str
    """The source that nothing was learnt from; empty: patients of all sources."""
    seed: int
    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    temperature: float
    """As its bundle has it."""

    def ece(self, temperature: float) -> float:
        return reliability(self.labels, Classifier.calibrated(self.logits, temperature)).ece


def main() -> None:
    """Print one JSON object for each network without a source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, type=Path, help="folder of bundles of benchmarks/recipes.py")
    answers = [_answers(run) for run in sorted(parser.parse_args().runs.iterdir()) if _is_measured(run)]
    known, unseen = ([one for one in answers if bool(one.left_out) == left_out] for left_out in (False, True))
    if not known or len({one.left_out for one in unseen}) < 2:
        parser.error("--runs: give a folder with the rows default and `without SOURCE` of two sources at least")
    by_patients = float(np.mean([one.temperature for one in known]))
    for one in [*known, *unseen]:
        others = [other for other in unseen if other.left_out != one.left_out]
        logits, labels = (np.concatenate([getattr(other, name) for other in others]) for name in ("logits", "labels"))
        by_sources = fit_temperature(logits, labels)
        figures = {
            "without": one.left_out,
            "seed": one.seed,
            "images": len(one.labels),
            "accuracy": round(float((one.logits.argmax(1) == one.labels).mean()), 3),
            "temperature_by_patients": round(by_patients, 2),
            "ece_by_patients": round(one.ece(by_patients), 3),
            "temperature_by_sources": round(by_sources, 2),
            "ece_by_sources": round(one.ece(by_sources), 3),
        }
        print(json.dumps(figures), flush=True)


def _is_measured(run: Path) -> bool:
    return run.name.startswith(("default-", "without-")) and (run / "model" / "metrics.json").exists()


def _answers(run: Path) -> Answers:
    bundle, table = load_bundle(str(run / "model")), pq.read_table(run / "data.parquet")
    classes = bundle.manifest.classes
    held = pc.and_(pc.equal(table["split"], "val"), pc.is_in(table["label"], pa.array(classes)))
    table = table.filter(held)
    frames = FrameSource(bundle.manifest.preprocess).from_uris(table["uri"].to_pylist())
    readable = {number: frame[0] for number, frame in enumerate(frames) if not isinstance(frame, Rejection)}
    labels = [classes.index(label) for label in table["label"].take([*readable]).to_pylist()]
    logits = Classifier(bundle).answer(np.stack([*readable.values()])).logits
    sources = set(table["source"].to_pylist())
    (left_out,) = sources if run.name.startswith("without-") else ("",)
    seed = int(run.name.rpartition("-")[2])
    return Answers(left_out, seed, logits, np.array(labels), bundle.manifest.calibration.temperature)


if __name__ == "__main__":
    main()
