"""Optimiser, schedule, loss, mixup and weight averaging: how one training step changes the network."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from btray.model.network import Network
from btray.training.config import OptimiserConfig

Indices = npt.NDArray[np.int64]

# The layers from input to output count as this many steps of `layer_decay`, into however many parts a network is cut:
# the setting means the same for a CNN of four stages and a DenseNet of twelve.
_DECAY_STEPS = 4

OUTLIER_WEIGHT = 0.5
"""Weight of an outlier in the loss, where an image of a class weighs 1 on average, as in that paper."""


def make_optimiser(network: Network, config: OptimiserConfig, *, fine_tune: bool) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over groups of parameters.

    Norms and biases, which have one dimension, do not decay (He et al. 2019, arXiv:1812.01187). With `fine_tune` rates
    fall towards the input, whose filters transfer best (Howard & Ruder 2018, arXiv:1801.06146). Each group's `share` is
    its part of the scheduled learning rate.
    """
    last = len(network.parts) - 1
    groups = []
    for index, part in enumerate([*network.parts, network.head]):
        distance = _DECAY_STEPS * (last - index) / max(last, 1) + 1 if index <= last else 0
        share = config.layer_decay**distance if fine_tune else 1.0
        for decays, weight_decay in ((True, config.weight_decay), (False, 0.0)):
            chosen = [parameter for parameter in part.parameters() if (parameter.ndim > 1) == decays]
            if chosen:
                groups.append({"params": chosen, "weight_decay": weight_decay, "share": share})
    # One kernel for all parameters of a GPU. Its counters of steps lie there too, so that none is copied.
    fused = network.head.weight.device.type == "cuda"
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused or None)


def learning_rate(step: float, total: int, config: OptimiserConfig) -> float:
    """Return the learning rate of `step` (from 0) out of `total`: linear warm-up, then cosine or constant.

    A run that continued with a batch of another size is between two steps.

    Warm-up: Goyal et al. 2017, arXiv:1706.02677; cosine: Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts.
    """
    warmup = round(total * config.warmup)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup  # + 1: a first step at rate 0 would be wasted
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_learning_rate + (1.0 - config.final_learning_rate) * cosine)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group its share of `rate`."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["share"]


def freeze(network: Network, parts: int) -> None:
    """Let all but the first `parts` parts learn; batch statistics of frozen parts stay as they are."""
    for index, part in enumerate(network.parts):
        part.requires_grad_(index >= parts)
        part.train(index >= parts)


def sample_weights(labels: Indices, sources: Indices, config: OptimiserConfig) -> npt.NDArray[np.float32]:
    """Weigh n training samples by how rare their class is, and their source within it, float32 [n].

    The total weights of classes are in proportion to count ** (1 - class_power): with 1, all contribute the same (King
    & Zeng 2001, Logistic Regression in Rare Events Data, doi:10.1093/oxfordjournals.pan.a004868). So are those of the
    sources of a class. The mean over all samples with a class is 1; outliers, labelled -1, weigh OUTLIER_WEIGHT.
    """
    weights, known = np.full(len(labels), OUTLIER_WEIGHT, np.float32), labels >= 0
    labels, strata = labels[known], labels[known] * (sources.max(initial=0) + 1) + sources[known]
    in_class = np.bincount(strata)[strata] ** -config.source_power
    in_class /= np.bincount(labels, in_class)[labels]
    balanced = in_class * np.bincount(labels)[labels] ** (1.0 - config.class_power)
    weights[known] = balanced / balanced.mean()
    return weights


def soft_targets(labels: Tensor, classes: int, config: OptimiserConfig) -> Tensor:
    """Return one-hot targets [n, classes] with label smoothing (Szegedy et al. 2016, arXiv:1512.00567).

    Those of outliers, whose label is -1, are uniform (Hendrycks et al. 2019, Outlier Exposure, arXiv:1812.04606).
    """
    smoothing = config.label_smoothing
    # F.one_hot looks at the labels' values, and torch.where copies its number to the device.
    one_hot = (labels[:, None] == torch.arange(classes, device=labels.device)).float()
    return (one_hot * (1.0 - smoothing) + smoothing / classes).masked_fill(labels[:, None] < 0, 1.0 / classes)


def mix_up(
    images: Tensor, targets: Tensor, weights: Tensor, alpha: float, seed: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Blend each sample with one from the other end of the batch by a share from Beta(alpha, alpha).

    Zhang et al. 2018, arXiv:1710.09412. The share is drawn once for the batch, from `seed`; the larger part stays each
    sample's own, which changes nothing but which of the two gives its place. Targets are blended by their weights too,
    so that each counts for as much as without: the loss is the blend of two weighted losses.
    """
    drawn = float(np.random.default_rng(seed).beta(alpha, alpha))
    share = max(drawn, 1.0 - drawn)
    images, weighted, weights = (
        share * tensor + (1.0 - share) * tensor.flip(0) for tensor in (images, targets * weights[:, None], weights)
    )
    return images, weighted / weights.clamp(min=1e-12)[:, None], weights


def weighted_losses(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum each sample's cross-entropy against soft `targets` [n, classes], times its weight [n], over the batch.

    In float32 whatever the logits are: bf16 has eight bits of mantissa.
    """
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


class Average:
    """The exponential moving average of a network's weights and batch statistics.

    Evaluating the average is worth a lower learning rate at the end (Polyak & Juditsky 1992; Tarvainen & Valpola 2017,
    arXiv:1703.01780). Its decay rises from 0.1 to `decay` over the first steps, as in TensorFlow's
    ExponentialMovingAverage, so that the average of a short run is not dominated by its random start.

    torch's AveragedModel copies its counter to the device in every update; this one counts on the host.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(network)
        self._decay, self._steps = decay, 0
        # Ours and the network's, in one order, for one kernel over all of them.
        both = [[*module.parameters(), *module.buffers()] for module in (self.module, network)]
        self._averaged = [[tensor.detach() for tensor in tensors if tensor.is_floating_point()] for tensors in both]
        self._counters = [[tensor for tensor in tensors if not tensor.is_floating_point()] for tensors in both]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the network after one more of its steps; the first one is taken over as it is."""
        decay = min(self._decay, (1.0 + self._steps) / (10.0 + self._steps)) if self._steps else 0.0
        get_ema_multi_avg_fn(decay)(*self._averaged, self._steps)
        ours, theirs = self._counters
        if ours:
            torch._foreach_copy_(ours, theirs)
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged tensors and the counter of steps, named as in torch's AveragedModel."""
        tensors = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        return {"n_averaged": torch.tensor(self._steps), **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._steps = int(state["n_averaged"])
        tensors = {name.removeprefix("module."): value for name, value in state.items() if name != "n_averaged"}
        self.module.load_state_dict(tensors)
