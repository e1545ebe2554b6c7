"""The networks: the default, a family of 2D CNNs described wholly by a config, and torchvision backbones by name.

Every network maps float32 [n, 1, size, size] to logits [n, classes] and has the same three steps: `feature_map`
(what Grad-CAM looks at), `embed` (the vector before the last layer) and `head`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from btray.model.config import NetworkConfig
from btray.model.mobile import WIDTH, build_parts

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "silu": lambda: nn.SiLU(inplace=True),
}


class Network(nn.Module):
    """`parts` run one after the other, then pooling, dropout and a linear layer.

    `aliases` map prefixes of the tensor names of pretrained weights to ours.
    """

    def __init__(
        self, parts: list[nn.Module], width: int, classes: int, *, pooling: str, dropout: float, aliases: dict[str, str]
    ) -> None:
        """`width`: channels of the last feature map."""
        super().__init__()
        self.aliases = aliases
        self.parts = nn.ModuleList(parts)
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width * (2 if pooling == "average_max" else 1), classes)

    def extra_repr(self) -> str:
        """Return what no layer shows: two networks of equal repr compute the same, except for their weights."""
        return f"pooling={self.pooling}"

    def feature_map(self, images: Tensor) -> Tensor:
        """Compute the last feature map: [n, 1, size, size] -> [n, width, rows, columns]."""
        for part in self.parts:
            images = part(images)
        return images

    def embed(self, feature_map: Tensor) -> Tensor:
        """Pool a feature map to one vector per image: [n, width, rows, columns] -> [n, features]."""
        pooled = []
        if self.pooling != "max":
            pooled.append(feature_map.mean((2, 3)))
        if self.pooling != "average":
            pooled.append(feature_map.amax((2, 3)))
        return torch.cat(pooled, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [n, classes] of standardised images [n, 1, size, size]."""
        logits: Tensor = self.head(self.dropout(self.embed(self.feature_map(images))))
        return logits

    def with_summary(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits [n, classes] and, in the same pass, features [n, channels] for the out-of-distribution score.

        The features are the mean of each channel of the last feature map of every resolution: coarse and fine maps
        together tell an image that is not an MRI slice. Both are float32, also if the feature maps are not.
        """
        means = []
        for part in self.parts:
            previous, images = images, part(images)
            # the image itself, of one channel, is not a feature map
            if images.shape[2:] != previous.shape[2:] and previous.shape[1] > 1:
                means.append(_means(previous))
        means.append(_means(images))
        logits: Tensor = self.head(self.dropout(self.embed(images.float())))
        return logits, torch.cat(means, 1)


def _means(feature_map: Tensor) -> Tensor:
    """Return the mean of each channel, float32 [n, channels], in the order in which channels last lie in memory."""
    return feature_map.permute(0, 2, 3, 1).flatten(1, 2).float().mean(1)


class Block(nn.Module):
    """Two convolutions with an optional squeeze-and-excitation gate and skip connection."""

    def __init__(self, channels_in: int, channels: int, stride: int, config: NetworkConfig) -> None:
        """`stride` is that of the first convolution."""
        super().__init__()
        activation = _ACTIVATIONS[config.activation]
        self.body = nn.Sequential(
            _convolution(channels_in, channels, stride, config),
            activation(),
            _convolution(channels, channels, 1, config),
        )
        self.gate = SqueezeExcite(channels, config.squeeze_excite) if config.squeeze_excite else nn.Identity()
        self.skip: nn.Module | None = None
        if config.residual:
            same = (channels_in, stride) == (channels, 1)
            self.skip = nn.Identity() if same else _shortcut(channels_in, channels, stride, config)
        self.activation = activation()

    def forward(self, images: Tensor) -> Tensor:
        """Map [n, channels_in, h, w] to [n, channels, h / stride, w / stride]."""
        out = self.gate(self.body(images))
        if self.skip is not None:
            out = out + self.skip(images)
        activated: Tensor = self.activation(out)
        return activated


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the mean of all channels (Hu et al. 2018, arXiv:1709.01507)."""

    def __init__(self, channels: int, ratio: float) -> None:
        """`ratio`: width of the hidden layer as a share of `channels`."""
        super().__init__()
        hidden = max(4, round(channels * ratio))
        self.gate = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1), nn.Sigmoid()
        )

    def forward(self, images: Tensor) -> Tensor:
        """Scale [n, channels, h, w]."""
        scaled: Tensor = images * self.gate(images.mean((2, 3), keepdim=True))
        return scaled


