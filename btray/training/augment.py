"""The random transform that training alone has, on whole batches of frames.

Every random number is a hash of (seed, epoch, sample), so a sample is changed in the same way whatever batch, worker
or device it lands on, and a run that is resumed or spread over more workers sees the same pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from btray.training.config import AugmentConfig

# One random number each: a name here is a column of the table that is drawn. The order is part of every result.
_DRAWS = (
    "flip_horizontal", "flip_vertical", "rotation", "scale", "shear", "shift_x", "shift_y", "contrast", "gamma",
    "bias_field", "noise", "blur", "erase", "erase_shape", "erase_x", "erase_y", "tone",
)  # fmt: skip
_TONES = 4  # points, evenly spread up to white, through which a random gray curve goes
_WAVES = 4  # cosine waves along each edge that make up a bias field
_MASK = 0xFFFFFFFF

_Integers = TypeVar("_Integers", int, Tensor)


@dataclass(frozen=True)
class Augmenter:
    """Augments uint8 frames on the device they lie on; `epoch` and sample keys choose the random numbers."""

    config: AugmentConfig
    seed: int

    def __call__(self, frames: Tensor, samples: Tensor, epoch: int) -> Tensor:
        """Augment `frames` (uint8 [n, size, size]); `samples` (int64 [n], there too) are their numbers in the data set.

        Returns float32 [n, 1, size, size], each standardised to mean 0 and deviation 1 as `preprocess.to_tensor` does.
        """
        # A number of the host: a tensor would have to be copied to the device, in every step.
        keys = _mix(_mix(samples + 1) ^ _mix(self.seed * 1_000_003 + epoch))
        # [n, 1, 1, 1] each, to multiply images by
        draws = dict(zip(_DRAWS, keyed_uniform(keys, len(_DRAWS))[:, :, None, None, None].unbind(1), strict=True))
        images = frames.unsqueeze(1).float() / 255.0
        images = self._move(images, draws)
        images = self._change_gray(images, draws, keys)
        images = self._degrade(images, draws, keys)
        if self.config.erase:
            images = _erase(images, draws, self.config.erase)
        centred = images - images.mean((2, 3), keepdim=True)
        deviation = centred.square().mean((2, 3), keepdim=True).sqrt()
        return centred / deviation.clamp(min=1.0 / 255.0)

    def _move(self, images: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """Flip, rotate, scale, shear and shift in one resampling."""
        config, draws = self.config, {name: draw.squeeze(1) for name, draw in draws.items()}  # [n, 1, 1]
        angle = _around_zero(draws["rotation"]) * math.radians(config.rotation)
        zoom = torch.exp(_around_zero(draws["scale"]) * math.log1p(config.scale))
        shear = torch.tan(_around_zero(draws["shear"]) * math.radians(config.shear))
        mirror_x = 1.0 - 2.0 * (draws["flip_horizontal"] < config.flip_horizontal).float()
        mirror_y = 1.0 - 2.0 * (draws["flip_vertical"] < config.flip_vertical).float()
        cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        # The frame spans [-1, 1], so a share of its edge is twice as long in these coordinates.
        shift_x = 2.0 * config.translation * _around_zero(draws["shift_x"])
        shift_y = 2.0 * config.translation * _around_zero(draws["shift_y"])
        # Written out: F.affine_grid's batched matrix product takes three times as long as all else here.
        axis = _pixel_centres(images)
        x, y = axis.view(1, 1, -1), axis.view(1, -1, 1)
        across = cosine * mirror_x * x + (shear * cosine - sine) * mirror_y * y + shift_x
        down = sine * mirror_x * x + (shear * sine + cosine) * mirror_y * y + shift_y
        grid = torch.stack([across, down], 3)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _change_gray(self, images: Tensor, draws: dict[str, Tensor], keys: Tensor) -> Tensor:
        """Change contrast and gamma, and give images random gray curves."""
        config = self.config
        if config.contrast:
            mean = images.mean((2, 3), keepdim=True)
            images = mean + (images - mean) * (1.0 + config.contrast * _around_zero(draws["contrast"]))
            # Cut off at black and white: without that, standardising would undo the change.
            images = images.clamp(0.0, 1.0)
        if config.gamma:
            # Rounding may leave a value below 0, whose power is not a number.
            images = images.clamp(min=1e-4) ** torch.exp(_around_zero(draws["gamma"]) * config.gamma)
        if config.tone:
            weights = config.tone * _half_of_the_time(draws["tone"])
            images = images + weights * (_through_curve(images, keyed_uniform(_mix(keys + 3), _TONES)) - images)
        return images

    def _degrade(self, images: Tensor, draws: dict[str, Tensor], keys: Tensor) -> Tensor:
        """Imitate the flaws of scanners: uneven sensitivity of the coil, blur, noise."""
        config = self.config
        if config.bias_field:
            images = images * (1.0 + config.bias_field * draws["bias_field"] * _smooth_field(images, keys))
        if config.blur:
            # 2.5 deviations hold 99 % of a Gaussian.
            images = _blur(images, config.blur * _half_of_the_time(draws["blur"]), math.ceil(2.5 * config.blur))
        if config.noise:
            deviation = config.noise * _half_of_the_time(draws["noise"])
            images = images + deviation * _keyed_normal(_mix(keys + 2), images.shape)
        return images


def keyed_uniform(keys: Tensor, count: int) -> Tensor:
    """Draw `count` uniform numbers in [0, 1) for each of `keys` (int64 [n]): float32 [n, count].

    A 32-bit integer hash of key and position (the finaliser of MurmurHash3, Appleby 2011, public domain).
    """
    # The golden ratio's multiples (Knuth, TAOCP 6.4) are far apart; 24 bits are what float32 holds exactly.
    positions = torch.arange(1, count + 1, device=keys.device) * 0x9E3779B9
    return (_mix(keys.unsqueeze(1) + positions) >> 8).float() * (1.0 / (1 << 24))


def _keyed_normal(keys: Tensor, shape: torch.Size) -> Tensor:
    """Draw standard normal numbers of `shape`, from pairs of uniform ones (Box & Muller 1958)."""
    pixels = shape[1:].numel()
    first, second = keyed_uniform(keys, pixels + pixels % 2).chunk(2, 1)
    radius, angle = torch.sqrt(-2.0 * torch.log(1.0 - first)), 2.0 * math.pi * second
    normal = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], 1)
    return normal[:, :pixels].reshape(shape)


def _mix(values: _Integers) -> _Integers:
    """Hash int64 values, of which the lower 32 bits count, by MurmurHash3's 32-bit finaliser."""
    values = values & _MASK
    values = ((values ^ (values >> 16)) * 0x85EBCA6B) & _MASK
    values = ((values ^ (values >> 13)) * 0xC2B2AE35) & _MASK
    return values ^ (values >> 16)


