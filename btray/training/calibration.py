"""What a model knows of its own limits, learnt from validation images: temperature, thresholds, what training saw."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from btray.evaluation.metrics import fit_temperature
from btray.evaluation.scoring import Scores
from btray.model.abstention import NEVER, conformal_threshold, threshold_for_accuracy
from btray.model.bundle import Bundle, Thresholds
from btray.model.classifier import Classifier, interpret
from btray.model.drift import Profile
from btray.model.ood import FLAGGED, Distribution, Features
from btray.model.prediction import Place
from btray.training.config import TrainConfig

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What turns logits and features into probabilities and marks."""

    temperature: float = 1.0
    thresholds: Thresholds = field(default_factory=Thresholds)
    ood: Distribution | None = None


def choose_limits(
    config: TrainConfig, validation: Scores, labels: npt.NDArray[np.int64], reference: Features
) -> Limits:
    """Fit temperature and thresholds on scored validation frames (`labels` int [n]).

    `reference` are features [m, features] of training images. Without a readable validation frame nothing is chosen but
    what the user chose: --abstain-below.
    """
    ood = Distribution.fit(reference) if len(reference) else None
    if len(labels) == 0:
        return Limits(thresholds=Thresholds(abstain_below=config.abstain_below), ood=ood)
    temperature = fit_temperature(validation.answers.logits, labels)
    probabilities = Classifier.calibrated(validation.answers.logits, temperature)
    abstain_below = config.abstain_below
    if config.abstain_target is not None:
        abstain_below = threshold_for_accuracy(labels, probabilities, config.abstain_target)
        if abstain_below == NEVER:
            _log.warning(
                "no confidence gives an accuracy of %s on the validation images: the model will abstain from "
                "everything; lower --abstain-target",
                config.abstain_target,
            )
    error = config.conformal_error
    thresholds = Thresholds(
        abstain_below=abstain_below,
        ood_score=_ood_threshold(ood, validation.answers.features),
        conformal=None if error is None else conformal_threshold(labels, probabilities, error),
        conformal_error=error,
    )
    return Limits(temperature, thresholds, ood)


def profile_of(bundle: Bundle, scores: Scores) -> Profile:
    """What a bundle says of scored frames: what later answers are compared with."""
    places = [Place(row) for row in scores.row.tolist()]
    return Profile.of(map(vars, interpret(scores.answers, places, bundle.manifest, bundle.ood)))


def _ood_threshold(ood: Distribution | None, features: Features) -> float | None:
    """The score that a share `FLAGGED` of the validation frames, features [n, features], passes."""
    return None if ood is None else float(np.quantile(ood.scores(features), 1 - FLAGGED))
