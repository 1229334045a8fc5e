"""Schroedinger bridges between weighted points, by Sinkhorn's algorithm.

The bridge between two laws is the process closest in relative entropy to dX = sqrt(2 epsilon) dW, started anywhere, among
those that have these laws at t = 0 and 1. Its ends are coupled by entropic optimal transport with cost |x1 - x0|^2 / 2 and
regularisation 2 epsilon, and given its ends it is a Brownian bridge of variance 2 epsilon t (1 - t) (Leonard 1308.0215).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class EntropicField(nn.Module):
    """The drift of the Schroedinger bridge to points, or back to them: `field(x, t)`, x (B, D), t 0-d or (B,), to (B, D).

    With h(x, t) the heat flow of exp(potential / 2 epsilon) from its end to t, the forward drift is 2 epsilon grad log h,
    that is (m(x, t) - x) / (1 - t) with m a mean of the points weighted by exp(potential / 2 epsilon) and by their nearness;
    the backward drift is (x - m(x, t)) / t (Pavon, Trigila, Tabak 1806.01364; Leonard 1308.0215).

    Args:
        points: the points of one end, (N, D): x1 for the forward drift, x0 for the backward one.
        potential: their Sinkhorn potential, (N,), in units of the cost |x1 - x0|^2 / 2.
        epsilon: of the reference process.
        weights: of the points, (N,), positive; even by default.
        backward: whether this is the drift of the equation run from t = 1 down. It is defined for t > 0, the forward one for
            t < 1.

    Raises:
        ValueError: shapes do not match, or epsilon is not positive.
    """

    points: Tensor
    log_weights: Tensor

    def __init__(
        self,
        points: Tensor,
        potential: Tensor,
        epsilon: float,
        *,
        weights: Tensor | None = None,
        backward: bool = False,
    ):
        super().__init__()
        self.epsilon, self.backward = check_epsilon(epsilon), backward
        weights = _check_points("points", points, weights)
        if potential.shape != weights.shape:
            raise ValueError(f"potential: shape ({len(points)},) is needed, got {tuple(potential.shape)}")
        self.register_buffer("points", points)
        self.register_buffer("log_weights", weights.log() + (potential / (2 * epsilon)).to(weights))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The drift.

        Raises:
            ValueError: at the end where it does not exist.
        """
        t = t.to(x).reshape(-1, 1)
        left = t if self.backward else 1 - t
        if bool((left <= 0).any()):
            raise ValueError(
                f"t: this drift exists for {'t > 0' if self.backward else 't < 1'}, got {t.flatten()[0]:g}"
            )
        points = self.points.to(x)
        # |x - p|^2 without |x|^2, which cancels in the softmax.
        nearness = (x @ points.T - 0.5 * points.square().sum(dim=1)) / (2 * self.epsilon * left)
        mean = torch.softmax(self.log_weights.to(x) + nearness, dim=1) @ points
        return (x - mean) / left if self.backward else (mean - x) / left