def _around_zero(draw: Tensor) -> Tensor:
    return 2.0 * draw - 1.0


def _half_of_the_time(draw: Tensor) -> Tensor:
    """Return zero for half of the draws, so that half of the images stay as they are, and the rest over [0, 1)."""
    return (2.0 * draw - 1.0).clamp(min=0.0)


def _pixel_centres(images: Tensor) -> Tensor:
    """Return where the pixels of a row lie when the row spans [-1, 1]."""
    size = images.shape[-1]
    return (torch.arange(size, device=images.device) * 2 + 1) / size - 1.0


def _through_curve(images: Tensor, points: Tensor) -> Tensor:
    """Map gray levels in [0, 1] through curves of straight pieces from black to `points` [n, pieces]."""
    pieces = points.shape[1]
    ends = F.pad(points, (1, 0))
    slopes = (ends[:, 1:] - ends[:, :-1]) * pieces
    curved = torch.zeros_like(images)
    for piece, slope in enumerate(slopes[:, :, None, None, None].unbind(1)):
        curved.addcmul_((images - piece / pieces).clamp(0.0, 1.0 / pieces), slope)
    return curved


def _smooth_field(images: Tensor, keys: Tensor) -> Tensor:
    """Draw a sum of low cosine waves for each image, its largest absolute value 1: [n, 1, size, size]."""
    weights = keyed_uniform(_mix(keys + 1), _WAVES * _WAVES).view(-1, _WAVES, _WAVES) * 2.0 - 1.0
    phase = (_pixel_centres(images) + 1.0) * (math.pi / 2.0)
    waves = torch.cos(phase.unsqueeze(1) * torch.arange(_WAVES, device=images.device))
    field = waves @ weights @ waves.T
    return (field / field.abs().amax((1, 2), keepdim=True).clamp(min=1e-6)).unsqueeze(1)


def _blur(images: Tensor, deviations: Tensor, radius: int) -> Tensor:
    """Blur each image by a Gaussian with a deviation of its own, [n, 1, 1, 1] in pixels.

    Summed tap by tap: a grouped convolution takes twice as long and rounds otherwise in a batch of one.
    """
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    kernels = torch.exp(-0.5 * (offsets / deviations.clamp(min=1e-2).view(-1, 1)) ** 2)
    taps = (kernels / kernels.sum(1, keepdim=True))[:, :, None, None, None].unbind(1)
    size = images.shape[-1]
    for axis, padding in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        padded = F.pad(images, padding)
        images = torch.zeros_like(images)
        for offset, tap in enumerate(taps):
            images.addcmul_(padded.narrow(axis, offset, size), tap)
    return images


def _erase(images: Tensor, draws: dict[str, Tensor], largest: float) -> Tensor:
    """Fill a rectangle with the image's mean, in half of the images (Zhong et al. 2020, arXiv:1708.04896)."""
    size = images.shape[-1]
    area = largest * _half_of_the_time(draws["erase"])
    stretch = torch.exp(_around_zero(draws["erase_shape"]) * 0.7)  # sides between 1:2 and 2:1
    height, width = (area.sqrt() * stretch).clamp(max=1.0), (area.sqrt() / stretch).clamp(max=1.0)
    top, left = draws["erase_y"] * (1.0 - height), draws["erase_x"] * (1.0 - width)
    edge = torch.arange(size, device=images.device) / size
    down, across = edge.view(-1, 1), edge
    hole = (down >= top) & (down < top + height) & (across >= left) & (across < left + width)
    return torch.where(hole, images.mean((2, 3), keepdim=True), images)
