"""Steering samples with what is known of them: a classifier, a part of the data, or data to begin with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pantarhei.flow.affine import AffinePath
from pantarhei.flow.conditions import Condition
from pantarhei.flow.flow import ConditionLike, Flow
from pantarhei.flow.modes import evaluation_mode
from pantarhei.flow.trajectory import TrajectoryModel
from pantarhei.flow.transforms import ConditionedField

# log p(y | x_t) of noisy states (B, ...) at t, 0-d or (B,), differentiable in x: (B,).
NoisyClassifier = Callable[[Tensor, Tensor], Tensor]
Control = Callable[[Tensor, float, int], Tensor]
CLEAN = 0.01  # sigma / alpha below which a state is left as it is


def slope_of(classifier: NoisyClassifier, x: Tensor, t: Tensor, *, twice: bool = False) -> Tensor:
    """grad log p(y | x_t) with respect to x, like x; `twice` lets a gradient with respect to x pass through it."""
    twice = twice and x.requires_grad and torch.is_grad_enabled()
    with torch.enable_grad():
        seen = x if twice else x.detach().requires_grad_(True)
        return torch.autograd.grad(classifier(seen, t).sum(), seen, create_graph=twice)[0]


@dataclass(frozen=True)
class ClassifierGuidance:
    """Classifier guidance (Dhariwal & Nichol 2105.05233) of a velocity: the score plus scale * grad log p(y | x_t).

    A field transform, for `Flow.sample(transforms=[...])` on an affine path with a Gaussian source. The noise estimate loses
    sigma * scale * grad, the data estimate gains sigma^2 / alpha times it.

    Attributes:
        classifier: log p(y | x_t) of noisy states.
        path: of the flow.
        scale: strength.
        twice: let gradients through the sampler pass through the slope, which takes the classifier's second derivative;
            without it they are biased, as in the published code of AdjointDPM, and cheaper.
    """

    classifier: NoisyClassifier
    path: AffinePath
    scale: float = 1.0
    twice: bool = True

    def __call__(
        self, field: ConditionedField, x: Tensor, t: Tensor, condition: Condition | None, step: int | None
    ) -> Tensor:
        """The guided velocity."""
        share = self.scale * self.path.velocity_of_score(t, x)
        return field(x, t, condition) + share * slope_of(self.classifier, x, t, twice=self.twice)


def langevin(
    flow: Flow,
    classifier: NoisyClassifier | None = None,
    *,
    scale: float = 1.0,
    snr: float = 0.16,
    steps: int = 1,
    condition: ConditionLike = None,
    generator: torch.Generator | None = None,
) -> Control:
    """A control of jumps: Langevin steps along the score (Kim et al. 2310.02279, appendix; Song et al. 2011.13456).

    After each jump that leaves noise the state moves by e g + sqrt(2 e) z, with g = score + scale * grad log p(y | x_t), z
    standard normal and e = 2 (snr sigma)^2. The papers have the mean of |z| / |g| over a batch for sigma,
    which is its value where data are many-dimensional; taken row by row it breaks where a score vanishes.

    Args:
        flow: whose score it is: a trajectory model's own, or a better one's.
        classifier: log p(y | x_t); without one the steps only correct the state.
        scale: strength of the classifier.
        snr: target ratio of step and noise.
        steps: after each jump.
        condition: of the score.
        generator: draws z.

    Raises:
        ValueError: the flow has no score.
    """
    flow.require_score()

    def control(x: Tensor, t: float, number: int) -> Tensor:
        time = torch.as_tensor(t, dtype=torch.float64)
        sigma = float(flow.path.sigma(time))
        if sigma <= CLEAN * float(flow.path.alpha(time)):
            return x
        length = 2 * (snr * sigma) ** 2
        at = x.new_full((), t, dtype=torch.promote_types(x.dtype, torch.float32))
        for _ in range(steps):
            slope = flow.score(x, at, condition)
            if classifier is not None:
                slope = slope + scale * slope_of(classifier, x, at)
            z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            x = x + length * slope + math.sqrt(2 * length) * z
        return x

    return control


def known_part(
    flow: Flow,
    data: Tensor,
    known: Tensor | Callable[[Tensor], Tensor],
    generator: torch.Generator | None = None,
) -> Control:
    """A control of jumps: what is known of the data is put back after each (Song et al. 2303.01469, appendix).

    Args:
        flow: on an affine path with a Gaussian source.
        data: the data (B, *shape), in the flow's space; anything where they are not known.
        known: a mask, true where they are known, of a shape that broadcasts to theirs (in-painting); or an orthogonal
            projection on what is known of them, such as `grey_part` (colouring) and `coarse_part(n)` (super-resolution).
        generator: draws the noise of the known part.
    """
    project = known if callable(known) else partial(torch.mul, known.bool())

    def control(x: Tensor, t: float, number: int) -> Tensor:
        time = torch.as_tensor(t, dtype=torch.float64)
        alpha, sigma = float(flow.path.alpha(time)), float(flow.path.sigma(time))
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        noisy = alpha * data + sigma * noise if sigma > CLEAN * alpha else data
        return x + project(noisy - x)

    return control


def grey_part(x: Tensor) -> Tensor:
    """The projection of images (B, C, H, W) on those whose channels are equal: their mean over the channels."""
    return x.mean(dim=1, keepdim=True).expand_as(x)


def coarse_part(factor: int) -> Callable[[Tensor], Tensor]:
    """The projection of images (B, C, H, W) on those that are constant on squares of `factor` pixels: their means there.

    Raises:
        ValueError: when it is used on images whose sides are no multiples of the factor.
    """

    def project(x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"known: images with sides that are multiples of {factor} are needed, got {tuple(x.shape)}"
            )
        means = F.avg_pool2d(x, factor)
        return means.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)

    return project


@torch.no_grad()
def redrawn(
    flow: TrajectoryModel,
    data: Tensor,
    start: float,
    steps: int = 1,
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """Data with noise up to a time, and jumps from there: variations of images, images from strokes (2108.01073).

    Args:
        flow: a trajectory model.
        data: images or points (B, *output shape).
        start: the time; the earlier, the less of the data stays.
        steps: jumps.
        generator: draws all noise.
        options: gamma, grid and moves of `TrajectoryModel.plan`; condition, guidance and control of its `jumps`.

    Returns:
        Data of the same shape.

    Raises:
        ValueError: a time outside the flow's interval, or options that do not go together.
    """
    x1 = flow.encode(data)
    time = torch.as_tensor(start, dtype=torch.float64)
    noise = torch.randn(x1.shape, generator=generator, dtype=x1.dtype, device=x1.device)
    x = float(flow.path.alpha(time)) * x1 + float(flow.path.sigma(time)) * noise
    planned = {name: options.pop(name) for name in ("gamma", "grid", "moves") if name in options}
    moves = flow.plan(steps, start=start, **planned)
    with evaluation_mode(flow.network):
        return flow.decode(flow.jumps(x, moves, start=start, generator=generator, **options))


@torch.no_grad()
def rejection_sample(
    flow: Flow,
    count: int,
    log_prob: Callable[[Tensor], Tensor],
    *,
    keep: float = 0.5,
    condition: ConditionLike = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """The samples that a classifier is surest of, `keep` of those drawn (classifier-rejection sampling, Razavi et al. 2019).

    Args:
        flow: any.
        count: how many to return.
        log_prob: log p(y | x) of samples as `Flow.sample` gives them, (B,).
        keep: share of the draws that is kept, in (0, 1].
        condition: one row for all.
        generator, options: of `Flow.sample`.

    Raises:
        ValueError: a share out of range.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: must lie in (0, 1], got {keep}")
    x = flow.sample(math.ceil(count / keep), condition=condition, generator=generator, **options)
    return x[log_prob(x).topk(count).indices]
