"""Engines: a network run as it is, as a frozen graph, or by ONNX Runtime. All give the same answers within 1e-5.

torch's tracing tools are deprecated in favour of torch.compile, which needs a C++ compiler on every node and half a
minute per worker; tracing takes a second. So they stay, behind one function, and are not used if they would be wrong.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from btray.core.errors import UserError
from btray.model.config import EngineName
from btray.model.network import Network

_log = logging.getLogger(__name__)

Engine = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Standardised images [n, 1, size, size] -> logits [n, classes] and features [n, channels]: `Network.with_summary`."""

TOLERANCE = 1e-4
"""Largest difference from the network's own logits that a graph may show on noise."""


def make_engine(name: EngineName, network: Network, *, size: int, device: torch.device) -> Engine:
    """Prepare the network, in evaluation mode on `device`, to be run on images of `size` pixels a side.

    `auto` is `frozen` on a CPU and `eager` elsewhere. Raises UserError for `onnx` on another device than a CPU, or if
    ONNX Runtime is not installed.
    """
    if name == "auto":
        name = "frozen" if device.type == "cpu" else "eager"
    if name == "eager":
        return network.with_summary
    example = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    example = example.contiguous(memory_format=torch.channels_last)
    engine = _frozen(network, example) if name == "frozen" else _onnx(network, example)
    with torch.inference_mode():
        outputs = zip(engine(example), network.with_summary(example), strict=True)
        worst = max(float((got - own).abs().max()) for got, own in outputs)
    if not worst <= TOLERANCE:
        _log.warning("engine %s differs by %.1e from the network on this machine; eager is used instead", name, worst)
        return network.with_summary
    return engine


class _WithSummary(nn.Module):
    """The module that is traced: its forward pass gives the features too."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.with_summary(images)


def _frozen(network: Network, example: Tensor) -> Engine:
    """Make one graph with its weights as constants and batch normalisation folded into the convolutions."""
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        graph = torch.jit.load(io.BytesIO(_traced(network, example)), map_location=example.device)
        graph.load_state_dict(_WithSummary(network).state_dict())
        engine: Engine = torch.jit.freeze(graph.eval())
    return engine


_traces: dict[tuple[str, torch.Size, torch.device], bytes] = {}


def _traced(network: Network, example: Tensor) -> bytes:
    """Trace the network with zeros for weights, once per structure and process; return the saved graph.

    torch never frees the memory of a trace, nor that of what is frozen from one (pytorch #96726). What is loaded from
    the saved graph is freed like any module, so that a service may switch models for ever.
    """
    key = (repr(network), example.shape, example.device)  # see Network.extra_repr
    if key not in _traces:
        empty = copy.deepcopy(network)
        for tensor in empty.state_dict().values():
            tensor.zero_()
        saved = io.BytesIO()
        torch.jit.save(torch.jit.trace(_WithSummary(empty), example, check_trace=False), saved)
        _traces[key] = zlib.compress(saved.getvalue(), 1)
    return zlib.decompress(_traces[key])


def _onnx(network: Network, example: Tensor) -> Engine:
    if example.device.type != "cpu":
        raise UserError(f"engine onnx runs on a CPU, not on {example.device.type}; choose eager or frozen")
    try:
        import onnx  # noqa: F401 - torch's exporter needs it
        import onnxruntime
    except ImportError as error:
        raise UserError("engine onnx needs the extra: pip install 'btray[onnx]'") from error
    graph = io.BytesIO()
    names = ["logits", "features"]
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            _WithSummary(network),
            (example.contiguous(),),
            graph,  # type: ignore[arg-type]  # the annotation knows paths only
            input_names=["images"],
            output_names=names,
            dynamic_axes={name: {0: "n"} for name in ["images", *names]},
            dynamo=False,
        )
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session: Any = onnxruntime.InferenceSession(graph.getvalue(), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = session.run(names, {"images": np.ascontiguousarray(images.numpy())})
        return torch.from_numpy(logits), torch.from_numpy(features)

    return run
