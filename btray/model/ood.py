"""Out of distribution: how unlike the training images an input is, from the means of the network's feature maps.

The score is a Mahalanobis distance to the training images (Lee et al. 2018, arXiv:1807.03888), of all classes together
and of the feature maps of all resolutions, with a shrunk covariance (Ledoit & Wolf 2004,
doi:10.1016/S0047-259X(03)00096-4). Its unit is the root mean square over the training images, so that these score
about 1. It comes from the same forward pass as the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Features = npt.NDArray[np.float32]

FLAGGED = 0.01
"""Share of the validation images whose score exceeds the threshold."""
REFERENCE_IMAGES = 2000
"""Most training images from which the distribution is estimated."""

# Directions in which the deviation is measured one by one; the rest share their mean. It bounds the bundle's size.
_DIRECTIONS = 256
# A channel that never fires has no deviation of its own.
_LEAST_DEVIATION = 1e-4


@dataclass(frozen=True)
class Distribution:
    """The training images' features, as a Gaussian of low rank."""

    mean: Features
    """[features]"""
    deviation: Features
    """[features], by which features are divided first."""
    directions: npt.NDArray[np.floating]
    """[features, directions], orthonormal; float16 in half precision."""
    variances: Features
    """[directions + 1]: variance along each direction, and of the rest."""

    @classmethod
    def fit(cls, features: Features) -> Self:
        """Estimate the distribution from features [n, features] of n >= 1 training images."""
        from sklearn.covariance import LedoitWolf  # heavy, and only training needs it

        mean, deviation = features.mean(0), np.maximum(features.std(0), _LEAST_DEVIATION)
        covariance = LedoitWolf(assume_centered=True).fit((features - mean) / deviation).covariance_
        variances, directions = np.linalg.eigh(covariance)
        # Largest first; rounding may leave an eigenvalue below 0.
        variances, directions = variances[::-1].clip(1e-6), directions[:, ::-1][:, :_DIRECTIONS]
        rest = variances[_DIRECTIONS:].mean() if len(variances) > _DIRECTIONS else variances[-1]
        kept = np.append(variances[:_DIRECTIONS], rest)
        fitted = cls(mean, deviation, directions.astype(np.float32), kept.astype(np.float32))
        # Shrinkage and dead channels make distances smaller, so the unit is measured on these very images.
        unit = float((fitted.scores(features).astype(np.float64) ** 2).mean())
        return replace(fitted, variances=fitted.variances * np.float32(unit)) if unit else fitted

    def scores(self, features: Features) -> npt.NDArray[np.float32]:
        """Return scores [n] of features [n, features]: 0 at the mean, about 1 for training images, more for others."""
        # In double precision: the sum of a few hundred squares must not depend on how a batch is summed.
        standard = (features.astype(np.float64) - self.mean) / self.deviation
        along = standard @ self.directions.astype(np.float64)
        rest = float(self.variances[-1])
        squares = (standard**2).sum(1) / rest + (along**2) @ (1 / self.variances[:-1] - 1 / rest)
        return np.sqrt(squares.clip(0) / features.shape[1]).astype(np.float32)

    def whitening(self) -> npt.NDArray[np.float64]:
        """Return [features, features]: the root mean square of `(features - mean) @ whitening` is the score."""
        directions, variances = self.directions.astype(np.float64), self.variances.astype(np.float64)
        rest = variances[-1] ** -0.5
        along = directions * (variances[:-1] ** -0.5 - rest) @ directions.T
        return (along + rest * np.eye(len(self.mean))) / self.deviation[:, None]

    def tensors(self) -> dict[str, Tensor]:
        """Return what a bundle keeps, by name."""
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in vars(self).items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Return the distribution of `tensors`. Raises KeyError if one is missing."""
        return cls(*[tensors[name].numpy() for name in ("mean", "deviation", "directions", "variances")])
