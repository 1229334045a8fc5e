"""Samples of the data that a noisy measurement leaves possible, without training for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pantarhei.flow.affine import AffinePath
from pantarhei.flow.conditions import Condition
from pantarhei.flow.flow import Flow
from pantarhei.flow.predictions import Velocity
from pantarhei.flow.transforms import ConditionedField, FieldTransform
from pantarhei.solve.state import per_row

# What is measured of data (B, *shape): any shape (B, ...), differentiable.
Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Measurement:
    """y = A(x1) + noise, with A linear or not.

    Attributes:
        operator: A.
        value: y, (B, ...); one row serves for all.
        noise: standard deviation of the noise in each element.
        spread: standard deviation of the data, where a Gaussian of one variance describes them: how sure an estimate is
            follows from it. By default it is measured, see `MeasurementGuidance`.
    """

    operator: Operator
    value: Tensor
    noise: float = 0.05
    spread: float | None = None

    def __post_init__(self) -> None:
        if not self.noise > 0 or (self.spread is not None and not self.spread > 0):
            raise ValueError(f"measurement: noise and spread must be positive, got {self.noise} and {self.spread}")

    def index(self, rows: Tensor) -> Measurement:
        """That of some rows."""
        return self if len(self.value) == 1 else replace(self, value=self.value[rows.to(self.value.device)])

    def residual(self, x: Tensor) -> Tensor:
        """A(x) - y, (B, ...).

        Raises:
            ValueError: what is measured of x has another shape than y.
        """
        found = self.operator(x)
        if found.ndim < 1 or len(found) != len(x):
            raise ValueError(
                f"measurement: the operator gives {tuple(found.shape)} for {len(x)} samples; (B, ...) is needed"
            )
        if found.shape[1:] != self.value.shape[1:]:
            raise ValueError(
                f"measurement: the operator gives {tuple(found.shape[1:])} a row, but "
                f"{tuple(self.value.shape[1:])} was measured"
            )
        if len(self.value) not in (1, len(found)):
            raise ValueError(f"measurement: {len(found)} samples, but {len(self.value)} rows were measured")
        if x.requires_grad and torch.is_grad_enabled() and not found.requires_grad:
            raise ValueError(
                "measurement: the operator is not differentiable (a comparison, argmax, detach or NumPy in it?)"
            )
        return found - self.value.to(found)

    def mismatch(self, x: Tensor) -> Tensor:
        """|A(x) - y|^2 / (2 noise^2), (B,): what noise optimisation makes small (D-Flow, 2402.14017)."""
        residual = self.residual(x)
        return _dot(residual, residual) / (2 * self.noise**2)


@dataclass(frozen=True)
class MeasurementGuidance:
    """Guides a velocity by the likelihood of each denoised estimate: a field transform, on affine paths from Gaussian noise.

    The score gains -J^T A^T r / (noise^2 + v), with J the denoiser's Jacobian, r what A makes of its estimate less y
    (diffusion posterior sampling, Chung et al. 2209.14687), and v how unsure A of the estimate is (Song et al., ICLR 2023).
    v is measured along r from the denoiser's own covariance sigma^2 / alpha J, at no further evaluation: the first step of
    the conjugate gradients of Rozet et al. (2405.13712). Exact for Gaussian data of one variance and A A^T = 1.

    Attributes:
        flow: whose denoised estimates; decoded, where it has a codec.
        measurement: what is known.
        scale: strength; 1 is the likelihood's own.
        twice: let gradients through the sampler pass through the Jacobian, see `ClassifierGuidance`.
    """

    flow: Flow
    measurement: Measurement
    scale: float = 1.0
    twice: bool = True

    def __call__(
        self, field: ConditionedField, x: Tensor, t: Tensor, condition: Condition | None, step: int | None
    ) -> Tensor:
        """The guided velocity; one evaluation of the field and one product with its Jacobian."""
        through = x.requires_grad and torch.is_grad_enabled()
        twice = self.twice and through
        c = self.flow.path.at(t, x)
        with torch.enable_grad():
            seen = x if through else x.detach().requires_grad_(True)
            velocity = field(seen, t, condition)
            data = Velocity().ends(self.flow.path, seen, t, velocity).data
            residual = self.measurement.residual(self.flow.decode(data))
            back = partial(torch.autograd.grad, retain_graph=True, create_graph=twice)
            kept = residual if twice else residual.detach()
            (outward,) = back(residual, data, kept)  # A^T r
            (slope,) = back(data, seen, outward)  # J^T A^T r
        along = _dot(outward, slope) / _dot(kept, kept).clamp_min(1e-20)
        variance = per_row(along, x) * c.sigma**2 / c.alpha.clamp_min(1e-3)
        if self.measurement.spread is not None:
            variance = (self.measurement.spread * c.sigma) ** 2
            variance = variance / ((self.measurement.spread * c.alpha) ** 2 + c.sigma**2)
        # A covariance is not negative; where a network's is, it knows nothing of this direction yet.
        weight = torch.where(variance < 0, 0.0, 1 / (self.measurement.noise**2 + variance.clamp_min(0)))
        share = self.scale * self.flow.path.velocity_of_score(t, x)
        guided = velocity - share * weight * slope
        return guided if through else guided.detach()


def posterior_sample(
    flow: Flow,
    measurement: Measurement,
    count: int | None = None,
    *,
    x0: Tensor | None = None,
    scale: float = 1.0,
    transforms: Sequence[FieldTransform] = (),
    **options: Any,
) -> Tensor:
    """Samples that agree with a measurement, by `MeasurementGuidance` of the ODE.

    Args:
        flow: on an affine path, with a Gaussian source.
        measurement: of the data, as they are decoded.
        count, x0, transforms, options: as of `Flow.sample`; by default as many as rows were measured.
        scale: strength; 1 is the likelihood's own.

    Returns:
        (B, *shape), or the codec's output shape.

    Raises:
        ValueError: the flow has another path or source.
    """
    flow.require_score()
    if not isinstance(flow.path, AffinePath):
        raise ValueError("posterior: an affine path is needed")
    if count is None and x0 is None:
        count = len(measurement.value)
    guide = MeasurementGuidance(flow, measurement, scale)
    return flow.sample(count, x0=x0, transforms=[*transforms, guide], **options)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).reshape(len(a), -1).sum(dim=1)


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
