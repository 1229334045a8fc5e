"""`Flow`: a network together with what is needed to use it - path, prediction, source, conditions, provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pantarhei.flow import density, paths, pretrained
from pantarhei.flow.conditions import Condition, Null, as_condition
from pantarhei.flow.endings import Final, carried
from pantarhei.flow.fields import Fields, build_fields
from pantarhei.flow.gammas import NoLatent
from pantarhei.flow.grids import Grid, GridName, optional_grid
from pantarhei.flow.interpolants import INTERPOLANTS, Interpolant, build_interpolant
from pantarhei.flow.likelihood import Likelihood
from pantarhei.flow.modes import evaluation_mode
from pantarhei.flow.noise_amounts import Epsilon
from pantarhei.flow.paths import AffinePath, build_path
from pantarhei.flow.predictions import Ends, Prediction, PredictionName, as_rows, build_prediction, check_times
from pantarhei.flow.provenance import Provenance
from pantarhei.flow.sources import Law, SourceLaw, build_source
from pantarhei.flow.stochastic import transport_sde
from pantarhei.flow.transforms import FieldTransform, Guidance, TransformedField
from pantarhei.flow.updates import PathMethod, path_step
from pantarhei.solve import Solution, ode
from pantarhei.solve.methods import MethodName
from pantarhei.solve.ode import Hook
from pantarhei.solve.state import per_row
from pantarhei.solve.steps import Step

ConditionLike = Condition | Mapping[str, Tensor] | Tensor | None


class Codec(Protocol):
    """A latent codec: the flow lives on `encode(data)`."""

    def encode(self, x: Tensor) -> Tensor:
        """Data to latents."""

    def decode(self, z: Tensor) -> Tensor:
        """Latents to data."""


class Flow(nn.Module):
    """A generative flow (or a flow between two data sets) around a network.

    Args:
        network: any module `network(x, t, **conditions)`; x (B, *shape), t (B,), output like x.
        path: the path it was or will be trained on; an `Interpolant` has a latent noise.
        predicts: what its output means: "velocity", "data", "noise", "score", "edm" or a `Prediction`; on an interpolant
            the fields it stacks, such as "velocity+latent" (see `Fields`).
        source: law of x0; None is the standard normal, a tensor of samples is a data set, a mixture has a density.
        shape: shape of one sample in the flow's space (needed to sample without x0).
        null: for each condition, the value that means "no condition" (enables guidance and dropout).
        conditions: names of conditions without a null value.
        codec: optional latent codec.
        interval: times that the network was trained on, where these are fewer than the prediction allows. Sampling then
            starts (and inversion ends) at the first of them, with the state of t = 0.
        starts_scaled: start there with sigma(t) x0 instead, as the same flow on another path does (`on_path`).
        provenance: where it comes from.

    Times run from 0 (source) to 1 (data) and are handed to the network as they are. `first_sigma` is what a unit draw is
    multiplied with to be the state at the first time, `last_sigma` the noise that is left at the last one.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        path: AffinePath | paths.Path | str | dict[str, Any] = "linear",
        predicts: PredictionName | Prediction | str | dict[str, Any] = "velocity",
        source: SourceLaw | Law | Tensor | dict[str, Any] | None = None,
        shape: Sequence[int] | None = None,
        null: Mapping[str, Null] | None = None,
        conditions: Sequence[str] = (),
        codec: Codec | None = None,
        interval: Sequence[float] | None = None,
        starts_scaled: bool = False,
        provenance: Provenance | None = None,
    ):
        super().__init__()
        if not callable(network):
            raise TypeError(f"network: a module network(x, t, **conditions) is needed, got {type(network).__name__}")
        self.network = network
        self.path: Any = _build_path(path)
        latent = isinstance(self.path, Interpolant)
        self.prediction: Any = build_fields(predicts) if latent else build_prediction(predicts)
        self.source: Any = build_source(source)
        self.shape = tuple(shape) if shape is not None else None
        self.null = dict(null or {})
        self.conditions = tuple(dict.fromkeys((*self.null, *conditions)))
        self.codec = codec
        self.provenance = provenance or Provenance()
        if isinstance(self.prediction, Fields):
            self.prediction.check(self.path)
        elif not isinstance(self.path, AffinePath) and self.prediction.spec()["name"] != "velocity":
            raise ValueError("predicts: on a path of your own only 'velocity' is defined")
        # Found once, as floats: a compiled sampler must not wait for tensors.
        self._interval, self.first_sigma, self.last_sigma = (0.0, 1.0), 1.0, 0.0
        if isinstance(self.path, AffinePath):
            self._interval = self.prediction.interval(self.path)
            self.first_sigma = float(self.path.sigma(torch.tensor(self._interval[0], dtype=torch.float64)))
        elif latent:
            self._interval = self.prediction.interval(self.path)
        self._narrowed = interval is not None
        if interval is not None:
            (low, high), (first, last) = self._interval, (float(t) for t in interval)
            if not low <= first < last <= high:
                raise ValueError(f"interval: must lie inside [{low:g}, {high:g}], got [{first:g}, {last:g}]")
            self._interval = (first, last)
        self._starts_scaled = starts_scaled and interval is not None
        if self._starts_scaled:
            self.first_sigma = float(self.path.sigma(torch.tensor(self._interval[0], dtype=torch.float64)))
        if hasattr(self.path, "level"):
            self.last_sigma = float(self.path.level(torch.tensor(self._interval[1], dtype=torch.float64)))

    # What the flow knows of itself

    @property
    def interval(self) -> tuple[float, float]:
        """The closed interval of t on which the network determines the velocity."""
        return self._interval

    @property
    def stochastic(self) -> bool:
        """Whether this flow is sampled by its own SDE only: it leaves single points, which no ODE can."""
        return isinstance(self.prediction, Fields) and self.prediction.stochastic

    @property
    def device(self) -> torch.device:
        """Device of the network's first tensor."""
        return next((p.device for p in _tensors(self.network)), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the network's first tensor."""
        return next((p.dtype for p in _tensors(self.network) if p.is_floating_point()), torch.float32)

    def spec(self) -> dict[str, Any]:
        """Everything but the network and the codec, as data (JSON/YAML)."""
        return {
            "path": self.path.spec() if hasattr(self.path, "spec") else {"name": "custom"},
            "predicts": self.prediction.spec(),
            "source": self.source.spec(),
            "shape": list(self.shape) if self.shape is not None else None,
            "null": {k: v.tolist() if isinstance(v, Tensor) else v for k, v in self.null.items()},
            "conditions": list(self.conditions),
            **({"interval": list(self._interval)} if self._narrowed else {}),
            **({"starts_scaled": True} if self._starts_scaled else {}),
            "provenance": asdict(self.provenance),
        }

    @staticmethod
    def from_spec(spec: Mapping[str, Any], network: nn.Module, **overrides: Any) -> Flow:
        """The flow of a `spec()` around a network; `overrides` give what a spec cannot hold (source, path, codec).

        A spec with a head is that of a `TrajectoryModel`.
        """
        from pantarhei.flow.trajectory import TrajectoryModel  # a flow, too

        null = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in spec.get("null", {}).items()}
        settings: dict[str, Any] = {k: v for k, v in spec.items() if k not in ("null", "provenance")}
        settings.update(null=null, provenance=Provenance(**spec.get("provenance", {})))
        kind = TrajectoryModel if "head" in spec else Flow
        return kind(network, **{**settings, **overrides})

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write this flow into a folder (`flow.json`, `model.safetensors`)."""
        return pretrained.save_pretrained(self, folder)

    @staticmethod
    def from_pretrained(folder: str | Path, network: nn.Module | None = None, **overrides: Any) -> Flow:
        """Read a flow that `save_pretrained` wrote; a network that is not one of ours must be given."""
        return pretrained.from_pretrained(folder, network, **overrides)

    def like(
        self,
        network: nn.Module,
        *,
        interval: Sequence[float] | None = None,
        path: AffinePath | None = None,
        predicts: Prediction | None = None,
        starts_scaled: bool | None = None,
        **provenance: Any,
    ) -> Flow:
        """The same flow around another network, with changes to its interval, path, prediction or provenance."""
        moved = path is not None and path != self.path
        changes: dict[str, Any] = {"provenance": replace(self.provenance, **provenance)}
        if moved:
            changes |= {"path": path, "interval": None}
        changes |= {"predicts": predicts} if predicts is not None else {}
        changes |= {"interval": interval} if interval else {}
        changes |= {"starts_scaled": starts_scaled} if starts_scaled is not None else {}
        return type(self)(network, **{**self.settings(), **changes})

    def settings(self) -> dict[str, Any]:
        """The arguments that make such a flow around another network."""
        return {
            "path": self.path,
            "predicts": self.prediction,
            "source": self.source,
            "shape": self.shape,
            "null": self.null,
            "conditions": self.conditions,
            "codec": self.codec,
            "interval": self._interval if self._narrowed else None,
            "starts_scaled": self._starts_scaled,
            "provenance": self.provenance,
        }

    def condition_in(self, batch: Mapping[str, Tensor]) -> Condition | None:
        """The conditions this flow takes, from a batch.

        Raises:
            ValueError: if the batch lacks one.
        """
        if not self.conditions:
            return None
        missing = [name for name in self.conditions if name not in batch]
        if missing:
            raise ValueError(f"batch: this flow is conditioned on {', '.join(missing)}, the data have {sorted(batch)}")
        return Condition({name: batch[name] for name in self.conditions}, self.null)

    def encode(self, x: Tensor) -> Tensor:
        """Data to the flow's space (the codec's latents, or x itself); no gradient."""
        if self.codec is None:
            return x
        with torch.no_grad():
            return self.codec.encode(x)

    def decode(self, x: Tensor) -> Tensor:
        """The flow's space to data."""
        return x if self.codec is None else self.codec.decode(x)

    # Fields

    def output(self, x: Tensor, t: Tensor, condition: ConditionLike = None) -> Tensor:
        """The network's raw output at (x, t)."""
        named = as_condition(condition, self.null, x.shape[0])
        seen, label = self.prediction.inputs(self.path, x, t)
        label = as_rows(label, x)
        return self.network(seen, label) if named is None else self.network(seen, label, **named)

    def velocity(self, x: Tensor, t: Tensor, condition: ConditionLike = None) -> Tensor:
        """dx/dt at (x, t): the field that sampling integrates. t is 0-d or (B,)."""
        return self.prediction.velocity(self.path, x, t, self.output(x, t, condition), **self._start(condition))

    def ends(self, x: Tensor, t: Tensor, condition: ConditionLike = None) -> Ends:
        """E[x1 | x_t] and E[x0 | x_t] as the network has them.

        Raises:
            ValueError: for a t outside the prediction's valid interval.
        """
        check_times(self.interval, t, self.prediction.spec()["name"])
        return self.prediction.ends(self.path, x, t, self.output(x, t, condition), **self._start(condition))

    def denoise(self, x: Tensor, t: Tensor, condition: ConditionLike = None) -> Tensor:
        """E[x1 | x_t]."""
        return self.ends(x, t, condition).data

    def noise(self, x: Tensor, t: Tensor, condition: ConditionLike = None) -> Tensor:
        """E[x0 | x_t]."""
        return self.ends(x, t, condition).noise

    def latent(self, x: Tensor, t: Tensor, condition: ConditionLike = None) -> Tensor:
        """E[z | x_t] of the latent z of a stochastic interpolant.

        Raises:
            ValueError: the path has no latent, or the network's fields do not determine it.
        """
        if not isinstance(self.path, Interpolant):
            raise ValueError("latent: the path of this flow has no latent noise")
        return self.prediction.latent(self.path, x, t, self.output(x, t, condition), **self._start(condition))

    def score(self, x: Tensor, t: Tensor, condition: ConditionLike = None) -> Tensor:
        """grad log p_t(x): -E[x0 | x_t] / sigma, or -E[z | x_t] / gamma on a path with a latent.

        Raises:
            ValueError: where it is not known (after reflow, say), with the reason; and where sigma(t), or gamma(t), is 0.
        """
        self.require_score()
        level = per_row(self.path.level(t), x).to(x.dtype)
        if bool((level <= 0).any()):
            raise ValueError("t: the score is unbounded where sigma(t), or gamma(t), is 0; keep away from there")
        check_times(self.interval, t, "score")
        output = self.output(x, t, condition)
        return -self.prediction.latent(self.path, x, t, output, **self._start(condition)) / level

    def _start(self, condition: ConditionLike) -> dict[str, Tensor]:
        """x0, where the network was given it as a condition."""
        name = getattr(self.prediction, "start", "")
        named = as_condition(condition, self.null) if name else None
        return {} if named is None else {"x0": named[name]}

    def field(self, guidance: float | Guidance = 1.0, transforms: Sequence[FieldTransform] = ()) -> TransformedField:
        """The sampled field `f(x, t, condition)`: the velocity under guidance, then under `transforms`, in order."""
        strength = Guidance(guidance) if isinstance(guidance, (int, float)) else guidance
        inner: tuple[FieldTransform, ...] = () if strength.scale == 1.0 else (strength,)
        return TransformedField(self.velocity, (*inner, *transforms))

    # Use

    def transport(
        self,
        x: Tensor,
        times: Sequence[float],
        *,
        steps: int | Grid | None = 50,
        method: MethodName | PathMethod | Step = "auto",
        grid: GridName | Callable[[float], float] = "uniform",
        shift: float = 1.0,
        condition: ConditionLike = None,
        guidance: float | Guidance = 1.0,
        transforms: Sequence[FieldTransform] = (),
        before_step: Hook | None = None,
        after_step: Hook | None = None,
        observe: Callable[[Any, float, int], None] | None = None,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        control: Literal["joint", "per_sample"] = "joint",
    ) -> Solution:
        """Carry states of the flow's space through `times`, either way; gradients flow through it.

        Args:
            x: states at `times[0]`, (B, *shape).
            times: two or more monotone times inside `interval`.
            steps: number of steps between the first and the last time, a whole grid, or None for error control (with a
                method that has an error estimate).
            method: as in `solve.ode`; "ddim", "edm", "reinterpolate", "reinterpolate-heun", "dpm-solver" or "heun-euler"
                (see `flow.updates`), which know the path; or "auto": DDIM on a curved path, else Euler.
            grid, shift: spacing of the steps, see `make_grid`.
            condition, guidance, transforms: what changes the field.
            before_step, after_step, observe: hooks, see `solve.ode`.
            rtol, atol, control: error control.
        """
        self.require_ode()
        times = tuple(float(t) for t in times)
        low, high = self.interval
        if min(times) < low - 1e-6 or max(times) > high + 1e-6:
            raise ValueError(f"times: must lie in this flow's interval [{low:g}, {high:g}], got {times}")
        named = as_condition(condition, self.null, x.shape[0], x.device)
        field, step = self.field(guidance, transforms), path_step(method, self.path, times[-1])
        nodes = optional_grid(step, self.path, steps, times, grid, shift)
        if nodes is not None and (transforms or before_step is not None):
            before_step = field.number_steps(before_step)
        return ode(
            field,
            x,
            times,
            method=step,
            steps=nodes,
            rtol=rtol,
            atol=atol,
            control=control,
            condition=named,
            before_step=before_step,
            after_step=after_step,
            observe=observe,
        )

    @torch.no_grad()
    def sample(
        self,
        count: int | None = None,
        *,
        x0: Tensor | None = None,
        condition: ConditionLike = None,
        generator: torch.Generator | None = None,
        final: Final = "auto",
        decode: bool = True,
        epsilon: Epsilon | Literal["trained"] | None = None,
        **options: Any,
    ) -> Tensor:
        """Draw samples: x0 from the source, carried to the data end.

        Args:
            count: how many (not needed with `x0`).
            x0: unit source draws to start from, (B, *shape).
            condition: labels or other conditions, one row a sample (or one row for all).
            generator: draws x0, on the flow's device.
            final: "denoise" ends with one more evaluation, E[x1 | x]; "state" does not; "clean" takes E[x1 | x] at the start
                of the last step as its end: no noise is left, and no evaluation is added. "auto" acts only where noise is
                left at the end of the interval (VE, EDM, VP; a data prediction): it denoises, or (of a rectified flow on a
                grid of steps) ends clean.
            decode: pass the result through the codec.
            epsilon: sample the SDE with this much noise (a number or a function of t) instead of the ODE, with the options
                of `transport_sde`; `generator` draws its noise too. A flow that predicts a drift has no ODE at its point
                source: its default is "trained".
            options: `steps=50`, `method="auto"`, `grid`, `shift`, `guidance`, hooks: see `transport`.

        Returns:
            (B, *shape), or the codec's output shape.
        """
        x = self.first_sigma * self.draw(count, condition, generator, x0=x0)
        if epsilon is None and self.stochastic:
            epsilon = "trained"

        def carry(x: Tensor, times: Sequence[float], **how: Any) -> Tensor:
            if epsilon is None:
                return self.transport(x, times, **how).x
            return transport_sde(self, x, times, epsilon, generator=generator, **how).x

        with evaluation_mode(self.network):
            x = carried(self, x, carry, condition=condition, final=final, stochastic=epsilon is not None, **options)
        return self.decode(x) if decode else x

    @torch.no_grad()
    def invert(self, x: Tensor, *, condition: ConditionLike = None, encode: bool = True, **options: Any) -> Tensor:
        """The unit source draw x0 that flows to x: the same field run from the data end to the source end.

        Args:
            x: data (B, ...); latents where `encode` is False.
            condition: as in `sample`.
            encode: pass x through the codec first.
            options: see `transport`.
        """
        low, high = self.interval
        with evaluation_mode(self.network):
            start = self.encode(x) if encode else x
            end = self.transport(start, (high, low), condition=condition, **options).x
        return end / self.first_sigma

    def log_prob(self, x: Tensor, **options: Any) -> Any:
        """log p(x) in nats, (B,), of data x (B, *shape): see `flow.density.log_prob` for what it takes and raises."""
        return density.log_prob(self, x, **options)

    def sample_with_log_prob(self, count: int | None = None, **options: Any) -> Likelihood:
        """Samples of the ODE together with their log-likelihood, in one solve: see `flow.density.sample_with_log_prob`."""
        return density.sample_with_log_prob(self, count, **options)

    def draws_noise(self, **options: Any) -> bool:
        """Whether `sample` with these options draws noise on the way, beyond x0."""
        return options.get("epsilon") is not None or self.stochastic

    def draw(
        self,
        count: int | None,
        condition: ConditionLike = None,
        generator: torch.Generator | None = None,
        *,
        x0: Tensor | None = None,
    ) -> Tensor:
        """Unit source draws (count, *shape), or those that are given.

        Raises:
            ValueError: without a shape, for count < 1, or for given draws of another number.
        """
        if x0 is not None:
            if count is not None and count != x0.shape[0]:
                raise ValueError(f"count: {count} samples asked, but x0 has {x0.shape[0]} rows")
            return x0
        if self.shape is None:
            raise ValueError("shape: this flow does not know the shape of a sample; give Flow(..., shape=...) or x0=")
        if count is None or count < 1:
            raise ValueError(f"count: at least one sample is needed, got {count}")
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return self.source.draw((count, *self.shape), like, as_condition(condition, self.null, count), generator)

    def require_field(self) -> None:
        """Check that the network is a velocity field at all times, not a sampler of a few steps.

        Raises:
            ValueError: it was distilled.
        """
        reason = self.provenance.why_not_field()
        if reason:
            raise ValueError(reason)

    def require_ode(self) -> None:
        """Check that there is an ODE to solve.

        Raises:
            ValueError: the flow leaves single points, which takes an SDE.
        """
        if self.stochastic:
            raise ValueError(
                "this flow leads from one point to many and has no ODE: sample it as it is, and do not invert it or ask for "
                "its likelihood"
            )

    def require_density(self, of: Literal["data", "samples"] = "data") -> None:
        """Check that the change of variables gives a density, of the data or of the flow's own samples.

        Raises:
            ValueError: the flow was distilled, its source has no density, or (of the data) it was rectified.
        """
        self.require_field()
        self.require_ode()
        reason = self.provenance.why_not_density()
        if of == "data" and reason:
            raise ValueError(f"log_prob: {reason}; of='samples' gives the density of its own samples")
        if not hasattr(self.source, "log_prob"):
            raise ValueError("log_prob: the source of this flow is a set of samples without a density")

    def require_score(self) -> None:
        """Check that this flow has a score (and so SDEs with its marginals).

        Raises:
            ValueError: noise and data are not independent, the source is not Gaussian, or the path is not affine.
        """
        reason: str | None
        if isinstance(self.path, Interpolant):  # the latent is independent of the pair, whatever the coupling
            known = self.prediction.score_known and not isinstance(self.path.gamma, NoLatent)
            reason = None if known else "its network was not trained for it; train with predicts='velocity+latent'"
            reason = reason or self.provenance.why_not_field()
        elif not isinstance(self.path, AffinePath):
            reason = "its path is not affine"
        else:
            reason = self.provenance.why_not_marginal()
            if reason is None and not getattr(self.source, "gaussian", False):
                reason = "its source is not Gaussian"
        if reason:
            raise ValueError(f"the score of this flow is not known: {reason}")


def _build_path(path: Any) -> Any:
    if isinstance(path, dict) and path.get("name") == "interpolant":
        return build_interpolant(path)
    if isinstance(path, str) and path not in paths.PATHS and path in INTERPOLANTS:
        return build_interpolant(path)
    return build_path(path) if isinstance(path, (str, dict)) else path


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()
