"""Samples of the data that a noisy measurement leaves possible, without training for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pantarhei.flow.controls import ClassifierGuidance
from pantarhei.flow.flow import ConditionLike, Flow

# What is measured of data (B, *shape): any shape (B, ...), differentiable.
Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Measurement:
    """y = A(x1) + noise, with A linear or not.

    Attributes:
        operator: A.
        value: y, (B, ...); one row serves for all.
        noise: standard deviation of the noise in each element.
        spread: standard deviation of the data, as far as a Gaussian describes them: how sure a denoised estimate is follows
            from it.
    """

    operator: Operator
    value: Tensor
    noise: float = 0.05
    spread: float = 1.0

    def __post_init__(self) -> None:
        if not self.noise > 0 or not self.spread > 0:
            raise ValueError(f"measurement: noise and spread must be positive, got {self.noise:g} and {self.spread:g}")

    def residual(self, x: Tensor) -> Tensor:
        """A(x) - y, (B, ...).

        Raises:
            ValueError: what is measured of x has another shape than y.
        """
        found = self.operator(x)
        if found.shape[1:] != self.value.shape[1:]:
            raise ValueError(
                f"measurement: the operator gives {tuple(found.shape[1:])} a row, but "
                f"{tuple(self.value.shape[1:])} was measured"
            )
        return found - self.value.to(found)

    def mismatch(self, x: Tensor) -> Tensor:
        """|A(x) - y|^2 / (2 noise^2), (B,): what noise optimisation makes small (D-Flow, 2402.14017)."""
        return self.residual(x).square().flatten(1).sum(dim=1) / (2 * self.noise**2)

    def log_likelihood(self, flow: Flow, condition: ConditionLike = None) -> Callable[[Tensor, Tensor], Tensor]:
        """log p(y | x_t) from the flow's denoised estimate, for `ClassifierGuidance`: exact for Gaussian data and A A^T = 1.

        The estimate, decoded where the flow has a codec, is as sure as that of Gaussian data of this spread would be.
        """

        def log_prob(x: Tensor, t: Tensor) -> Tensor:
            at = flow.path.at(t, x)
            left = (self.spread * at.sigma) ** 2 / ((self.spread * at.alpha) ** 2 + at.sigma**2)
            misses = self.residual(flow.decode(flow.denoise(x, t, condition))).square().flatten(1).sum(dim=1)
            return -misses / (2 * (self.noise**2 + left.reshape(-1)))

        return log_prob


def posterior_sample(
    flow: Flow,
    measurement: Measurement,
    count: int | None = None,
    *,
    x0: Tensor | None = None,
    condition: ConditionLike = None,
    scale: float = 1.0,
    **options: Any,
) -> Tensor:
    """Samples that agree with a measurement, by guiding the ODE with the likelihood of each denoised estimate.

    Two evaluations of the network and one gradient a slope (diffusion posterior sampling, Chung et al. 2209.14687, with the
    variance of Song et al., ICLR 2023).

    Args:
        flow: on an affine path, with a Gaussian source.
        measurement: of the data, as they are decoded.
        count, x0, condition, options: as of `Flow.sample`.
        scale: strength; 1 is the likelihood's own.

    Returns:
        (B, *shape), or the codec's output shape.
    """
    guide = ClassifierGuidance(measurement.log_likelihood(flow, condition), flow.path, scale)
    return flow.sample(count, x0=x0, condition=condition, transforms=[guide], **options)


@dataclass(frozen=True)
class Masked:
    """In-painting: the values where a mask is true, zeros elsewhere.

    Attributes:
        mask: of a shape that broadcasts to one sample's.
    """

    mask: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(B, *shape) to the same."""
        return x * self.mask.to(x)


@dataclass(frozen=True)
class Blurred:
    """Images through a Gaussian filter, zero beyond their edges.

    Attributes:
        width: standard deviation in pixels.
    """

    width: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        reach = max(1, round(3 * self.width))
        at = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
        kernel = torch.exp(-(at**2) / (2 * self.width**2))
        kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
        x = F.conv2d(x, kernel[:, :, None], padding=(0, reach), groups=x.shape[1])
        return F.conv2d(x, kernel[..., None], padding=(reach, 0), groups=x.shape[1])


@dataclass(frozen=True)
class Sensors:
    """The values at some places of a field.

    Attributes:
        places: row and column of each sensor, (n, 2) whole numbers.
    """

    places: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, n)."""
        rows, columns = self.places.to(x.device).unbind(dim=1)
        return x[..., rows, columns]
