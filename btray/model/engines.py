"""Engines: a network run as it is, as a frozen graph, or by ONNX Runtime, in float32 or bfloat16.

In float32 all give the same answers within 1e-5. In bfloat16 the feature maps are computed; what is summed up of them,
the last layer included, is float32 again.

torch's tracing tools are deprecated in favour of torch.compile, which needs a C++ compiler on every node and half a
minute per worker; tracing takes a second. So they stay, behind one function, and are not used if they would be wrong.
"""

from __future__ import annotations

import copy
import io
import logging
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from btray.core.errors import UserError
from btray.model.config import EngineName, Precision
from btray.model.network import Network

_log = logging.getLogger(__name__)

Run = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Standardised images [n, 1, size, size] -> logits [n, classes] and features [n, channels]: `Network.with_summary`."""

TOLERANCE: dict[Precision, float] = {"float32": 1e-4, "bf16": 0.1}
"""Largest difference from the network itself, run in the same precision, that a graph may show on noise: of a logit or
feature, as a share of the largest one if that is above 1."""
# Runs of a shape before it is captured: torch compiles and chooses kernels in the first ones. Each graph holds the
# memory of its feature maps.
_BEFORE_CAPTURE, _MOST_CAPTURED = 3, 4
CPU_FLAGS = Path("/proc/cpuinfo")
_BF16_FLAGS = ("avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Engine:
    """A network that is ready to run."""

    name: str
    """How it is run and in which precision, as in `frozen bf16`."""
    run: Run

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 logits [n, classes] and features [n, channels] of standardised images [n, 1, size, size]."""
        return self.run(images)


def make_engine(
    name: EngineName, network: Network, *, size: int, device: torch.device, precision: Precision = "float32"
) -> Engine:
    """Prepare the network, in evaluation mode on `device`, to be run on images of `size` pixels a side.

    `auto` is `frozen` on a CPU and `eager` elsewhere. Raises UserError for `onnx` on another device than a CPU, or if
    ONNX Runtime is not installed, and for `bf16` on a device that is not made for it.
    """
    if name == "auto":
        name = "frozen" if device.type == "cpu" else "eager"
    if precision == "bf16":
        require_bf16(name, device)
    module = _WithSummary(network, precision)
    eager = Engine(f"eager {precision}", module)
    if name == "eager":
        return eager
    example = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    example = example.contiguous(memory_format=torch.channels_last)
    try:
        run = _frozen(_with_columns(module, size, device), example) if name == "frozen" else _onnx(module, example)
        if device.type == "cuda":
            run = Captured(run)
        worst = _difference(run, module, example)
    except (AttributeError, RuntimeError) as error:  # of a GPU that cannot capture it, say
        _log.warning("engine %s fails on this machine; eager is used instead: %s", name, error)
        return eager
    if not worst <= TOLERANCE[precision]:
        _log.warning("engine %s differs by %.1e from the network on this machine; eager is used instead", name, worst)
        return eager
    return Engine(f"{name} {precision}", run)


@torch.inference_mode()
def _difference(run: Run, module: nn.Module, example: Tensor) -> float:
    """Return by how much `run`, once it is captured, differs from `module`: see TOLERANCE."""
    for _ in range(_BEFORE_CAPTURE if example.device.type == "cuda" else 0):
        run(example)
    outputs = zip(run(example), module(example), strict=True)
    return max(float((got - own).abs().max() / own.abs().max().clamp(min=1)) for got, own in outputs)


def require_bf16(name: EngineName, device: torch.device) -> None:
    """Raise UserError unless `device` computes in bfloat16 faster than in float32, and the engine `name` in it."""
    if name == "onnx":
        raise UserError("--precision bf16 needs --engine frozen or eager: ONNX Runtime has no bfloat16 on a CPU")
    if not supports_bf16(device):
        remedy = "leave it out, or use a machine that has"
        if device.type == "cpu":
            raise UserError(f"--precision bf16: this CPU has neither AVX512_BF16 nor AMX; {remedy} one of them")
        raise UserError(f"--precision bf16: the device {device} has no bfloat16; {remedy} it")


