"""The path between a source and data, and the affine kind: x_t = alpha(t) x1 + sigma(t) x0, t = 0 source, t = 1 data.

alpha multiplies data and sigma the source in the whole project, whatever a paper calls them (docs/glossary).
Coefficients are functions of a tensor `t` and keep its dtype and shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pantarhei.solve.state import per_row


@runtime_checkable
class Path(Protocol):
    """Anything that draws a point of a bridge between x0 and x1 and its time derivative."""

    def sample(self, x0: Tensor, x1: Tensor, z: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor]:
        """`(x_t, dx_t/dt)` for times t of shape (B,) or 0-d; `z` is the latent noise of paths that have one."""


class Coefficients(NamedTuple):
    """alpha, sigma and their time derivatives at some t, shaped to multiply the state."""

    alpha: Tensor
    sigma: Tensor
    alpha_dot: Tensor
    sigma_dot: Tensor


@dataclass(frozen=True)
class AffinePath:
    """A path x_t = alpha(t) x1 + sigma(t) x0 with differentiable coefficients and no latent noise.

    Subclasses give `alpha` and `sigma`, and their derivatives where a closed form exists (else forward-mode autograd).
    `regular` is the closed interval of t on which all four are finite.
    """

    @property
    def regular(self) -> tuple[float, float]:
        """The closed interval of t on which the coefficients and their derivatives are finite."""
        return (0.0, 1.0)

    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the data."""
        raise TypeError(f"{type(self).__name__} does not define alpha")

    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the source."""
        raise TypeError(f"{type(self).__name__} does not define sigma")

    def level(self, t: Tensor) -> Tensor:
        """The noise level, which the score is divided by: sigma."""
        return self.sigma(t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """d alpha / dt."""
        return _derivative(self.alpha, t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """d sigma / dt."""
        return _derivative(self.sigma, t)

    def at(self, t: Tensor, like: Tensor) -> Coefficients:
        """All four coefficients at t, 0-d or (B,), in shape and dtype to multiply `like` (B, ...)."""
        values = (self.alpha(t), self.sigma(t), self.alpha_dot(t), self.sigma_dot(t))
        return Coefficients(*(per_row(v, like).to(like.dtype) for v in values))

    def velocity_of_score(self, t: Tensor, like: Tensor) -> Tensor:
        """What the velocity gains where the score gains 1: alpha' sigma^2 / alpha - sigma' sigma."""
        c = self.at(t, like)
        return c.alpha_dot * c.sigma**2 / c.alpha.clamp_min(1e-3) - c.sigma_dot * c.sigma

    def sample(self, x0: Tensor, x1: Tensor, z: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor]:
        """The point `x_t` and the derivative `alpha' x1 + sigma' x0`; there is no latent noise, so `z` is not used."""
        c = self.at(t, x1)
        return c.alpha * x1 + c.sigma * x0, c.alpha_dot * x1 + c.sigma_dot * x0

    def time_at(self, ratio: Tensor) -> Tensor:
        """The t at which alpha(t) / sigma(t) equals `ratio` >= 0 (rising in t), by bisection in float64.

        Ratios outside the path's range give its nearest end.
        """
        target = ratio.double()
        low = torch.full_like(target, self.regular[0])
        high = torch.full_like(target, 1.0)
        for _ in range(60):
            middle = (low + high) / 2
            # alpha - ratio sigma rises with t and has no pole where sigma vanishes.
            above = self.alpha(middle) - target * self.sigma(middle) > 0
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return ((low + high) / 2).to(ratio.dtype)

    def spec(self) -> dict[str, Any]:
        """The path as data: its name in `PATHS` and its constants."""
        from pantarhei.flow.paths import PATHS  # the table stands above its entries

        return {"name": next(name for name, kind in PATHS.items() if kind is type(self)), **asdict(self)}


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    pair: Any = torch.func.jvp(function, (t,), (torch.ones_like(t),))
    return pair[1]
