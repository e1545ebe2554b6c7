"""The networks: the default has its size, every described one learns, weights from elsewhere land where they belong."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from btray.core.errors import UserError
from btray.data.config import PreprocessConfig
from btray.model.config import BACKBONES, NetworkConfig
from btray.model.network import Network, build_network, count_flops, count_parameters, load_matching
from btray.training.config import IMAGENET
from btray.training.pretrained import read_initial_weights
from tests.helpers.tiny_bundle import NETWORK, random_bundle, saved_bundle

CONFIGS = st.integers(1, 3).flatmap(
    lambda stages: st.builds(
        NetworkConfig,
        stem_width=st.integers(1, 9),
        stem_stride=st.sampled_from((1, 2, 4)),
        widths=st.tuples(*[st.integers(1, 12)] * stages),
        depths=st.tuples(*[st.integers(1, 2)] * stages),
        kernel=st.sampled_from((3, 5, 7)),
        first_stride=st.sampled_from((1, 2)),
        norm=st.sampled_from(("batch", "group", "none")),
        activation=st.sampled_from(("relu", "gelu", "silu")),
        residual=st.booleans(),
        squeeze_excite=st.sampled_from((0.0, 0.1, 1.0)),
        pooling=st.sampled_from(("average", "max", "average_max")),
        dropout=st.sampled_from((0.0, 0.5)),
    )
)


def images(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


def test_the_default_has_less_than_three_million_parameters_and_half_a_gigaflop() -> None:
    network = build_network(NetworkConfig(), 5)
    assert 2e6 < count_parameters(network) < 3e6
    assert 0.3e9 < count_flops(network, PreprocessConfig().size) < 0.5e9
    assert network.training, "counting changed the mode"


def test_a_setting_of_the_family_means_the_family_and_dropout_is_for_all() -> None:
    assert NetworkConfig(dropout=0.1).architecture == "mobile_cnn"
    assert NetworkConfig(norm="group").architecture == "cnn"
    assert NetworkConfig(architecture="resnet18", norm="group").architecture == "resnet18"


def test_the_weights_of_imagenet_fill_the_default_but_for_its_head_and_see_edges() -> None:
    network = build_network(NetworkConfig(), 4)
    weights = read_initial_weights(IMAGENET, NetworkConfig(), 4)
    assert set(network.state_dict()) - set(load_matching(network, weights)) == {"head.weight", "head.bias"}
    flat, edge = torch.zeros(1, 1, 96, 96), torch.zeros(1, 1, 96, 96)
    edge[..., 48:] = 2.0
    stem = network.eval().parts[0]
    with torch.no_grad():
        along = [float(stem(picture)[..., 20:28, 20:28].std(-1).mean()) for picture in (flat, edge)]
    assert along[0] < 1e-6
    assert along[1] > 0.1


def test_a_mobile_network_in_autocast_gives_nearly_what_it_gives_in_float32() -> None:
    torch.manual_seed(0)
    network = build_network(NetworkConfig(dropout=0.0), 4).train()
    batch = images(4, 64)
    exact = network(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(batch)
    rounded.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=CONFIGS, classes=st.integers(2, 7), size=st.integers(32, 49))
def test_every_network_of_the_family_builds_and_back_propagates(config: NetworkConfig, classes: int, size: int) -> None:
    torch.manual_seed(0)
    network = build_network(config, classes)
    batch = images(3, size)
    logits = network(batch)
    assert logits.shape == (3, classes)
    nn.functional.cross_entropy(logits, torch.arange(3) % classes).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    network.eval()
    features = network.feature_map(batch)
    assert features.shape[:2] == (3, config.widths[-1])
    torch.testing.assert_close(network.head(network.embed(features)), network(batch))


@settings(max_examples=20, deadline=None)
@given(config=CONFIGS)
def test_a_config_describes_its_network_wholly(config: NetworkConfig) -> None:
    again = NetworkConfig.model_validate_json(config.model_dump_json())
    network, other = build_network(config, 3), build_network(again, 3)
    other.load_state_dict(network.state_dict())
    torch.testing.assert_close(network.eval()(images(2, 40)), other.eval()(images(2, 40)))


@pytest.mark.parametrize("norm", ["group", "none"])
def test_without_batch_norm_an_answer_does_not_depend_on_the_batch_in_training(norm: str) -> None:
    network = build_network(NetworkConfig(stem_width=8, widths=(8,), depths=(2,), norm=norm, dropout=0.0), 3).train()
    batch = images(4, 40)
    torch.testing.assert_close(network(batch)[:1], network(batch[:1]), atol=1e-5, rtol=1e-5)


def test_the_seed_decides_the_weights() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build_network(NETWORK, 3).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_signals_neither_die_nor_explode_at_the_start() -> None:
    for norm in ("batch", "group", "none"):
        torch.manual_seed(0)
        network = build_network(NetworkConfig(norm=norm), 5).eval()
        deviation = float(network.embed(network.feature_map(images(8, 96))).std())
        assert 1e-2 < deviation < 1e3, norm


@pytest.mark.parametrize(
    "changes", [{"widths": ()}, {"widths": (8, 8), "depths": (1,)}, {"widths": (0,)}, {"kernel": 4}]
)
def test_a_description_of_no_network_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NetworkConfig(**{"depths": (1,), "widths": (8,)} | changes)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_takes_one_channel_and_back_propagates(name: str) -> None:
    network = build_network(NetworkConfig(architecture=name), 4)
    nn.functional.cross_entropy(network(images(2, 64)), torch.tensor([0, 3])).backward()
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    assert first.in_channels == 1
    assert all(parameter.grad is not None for parameter in network.parameters())


def their_embedding(name: str, model: nn.Module, gray: Tensor) -> Tensor:
    """What torchvision's own model computes of a gray picture as three equal colours, averaged over the plane."""
    colour = gray.repeat(1, 3, 1, 1)
    if name.startswith("resnet"):
        body = nn.Sequential(*list(model.children())[:-2])
        return body(colour).mean((2, 3))
    features = model.features(colour)  # type: ignore[operator]
    return (features.relu() if name.startswith("densenet") else features).mean((2, 3))


