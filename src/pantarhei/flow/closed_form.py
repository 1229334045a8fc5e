"""Flows whose velocity, score and density are known: Gaussian mixtures at both ends, independently coupled.

They test everything that is built on a learned field, and stand in for one: a `MixtureField` is a network for `Flow`.
Source: Albergo et al. 2303.08797, appendix A; Liu et al. 2209.03003 for the linear path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pantarhei.flow.paths import AffinePath, Linear


@dataclass(frozen=True)
class GaussianMixture:
    """sum_k weights[k] N(means[k], covariances[k]) in D dimensions.

    Args:
        weights: (K,), positive; normalised on construction.
        means: (K, D).
        covariances: (K, D, D), or (K,) for isotropic variances.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def __post_init__(self) -> None:
        k, d = self.means.shape
        if self.weights.shape != (k,) or not bool((self.weights > 0).all()):
            raise ValueError(f"weights: {k} positive numbers are needed")
        if self.covariances.shape == (k,):
            full = self.covariances[:, None, None] * torch.eye(d, dtype=self.means.dtype, device=self.means.device)
            object.__setattr__(self, "covariances", full)
        if self.covariances.shape != (k, d, d):
            raise ValueError(
                f"covariances: shape ({k}, {d}, {d}) or ({k},) is needed, got {tuple(self.covariances.shape)}"
            )
        object.__setattr__(self, "weights", self.weights / self.weights.sum())

    @staticmethod
    def standard(dimension: int, dtype: torch.dtype = torch.float64) -> GaussianMixture:
        """N(0, I)."""
        one = torch.ones(1, dtype=dtype)
        return GaussianMixture(one, torch.zeros(1, dimension, dtype=dtype), one)

    @property
    def dimension(self) -> int:
        """D."""
        return self.means.shape[1]

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at x (B, D), shape (B,), by log-sum-exp."""
        return torch.logsumexp(_log_components(x, self.means, self.covariances, self.weights.log()), dim=1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws, (count, D)."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dimension, dtype=self.means.dtype, generator=generator)
        factor = torch.linalg.cholesky(self.covariances)
        return self.means[which] + torch.einsum("bij,bj->bi", factor[which], noise)


class MixtureField(nn.Module):
    """The exact velocity of an affine path between two Gaussian mixtures: `field(x, t)` with x (B, D), t 0-d or (B,).

    Args:
        target: law of x1.
        source: law of x0; N(0, I) by default.
        path: the affine path; linear by default.
    """

    log_weights: Tensor
    means0: Tensor
    means1: Tensor
    covariances0: Tensor
    covariances1: Tensor

    def __init__(self, target: GaussianMixture, source: GaussianMixture | None = None, path: AffinePath | None = None):
        super().__init__()
        source = source or GaussianMixture.standard(target.dimension, target.means.dtype)
        self.target, self.source, self.path = target, source, path or Linear()
        # One component a pair of modes (i of the source, j of the target).
        k0, k1 = len(source.weights), len(target.weights)
        pair = torch.cartesian_prod(torch.arange(k0), torch.arange(k1)).reshape(-1, 2)
        self.register_buffer("log_weights", source.weights[pair[:, 0]].log() + target.weights[pair[:, 1]].log())
        self.register_buffer("means0", source.means[pair[:, 0]])
        self.register_buffer("means1", target.means[pair[:, 1]])
        self.register_buffer("covariances0", source.covariances[pair[:, 0]])
        self.register_buffer("covariances1", target.covariances[pair[:, 1]])

    def _components(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Means (.., K, D) and covariances (.., K, D, D) at t; with a leading B where t is (B,)."""
        a, s = self.path.alpha(t)[..., None, None], self.path.sigma(t)[..., None, None]
        means = s * self.means0 + a * self.means1
        a, s = a[..., None], s[..., None]
        return means, s**2 * self.covariances0 + a**2 * self.covariances1

    def _responsible(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Responsibilities (B, K) and C^-1 (x - m), (B, K, D)."""
        means, covariances = self._components(_one_time(t).to(x))
        log_parts = _log_components(x, means, covariances, self.log_weights)
        solved = torch.linalg.solve(covariances, (x[:, None] - means)[..., None])[..., 0]
        return torch.softmax(log_parts, dim=1), solved

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """E[dx_t/dt | x_t = x]."""
        t = _one_time(t).to(x)
        weights, solved = self._responsible(x, t)
        a, s = self.path.alpha(t)[..., None, None], self.path.sigma(t)[..., None, None]
        da, ds = self.path.alpha_dot(t)[..., None, None], self.path.sigma_dot(t)[..., None, None]
        drift = ds * self.means0 + da * self.means1
        half_rate = (s * ds)[..., None] * self.covariances0 + (a * da)[..., None] * self.covariances1
        return torch.einsum("bk,bkd->bd", weights, drift + (half_rate @ solved[..., None])[..., 0])

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x), (B, D)."""
        weights, solved = self._responsible(x, t)
        return -torch.einsum("bk,bkd->bd", weights, solved)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x1 | x_t = x], (B, D)."""
        weights, solved = self._responsible(x, t)
        a = self.path.alpha(_one_time(t).to(x))[..., None, None]
        shift = a[..., None] * self.covariances1 @ solved[..., None]
        return torch.einsum("bk,bkd->bd", weights, self.means1 + shift[..., 0])

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t(x), (B,)."""
        means, covariances = self._components(_one_time(t).to(x))
        return torch.logsumexp(_log_components(x, means, covariances, self.log_weights), dim=1)


def _one_time(t: Tensor) -> Tensor:
    """A number that was expanded to all rows as that number again: one set of components instead of one a row."""
    return t[0] if t.ndim and t.stride(0) == 0 else t


def _log_components(x: Tensor, means: Tensor, covariances: Tensor, log_weights: Tensor) -> Tensor:
    """log(w_k N(x; m_k, C_k)), (B, K); means and covariances may have a leading B."""
    factor = torch.linalg.cholesky(covariances)
    difference = (x[:, None] - means)[..., None]
    white = torch.linalg.solve_triangular(factor, difference, upper=False)[..., 0]
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
    d = x.shape[1]
    return log_weights - 0.5 * white.square().sum(dim=-1) - log_det - 0.5 * d * math.log(2 * math.pi)
