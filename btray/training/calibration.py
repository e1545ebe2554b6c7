"""Calibration on validation images: the temperature of confidences, and the thresholds that mark doubtful answers."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np

from btray.evaluation.metrics import fit_temperature
from btray.evaluation.scoring import Scores
from btray.model.abstention import NEVER, conformal_threshold, threshold_for_accuracy
from btray.model.classifier import Classifier
from btray.model.manifest import StudyRule, Thresholds
from btray.model.ood import FLAGGED, Distribution
from btray.model.studies import choose_rule
from btray.training.config import TrainConfig
from btray.training.plan import Indices

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What turns logits and features into probabilities and marks, and those of frames into those of studies."""

    temperature: float = 1.0
    thresholds: Thresholds = field(default_factory=Thresholds)
    ood: Distribution | None = None
    """Of the features of training images."""
    study_rule: StudyRule | None = None


def calibrate(
    config: TrainConfig, validation: Scores, labels: Indices, *, classes: tuple[str, ...], subjects: Indices
) -> Limits:
    """Fit temperature (Guo et al. 2017, arXiv:1706.04599), thresholds and study rule on scored validation frames.

    They may be answers of several networks, to different frames each, since only logits and scores are looked at.

    Without a readable validation frame nothing is fitted, and --abstain-below holds as it is given.

    Args:
        config: which thresholds to fit, and for what accuracy and error rate.
        validation: scores of n frames that the network has not learnt from.
        labels: their labels, [n].
        classes: the labels' names.
        subjects: numbers of the patients that they show, [n].
    """
    if len(labels) == 0:
        return Limits(thresholds=Thresholds(abstain_below=config.abstain_below))
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
    ood_scores = validation.ood_scores
    ood_score = None if ood_scores is None else float(np.quantile(ood_scores, 1 - FLAGGED))
    thresholds = Thresholds(
        abstain_below=abstain_below,
        ood_score=ood_score,
        conformal=None if error is None else conformal_threshold(labels, probabilities, error),
        conformal_error=error,
    )
    return Limits(temperature, thresholds, study_rule=choose_rule(subjects, labels, probabilities, classes))
