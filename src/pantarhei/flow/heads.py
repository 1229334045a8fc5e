"""Heads of trajectory models: what the output of a network of (x, t, s) says about the way from t to s."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.flow.affine import AffinePath
from pantarhei.flow.predictions import EDMPreconditioned, Ends, Prediction
from pantarhei.naming import build, unknown
from pantarhei.solve.state import per_row

HeadName = Literal["ctm", "consistency", "mean-velocity"]
Outer = Literal["euler", "variance", "mixed"]
Scaling = Literal["jump", "boundary"]


@dataclass(frozen=True)
class Head:
    """How a jump is made of the network's output.

    Attributes:
        anywhere: it jumps to any later time, and the network sees that time; else to the end only.
    """

    anywhere = True

    def prediction(self, prediction: Prediction) -> Prediction:
        """What the output at s = t predicts, given what it would under the simplest head."""
        return prediction

    def jump(self, prediction: Prediction, path: AffinePath, x: Tensor, t: Tensor, s: Tensor, output: Tensor) -> Tensor:
        """The state at s, from x (B, ...) at t and the network's output there; t and s are 0-d or (B,)."""
        raise TypeError(f"{type(self).__name__} does not define jump")

    def finish(
        self, prediction: Prediction, path: AffinePath, x: Tensor, t: Tensor, s: Tensor, output: Tensor
    ) -> Tensor:
        """The data without the noise that the path leaves at its end s: g itself where there is one."""
        return prediction.ends(path, x, t, output).data

    def spec(self) -> dict[str, Any]:
        """The head as data."""
        return {"name": next(name for name, kind in HEADS.items() if kind is type(self)), **asdict(self)}


@dataclass(frozen=True)
class CTM(Head):
    """G = alpha_s g + sigma_s (x - alpha_t g) / sigma_t, with g the data estimate (Kim et al. 2310.02279, section 3).

    g(x, t, t) is E[x1 | x_t] and g(x, t, 1) what a consistency model gives. A step of DDIM would be exact if g were that
    estimate all along; here g depends on s, and the step is exact when g has been learned.

    Attributes:
        outer: "euler" is this formula. "variance" multiplies the state with what keeps the variance of data of deviation
            sd, "mixed" mixes the two by the noise level; both need EDM's preconditioning.
        floor: of these two, the least noise level.
    """

    outer: Outer = "euler"
    floor: float = 0.002

    def __post_init__(self) -> None:
        if self.outer not in ("euler", "variance", "mixed"):
            raise ValueError(unknown("outer", self.outer, ["euler", "variance", "mixed"]))

    def prediction(self, prediction: Prediction) -> Prediction:
        """EDM's, changed by the outer form.

        Raises:
            ValueError: an outer form other than "euler" without EDM's preconditioning.
        """
        if isinstance(prediction, OuterVariance):  # of another outer form, perhaps
            prediction = EDMPreconditioned(prediction.margin, prediction.sigma_data, prediction.largest)
        if self.outer == "euler":
            return prediction
        if type(prediction) is not EDMPreconditioned:
            raise ValueError(f"outer: {self.outer!r} needs predicts='edm', got {prediction.spec()['name']!r}")
        return OuterVariance(**asdict(prediction), floor=self.floor, mixed=self.outer == "mixed")

    def jump(self, prediction: Prediction, path: AffinePath, x: Tensor, t: Tensor, s: Tensor, output: Tensor) -> Tensor:
        """The state at s, and x itself at s = t."""
        if isinstance(prediction, OuterVariance):
            landed = prediction.jump(path, x, t, s, output)
        else:
            ends, to = prediction.ends(path, x, t, output), path.at(s, x)
            landed = to.alpha * ends.data + to.sigma * ends.noise
        return torch.where(per_row(s == t, x), x, landed)


@dataclass(frozen=True)
class Consistency(Head):
    """A consistency model (Song et al. 2303.01469): from any t to the end, and nowhere else.

    Attributes:
        scaling: "jump" makes of the output what CTM's head does for s at the end, with any prediction; "boundary" is the
            published models' own, f = c_skip x + c_out F with c_skip = sd^2 / ((rho - e)^2 + sd^2) and
            c_out = (rho - e) sd / sqrt(rho^2 + sd^2), rho = sigma / alpha and e its value at the end.
    """

    scaling: Scaling = "jump"
    anywhere = False

    def __post_init__(self) -> None:
        if self.scaling not in ("jump", "boundary"):
            raise ValueError(unknown("scaling", self.scaling, ["jump", "boundary"]))

    def prediction(self, prediction: Prediction) -> Prediction:
        """As it is.

        Raises:
            ValueError: the published scaling without EDM's preconditioning.
        """
        if self.scaling == "boundary" and not isinstance(prediction, EDMPreconditioned):
            raise ValueError(f"scaling: 'boundary' needs predicts='edm', got {prediction.spec()['name']!r}")
        return prediction

    def jump(self, prediction: Prediction, path: AffinePath, x: Tensor, t: Tensor, s: Tensor, output: Tensor) -> Tensor:
        """The state at the end s."""
        if self.scaling == "jump":
            return CTM().jump(prediction, path, x, t, s, output)
        assert isinstance(prediction, EDMPreconditioned)
        here, end, sd = path.at(t, x), path.at(s, x), prediction.sigma_data
        # Times alpha_t, above and below, so that alpha_t may be 0.
        over = here.sigma - end.sigma / end.alpha * here.alpha
        skip = sd**2 * here.alpha / (over**2 + (sd * here.alpha) ** 2)
        scale = over * sd / torch.sqrt(here.sigma**2 + (sd * here.alpha) ** 2)
        return end.alpha * (skip * x + scale * output)

    def finish(
        self, prediction: Prediction, path: AffinePath, x: Tensor, t: Tensor, s: Tensor, output: Tensor
    ) -> Tensor:
        """As CTM's head, or what the published scaling gives."""
        if self.scaling == "jump":
            return super().finish(prediction, path, x, t, s, output)
        return self.jump(prediction, path, x, t, s, output)


