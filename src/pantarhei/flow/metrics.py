"""Premetrics: how far a prediction is from its target, one number a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.networks.vgg import VGG16Features, linear_weights

Premetric = Callable[[Tensor, Tensor], Tensor]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of its channels


def squared(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all but the first dimension, shape (B,)."""
    return F.mse_loss(prediction, target, reduction="none").flatten(1).mean(dim=1)


@dataclass(frozen=True)
class PseudoHuber:
    """Pseudo-Huber: quadratic below c, linear above.

    Attributes:
        c: the transition. A row of D elements uses (sqrt(|d|^2 + (c D)^2) - c D) / D with c = 0.00054 in rectified
            flow++ (2405.20320; linear in D); elementwise it is mean(sqrt(d^2 + c^2) - c), c = 0.001 in rectified
            diffusion (2410.07303).
        elementwise: which of the two.
        root: of the first, sqrt(D) in place of D, before and after (improved consistency training, 2310.14189).
    """

    c: float = 0.00054
    elementwise: bool = False
    root: bool = False

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError(f"c: must be positive, got {self.c}")

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Shape (B,)."""
        difference = (prediction - target).flatten(1)
        if self.elementwise:
            return (torch.sqrt(difference.square() + self.c**2) - self.c).mean(dim=1)
        size = difference.shape[1] ** (0.5 if self.root else 1)
        c = self.c * size
        return (torch.sqrt(difference.square().sum(dim=1) + c**2) - c) / size


class GradientPyramid:
    """Differences of image gradients at several scales: a perceptual distance that needs no learned features.

    At each scale sqrt(d^2 + c^2) - c of the horizontal and vertical differences of (prediction - target), averaged; the next
    scale is the 2 x 2 mean; the coarsest adds the difference itself. It forgives a flat offset less than LPIPS and knows
    nothing of texture: a surrogate, and named so wherever it is used.

    Args:
        scales: how many, the image's own the first.
        c: below it differences count squared.
    """

    name = "gradient pyramid (surrogate, no learned features)"

    def __init__(self, scales: int = 3, c: float = 0.05):
        if scales < 1 or not c > 0:
            raise ValueError(f"scales, c: must be positive, got {scales} and {c}")
        self.scales, self.c = scales, c

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Images (B, C, H, W) to (B,)."""
        d = prediction - target
        if d.ndim != 4:
            raise ValueError(f"metric: the gradient pyramid compares images (B, C, H, W), got shape {tuple(d.shape)}")
        total = d.new_zeros(d.shape[0])
        for scale in range(self.scales):
            if scale:
                d = F.avg_pool2d(d, 2, ceil_mode=True)
            for axis in (2, 3):
                if d.shape[axis] > 1:
                    total = total + self._robust(d.diff(dim=axis))
        return (total + self._robust(d)) / (2 * self.scales + 1)

    def _robust(self, d: Tensor) -> Tensor:
        return ((d.square() + self.c**2).sqrt() - self.c).flatten(1).mean(dim=1)


