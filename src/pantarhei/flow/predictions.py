"""What a network predicts, and the linear algebra that turns any prediction into any other.

On an affine path x_t = a x1 + b x0 and v_t = a' x1 + b' x0, any two of (x0, x1, x_t, v_t) give the rest. Each
prediction names the closed interval of t on which it determines the velocity; outside it a conversion raises.
(The score and the noise say nothing about the data where a = 0, the data nothing about the noise where b = 0.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pantarhei.flow.paths import AffinePath, build_path, change_path
from pantarhei.naming import build
from pantarhei.solve.state import per_row

PredictionName = Literal["velocity", "data", "noise", "score", "v", "edm"]


class Ends(NamedTuple):
    """The two ends a prediction implies: E[x1 | x_t] and E[x0 | x_t]."""

    data: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Prediction:
    """A kind of network output.

    `margin` keeps the valid interval away from an end at which the division by a vanishing coefficient would blow up
    rounding and network errors by 1/margin.
    """

    margin: float = 1e-3

    def interval(self, path: AffinePath) -> tuple[float, float]:
        """The closed interval of t on which this prediction determines the velocity on `path`."""
        raise TypeError(f"{type(self).__name__} does not define interval")

    def inputs(self, path: AffinePath, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network sees for the state x at t."""
        return x, t

    def target(self, path: AffinePath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """The regression target of the network's output."""
        raise TypeError(f"{type(self).__name__} does not define target")

    def ends(self, path: AffinePath, x: Tensor, t: Tensor, output: Tensor) -> Ends:
        """The ends implied by the network's output."""
        raise TypeError(f"{type(self).__name__} does not define ends")

    def velocity(self, path: AffinePath, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The velocity implied by the network's output."""
        data, noise = self.ends(path, x, t, output)
        c = path.at(t, x)
        return c.alpha_dot * data + c.sigma_dot * noise

    def latent(self, path: Any, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The expected Gaussian noise in x_t: x0 on an affine path."""
        return self.ends(path, x, t, output).noise

    def spec(self) -> dict[str, Any]:
        """The prediction as data."""
        return {"name": next(n for n, kind in PREDICTIONS.items() if kind is type(self)), **asdict(self)}


@dataclass(frozen=True)
class Velocity(Prediction):
    """v = E[dx_t/dt | x_t]: regular wherever the path is."""

    def interval(self, path: AffinePath) -> tuple[float, float]:
        """The path's own regular interval."""
        return path.regular

    def target(self, path: AffinePath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """alpha' x1 + sigma' x0."""
        c = path.at(t, x1)
        return c.alpha_dot * x1 + c.sigma_dot * x0

    def ends(self, path: AffinePath, x: Tensor, t: Tensor, output: Tensor) -> Ends:
        """Solve the 2x2 system for x1 and x0; its determinant is nowhere 0 on a path whose alpha/sigma rises."""
        c = path.at(t, x)
        determinant = c.alpha * c.sigma_dot - c.alpha_dot * c.sigma
        return Ends(
            (c.sigma_dot * x - c.sigma * output) / determinant,
            (c.alpha * output - c.alpha_dot * x) / determinant,
        )

    def velocity(self, path: AffinePath, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The output itself."""
        return output


@dataclass(frozen=True)
class Data(Prediction):
    """x1-prediction: E[x1 | x_t]; invalid where sigma = 0."""

    def interval(self, path: AffinePath) -> tuple[float, float]:
        """Up to where sigma has fallen to `margin` (of its largest value)."""
        low, high = path.regular
        return low, _last_time(path.sigma, low, high, self.margin)

    def target(self, path: AffinePath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """x1."""
        return x1

    def ends(self, path: AffinePath, x: Tensor, t: Tensor, output: Tensor) -> Ends:
        """x0 = (x_t - alpha x1) / sigma."""
        c = path.at(t, x)
        return Ends(output, (x - c.alpha * output) / c.sigma)


@dataclass(frozen=True)
class Noise(Prediction):
    """x0-prediction (epsilon): E[x0 | x_t]; invalid where alpha = 0."""

    def interval(self, path: AffinePath) -> tuple[float, float]:
        """From where alpha has risen to `margin`."""
        low, high = path.regular
        return _first_time(path.alpha, low, high, self.margin), high

    def target(self, path: AffinePath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """x0."""
        return x0

    def ends(self, path: AffinePath, x: Tensor, t: Tensor, output: Tensor) -> Ends:
        """x1 = (x_t - sigma x0) / alpha."""
        c = path.at(t, x)
        return Ends((x - c.sigma * output) / c.alpha, output)


@dataclass(frozen=True)
class Score(Noise):
    """grad log p_t = -E[x0 | x_t] / sigma, for a standard normal source and independent coupling only."""

    def interval(self, path: AffinePath) -> tuple[float, float]:
        """Noise's interval, cut where sigma vanishes (the score is unbounded there)."""
        low, high = super().interval(path)
        return low, _last_time(path.sigma, low, high, self.margin)

    def target(self, path: AffinePath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """-x0 / sigma."""
        return -x0 / path.at(t, x0).sigma

    def ends(self, path: AffinePath, x: Tensor, t: Tensor, output: Tensor) -> Ends:
        """x0 = -sigma score."""
        return super().ends(path, x, t, -path.at(t, x).sigma * output)


@dataclass(frozen=True)
class Angular(Prediction):
    """v = alpha x0 - sigma x1 (Salimans & Ho 2202.00512): regular at every time, also where alpha or sigma vanishes.

    The name "v" is that of diffusion models; it is no velocity.
    """

    def interval(self, path: AffinePath) -> tuple[float, float]:
        """The path's own regular interval."""
        return path.regular

    def target(self, path: AffinePath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """alpha x0 - sigma x1."""
        c = path.at(t, x1)
        return c.alpha * x0 - c.sigma * x1

    def ends(self, path: AffinePath, x: Tensor, t: Tensor, output: Tensor) -> Ends:
        """x1 = (alpha x_t - sigma v) / (alpha^2 + sigma^2), x0 = (sigma x_t + alpha v) / (alpha^2 + sigma^2)."""
        c = path.at(t, x)
        size = c.alpha**2 + c.sigma**2
        return Ends((c.alpha * x - c.sigma * output) / size, (c.sigma * x + c.alpha * output) / size)


@dataclass(frozen=True)
class EDMPreconditioned(Prediction):
    """Karras et al. 2206.00364, section 5, on any affine path, in a form without divisions by alpha or sigma.

    With q^2 = sigma^2 + sd^2 alpha^2 the network F sees x_t / q and the noise label ln(sigma/alpha) / 4, and
    D = (sd^2 alpha x_t + sigma sd q F) / q^2 predicts the data, x0 = (sigma x_t - alpha sd q F) / q^2 the source, so
    F's own target is (sigma x1 - sd^2 alpha x0) / (sd q): unit variance, and its squared error is EDM's weighted loss.
    Only the label needs both coefficients away from zero: their ratio is clamped to [margin, largest].

    Attributes:
        sigma_data: sd, deviation of the data.
        largest: noisiest label the network is given. A network that knows noise levels up to 80 is best told 80 for all
            beyond, where its scaled input hardly changes any more.
    """

    margin: float = 1e-5
    sigma_data: float = 0.5
    largest: float = 1e5

    def interval(self, path: AffinePath) -> tuple[float, float]:
        """The path's own regular interval."""
        return path.regular

    def _scale(self, path: AffinePath, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = path.at(t, x)
        return c.alpha, c.sigma, torch.sqrt(c.sigma**2 + (self.sigma_data * c.alpha) ** 2)

    def inputs(self, path: AffinePath, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t / q, and the noise label."""
        _, _, q = self._scale(path, x, t)
        ratio = (path.sigma(t) / path.alpha(t).clamp_min(torch.finfo(t.dtype).tiny)).clamp(self.margin, self.largest)
        return x / q, torch.log(ratio) / 4

    def target(self, path: AffinePath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """(sigma x1 - sd^2 alpha x0) / (sd q)."""
        alpha, sigma, q = self._scale(path, x1, t)
        return (sigma * x1 - self.sigma_data**2 * alpha * x0) / (self.sigma_data * q)

    def ends(self, path: AffinePath, x: Tensor, t: Tensor, output: Tensor) -> Ends:
        """D and the matching source."""
        alpha, sigma, q = self._scale(path, x, t)
        sd = self.sigma_data
        return Ends(
            (sd**2 * alpha * x + sigma * sd * q * output) / q**2,
            (sigma * x - alpha * sd * q * output) / q**2,
        )


@dataclass(frozen=True)
class Elsewhere(Prediction):
    """A network of one path used, exactly, on another: it goes on seeing its own states, times and outputs.

    Two affine paths of one coupling differ by a change of time and scale (`change_path`), so any diffusion model is also a
    velocity field of the linear path, without training.

    Attributes:
        prediction: what the output means on the network's own path (or its `spec()`).
        origin: that path (or its `spec()`).
    """

    prediction: Any = None
    origin: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prediction", build_prediction(self.prediction or "velocity"))
        object.__setattr__(self, "origin", build_path(self.origin or "linear"))

    def interval(self, path: AffinePath) -> tuple[float, float]:
        """The times of `path` whose alpha / sigma the network's own valid interval has."""
        low, high = torch.tensor(self.prediction.interval(self.origin), dtype=torch.float64)
        ends = [self.origin.alpha(t) / self.origin.sigma(t).clamp_min(1e-30) for t in (low, high)]
        first, last = (float(path.time_at(r.clamp(max=1e12))) for r in ends)
        return max(first, path.regular[0]), min(last, path.regular[1])

    def _there(self, path: AffinePath, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The state and time on the network's own path."""
        own, scale = change_path(self.origin, path, t)
        return per_row(scale, x).to(x.dtype) * x, own

    def inputs(self, path: AffinePath, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network sees on its own path."""
        return self.prediction.inputs(self.origin, *self._there(path, x, t))

    def target(self, path: AffinePath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """The network's own target at its own time."""
        return self.prediction.target(self.origin, x0, x1, change_path(self.origin, path, t)[0])

    def ends(self, path: AffinePath, x: Tensor, t: Tensor, output: Tensor) -> Ends:
        """The ends are the same on both paths."""
        return self.prediction.ends(self.origin, *self._there(path, x, t), output)

    def spec(self) -> dict[str, Any]:
        """With the inner prediction and path as data."""
        return {
            "name": "elsewhere",
            "margin": self.margin,
            "prediction": self.prediction.spec(),
            "origin": self.origin.spec(),
        }


PREDICTIONS: dict[str, type[Prediction]] = {
    "velocity": Velocity,
    "data": Data,
    "noise": Noise,
    "score": Score,
    "v": Angular,
    "edm": EDMPreconditioned,
    "elsewhere": Elsewhere,
}


def build_prediction(spec: str | dict[str, Any] | Prediction) -> Prediction:
    """A prediction from its name, from its `spec()`, or itself.

    Raises:
        ValueError: for an unknown name or constant.
    """
    return spec if isinstance(spec, Prediction) else build("predicts", PREDICTIONS, spec)


def convert(
    path: AffinePath, x: Tensor, t: Tensor, value: Tensor, source: PredictionName, target: PredictionName
) -> Tensor:
    """Turn one prediction at (x_t, t) into another.

    Args:
        path: the affine path.
        x: states (B, ...).
        t: times, 0-d or (B,).
        value: what was predicted, of kind `source`, like x.
        source, target: "velocity", "data", "noise", "score", "v" or "edm" (the raw output F of a preconditioned network).

    Raises:
        ValueError: where a t lies outside the interval on which `source` (or a `target` of score) is determined.
    """
    known = build_prediction(source)
    check_times(known.interval(path), t, source)
    ends = known.ends(path, x, t, value)
    if target == "data":
        return ends.data
    if target == "noise":
        return ends.noise
    if target == "velocity":
        return known.velocity(path, x, t, value)
    wanted = build_prediction(target)
    check_times(wanted.interval(path), t, target)
    return wanted.target(path, ends.noise, ends.data, t)


def check_times(interval: tuple[float, float], t: Tensor, what: str) -> None:
    """Raise a ValueError if any t lies outside the closed interval (with one part in 10^6 for rounding)."""
    low, high = interval
    outside = (t < low - 1e-6) | (t > high + 1e-6)
    if bool(outside.any()):
        worst = float(t[outside].flatten()[0]) if t.ndim else float(t)
        raise ValueError(f"t: {what} determines the velocity on [{low:g}, {high:g}] of this path, got t = {worst:g}")


def _first_time(rising: Callable[[Tensor], Tensor], low: float, high: float, level: float) -> float:
    """The first t in [low, high] at which a rising coefficient reaches `level` (low itself if it starts above)."""
    return low if float(rising(torch.tensor(low, dtype=torch.float64))) >= level else _bisect(rising, low, high, level)


def _last_time(falling: Callable[[Tensor], Tensor], low: float, high: float, level: float) -> float:
    """The last t in [low, high] at which a falling coefficient is still `level` of its start."""
    start = float(falling(torch.tensor(low, dtype=torch.float64)))
    if float(falling(torch.tensor(high, dtype=torch.float64))) >= min(level * start, level):
        return high
    return _bisect(lambda t: -falling(t), low, high, -min(level * start, level))


def _bisect(rising: Callable[[Tensor], Tensor], low: float, high: float, level: float) -> float:
    for _ in range(60):
        middle = (low + high) / 2
        if float(rising(torch.tensor(middle, dtype=torch.float64))) < level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def as_rows(t: Tensor, x: Tensor) -> Tensor:
    """t, 0-d or (B,), as (B,) for the rows of x."""
    return t.expand(x.shape[0]) if t.ndim == 0 else t


__all__ = ["PREDICTIONS", "Prediction", "as_rows", "build_prediction", "check_times", "convert"]