@dataclass(frozen=True)
class Potentials:
    """The entropic optimal transport plan between two sets of weighted points, and the Schroedinger bridge that it spans.

    Attributes:
        x0, x1: the points, (N, D) and (M, D), float64.
        weights0, weights1: their weights, which sum to one.
        potential0, potential1: (N,) and (M,); the plan is weights0 weights1
            exp((potential0 + potential1 - cost) / 2 epsilon) with the cost |x1 - x0|^2 / 2.
        epsilon: of the reference process dX = sqrt(2 epsilon) dW.
        error: sum of the plan's deviations from weights0 (it meets weights1 exactly).
        iterations: how many it took.
    """

    x0: Tensor
    x1: Tensor
    weights0: Tensor
    weights1: Tensor
    potential0: Tensor
    potential1: Tensor
    epsilon: float
    error: float
    iterations: int

    def plan(self) -> Tensor:
        """The coupling of the points, (N, M)."""
        exponent = self.potential0[:, None] + self.potential1[None] - _cost(self.x0, self.x1)
        return self.weights0[:, None] * self.weights1[None] * torch.exp(exponent / (2 * self.epsilon))

    def cost(self) -> float:
        """E|x1 - x0|^2 under the plan."""
        return 2 * float((self.plan() * _cost(self.x0, self.x1)).sum())

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Pairs (x0, x1) drawn from the plan, each (count, D)."""
        rows = torch.multinomial(self.weights0, count, replacement=True, generator=generator)
        chosen, columns = rows.unique(return_inverse=True)
        plan = self.plan()[chosen].cumsum(dim=1)
        # Inverse transform row by row: multinomial takes one row a draw, which would copy the plan.
        u = torch.rand(count, generator=generator, dtype=plan.dtype, device=plan.device)
        partner = torch.empty_like(rows)
        for part in torch.arange(count, device=plan.device).split(4096):
            sums = plan[columns[part]]
            found = torch.searchsorted(sums, (u[part] * sums[:, -1])[:, None])[:, 0]
            partner[part] = found.clamp(max=len(self.x1) - 1)
        return self.x0[rows], self.x1[partner]

    def forward_field(self) -> EntropicField:
        """The drift of the bridge run from t = 0 up, for t < 1."""
        return EntropicField(self.x1, self.potential1, self.epsilon, weights=self.weights1)

    def backward_field(self) -> EntropicField:
        """The drift of the bridge run from t = 1 down, for t > 0."""
        return EntropicField(self.x0, self.potential0, self.epsilon, weights=self.weights0, backward=True)


def sinkhorn_potentials(
    x0: Tensor,
    x1: Tensor,
    epsilon: float,
    *,
    weights0: Tensor | None = None,
    weights1: Tensor | None = None,
    iterations: int = 2000,
    tolerance: float = 1e-6,
) -> Potentials:
    """Sinkhorn's algorithm in the log domain, float64 (Cuturi 1306.0895; Peyre and Cuturi 1803.00567, section 4.4).

    With nodes and weights of a quadrature rule instead of samples it gives the bridge between two densities.

    Args:
        x0, x1: points, (N, D) and (M, D); memory is N x M.
        epsilon: of the reference process dX = sqrt(2 epsilon) dW; the regularisation is 2 epsilon.
        weights0, weights1: positive weights, (N,) and (M,), normalised here; even by default.
        iterations: at most so many; the number needed grows like 1 / epsilon.
        tolerance: stop where the plan's row sums deviate from weights0 by this much in all; where it is not
            reached, a warning says so.

    Raises:
        ValueError: shapes do not match, a weight, `epsilon` or another number is not positive.
    """
    check_epsilon(epsilon)
    if iterations < 1 or not tolerance > 0:
        raise ValueError(f"iterations, tolerance: must be positive, got {iterations} and {tolerance}")
    weights0, weights1 = _check_points("x0", x0, weights0), _check_points("x1", x1, weights1)
    if x0.shape[1] != x1.shape[1]:
        raise ValueError(f"x1: points of dimension {x0.shape[1]} like x0 are needed, got {x1.shape[1]}")
    x0, x1, regularisation = x0.double(), x1.double(), 2 * epsilon
    kernel = -_cost(x0, x1) / regularisation
    log0, log1 = weights0.log(), weights1.log()
    u, v = torch.zeros_like(log0), torch.zeros_like(log1)  # potentials over the regularisation
    error, done = math.inf, 0
    while done < iterations and error > tolerance:
        updated = -torch.logsumexp(kernel + (log1 + v), dim=1)
        # The row sums of the plan before this update are weights0 exp(u - updated).
        error = float((weights0 * torch.expm1(u - updated)).abs().sum()) if done else math.inf
        if error <= tolerance:
            break
        u, done = updated, done + 1
        v = -torch.logsumexp(kernel + (log0 + u)[:, None], dim=0)
    if error > tolerance:
        warnings.warn(
            f"sinkhorn_potentials: after {done} iterations the row sums are off by {error:.2g} in all; "
            "raise iterations or epsilon",
            stacklevel=2,
        )
    return Potentials(x0, x1, weights0, weights1, regularisation * u, regularisation * v, epsilon, error, done)


def check_epsilon(epsilon: float) -> float:
    """epsilon, if it is a positive number.

    Raises:
        ValueError: it is not.
    """
    if not (isinstance(epsilon, (int, float)) and 0 < epsilon < math.inf):
        raise ValueError(f"epsilon: must be a positive number, got {epsilon!r}")
    return float(epsilon)


def _cost(x0: Tensor, x1: Tensor) -> Tensor:
    return 0.5 * torch.cdist(x0, x1, compute_mode="donot_use_mm_for_euclid_dist").square()


def _check_points(name: str, points: Tensor, weights: Tensor | None) -> Tensor:
    """The points' weights, normalised, float64."""
    if points.ndim != 2 or not len(points):
        raise ValueError(f"{name}: points (N, D) with N >= 1 are needed, got shape {tuple(points.shape)}")
    if weights is None:
        weights = points.new_ones(len(points))
    if weights.shape != (len(points),) or not bool((weights > 0).all()):
        raise ValueError(f"weights of {name}: {len(points)} positive numbers are needed")
    weights = weights.to(points.device, torch.float64)
    return weights / weights.sum()
