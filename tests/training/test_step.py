"""One training step: it waits for no device, and its gradients are those of the whole batch however it is computed."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from btray.model.network import build_network
from btray.training import optimizer
from btray.training.feeding.loader import LoadedBatch
from btray.training.plan import Plan
from btray.training.step import TrainingStep, shares_norms
from tests.helpers.one_worker import collectives, plan_of
from tests.helpers.training_helpers import NETWORK, OPTIMISER, PREPROCESS, tiny

CPU = torch.device("cpu")
# Stands for a GPU: its tensors have shapes and no values, so that a step that asked for one would fail.
AWAY = torch.device("meta")
SIZE = PREPROCESS.size


def plan_with(**changes: Any) -> Plan:
    return plan_of(tiny("d", "o", **changes), [0, 1, 2] * 8)


def batch_on(device: torch.device, n: int = 8, seed: int = 0, whole_weight: float | None = None) -> LoadedBatch:
    random = np.random.default_rng(seed)
    samples = torch.arange(n)
    return LoadedBatch(
        torch.from_numpy(random.integers(0, 256, (n, SIZE, SIZE), np.uint8)).to(device),
        torch.from_numpy(random.integers(-1, 3, n)).to(device),
        samples.to(device),
        torch.from_numpy(random.random(n, np.float32) + 0.5).to(device),
        whole_weight,
        samples,
    )


class Transfers(TorchDispatchMode):
    """Notes each operation that reads a value of a tensor away from the host, or moves one between it and the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        places = {one.device.type for one in tree_leaves([args, kwargs, out]) if isinstance(one, Tensor)}
        if name in ("_local_scalar_dense", "nonzero", "_unique2") and places != {"cpu"}:
            self.seen.append(name)
        if name in ("_to_copy", "copy_", "_foreach_copy_") and len(places) > 1:
            self.seen.append(name)
        return out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"network": {"norm": "batch", "dropout": 0.3}, "optimiser": {"mixup": 0.4}, "accumulate": 3},
        {"optimiser": {"class_balance": "none", "ema": 0.0}, "augment": {"enabled": False}},
    ],
    ids=["default", "all", "little"],
)
@pytest.mark.parametrize("known", [True, False], ids=["weights known", "weights summed"])
def test_a_step_reads_nothing_from_the_device_and_copies_nothing_there_but_its_batch(
    changes: dict[str, Any], known: bool
) -> None:
    step = TrainingStep(plan_with(**changes), AWAY, collectives())
    step.begin(0)
    with Transfers() as transfers:
        for index in range(3):
            batch = batch_on(AWAY, whole_weight=8.0 if known else None)
            assert transfers.seen == ["_to_copy"] * 4, "the batch"
            transfers.seen.clear()
            step(batch, epoch=0, index=index, rate=0.1)
            assert transfers.seen == []
    assert step.totals.device == AWAY
    with pytest.raises(RuntimeError, match="meta"):
        step.totals.tolist()  # this is how a look at a value would have ended


