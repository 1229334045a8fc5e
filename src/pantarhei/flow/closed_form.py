"""Flows whose fields and densities are known: Gaussian mixtures at both ends, with or without a latent between them.

They test everything that is built on a learned field, and stand in for one: a `MixtureField` is a network for `Flow`.
Source: Albergo et al. 2303.08797, appendix A; Liu et al. 2209.03003 for the linear path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.flow.fields import build_fields
from pantarhei.flow.interpolants import Interpolant
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
        return torch.logsumexp(_log_components(x, self.means, self.covariances, self.weights.log())[0], dim=1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws, (count, D)."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dimension, dtype=self.means.dtype, generator=generator)
        factor = torch.linalg.cholesky(self.covariances)
        return self.means[which] + torch.einsum("bij,bj->bi", factor[which], noise)


class MixtureField(nn.Module):
    """The exact fields of a path between two Gaussian mixtures: `field(x, t)` with x (B, D), t 0-d or (B,).

    Args:
        target: law of x1.
        source: law of x0; N(0, I) by default.
        path: an affine path or an interpolant with a latent; linear by default.
        cross: E[(x0 - m0)(x1 - m1)^T] (D, D) of correlated ends, for single Gaussians; independent by default.
        predicts: the fields that `forward` stacks, like a network of `Flow(predicts=...)`: "velocity", "velocity+latent"...
    """

    log_weights: Tensor
    means0: Tensor
    means1: Tensor
    covariances0: Tensor
    covariances1: Tensor
    cross: Tensor

    def __init__(
        self,
        target: GaussianMixture,
        source: GaussianMixture | None = None,
        path: AffinePath | Interpolant | None = None,
        *,
        cross: Tensor | None = None,
        predicts: str = "velocity",
    ):
        super().__init__()
        source = source or GaussianMixture.standard(target.dimension, target.means.dtype)
        self.target, self.source, self.path = target, source, path or Linear()
        self.predicts = build_fields(predicts).names
        # One component a pair of modes (i of the source, j of the target).
        k0, k1 = len(source.weights), len(target.weights)
        if cross is not None and (k0, k1, tuple(cross.shape)) != (1, 1, (target.dimension,) * 2):
            raise ValueError("cross: correlated ends are single Gaussians with a (D, D) cross-covariance")
        pair = torch.cartesian_prod(torch.arange(k0), torch.arange(k1)).reshape(-1, 2)
        self.register_buffer("log_weights", source.weights[pair[:, 0]].log() + target.weights[pair[:, 1]].log())
        self.register_buffer("means0", source.means[pair[:, 0]])
        self.register_buffer("means1", target.means[pair[:, 1]])
        self.register_buffer("covariances0", source.covariances[pair[:, 0]])
        self.register_buffer("covariances1", target.covariances[pair[:, 1]])
        d = target.dimension
        self.register_buffer("cross", torch.zeros(d, d).to(target.means) if cross is None else cross.to(target.means))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The fields named by `predicts`, stacked along dimension 1; E[dx_t/dt | x_t = x] by default."""
        at = self._at(x, t)
        return torch.cat([getattr(at, name) for name in self.predicts], dim=1)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x), (B, D)."""
        return self._at(x, t).score

    def latent(self, x: Tensor, t: Tensor) -> Tensor:
        """E[z | x_t = x] of a path with a latent, (B, D)."""
        return self._at(x, t).latent

    def deterministic(self, x: Tensor, t: Tensor) -> Tensor:
        """E[alpha' x1 + sigma' x0 | x_t = x], the velocity without the latent's motion, (B, D)."""
        return self._at(x, t).deterministic

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x1 | x_t = x], (B, D)."""
        return self._at(x, t).data

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t(x), (B,)."""
        return self._at(x, t).log_prob

    def _at(self, x: Tensor, t: Tensor) -> _Conditional:
        return _Conditional(self, x, _one_time(t).to(x))


