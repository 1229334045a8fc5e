"""Steering samples with what is known of them: a classifier, or a part of the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pantarhei.flow.affine import AffinePath
from pantarhei.flow.conditions import Condition
from pantarhei.flow.flow import ConditionLike, Flow
from pantarhei.flow.transforms import ConditionedField
from pantarhei.solve.state import per_row

# log p(y | x_t) of noisy states (B, ...) at t, 0-d or (B,), differentiable in x: (B,).
NoisyClassifier = Callable[[Tensor, Tensor], Tensor]
Control = Callable[[Tensor, float, int], Tensor]
CLEAN = 0.01  # sigma / alpha below which a state is left as it is


def slope_of(classifier: NoisyClassifier, x: Tensor, t: Tensor) -> Tensor:
    """grad log p(y | x_t) with respect to x, like x."""
    with torch.enable_grad():
        seen = x.detach().requires_grad_(True)
        return torch.autograd.grad(classifier(seen, t).sum(), seen)[0]


@dataclass(frozen=True)
class ClassifierGuidance:
    """Classifier guidance (Dhariwal & Nichol 2105.05233) of a velocity: the score plus scale * grad log p(y | x_t).

    A field transform, for `Flow.sample(transforms=[...])` on an affine path with a Gaussian source. The noise estimate loses
    sigma * scale * grad, the data estimate gains sigma^2 / alpha times it.

    Attributes:
        classifier: log p(y | x_t) of noisy states.
        path: of the flow.
        scale: strength.
    """

    classifier: NoisyClassifier
    path: AffinePath
    scale: float = 1.0

    def __call__(
        self, field: ConditionedField, x: Tensor, t: Tensor, condition: Condition | None, step: int | None
    ) -> Tensor:
        """The guided velocity."""
        c = self.path.at(t, x)
        share = c.alpha_dot * c.sigma**2 / c.alpha.clamp_min(1e-3) - c.sigma_dot * c.sigma
        return field(x, t, condition) + self.scale * share * slope_of(self.classifier, x, t)


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
    standard normal and e = 2 (snr |z| / |g|)^2, row by row.

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
        if float(flow.path.sigma(time)) <= CLEAN * float(flow.path.alpha(time)):
            return x
        at = x.new_full((), t, dtype=torch.promote_types(x.dtype, torch.float32))
        for _ in range(steps):
            slope = flow.score(x, at, condition)
            if classifier is not None:
                slope = slope + scale * slope_of(classifier, x, at)
            z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            ratio = z.flatten(1).norm(dim=1) / slope.flatten(1).norm(dim=1).clamp_min(1e-12)
            length = per_row(2 * (snr * ratio) ** 2, x)
            x = x + length * slope + torch.sqrt(2 * length) * z
        return x

    return control


def known_part(flow: Flow, data: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Control:
    """A control of jumps: what is known of the data is put back after each (inpainting; Song et al. 2303.01469, appendix).

    Args:
        flow: on an affine path with a Gaussian source.
        data: the data (B, *shape), in the flow's space; anything where they are not known.
        mask: true where they are known, of a shape that broadcasts to theirs.
        generator: draws the noise of the known part.
    """

    def control(x: Tensor, t: float, number: int) -> Tensor:
        time = torch.as_tensor(t, dtype=torch.float64)
        alpha, sigma = float(flow.path.alpha(time)), float(flow.path.sigma(time))
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return torch.where(mask.bool(), alpha * data + (sigma if sigma > CLEAN * alpha else 0.0) * noise, x)

    return control


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