def test_on_a_gpu_all_weights_are_changed_by_fused_kernels_that_copy_no_counter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors of a GPU that is not there, as torch.compile uses them; their gradients are given."""
    with FakeTensorMode(), torch.device("cuda:0"):
        network = build_network(NETWORK.model_copy(update={"norm": "batch"}), 3)
        optimiser = optimizer.make_optimiser(network, OPTIMISER, fine_tune=False)
        # copying a tensor that has no memory gives one of another mode
        twin = build_network(NETWORK.model_copy(update={"norm": "batch"}), 3)
        monkeypatch.setattr(optimizer, "copy", SimpleNamespace(deepcopy=lambda _: twin))
        average = optimizer.Average(network, 0.9)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with Transfers() as transfers, Counted() as counted:
            for rate in (0.1, 0.2):
                optimizer.set_learning_rate(optimiser, rate)
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimiser.step()
                average.update()
    assert transfers.seen == []
    assert counted.calls["_fused_adamw_"] == 2 * len(optimiser.param_groups)
    assert counted.calls["_foreach_lerp_"] == 2
    assert counted.calls["_foreach_copy_"] == 2


class Counted(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def gradients(step: TrainingStep) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in step.network.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_gradients_added_up_in_parts_are_those_of_the_batch(parts: int) -> None:
    images = torch.randn(8, 1, SIZE, SIZE, dtype=torch.float64)
    targets, weights = torch.rand(8, 3, dtype=torch.float64).softmax(1), torch.rand(8, dtype=torch.float64)
    sums, losses = [], []
    for accumulate in (1, parts):
        step = TrainingStep(plan_with(accumulate=accumulate), CPU, collectives())
        step.network.double()
        step.begin(0)
        losses.append(step._accumulate(images, targets, weights, 0.25).item())
        sums.append(gradients(step))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in sums[0].items():
        torch.testing.assert_close(sums[1][name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_a_step_in_parts_ends_where_the_whole_one_does() -> None:
    ends = []
    for accumulate in (1, 4):
        step = TrainingStep(plan_with(accumulate=accumulate), CPU, collectives())
        step.begin(0)
        step(batch_on(CPU), epoch=0, index=0, rate=1e-3)
        ends.append(step.totals)
    torch.testing.assert_close(*ends)


def test_a_batch_of_samples_that_do_not_count_changes_no_gradient_and_is_not_counted() -> None:
    step = TrainingStep(plan_with(), CPU, collectives())
    step.begin(0)
    batch = batch_on(CPU)
    step(replace(batch, weights=torch.zeros(8)), epoch=0, index=0, rate=1e-3)
    assert step.totals.tolist() == [0.0, 0.0, 0.0]
    assert not any(gradient.any() for gradient in gradients(step).values())
    some = batch.weights * torch.tensor([1.0] * 5 + [0.0] * 3)
    step(replace(batch, weights=some), epoch=0, index=1, rate=1e-3)
    assert step.totals[2] == 5


@pytest.mark.parametrize(
    ("device", "workers", "images", "shared"),
    [("cuda", 8, 15, True), ("cuda", 8, 16, False), ("cuda", 1, 2, False), ("cpu", 8, 2, False)],
)
def test_gpus_share_batch_statistics_below_16_images(device: str, workers: int, images: int, shared: bool) -> None:
    assert shares_norms(torch.device(device), workers, images) == shared


def test_shared_norms_are_everywhere_and_have_the_names_of_those_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = TrainingStep(plan_with(network={"norm": "batch"}), AWAY, collectives())
    monkeypatch.setattr("btray.training.step.shares_norms", lambda *_: True)
    shared = TrainingStep(plan_with(network={"norm": "batch"}), AWAY, collectives())
    norms = [type(module) for module in shared.network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert set(norms) == {nn.SyncBatchNorm}
    assert list(shared.network.state_dict()) == list(alone.network.state_dict())
    optimised = {id(parameter) for group in shared.optimiser.param_groups for parameter in group["params"]}
    assert optimised == {id(parameter) for parameter in shared.network.parameters()}


def test_the_average_is_torchs_with_the_rising_decay_and_reads_and_writes_its_state() -> None:
    network = build_network(NETWORK.model_copy(update={"norm": "batch"}), 3)

    def as_before(averaged: Tensor, current: Tensor, steps: Tensor | int) -> Tensor:
        if not averaged.is_floating_point():
            return current
        return averaged.lerp(current, 1.0 - min(0.9, (1.0 + int(steps)) / (10.0 + int(steps))))

    ours, theirs = optimizer.Average(network, 0.9), AveragedModel(network, avg_fn=as_before, use_buffers=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        network(torch.randn(4, 1, SIZE, SIZE, generator=generator))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        ours.update()
        theirs.update_parameters(network)
        if number == 5:  # resumed
            state, ours = ours.state_dict(), optimizer.Average(network, 0.9)
            ours.load_state_dict(copy.deepcopy(state))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.soak, pytest.mark.timeout(600)])]
)
def test_a_compiled_network_learns_the_same(
    fresh_compiler: None, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("NO C++ COMPILER: what torch.compile computes is NOT shown here")
    compiled: list[nn.Module] = []

    def compile_network(network: nn.Module) -> None:
        compiled.append(network)
        network._compiled_call_impl = torch.compile(network._call_impl, backend=backend)

    monkeypatch.setattr(nn.Module, "compile", compile_network)
    totals, states = [], []
    for compile in (False, True):
        step = TrainingStep(plan_with(compile=compile, batch_size=8), CPU, collectives())
        step.begin(0)
        for index in range(3):
            step(batch_on(CPU, seed=index), epoch=0, index=index, rate=1e-3)
        totals.append(step.totals)
        states.append(step.state())
    assert len(compiled) == 1
    torch.testing.assert_close(*totals, rtol=1e-4, atol=1e-4)
    assert states[0]["network"] is not None
    assert states[1]["network"] is not None
    assert list(states[0]["network"]) == list(states[1]["network"])