class Perceptual:
    """Distance of network features, with each position's channels scaled to unit length (as in LPIPS, 1801.03924).

    Args:
        network: maps images (B, C, H, W) to one feature map (B, F, h, w) or a sequence of them. It is used as it is:
            put it in eval mode and freeze it.
        weight: one weight a feature map; equal weights by default.

    Its name says which network it is, because a perceptual loss is only as good as its features.
    """

    def __init__(self, network: Callable[[Tensor], Tensor | Sequence[Tensor]], weight: Sequence[float] | None = None):
        self.network = network
        self.weight = weight
        self.name = f"perceptual ({getattr(network, 'name', type(network).__name__)})"

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Shape (B,)."""
        follow(self.network, prediction)
        with torch.no_grad():
            wanted = _maps(self.network(target))
        found = _maps(self.network(prediction))
        weights = self.weight or [1.0 / len(found)] * len(found)
        if len(weights) != len(found):
            raise ValueError(f"weight: the network gives {len(found)} feature maps, got {len(weights)} weights")
        parts = [
            w * (_unit(a) - _unit(b)).square().sum(dim=1).flatten(1).mean(dim=1)
            for w, a, b in zip(weights, found, wanted, strict=True)
        ]
        return torch.stack(parts).sum(dim=0)


class LPIPS:
    """Learned perceptual distance of images (Zhang et al. 2018, 1801.03924) with VGG16, as rectified flow++ trains on.

    Images in [-1, 1] become 0.5 x + 0.5, without clipping, are resized bilinearly (align_corners false) and normalised by
    ImageNet's moments. Features of the five stages are scaled to unit length over their channels; their squared differences
    are weighted by channel, averaged over positions and summed over stages. No gradient goes into the target. Half
    precision and autocast are left for float32: near the data end of a path the distance has weights up to 1e5, and its
    arguments agree to many digits.

    Args:
        network: five feature maps of normalised images.
        linear: weights (F,) of the channels, one tensor a stage; by default each stage counts 1/5.
        size: side that images are resized to; None leaves them as they are.
        name: what it is called everywhere.

    Raises:
        ValueError: the weights do not fit the network, or size is not positive.
    """

    def __init__(
        self,
        network: VGG16Features,
        linear: Sequence[Tensor] | None = None,
        *,
        size: int | None = 224,
        name: str = "LPIPS (VGG16, weights of unknown origin)",
    ):
        if linear is None:
            linear = [torch.full((width,), 1 / len(network.widths)) for width in network.widths]
        if [weight.numel() for weight in linear] != list(network.widths):
            got, want = ([*map(str, sizes)] for sizes in ([weight.numel() for weight in linear], network.widths))
            raise ValueError(f"linear: the network has {', '.join(want)} channels, got weights for {', '.join(got)}")
        if size is not None and size < 1:
            raise ValueError(f"size: must be positive or None, got {size}")
        self.network, self.size, self.name = network, size, name
        self._constants = [weight.detach().flatten() for weight in (*linear, *map(torch.tensor, _IMAGENET))]

    @staticmethod
    def from_files(
        vgg: str | Path, linear: str | Path, *, size: int | None = 224, average_pooling: bool = True
    ) -> LPIPS:
        """The published distance, from torchvision's VGG16 file and the file of LPIPS' linear weights.

        Args:
            vgg: see `VGG16Features.from_file`.
            linear: see `networks.vgg.linear_weights`.
            size: see the class.
            average_pooling: as rectified flow++ has it; False pools by maximum, as the official code.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file is damaged or something else.
        """
        network = VGG16Features.from_file(vgg, average_pooling=average_pooling)
        name = f"LPIPS (VGG16, {Path(vgg).name}, {Path(linear).name})"
        return LPIPS(network, linear_weights(linear), size=size, name=name)

    @staticmethod
    def surrogate(seed: int = 0, *, size: int | None = 224, divisor: int = 1, average_pooling: bool = True) -> LPIPS:
        """The same arithmetic with fixed random weights: not LPIPS, and called a surrogate wherever it is named.

        Args:
            seed: of the weights.
            size: see the class; None is quick for small images.
            divisor: of all channel counts. Above 8 so few are left that all may be zero at a position, where scaling to unit
                length jumps.
            average_pooling: see `from_files`.
        """
        network = VGG16Features.random(seed, average_pooling=average_pooling, divisor=divisor)
        fewer = f", 1/{divisor} of the channels" if divisor > 1 else ""
        return LPIPS(network, size=size, name=f"LPIPS surrogate: random VGG features, seed {seed}{fewer}")

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] with 3 channels or 1 (grey) to (B,).

        Raises:
            ValueError: other shapes.
        """
        if prediction.ndim != 4 or prediction.shape[1] not in (1, 3) or prediction.shape != target.shape:
            shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
            raise ValueError(f"metric: LPIPS compares images (B, 3, H, W) or (B, 1, H, W), got {shapes}")
        with torch.autocast(prediction.device.type, enabled=False):
            x, y = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (prediction, target))
            self._follow(x)
            with torch.no_grad():
                wanted = self.network(self._normalised(y.to(x)))
            found = self.network(self._normalised(x))
            *linear, _, _ = self._constants
            parts = [
                torch.einsum("bchw,c->bhw", (_unit(a) - _unit(b)).square(), weight).mean(dim=(1, 2))
                for weight, a, b in zip(linear, found, wanted, strict=True)
            ]
            return torch.stack(parts).sum(dim=0)

    def resized(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) at the side that they are compared at."""
        if self.size is None or x.shape[-2:] == (self.size, self.size):
            return x
        return F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)

    def _normalised(self, x: Tensor) -> Tensor:
        *_, mean, deviation = self._constants
        return (0.5 * self.resized(x) + 0.5 - mean[:, None, None]) / deviation[:, None, None]  # grey becomes 3 channels

    def _follow(self, x: Tensor) -> None:
        """Network and constants to the device and dtype of x; a loss is no module, so nobody else moves them."""
        if self._constants[0].device != x.device or self._constants[0].dtype != x.dtype:
            self.network.to(x)
            self._constants = [value.to(x) for value in self._constants]


def follow(network: object, x: Tensor) -> None:
    """Move a module (or the owner of a method) to the device of x: a loss is no module, so nobody else does."""
    module = network if isinstance(network, nn.Module) else getattr(network, "__self__", None)
    if isinstance(module, nn.Module):
        parameter = next(module.parameters(), None)
        if parameter is not None and parameter.device != x.device:
            module.to(x.device)


def _maps(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()
