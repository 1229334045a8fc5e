"""What the network of a stochastic interpolant predicts: one field, or two stacked along dimension 1.

With e0, e1, ez the expectations of x0, x1, z given x_t, sigma e0 + alpha e1 + gamma ez = x_t, and an interpolant has the
velocity v = sigma' e0 + alpha' e1 + gamma' ez, its part u = v - gamma' ez without the latent's motion, and the score
s = -ez / gamma (Albergo et al. 2303.08797, theorem 2.6 and section 2.3). v gives the ODE; v and one of s, ez give every SDE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.flow.gammas import Gamma, NoLatent
from pantarhei.flow.interpolants import Interpolant, Mirror
from pantarhei.flow.predictions import Ends, Prediction, Velocity
from pantarhei.naming import unknown

FieldName = Literal["velocity", "deterministic", "drift", "latent", "score", "data", "source"]
# The sets of fields that say what a flow needs; "velocity" alone gives the ODE and nothing else.
SETS: tuple[tuple[FieldName, ...], ...] = (
    ("velocity",),
    ("velocity", "latent"),
    ("velocity", "score"),
    ("deterministic", "latent"),
    ("deterministic", "score"),
    ("drift", "latent"),
    ("drift", "score"),
    ("latent",),
    ("score",),
    ("drift",),
)


@dataclass(frozen=True)
class Fields(Prediction):
    """One or two fields of an interpolant.

    Attributes:
        margin: distance that is kept from ends at which a division by gamma is needed.
        names: which fields: "velocity" v, "deterministic" u, "drift" v + epsilon s, "latent" ez, "score" s; in the order
            in which the network stacks them. "latent" or "score" alone is enough on the mirror path.
        epsilon: of "drift": the noise (dX = drift dt + sqrt(2 epsilon) dW) that it belongs to; a number, or "foellmer" for
            half the square of c (1 - t), which keeps the target's variance finite at t = 0.
        start: name of the condition that holds x0, where x0 is given to the network: then "drift" or "velocity" alone also
            gives the score, that of x_t given x0.
    """

    margin: float = 1e-3
    names: tuple[FieldName, ...] = ("velocity", "latent")
    epsilon: float | str = 0.0
    start: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if self.names not in SETS:
            raise ValueError(unknown("predicts", "+".join(self.names), ["+".join(names) for names in SETS]))
        if isinstance(self.epsilon, str) and self.epsilon != "foellmer":
            raise ValueError(f"epsilon: must be a number or 'foellmer', got {self.epsilon!r}")

    def check(self, path: Interpolant) -> None:
        """Raise a ValueError where these fields do not give the velocity on this path."""
        only = self.names if len(self.names) == 1 else ()
        if isinstance(path.gamma, NoLatent) and {"latent", "score"} & set(self.names):
            raise ValueError("predicts: without a latent (gamma 'none') there is no 'latent' and no 'score' to predict")
        if only in (("latent",), ("score",)) and not isinstance(path.ends, Mirror):
            raise ValueError(f"predicts: {only[0]!r} alone is enough on the mirror path only; add 'velocity'")
        if only == ("drift",) and not self.start:
            raise ValueError("predicts: 'drift' alone needs a network that is given x0; name that condition (start=)")

    @property
    def stochastic(self) -> bool:
        """Whether these fields give one SDE and no ODE: a drift alone, of a process that leaves single points."""
        return self.names == ("drift",)

    @property
    def score_known(self) -> bool:
        """Whether these fields determine the score."""
        return "latent" in self.names or "score" in self.names or bool(self.start)

    def interval(self, path: Any) -> tuple[float, float]:
        """The path's own interval, less the margin where the velocity comes out of a division by gamma."""
        low, high = path.regular
        # u + gamma' ez needs gamma', and a drift its epsilon / gamma.
        by_slope = self.names in (("deterministic", "latent"), ("latent",)) and not _gentle(path.gamma)
        divided = by_slope or (len(self.names) == 2 and self.names[0] == "drift")
        return (low + self.margin, high - self.margin) if divided else (low, high)

    def split(self, output: Tensor) -> dict[str, Tensor]:
        """The fields in a network's output (B, fields * C, ...).

        Raises:
            ValueError: it cannot be split so.
        """
        if output.shape[1] % len(self.names):
            raise ValueError(
                f"network: {'+'.join(self.names)} are {len(self.names)} fields stacked along dimension 1, got an output of "
                f"shape {tuple(output.shape)}"
            )
        return dict(zip(self.names, output.chunk(len(self.names), dim=1), strict=True))

    def targets(self, path: Interpolant, x0: Tensor, x1: Tensor, z: Tensor, t: Tensor) -> dict[str, Tensor]:
        """The regression target of each field."""
        c = path.at(t, x1)
        rate = c.alpha_dot * x1 + c.sigma_dot * x0
        makers: dict[str, Callable[[], Tensor]] = {
            "velocity": lambda: rate + c.gamma_dot * z,
            "deterministic": lambda: rate,
            "drift": lambda: rate + self._drift_factor(path, t, x1) * z,
            "latent": lambda: z,
            "score": lambda: -z / c.gamma,
        }
        return {name: makers[name]() for name in self.names}

    def target(self, path: Any, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """There is no target without the latent.

        Raises:
            ValueError: always; it names the objective that draws one.
        """
        raise ValueError("objective: on a path with a latent train with flow.Interpolation, which draws the latent")

    def latent(self, path: Interpolant, x: Tensor, t: Tensor, output: Tensor, x0: Tensor | None = None) -> Tensor:
        """ez = E[z | x_t].

        Args:
            path: the interpolant.
            x, t, output: states, times and the network's output there.
            x0: where the network was given it.

        Raises:
            ValueError: these fields do not determine it.
        """
        fields = self.split(output)
        if "latent" in fields:
            return fields["latent"]
        c = path.at(t, x)
        if "score" in fields:
            return -c.gamma * fields["score"]
        if not self.start or x0 is None:
            raise ValueError(
                f"predicts: {'+'.join(self.names)} does not determine the latent, and with it the score; train with "
                "'velocity+latent'"
            )
        # Two linear equations in e1 and ez, for x0 is known.
        (name, value), factor = next(iter(fields.items())), c.gamma_dot
        if name == "drift":
            factor = self._drift_factor(path, t, x)
        left = c.alpha * (value - c.sigma_dot * x0) - c.alpha_dot * (x - c.sigma * x0)
        return left / (c.alpha * factor - c.alpha_dot * c.gamma)

    def velocity(self, path: Any, x: Tensor, t: Tensor, output: Tensor, x0: Tensor | None = None) -> Tensor:
        """The velocity v."""
        fields = self.split(output)
        if "velocity" in fields:
            return fields["velocity"]
        c = path.at(t, x)
        if "drift" in fields:
            # v = drift - epsilon s, s = -ez / gamma
            return fields["drift"] + _amount(self, path, t, c.gamma) / c.gamma * self.latent(path, x, t, output, x0)
        start = fields.get("deterministic", 0.0)
        return start - c.product * fields["score"] if "score" in fields else start + c.gamma_dot * fields["latent"]

    def ends(self, path: Any, x: Tensor, t: Tensor, output: Tensor, x0: Tensor | None = None) -> Ends:
        """E[x1 | x_t] and E[x0 | x_t]: those of the point without its latent.

        Where the path has no source left (or no data yet), these fields say nothing about it: NaN there.

        Raises:
            ValueError: at an end where gamma' is infinite.
        """
        c = path.at(t, x)
        if not bool(c.gamma_dot.isfinite().all()):
            raise ValueError("t: the two ends cannot be told apart where gamma' is infinite; keep away from there")
        latent = self.latent(path, x, t, output, x0)
        point = x - c.gamma * latent
        if isinstance(path.ends, Mirror):
            return Ends(point, point)
        fields = self.split(output)
        if "deterministic" in fields:
            rate = fields["deterministic"]
        else:
            rate = self.velocity(path, x, t, output, x0) - c.gamma_dot * latent
        data, source = Velocity().ends(path.ends, point, t, rate)
        return Ends(
            torch.where(c.sigma == 0, point / c.alpha, data).where(c.alpha != 0, torch.nan),
            torch.where(c.alpha == 0, point / c.sigma, source).where(c.sigma != 0, torch.nan),
        )

    def spec(self) -> dict[str, Any]:
        """The prediction as data."""
        return {"name": "fields", **asdict(self), "names": list(self.names)}

    def trained_epsilon(self, path: Interpolant) -> Callable[[float], float]:
        """The noise that the "drift" field belongs to, as a function of the time."""
        if self.epsilon != "foellmer":
            constant = float(self.epsilon)
            return lambda t: constant
        c = _foellmer_constant(path)
        return lambda t: 0.5 * (c * (1 - t)) ** 2

    def _drift_factor(self, path: Interpolant, t: Tensor, like: Tensor) -> Tensor:
        """What z is multiplied by in the target of "drift": gamma' - epsilon / gamma."""
        c = path.at(t, like)
        if self.epsilon == "foellmer":
            # The 1 / sqrt(t) of both terms cancels.
            return -_foellmer_constant(path) * torch.sqrt(t.clamp(0, 1)).reshape(c.gamma.shape).to(like.dtype)
        return c.gamma_dot - float(self.epsilon) / c.gamma


def _gentle(gamma: Gamma) -> bool:
    """Whether gamma' is finite at both ends."""
    return bool(gamma.derivative(torch.tensor([0.0, 1.0], dtype=torch.float64)).isfinite().all())


def _amount(fields: Fields, path: Interpolant, t: Tensor, gamma: Tensor) -> Tensor | float:
    """epsilon of the "drift" field at t, shaped like gamma."""
    if fields.epsilon != "foellmer":
        return float(fields.epsilon)
    level = _foellmer_constant(path) * (1 - t)
    return (level.square() / 2).reshape(gamma.shape).to(gamma.dtype)


def _foellmer_constant(path: Interpolant) -> float:
    constant = getattr(path.gamma, "c", None)
    if constant is None:
        raise ValueError("epsilon: 'foellmer' goes with the Foellmer path")
    return float(constant)


def build_fields(spec: str | dict[str, Any] | Prediction) -> Fields:
    """Fields from their names joined by "+", from a `spec()`, or themselves.

    Raises:
        ValueError: for fields that do not go together.
    """
    if isinstance(spec, Fields):
        return spec
    if isinstance(spec, str):
        return Fields(names=tuple(spec.split("+")))  # type: ignore[arg-type]
    if isinstance(spec, dict) and spec.get("name") == "fields":
        return Fields(**{k: v for k, v in spec.items() if k != "name"})
    name = spec.get("name") if isinstance(spec, dict) else type(spec).__name__
    if name in ("velocity", "Velocity"):
        return Fields(names=("velocity",))
    raise ValueError(f"predicts: on a path with a latent these are fields such as 'velocity+latent', got {name!r}")