@dataclass(frozen=True)
class MeanVelocity(Head):
    """x_s = x + (s - t) u, with u the mean velocity on the way (Geng et al. 2505.13447; Boffi et al. 2406.07507).

    u(x, t, t) is the velocity. On the linear path this is CTM's head: u = (g - x) / (1 - t).
    """

    def jump(self, prediction: Prediction, path: AffinePath, x: Tensor, t: Tensor, s: Tensor, output: Tensor) -> Tensor:
        """The state at s, and x itself at s = t."""
        length = per_row(s - t, x).to(x.dtype)
        return x + length * prediction.velocity(path, x, t, output)

    def finish(
        self, prediction: Prediction, path: AffinePath, x: Tensor, t: Tensor, s: Tensor, output: Tensor
    ) -> Tensor:
        """Where the mean velocity leads: it knows no other data."""
        return self.jump(prediction, path, x, t, s, output)


@dataclass(frozen=True)
class OuterVariance(EDMPreconditioned):
    """EDM's preconditioning below CTM's outer forms that keep the variance.

    With rho = sigma / alpha, y = x / alpha, e = `floor` and V(rho) = (rho - e)^2 + sd^2 a jump is
    sqrt(V(rho_s) / V(rho_t)) y + (1 - rho_s / rho_t) g, g as EDM has it. Its limit s = t makes the data estimate
    g + (e^2 + sd^2 - e rho) / V(rho) y.

    Attributes:
        floor: e.
        mixed: mix it with CTM's first form, with weights 1 / (1 + rho) and rho / (1 + rho).
    """

    floor: float = 0.002
    mixed: bool = False

    def ends(self, path: AffinePath, x: Tensor, t: Tensor, output: Tensor) -> Ends:
        """The data estimate above, and the noise that goes with it."""
        at = path.at(t, x)
        data = super().ends(path, x, t, output).data + self._more(path, x, t)
        return Ends(data, (x - at.alpha * data) / at.sigma)

    def target(self, path: AffinePath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """The output that makes x1 the data estimate."""
        at = path.at(t, x1)
        x = at.alpha * x1 + at.sigma * x0
        q = torch.sqrt(at.sigma**2 + (self.sigma_data * at.alpha) ** 2)
        rest = q**2 * (x1 - self._more(path, x, t)) - self.sigma_data**2 * at.alpha * x
        return rest / (at.sigma * self.sigma_data * q)

    def jump(self, path: AffinePath, x: Tensor, t: Tensor, s: Tensor, output: Tensor) -> Tensor:
        """The state at s."""
        here, to = path.at(t, x), path.at(s, x)
        start, end = here.sigma / here.alpha, to.sigma / to.alpha
        g = super().ends(path, x, t, output).data
        keep = torch.sqrt(self._variance(end) / self._variance(start))
        if self.mixed:
            keep = (start * (end / start) + keep) / (1 + start)
        return to.alpha * (keep * x / here.alpha + (1 - end / start) * g)

    def _more(self, path: AffinePath, x: Tensor, t: Tensor) -> Tensor:
        """What the data estimate has beyond g."""
        at = path.at(t, x)
        rho = at.sigma / at.alpha
        share = (self.floor**2 + self.sigma_data**2 - self.floor * rho) / self._variance(rho)
        return (share / (1 + rho) if self.mixed else share) * x / at.alpha

    def _variance(self, rho: Tensor) -> Tensor:
        return (rho - self.floor) ** 2 + self.sigma_data**2

    def spec(self) -> dict[str, Any]:
        """EDM's: the head makes this of it again."""
        return {"name": "edm", "margin": self.margin, "sigma_data": self.sigma_data, "largest": self.largest}


HEADS: dict[str, type[Head]] = {"ctm": CTM, "consistency": Consistency, "mean-velocity": MeanVelocity}


def build_head(spec: str | dict[str, Any] | Head) -> Head:
    """A head from its name, from its `spec()`, or itself.

    Raises:
        ValueError: for an unknown name or setting.
    """
    return spec if isinstance(spec, Head) else build("head", HEADS, spec)