def supports_bf16(device: torch.device) -> bool:
    """Return whether `device` has instructions for bfloat16."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return not set(_BF16_FLAGS).isdisjoint(CPU_FLAGS.read_text(encoding="utf-8").split())


class _WithSummary(nn.Module):
    """The module that is run and traced: `Network.with_summary`, its feature maps in a precision."""

    def __init__(self, network: Network, precision: Precision) -> None:
        super().__init__()
        self.network = network if precision == "float32" else _in_bf16(network)
        self.dtype = torch.float32 if precision == "float32" else torch.bfloat16
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.with_summary(images.to(self.dtype))

    def extra_repr(self) -> str:
        return str(self.dtype)


def _in_bf16(network: Network) -> Network:
    """Return a copy whose feature maps are bfloat16; the numbers of batch normalisation stay as exact as they are."""
    copied = copy.deepcopy(network)
    copied.parts.to(torch.bfloat16)
    for module, own in zip(copied.parts.modules(), network.parts.modules(), strict=True):
        if isinstance(module, nn.BatchNorm2d):
            module.float().load_state_dict(own.state_dict())
    return copied


class _Columns(nn.Conv2d):
    """A convolution of a gray image with a stride, to which neighbouring columns, as many as that, are the channels.

    The products are the same, and zeros. oneDNN takes as long for one channel as for several.
    """

    def __init__(self, own: nn.Conv2d) -> None:
        """Take kernel and bias from `own`; its images must have a multiple of its stride of columns."""
        (stride, _), (kernel, _) = own.stride, own.kernel_size
        beside = -(-(kernel // 2) // stride)
        super().__init__(
            stride, own.out_channels, (kernel, 2 * beside + 1), (stride, 1), (kernel // 2, beside), bias=False
        )
        weight = torch.zeros_like(self.weight, dtype=own.weight.dtype)
        for column in range(kernel):
            place, channel = divmod(column - kernel // 2, stride)
            weight[:, channel, :, beside + place] = own.weight[:, 0, :, column].detach()
        self.weight, self.bias = nn.Parameter(weight), own.bias

    def forward(self, images: Tensor) -> Tensor:
        """Map [n, 1, h, w] to [n, channels, h / stride, w / stride]."""
        columns = images.squeeze(1).unflatten(2, (-1, self.in_channels))
        return super().forward(columns.permute(0, 3, 1, 2))


def _with_columns(module: _WithSummary, size: int, device: torch.device) -> _WithSummary:
    """Return a copy that computes the same of images of `size` in less time, or the module if there is none."""
    name, first = next((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d))
    (stride, across), kernel = first.stride, first.kernel_size[0]
    centred = first.padding == (kernel // 2, kernel // 2)
    if device.type != "cpu" or stride == 1 or stride != across or size % stride or not centred:
        return module
    copied = copy.deepcopy(module)
    parent, _, place = name.rpartition(".")
    setattr(copied.get_submodule(parent), place, _Columns(first))
    return copied.to(memory_format=torch.channels_last)


# A convolution and its activation in one pass over memory, by the operator that torch.compile uses for it. Both are
# private, as is the pass that replaces one by the other: if they move, the graph fails, and eager is used instead.
_FUSED = (("relu_", "relu", ""), ("hardtanh_", "hardtanh", ", %low, %high"))
_APART = """
graph(%x, %w, %b, %stride, %pad, %dilation, %t : bool, %out, %groups, %a1, %a2, %a3, %a4{2}):
    %y = aten::_convolution(%x, %w, %b, %stride, %pad, %dilation, %t, %out, %groups, %a1, %a2, %a3, %a4)
    %z = aten::{0}(%y{2})
    return (%z)"""
_TOGETHER = """
graph(%x, %w, %b, %stride, %pad, %dilation, %t : bool, %out, %groups, %a1, %a2, %a3, %a4{2}):
    %name : str = prim::Constant[value="{1}"]()
    %limits : Scalar?[] = prim::ListConstruct({3})
    %none : None = prim::Constant()
    %z = mkldnn::_convolution_pointwise(%x, %w, %b, %pad, %stride, %dilation, %groups, %name, %limits, %none)
    return (%z)"""


def _frozen(module: _WithSummary, example: Tensor) -> Run:
    """Make one graph with its weights as constants and batch normalisation folded into the convolutions."""
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        graph = torch.jit.load(io.BytesIO(_traced(module, example)), map_location=example.device)
        graph.load_state_dict(module.state_dict())
        frozen = torch.jit.freeze(graph.eval())
        if example.device.type == "cpu" and torch.backends.mkldnn.is_available():
            for activation, name, arguments in _FUSED:
                words = (activation, name, arguments, arguments.removeprefix(", "))
                before, after = (pattern.format(*words) for pattern in (_APART, _TOGETHER))
                torch._C._jit_pass_custom_pattern_based_rewrite_graph(before, after, frozen.graph)
        run: Run = frozen
    return run


class Captured:
    """A graph whose kernels are launched together on a GPU: captured for each shape that comes often, then replayed.

    To launch them one by one takes a CPU longer than a GPU takes to compute a small network.
    """

    def __init__(self, run: Run) -> None:
        """Capture `run`, which must be ready to be captured once it has run a few times."""
        self._run = run
        self._seen: Counter[torch.Size] = Counter()
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, Tensor]]] = {}
        self._lock = threading.Lock()

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `run` returns."""
        shape = images.shape
        with self._lock:  # a graph has its input and its outputs always at the same place
            self._seen[shape] += 1
            if shape not in self._graphs:
                if self._seen[shape] <= _BEFORE_CAPTURE or len(self._graphs) == _MOST_CAPTURED:
                    return self._run(images)
                self._graphs[shape] = self._capture(images)
            graph, given, (logits, features) = self._graphs[shape]
            given.copy_(images)
            graph.replay()
            return logits.clone(), features.clone()

    def _capture(self, images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, Tensor]]:
        graph, given = torch.cuda.CUDAGraph(), images.clone()
        # Other threads may copy or take memory meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self._run(given)
        return graph, given, outputs


_traces: dict[tuple[str, torch.Size, torch.device], bytes] = {}


def _traced(module: _WithSummary, example: Tensor) -> bytes:
    """Trace the module with zeros for weights, once per structure and process; return the saved graph.

    torch never frees the memory of a trace, nor that of what is frozen from one (pytorch #96726). What is loaded from
    the saved graph is freed like any module, so that a service may switch models for ever.
    """
    key = (repr(module), example.shape, example.device)  # see Network.extra_repr
    if key not in _traces:
        empty = copy.deepcopy(module)
        for tensor in empty.state_dict().values():
            tensor.zero_()
        saved = io.BytesIO()
        torch.jit.save(torch.jit.trace(empty, example, check_trace=False), saved)
        _traces[key] = zlib.compress(saved.getvalue(), 1)
    return zlib.decompress(_traces[key])


def _onnx(module: _WithSummary, example: Tensor) -> Run:
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
            module,
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
