"""Fields that need no training: they are read off the points themselves, for tests and for small data sets.

Both are data predictions, `Flow(network, predicts="data")`: the average of the x1 that lie where x_t is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pantarhei.flow.paths import AffinePath, Linear


class NeighbourField(nn.Module):
    """E[x1 | x_t] of any coupling, from the nearest of its pairs (Liu et al. 2209.03003, section 2.2).

    A Gaussian-weighted mean of x1 over the `neighbours` pairs whose x_t^i = alpha(t) x1_i + sigma(t) x0_i lie nearest,
    weight exp(-|x_t^i - x|^2 / (2 bandwidth^2)). Its cost is one distance to every pair a row and step.

    Args:
        x0, x1: the pairs, (N, D).
        neighbours: how many to average.
        bandwidth: of the weights.
        path: the path.

    Raises:
        ValueError: the pairs differ in shape, or a number is not positive.
    """

    x0: Tensor
    x1: Tensor

    def __init__(
        self, x0: Tensor, x1: Tensor, *, neighbours: int = 100, bandwidth: float = 1.0, path: AffinePath | None = None
    ):
        super().__init__()
        if x0.shape != x1.shape or x0.ndim != 2:
            raise ValueError(f"x0, x1: pairs (N, D) are needed, got {tuple(x0.shape)} and {tuple(x1.shape)}")
        if neighbours < 1 or not bandwidth > 0:
            raise ValueError(f"neighbours, bandwidth: must be positive, got {neighbours} and {bandwidth}")
        self.register_buffer("x0", x0)
        self.register_buffer("x1", x1)
        self.neighbours, self.bandwidth, self.path = min(neighbours, len(x0)), bandwidth, path or Linear()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, D), t (B,) to (B, D); rows may have different times."""
        out = torch.empty_like(x)
        for moment in t.unique():
            rows = t == moment
            states = self.path.alpha(moment) * self.x1 + self.path.sigma(moment) * self.x0
            distance, nearest = torch.cdist(x[rows], states).topk(self.neighbours, dim=1, largest=False)
            weights = torch.softmax(-0.5 * (distance / self.bandwidth).square(), dim=1)
            out[rows] = torch.einsum("bn,bnd->bd", weights, self.x1[nearest])
        return out


class EmpiricalField(nn.Module):
    """E[x1 | x_t] for independent N(0, I) noise and the uniform law on given points: what a network would learn at best.

    Its flow ends in the given points themselves: it is exact, and it memorises.

    Args:
        points: (N, *shape).
        path: the path.
    """

    points: Tensor

    def __init__(self, points: Tensor, path: AffinePath | None = None):
        super().__init__()
        if points.ndim < 2 or len(points) < 1:
            raise ValueError(f"points: shape (N, ...) with N >= 1 is needed, got {tuple(points.shape)}")
        self.register_buffer("points", points)
        self.path = path or Linear()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, *shape), t (B,) to (B, *shape)."""
        flat, known = x.flatten(1), self.points.flatten(1)
        alpha, sigma = self.path.alpha(t).to(x)[:, None], self.path.sigma(t).to(x)[:, None]
        # |x - alpha p|^2, expanded so that rows may have different times; x's own square cancels in the softmax.
        fit = alpha * flat @ known.T - 0.5 * alpha.square() * known.square().sum(dim=1)
        weights = torch.softmax(fit / sigma.square().clamp_min(torch.finfo(x.dtype).tiny), dim=1)
        return (weights @ known).reshape(x.shape)
