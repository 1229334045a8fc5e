"""The Schroedinger bridge between two Gaussians in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pantarhei.flow.closed_form import GaussianMixture
from pantarhei.flow.entropic import check_epsilon


class GaussianBridge(nn.Module):
    """The Schroedinger bridge between two Gaussians, in closed form (Bunne et al. 2202.05722; Mallasto et al. 2006.03416).

    It is also a network: on `Interpolant(Linear(), Brownian(2 * epsilon))` it predicts `Fields(names=("drift", "latent"),
    epsilon=epsilon)` exactly. All fields are finite on the whole of [0, 1].

    Args:
        source, target: laws of one component.
        epsilon: of the reference process dX = sqrt(2 epsilon) dW, positive.

    Raises:
        ValueError: a mixture of several Gaussians, two dimensions, or an epsilon that is not positive.
    """

    mean0: Tensor
    mean1: Tensor
    covariance0: Tensor
    covariance1: Tensor
    cross: Tensor

    def __init__(self, source: GaussianMixture, target: GaussianMixture, epsilon: float):
        super().__init__()
        for name, law in (("source", source), ("target", target)):
            if len(law.weights) != 1:
                raise ValueError(f"{name}: one Gaussian is needed, got a mixture of {len(law.weights)}")
        if source.dimension != target.dimension:
            raise ValueError(f"target: dimension {source.dimension} like the source is needed, got {target.dimension}")
        self.epsilon = check_epsilon(epsilon)
        self.register_buffer("mean0", source.means[0])
        self.register_buffer("mean1", target.means[0])
        self.register_buffer("covariance0", source.covariances[0])
        self.register_buffer("covariance1", target.covariances[0])
        self.register_buffer("cross", _entropic_cross(source.covariances[0], target.covariances[0], epsilon))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Forward drift and E[z | x_t], (B, D) to (B, 2 D); t 0-d or (B,)."""
        t = t.to(x)
        gamma = torch.sqrt(2 * self.epsilon * t * (1 - t)).reshape(-1, 1)
        return torch.cat([self.drift(x, t), -gamma * self.score(x, t)], dim=1)

    def mean(self, t: Tensor) -> Tensor:
        """Mean at t, (*t.shape, D)."""
        t = t[..., None].to(self.mean0)
        return (1 - t) * self.mean0 + t * self.mean1

    def covariance(self, t: Tensor) -> Tensor:
        """Covariance at t, (*t.shape, D, D)."""
        t = t[..., None, None].to(self.cross)
        eye = torch.eye(len(self.mean0)).to(self.cross)
        mixed = self.cross + self.cross.T + 2 * self.epsilon * eye
        return (1 - t) ** 2 * self.covariance0 + t**2 * self.covariance1 + t * (1 - t) * mixed

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity of the ODE with the bridge's marginals, (B, D); t 0-d or (B,)."""
        return (self.mean1 - self.mean0).to(x) + self._linear(self._rate(t), x, t)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x), (B, D)."""
        return self._linear(-torch.eye(x.shape[1]).to(self.cross), x, t)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """Of the forward equation dX = drift dt + sqrt(2 epsilon) dW, (B, D)."""
        return self.velocity(x, t) + self.epsilon * self.score(x, t)

    def backward_drift(self, x: Tensor, t: Tensor) -> Tensor:
        """Of the equation run from t = 1 down, (B, D)."""
        return self.velocity(x, t) - self.epsilon * self.score(x, t)

    def cost(self) -> float:
        """E|x1 - x0|^2 of its ends."""
        spread = torch.trace(self.covariance0 + self.covariance1 - 2 * self.cross)
        return float((self.mean1 - self.mean0).square().sum() + spread)

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Ends x0 and x1 of `count` paths, each (count, D)."""
        d = len(self.mean0)
        joint = torch.cat(
            [torch.cat([self.covariance0, self.cross], dim=1), torch.cat([self.cross.T, self.covariance1], dim=1)]
        )
        noise = torch.randn(count, 2 * d, generator=generator, dtype=joint.dtype, device=joint.device)
        ends = noise @ torch.linalg.cholesky(joint).T
        return self.mean0 + ends[:, :d], self.mean1 + ends[:, d:]

    def _rate(self, t: Tensor) -> Tensor:
        """Covariance of dx_t/dt with x_t; half of it plus its transpose is half the covariance's derivative."""
        t = t[..., None, None].to(self.cross)
        eye = torch.eye(len(self.mean0)).to(self.cross)
        ends = (1 - t) * (self.cross.T - self.covariance0) + t * (self.covariance1 - self.cross)
        return ends + self.epsilon * (1 - 2 * t) * eye

    def _linear(self, matrix: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """matrix covariance(t)^-1 (x - mean(t)), row by row."""
        away = (x.to(self.cross) - self.mean(t))[..., None]
        return (matrix @ torch.linalg.solve(self.covariance(t), away))[..., 0].to(x)


def _entropic_cross(first: Tensor, second: Tensor, epsilon: float) -> Tensor:
    """Cov(x0, x1) of the plan: with s = 2 epsilon and R = S0^1/2, R ((R S1 R + s^2/4)^1/2 - s/2) R^-1."""
    dtype = first.dtype
    root, inverse = _roots(first.double())
    eye = torch.eye(len(first), dtype=torch.float64, device=first.device)
    inner, _ = _roots(root @ second.double() @ root + epsilon**2 * eye)
    return (root @ (inner - epsilon * eye) @ inverse).to(dtype)


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
