"""What one training step is made of: schedule, class weights, mixup, weight averaging, parameter groups."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from btray.model.config import NetworkConfig
from btray.model.network import build_network
from btray.training.config import OptimiserConfig
from btray.training.optimizer import (
    OUTLIER_WEIGHT,
    Average,
    freeze,
    learning_rate,
    make_optimiser,
    mix_up,
    sample_weights,
    set_learning_rate,
    soft_targets,
    weighted_losses,
)

SMALL = NetworkConfig(stem_width=8, widths=(8, 16, 24), depths=(1, 2, 1))


def rates(total: int, **settings: Any) -> list[float]:
    return [learning_rate(step, total, OptimiserConfig(**settings)) for step in range(total)]


def test_schedule_rises_in_equal_steps_to_its_peak_and_falls_to_its_final_share() -> None:
    course = rates(1000, learning_rate=0.4, warmup=0.1, final_learning_rate=0.05)
    assert course[0] > 0
    assert np.allclose(np.diff(course[:100]), 0.4 / 100)
    assert max(course) == course[99] == pytest.approx(0.4)
    assert all(np.diff(course[100:]) < 0)
    assert course[-1] == pytest.approx(0.4 * 0.05, rel=1e-3)
    assert course[550] == pytest.approx(0.4 * (1 + 0.05) / 2, rel=1e-3)  # half-way down half-way through


@given(
    total=st.integers(1, 50),
    warmup=st.floats(0, 0.99),
    schedule=st.sampled_from(["cosine", "constant"]),
    final=st.floats(0, 1),
)
def test_any_schedule_stays_between_zero_and_its_peak(total: int, warmup: float, schedule: str, final: float) -> None:
    course = rates(total, learning_rate=0.1, warmup=warmup, schedule=schedule, final_learning_rate=final)
    assert all(0 < rate <= 0.1 * (1 + 1e-9) for rate in course)


def test_constant_schedule_keeps_its_peak_after_warm_up() -> None:
    assert set(rates(40, learning_rate=0.1, warmup=0.25, schedule="constant")[9:]) == {0.1}


@given(counts=st.lists(st.integers(1, 300), min_size=2, max_size=6))
def test_weights_are_one_on_average_and_with_power_one_equal_over_classes(counts: list[int]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    config = OptimiserConfig(class_power=1.0, source_power=0.0)
    weights = sample_weights(labels, np.zeros(len(labels), np.int64), config).astype(np.float64)
    assert weights.mean() == pytest.approx(1.0, rel=1e-5)
    assert np.bincount(labels, weights) == pytest.approx(np.full(len(counts), len(labels) / len(counts)), rel=1e-5)


@given(
    strata=st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 3)), max_size=200).map(lambda some: [(0, 0), *some]),
    class_power=st.sampled_from((0.0, 0.5, 1.0)),
    source_power=st.sampled_from((0.0, 0.5, 1.0)),
)
def test_weights_lift_what_is_rare_in_its_class_and_outliers_weigh_the_same(
    strata: list[tuple[int, int]], class_power: float, source_power: float
) -> None:
    labels, sources = np.array(strata, np.int64).T
    config = OptimiserConfig(class_power=class_power, source_power=source_power)
    weights = sample_weights(labels, sources, config).astype(np.float64)
    assert (weights > 0).all()
    assert len(weights) == len(strata)
    assert set(weights[labels < 0]) <= {OUTLIER_WEIGHT}
    for label in set(labels[labels >= 0]):
        inside = labels == label
        share = inside.sum() ** (1 - class_power)
        total = sum((labels == other).sum() ** (1 - class_power) for other in set(labels[labels >= 0]))
        assert weights[inside].sum() == pytest.approx(share / total * (labels >= 0).sum(), rel=1e-4)
        counts = {source: (inside & (sources == source)).sum() for source in set(sources[inside])}
        for source, count in counts.items():
            part = count ** (1 - source_power) / sum(number ** (1 - source_power) for number in counts.values())
            found = weights[inside & (sources == source)].sum() / weights[inside].sum()
            assert found == pytest.approx(part, rel=1e-4)


def test_weighted_losses_are_torchs_cross_entropy_with_weights_and_smoothing_by_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(20, 4, generator=generator), torch.randint(0, 4, (20,), generator=generator)
    config = OptimiserConfig(label_smoothing=0.1)
    ones = torch.ones(20)
    ours = weighted_losses(logits, soft_targets(labels, 4, config), ones)
    assert ours.item() == pytest.approx(F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1).item())
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0])
    hard = soft_targets(labels, 4, OptimiserConfig(label_smoothing=0))
    weighted = weighted_losses(logits, hard, weights[labels])
    assert weighted.item() == pytest.approx(F.cross_entropy(logits, labels, weights, reduction="sum").item())


@given(seed=st.integers(0, 10_000), alpha=st.floats(0.05, 4), n=st.integers(1, 9))
def test_mixup_keeps_totals_and_each_samples_own_larger_share(seed: int, alpha: float, n: int) -> None:
    images, targets = torch.arange(float(n)).view(n, 1, 1, 1), torch.eye(n)
    weights = torch.linspace(1, 2, n)
    mixed = mix_up(images, targets, weights, alpha, [seed, 3])
    for before, after in zip((images, targets, weights), mixed, strict=True):
        assert after.shape == before.shape
    for before, after in ((images, mixed[0]), (weights, mixed[2])):
        assert after.sum().item() == pytest.approx(before.sum().item(), rel=1e-5, abs=1e-5)
    assert torch.allclose(mixed[1].sum(1), torch.ones(n))
    # each class keeps the weight that its images have, most of it in their own place
    in_loss = mixed[1] * mixed[2][:, None]
    assert torch.allclose(in_loss.sum(0), weights)
    assert (in_loss.diagonal() >= 0.5 * weights - 1e-6).all()
    assert torch.equal(mixed[0], mix_up(images, targets, weights, alpha, [seed, 3])[0])


@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.0, 0.0]])
def test_mixup_teaches_nothing_of_an_image_that_does_not_count(weights: list[float]) -> None:
    _, targets, mixed = mix_up(torch.ones(2, 1, 2, 2), torch.eye(2), torch.tensor(weights), 0.4, [0, 0])
    assert (targets * mixed[:, None]).sum(0).tolist() == pytest.approx(weights)
    assert targets[:, 1].tolist() == [0.0, 0.0]


def test_mixup_draws_anew_for_every_step() -> None:
    images, targets, weights = torch.rand(2, 1, 4, 4), torch.eye(2), torch.ones(2)
    shares = {
        mix_up(images, targets, weights, 0.4, [0, epoch, step])[1][0, 0].item() for epoch in (0, 1) for step in (0, 1)
    }
    assert len(shares) == 4


def test_average_of_weights_that_stay_is_those_weights() -> None:
    network = build_network(SMALL, 3)
    average = Average(network, 0.99)
    for _ in range(50):
        average.update()
    for name, value in network.state_dict().items():
        assert torch.equal(average.module.state_dict()[name], value), name


def test_average_forgets_its_random_start_within_a_short_run_and_follows_slowly_in_a_long_one() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = Average(model, 0.99)
    distances = []
    nn.init.constant_(model.weight, 0.0)
    average.update()
    nn.init.constant_(model.weight, 1.0)
    for _ in range(2000):
        average.update()
        distances.append(1.0 - average.module.get_parameter("weight").item())
    assert distances[9] < 0.001  # after ten steps the start is gone
    assert all(later <= earlier for earlier, later in itertools.pairwise(distances))
    nn.init.constant_(model.weight, 2.0)
    average.update()
    assert average.module.get_parameter("weight").item() == pytest.approx(
        1.01, abs=1e-3
    )  # now each step counts a hundredth


def test_average_takes_batch_statistics_and_counters_along() -> None:
    network = build_network(SMALL, 3)
    average = Average(network, 0.5)
    for _ in range(30):
        network(torch.randn(4, 1, 32, 32) + 3.0)
        average.update()
    ours, theirs = average.module.state_dict(), network.state_dict()
    counter = "parts.0.0.1.num_batches_tracked"
    assert ours[counter] == theirs[counter] == 30
    assert ours["parts.0.0.1.running_mean"].abs().sum() > 0


def test_every_parameter_is_optimised_once_and_norms_and_biases_do_not_decay() -> None:
    network = build_network(SMALL, 3)
    groups = make_optimiser(network, OptimiserConfig(weight_decay=0.1), fine_tune=False).param_groups
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in network.parameters())
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            exempt = name == "bias" or isinstance(module, nn.BatchNorm2d | nn.GroupNorm)
            assert decay[id(parameter)] == (0.0 if exempt else 0.1), (module, name)
    assert {group["share"] for group in groups} == {1.0}


@pytest.mark.parametrize("architecture", ["mobile_cnn", "cnn", "resnet18", "densenet121"])
def test_fine_tuning_learns_slower_the_nearer_a_layer_is_to_the_input(architecture: str) -> None:
    network = build_network(SMALL.model_copy(update={"architecture": architecture}), 3)
    optimiser = make_optimiser(network, OptimiserConfig(layer_decay=0.5), fine_tune=True)
    set_learning_rate(optimiser, 0.1)
    rate = {id(parameter): group["lr"] for group in optimiser.param_groups for parameter in group["params"]}
    of_part = [{rate[id(parameter)] for parameter in part.parameters()} for part in [*network.parts, network.head]]
    course = [only for rates_of_one in of_part if rates_of_one for only in rates_of_one]
    assert all(len(rates_of_one) <= 1 for rates_of_one in of_part)
    assert all(nearer < farther for nearer, farther in itertools.pairwise(course))
    assert course[-1] == pytest.approx(0.1)  # the head
    assert course[0] == pytest.approx(0.1 * 0.5**5)  # however many parts the network is cut into


def test_a_frozen_body_keeps_weights_and_batch_statistics_and_thaws_whole() -> None:
    network = build_network(SMALL, 3).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimiser = make_optimiser(network, OptimiserConfig(learning_rate=0.1), fine_tune=True)

    def step() -> set[str]:
        optimiser.zero_grad()
        network(torch.randn(4, 1, 32, 32)).square().sum().backward()
        optimiser.step()
        return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}

    freeze(network, len(network.parts))
    assert step() == {"head.weight", "head.bias"}
    freeze(network, 1)
    assert step() == {name for name in before if not name.startswith("parts.0.")}
    freeze(network, 0)
    assert step() == set(before)