def build_network(config: NetworkConfig, classes: int) -> Network:
    """Make the network that `config` describes, with random weights from torch's global generator.

    A torchvision backbone takes one gray channel and keeps its own feature extractor; only its head is ours.
    """
    if config.architecture == "mobile_cnn":
        mobile, aliases = build_parts()
        network = Network(mobile, WIDTH, classes, pooling="average", dropout=config.dropout, aliases=aliases)
        network.apply(_initialise)
        return network
    if config.architecture != "cnn":
        return _build_backbone(config, classes)
    stem = _convolution(1, config.stem_width, config.stem_stride, config)
    parts: list[nn.Module] = [nn.Sequential(stem, _ACTIVATIONS[config.activation]())]
    channels, stride = config.stem_width, config.first_stride
    for width, depth in zip(config.widths, config.depths, strict=True):
        blocks = [Block(channels, width, stride, config)]
        blocks += [Block(width, width, 1, config) for _ in range(depth - 1)]
        parts.append(nn.Sequential(*blocks))
        channels, stride = width, 2
    network = Network(parts, channels, classes, pooling=config.pooling, dropout=config.dropout, aliases={})
    network.apply(_initialise)
    return network


def count_parameters(network: nn.Module) -> int:
    """Return the number of trainable values."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def count_flops(network: nn.Module, size: int) -> int:
    """Count floating-point operations of one image's forward pass; a multiply-add counts as two."""
    from torch.utils.flop_counter import FlopCounterMode

    was_training = network.training
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, size, size))
    network.train(was_training)
    return int(counter.get_total_flops())


def load_matching(network: Network, weights: Mapping[str, Tensor]) -> list[str]:
    """Copy every tensor of `weights` whose name and shape fit into `network`; return the names that were copied.

    A first convolution over three colours is summed to one channel, since gray is the same in all three. The names
    of the pretrained weights are accepted as well as ours.
    """
    own = network.state_dict()
    fitting = {}
    for name, tensor in weights.items():
        alias = next((alias for alias in network.aliases if name.startswith(alias)), "")
        target = network.aliases.get(alias, "") + name.removeprefix(alias)
        if target in own and tensor.ndim == 4 and own[target].shape == (tensor.shape[0], 1, *tensor.shape[2:]):
            fitting[target] = tensor.sum(1, keepdim=True, dtype=own[target].dtype)
        elif target in own and own[target].shape == tensor.shape:
            fitting[target] = tensor
    network.load_state_dict(fitting, strict=False)
    return sorted(fitting)


def _convolution(channels_in: int, channels: int, stride: int, config: NetworkConfig) -> nn.Sequential:
    convolution = nn.Conv2d(
        channels_in, channels, config.kernel, stride, padding=config.kernel // 2, bias=config.norm == "none"
    )
    return nn.Sequential(convolution, _norm(channels, config))


def _shortcut(channels_in: int, channels: int, stride: int, config: NetworkConfig) -> nn.Sequential:
    """Average before the projection, so that no pixel is skipped (ResNet-D, He et al. 2019, arXiv:1812.01187)."""
    projection = nn.Conv2d(channels_in, channels, 1, bias=config.norm == "none")
    pool: nn.Module = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
    return nn.Sequential(pool, projection, _norm(channels, config))


def _norm(channels: int, config: NetworkConfig) -> nn.Module:
    if config.norm == "batch":
        return nn.BatchNorm2d(channels)
    if config.norm == "group":
        return nn.GroupNorm(math.gcd(channels, 8), channels)  # eight groups, or as many as divide the channels
    return nn.Identity()


def _initialise(module: nn.Module) -> None:
    """Initialise as in He et al. 2015 (arXiv:1502.01852), the head near 0 so that training starts from even answers."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


def _build_backbone(config: NetworkConfig, classes: int) -> Network:
    """Make the feature extractor of a torchvision model, for one gray channel, with a head of ours."""
    import torchvision  # takes two seconds, in every process, and only these networks need it

    name = config.architecture
    model = torchvision.models.get_model(name, weights=None)
    # The first convolution takes three colours, which are all the same in a gray image.
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.in_channels = 1
    first.weight = nn.Parameter(first.weight.detach().sum(1, keepdim=True))
    if name.startswith("resnet"):
        stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
        parts = [stem, model.layer1, model.layer2, model.layer3, model.layer4]
        aliases = {"conv1.": "parts.0.0.", "bn1.": "parts.0.1."}
        aliases |= {f"layer{number}.": f"parts.{number}." for number in range(1, 5)}
        width = model.fc.in_features
    else:
        parts = list(model.features)
        aliases = {f"features.{child}.": f"parts.{n}." for n, (child, _) in enumerate(model.features.named_children())}
        if name.startswith("densenet"):  # its own forward ends with this activation
            parts.append(nn.ReLU())
        last = model.classifier if isinstance(model.classifier, nn.Linear) else model.classifier[-1]
        # Those of VGG end with layers of their own, SqueezeNet's with a convolution.
        width = 512 if name.startswith(("vgg", "squeezenet")) else last.in_features
    return Network(parts, width, classes, pooling="average", dropout=config.dropout, aliases=aliases)