@pytest.mark.parametrize("name", BACKBONES)
def test_torchvision_weights_land_where_they_belong_from_either_kind_of_file(name: str) -> None:
    torch.manual_seed(7)
    model = torchvision.models.get_model(name, weights=None).eval()
    for buffer in model.buffers():  # so that swapped norms show
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    state = model.state_dict()
    sorted_by_the_format = safetensors.torch.load(safetensors.torch.save(state))
    expected = their_embedding(name, model, images(1, 64))
    for weights in (state, sorted_by_the_format):
        network = build_network(NetworkConfig(architecture=name), 4).eval()
        copied = load_matching(network, weights)
        left = set(network.state_dict()) - set(copied)
        assert left == {"head.weight", "head.bias"}
        found = network.embed(network.feature_map(images(1, 64)))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_the_first_convolution_is_the_sum_over_colours() -> None:
    state = torchvision.models.get_model("resnet18", weights=None).state_dict()
    network = build_network(NetworkConfig(architecture="resnet18"), 4)
    load_matching(network, state)
    torch.testing.assert_close(network.state_dict()["parts.0.0.weight"], state["conv1.weight"].sum(1, keepdim=True))


def test_a_head_of_another_size_stays_and_one_of_the_same_size_is_taken() -> None:
    source = random_bundle().weights  # five classes
    for classes, taken in ((5, True), (3, False)):
        network = build_network(NETWORK, classes)
        before = network.head.weight.detach().clone()
        copied = load_matching(network, source)
        assert ("head.weight" in copied) == taken
        assert torch.equal(network.head.weight, source["head.weight"] if taken else before)
        assert {name for name in source if not name.startswith("head.")} <= set(copied)


def test_weights_of_another_network_are_not_forced_in() -> None:
    network = build_network(NETWORK, 3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert load_matching(network, {"conv1.weight": torch.ones(64, 3, 7, 7), "head.weight": torch.ones(3, 1)}) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


class Bomb:
    """Unpickling it leaves a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


def saved(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def network_of(weights: dict[str, Tensor]) -> Network:
    network = build_network(NETWORK, 5)
    load_matching(network, weights)
    return network


def test_initial_weights_are_the_same_from_bundle_safetensors_and_state_dict(tmp_path: Path) -> None:
    saved_bundle(tmp_path / "model")
    state = random_bundle().weights
    (tmp_path / "w.safetensors").write_bytes(safetensors.torch.save(state))
    (tmp_path / "w.pt").write_bytes(saved(state))
    (tmp_path / "wrapped.pth").write_bytes(saved({"epoch": 3, "state_dict": state}))
    parameters = {name: nn.Parameter(tensor) for name, tensor in state.items() if tensor.is_floating_point()}
    (tmp_path / "parameters.pt").write_bytes(saved(parameters))
    for name in ("model", "w.safetensors", "w.pt", "wrapped.pth", "parameters.pt"):
        found = network_of(read_initial_weights(str(tmp_path / name), NETWORK, 5)).state_dict()
        assert all(torch.equal(found[key], value) for key, value in state.items() if value.is_floating_point()), name


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_initial_weights(str(path), NETWORK, 5)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    bodies = {
        "pickle": pickle.dumps({"head.weight": Bomb(trace)}),
        "archive": saved({"head.weight": torch.zeros(5, 32), "more": Bomb(trace)}),
        "module": saved(build_network(NETWORK, 5)),
    }
    for name, body in bodies.items():
        for ending in (".pt", ".pth", ".safetensors", ""):
            path = tmp_path / (name + ending)
            path.write_bytes(body)
            assert "--init-from" in refused(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"x", b"hello world\n" * 50, bytes(100), b"\x80\x02.", b"\x80\x04]", b"PK\3\4" + bytes(60), b"(lp0\n.",
        saved([1, 2, 3]), saved({"a": 1}), saved({"state_dict": [1]}), saved({"state_dict": None}),
        saved(torch.ones(3)), saved({1: torch.ones(3)}), saved({"other": torch.ones(3)}),
        saved({"head.weight": torch.ones(5, 32)})[:-40],
    ],
)  # fmt: skip
def test_what_holds_no_weights_is_refused_with_one_line(tmp_path: Path, body: bytes) -> None:
    for name in ("weights.pt", "weights.safetensors"):
        (tmp_path / name).write_bytes(body)
        refused(tmp_path / name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_state_dict_is_refused_or_read_but_never_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    body = bytearray(saved({"head.weight": torch.ones(5, 32), "head.bias": torch.ones(5)}))
    for place in data.draw(st.lists(st.integers(0, len(body) - 1), min_size=1, max_size=4)):
        body[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "weights.pt"
    path.write_bytes(body)
    with contextlib.suppress(UserError):
        read_initial_weights(str(path), NETWORK, 5)


def test_what_is_absent_or_fits_nothing_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "absent.pt")
    (tmp_path / "resnet.safetensors").write_bytes(safetensors.torch.save({"conv1.weight": torch.ones(64, 3, 7, 7)}))
    assert "--network.architecture" in refused(tmp_path / "resnet.safetensors")
