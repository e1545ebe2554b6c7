"""What validation says is what unseen patients and unseen sources then give, where a random split is far too high.

Patients, sources and their slices are planted, and the classifier is the nearest neighbour: it remembers everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

from btray.data.fingerprint import LENGTH, VIEWS, Fingerprints
from btray.data.splits import hold_out, k_folds, leave_out_sources

CLASSES = ("glioma", "meningioma", "no_tumor", "pituitary")
PATIENTS, SLICES = 18, 8
"""Of each class so many patients in each source, with so many files each whose numbers follow one another."""

Floats = npt.NDArray[np.float64]


def planted(random: np.random.Generator, name: str, *, named: bool) -> tuple[pa.Table, Floats]:
    """Draw a source: slices [n, 24], each a mean of its class, changed in this source, its patient's own, and noise."""
    means = 1.2 * np.random.default_rng(0).normal(size=(4, 24)) + 1.1 * random.normal(size=(4, 24))
    label = np.repeat(np.arange(4), PATIENTS * SLICES)
    patient = np.repeat(np.arange(4 * PATIENTS), SLICES)
    of_patient = 2.4 * random.normal(size=(4 * PATIENTS, 24))
    slices = means[label] + of_patient[patient] + 0.3 * random.normal(size=(len(label), 24))
    files = np.arange(len(label)) % (PATIENTS * SLICES)
    columns = {
        "uri": [f"/{name}/{CLASSES[kind]}/im ({number}).jpg" for kind, number in zip(label, files, strict=True)],
        "label": [CLASSES[kind] for kind in label],
        "patient_id": pa.array([str(one) if named else None for one in patient], pa.string()),
        "source": [name] * len(label),
    }
    return pa.table(columns), slices


def as_prints(slices: Floats) -> Fingerprints:
    """Slices as fingerprints: as near to each other as they are alike."""
    prints = np.zeros((len(slices), VIEWS, LENGTH), np.float16)
    prints[:, :, : slices.shape[1]] = 0.05 * slices[:, None]
    return prints


def macro_f1(table: pa.Table, slices: Floats, learnt: npt.NDArray[np.bool_], tested: npt.NDArray[np.bool_]) -> float:
    labels = np.array(table["label"].to_pylist())
    nearest = KNeighborsClassifier(1).fit(slices[learnt], labels[learnt])
    return float(f1_score(labels[tested], nearest.predict(slices[tested]), average="macro"))


def mean_macro_f1(table: pa.Table, slices: Floats, parts: Sequence[npt.NDArray[np.bool_]]) -> float:
    return float(np.mean([macro_f1(table, slices, ~part, part) for part in parts]))


@pytest.mark.parametrize("named", [True, False])
def test_grouped_validation_predicts_new_patients_and_a_random_split_does_not(named: bool) -> None:
    figures = []
    for seed in range(4):
        table, slices = planted(np.random.default_rng([seed, named]), "a", named=named)
        new = np.arange(len(table)) // SLICES % PATIENTS < 4  # the first patients of each class
        known, prints = table.filter(pa.array(~new)), as_prints(slices[~new])
        folds = k_folds(known, k=3, seed=seed, prints=prints)
        held = hold_out(known, fraction=0.3, seed=seed, prints=prints)
        at_random = np.random.default_rng(seed).integers(0, 3, len(known))
        figures.append([
            macro_f1(table, slices, ~new, new),
            mean_macro_f1(known, slices[~new], [folds == fold for fold in range(3)]),
            macro_f1(known, slices[~new], ~held, held),
            mean_macro_f1(known, slices[~new], [at_random == fold for fold in range(3)]),
        ])  # fmt: skip
    truth, grouped, once, scattered = np.mean(figures, axis=0)
    assert grouped == pytest.approx(truth, abs=0.08)
    assert once == pytest.approx(truth, abs=0.08)
    assert scattered > truth + 0.2


def test_leaving_sources_out_predicts_a_source_that_nobody_saw_and_patients_alone_do_not() -> None:
    figures = []
    for seed in range(2):
        random = np.random.default_rng(seed)
        drawn = [planted(random, name, named=True) for name in "abcde"]
        table, slices = pa.concat_tables([part for part, _ in drawn]), np.concatenate([part for _, part in drawn])
        for name, unseen in leave_out_sources(table).items():
            known, rest = table.filter(pa.array(~unseen)), slices[~unseen]
            folds = k_folds(known, k=3, seed=seed, prints=None)
            figures.append([
                macro_f1(table, slices, ~unseen, unseen),
                mean_macro_f1(known, rest, list(leave_out_sources(known).values())),
                mean_macro_f1(known, rest, [folds == fold for fold in range(3)]),
            ])  # fmt: skip
            assert name not in leave_out_sources(known)
    truth, by_source, by_patient = np.mean(figures, axis=0)
    assert by_source == pytest.approx(truth, abs=0.05)
    assert by_patient > truth + 0.08
