"""Calibration on validation images: the temperature of confidences, and the thresholds that mark doubtful answers."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np

from btray.evaluation.metrics import fit_temperature
from btray.evaluation.scoring import Scores
from btray.model.abstention import NEVER, conformal_threshold, threshold_for_accuracy
from btray.model.bundle import Bundle
from btray.model.classifier import Classifier, interpret
from btray.model.drift import Profile
from btray.model.manifest import Thresholds
from btray.model.ood import FLAGGED, Distribution, Features
from btray.training.config import TrainConfig
from btray.training.plan import Indices

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """The temperature and thresholds that turn logits and features into probabilities and marks."""

    temperature: float = 1.0
    thresholds: Thresholds = field(default_factory=Thresholds)
    ood: Distribution | None = None
    """Of the features of training images."""


def calibrate(config: TrainConfig, validation: Scores, labels: Indices, reference: Features) -> Limits:
    """Fit temperature (Guo et al. 2017, arXiv:1706.04599) and thresholds on scored validation frames.

    Without a readable validation frame nothing is fitted, and --abstain-below holds as it is given.

    Args:
        config: which thresholds to fit, and for what accuracy and error rate.
        validation: scores of n frames that the network has not learnt from.
        labels: their labels, [n].
        reference: features of training images, [m, features].
    """
    ood = Distribution.fit(reference) if len(reference) else None
    if len(labels) == 0:
        return Limits(thresholds=Thresholds(abstain_below=config.abstain_below), ood=ood)
    # First the temperature: thresholds are compared with calibrated probabilities.
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
    # The score that a share FLAGGED of these frames exceeds: so many ordinary images will be marked.
    ood_score = None if ood is None else float(np.quantile(ood.scores(validation.answers.features), 1 - FLAGGED))
    thresholds = Thresholds(
        abstain_below=abstain_below,
        ood_score=ood_score,
        conformal=None if error is None else conformal_threshold(labels, probabilities, error),
        conformal_error=error,
    )
    return Limits(temperature, thresholds, ood)


def profile_of(bundle: Bundle, scores: Scores) -> Profile:
    """Summarise a bundle's answers to scored frames: later answers are compared with this."""
    return Profile.of(map(vars, interpret(scores.answers, bundle.manifest, bundle.ood)))