class _Conditional:
    """The Gaussian law of (x0, x1, z) given x_t = x, mode by mode: every field is a mean of it."""

    def __init__(self, field: MixtureField, x: Tensor, t: Tensor):
        path: Any = field.path
        self._field = field
        latent = isinstance(path, Interpolant)
        ends = path.ends if latent else path

        def shaped(value: Tensor) -> Tensor:
            return value[..., None, None]  # to multiply (K, D)

        self._a, self._s = shaped(ends.alpha(t)), shaped(ends.sigma(t))
        self._da, self._ds = shaped(ends.alpha_dot(t)), shaped(ends.sigma_dot(t))
        self._gamma = path.gamma.value(t) if latent else torch.zeros_like(t)
        self._product = path.gamma.product(t) if latent else torch.zeros_like(t)
        self._eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        self._means = self._s * field.means0 + self._a * field.means1
        a, s = self._a[..., None], self._s[..., None]
        both = field.cross + field.cross.T
        self._covariances = s**2 * field.covariances0 + a**2 * field.covariances1 + a * s * both
        self._covariances = self._covariances + (self._gamma**2)[..., None, None, None] * self._eye
        parts, white, factor = _log_components(x, self._means, self._covariances, field.log_weights)
        self.log_prob = torch.logsumexp(parts, dim=1)
        self._weights = torch.softmax(parts, dim=1)
        self._solved = _triangular(factor.mT, white, upper=True)

    def _mean(self, constant: Tensor | float, with_x: Tensor) -> Tensor:
        """E[y | x_t = x] from the means of y and its covariance with x_t, (..., K, D, D)."""
        which = "kij,bkj->bki" if with_x.ndim == 3 else "bkij,bkj->bki"
        return torch.einsum("bk,bkd->bd", self._weights, constant + torch.einsum(which, with_x, self._solved))

    @property
    def score(self) -> Tensor:
        return -torch.einsum("bk,bkd->bd", self._weights, self._solved)

    @property
    def latent(self) -> Tensor:
        return -self._gamma[..., None] * self.score

    @property
    def data(self) -> Tensor:
        f = self._field
        return self._mean(f.means1, self._a[..., None] * f.covariances1 + self._s[..., None] * f.cross.T)

    @property
    def deterministic(self) -> Tensor:
        return self._rate(self._product * 0)

    @property
    def velocity(self) -> Tensor:
        return self._rate(self._product)

    def _rate(self, product: Tensor) -> Tensor:
        f = self._field
        a, s, da, ds = (value[..., None] for value in (self._a, self._s, self._da, self._ds))
        with_x = s * ds * f.covariances0 + a * da * f.covariances1 + ds * a * f.cross + da * s * f.cross.T
        drift = self._ds * f.means0 + self._da * f.means1
        return self._mean(drift, with_x + product[..., None, None, None] * self._eye)


def _one_time(t: Tensor) -> Tensor:
    """A number that was expanded to all rows as that number again: one set of components instead of one a row."""
    return t[0] if t.ndim and t.stride(0) == 0 else t


def _log_components(
    x: Tensor, means: Tensor, covariances: Tensor, log_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log(w_k N(x; m_k, C_k)) (B, K), whitened differences (B, K, D), Cholesky factors ([B,] K, D, D)."""
    factor = torch.linalg.cholesky(covariances)
    white = _triangular(factor, x[:, None] - means, upper=False)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
    d = x.shape[1]
    return log_weights - 0.5 * white.square().sum(dim=-1) - log_det - 0.5 * d * math.log(2 * math.pi), white, factor


def _triangular(factor: Tensor, values: Tensor, *, upper: bool) -> Tensor:
    """Solve triangular systems for values (B, K, D); factors shared by all rows are used once each."""
    if factor.ndim == 4:
        return torch.linalg.solve_triangular(factor, values[..., None], upper=upper)[..., 0]
    return torch.linalg.solve_triangular(factor, values.permute(1, 2, 0), upper=upper).permute(2, 0, 1)
