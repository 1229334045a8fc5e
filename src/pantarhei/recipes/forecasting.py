"""Probabilistic forecasts: the law of the next state as a bridge that leaves the present one (Chen et al. 2403.13724)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.data import SERIES, Source, TensorSource, read_series, series_pairs, split_trajectories
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, FlowMatching, Interpolation, Objective, Present, Provenance, evaluation_mode
from pantarhei.flow.fields import Fields
from pantarhei.flow.interpolants import foellmer
from pantarhei.flow.predictions import Data
from pantarhei.flow.provenance import DISTILLED
from pantarhei.flow.times import Steps
from pantarhei.metrics import crps, energy_score, spread_skill
from pantarhei.naming import unknown
from pantarhei.recipes.backbones import NetworkConfig, build_network
from pantarhei.recipes.data import DataConfig, Recipe
from pantarhei.report import Table
from pantarhei.training import FlowTask, Optimization


@dataclass(frozen=True)
class ForecastConfig(Recipe):
    """The recipe.

    Attributes:
        data: series (trajectories, steps, ...) in a .npy or .safetensors file, or made here: double_well (points in the
            plane under noise, with two resting places) or kolmogorov (vorticity of a stirred two-dimensional fluid).
            `held_out` is a fraction of the trajectories.
        lag: saved steps from the present state to the next one.
        kind: bridge (an ensemble), or regressor (one step of the same network to the mean of the next state).
        noise: noise of the bridge, in units of the typical change over one lag.
        network: sizes.
        lr: learning rate of Adam, falling to zero as a cosine.
        warmup: iterations of linear warm-up.
        clip: largest gradient norm.
        average: decay of the moving average that forecasts.
    """

    data: DataConfig = field(default_factory=lambda: DataConfig(data="double_well"))
    lag: int = 1
    kind: Literal["bridge", "regressor"] = "bridge"
    noise: float = 1.0
    network: NetworkConfig = field(default_factory=NetworkConfig)
    lr: float = 1e-3
    warmup: int = 50
    clip: float = 1.0
    average: float = 0.999

    def __post_init__(self) -> None:
        if self.source:
            raise ValueError("source: a forecast starts from the present state; leave it out")
        if not self.noise > 0:
            raise ValueError(f"noise: must be positive, got {self.noise}")

    def open_series(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training and held-out trajectories, standardised by the means and deviations of the first, and these two.

        Means and deviations are those of each component of points (D,), of each channel of fields (C, 1, 1).

        Raises:
            ValueError, FileNotFoundError: an unknown name, no such file, or too few trajectories.
        """
        name = self.data.data
        if name in SERIES:
            series = _simulated(name)
        elif name.endswith((".npy", ".safetensors")):
            series = read_series(name)
        else:
            raise ValueError(unknown("data", name, [*SERIES, "FILE.npy", "FILE.safetensors"]))
        train, test = split_trajectories(series, self.data.held_out)
        # One mean and one deviation a component of points, or a channel of fields.
        axes = tuple(axis for axis in range(train.ndim) if axis != 2)
        mean, scale = train.mean(axes, keepdim=True)[0, 0], train.std(axes, keepdim=True)[0, 0]
        if not bool((scale > 0).all()):
            raise ValueError(f"data: a component of {name} never changes; leave it out")
        return (train - mean) / scale, (test - mean) / scale, mean, scale

    def open(self) -> tuple[Source, Source]:
        """Pairs of a present and a next state, with the present one as the condition."""
        train, test, _, _ = self.open_series()
        name = self.data.data
        return self._pairs(train, name), self._pairs(test, f"{name}/held-out")

    def _pairs(self, series: Tensor, name: str) -> Source:
        pairs = series_pairs(series, self.lag)
        condition = condition_name(tuple(series.shape[2:]))
        return TensorSource({"x1": pairs["x1"], "past": pairs["past"], condition: pairs["past"]}, name)


@functools.cache
def _simulated(name: str) -> Tensor:
    """A simulated set, made once: a fluid takes some seconds."""
    return SERIES[name](0)


def condition_name(shape: tuple[int, ...]) -> str:
    """What our networks call the present state: an image beside x, or a vector."""
    return "context" if len(shape) == 3 else "vector"


def build_task(config: ForecastConfig, seed: int) -> FlowTask:
    """The task of a recipe; weights are drawn from `seed`.

    Raises:
        ValueError, FileNotFoundError: for data or settings that cannot be used.
    """
    train, test, mean, scale = config.open_series()
    shape = tuple(train.shape[2:])
    if len(shape) not in (1, 3):
        raise ValueError(f"data: states must be points (D,) or fields (C, H, W), got {shape}")
    present = Present(name_of_condition=condition_name(shape))
    pairs = series_pairs(train, config.lag)
    change = float((pairs["x1"] - pairs["past"]).square().mean().sqrt())
    notes: dict[str, Any] = {"forecast": config.kind, "mean": mean.tolist(), "scale": scale.tolist(), "lag": config.lag}
    path: Any
    predicts: Any
    objective: Objective
    if config.kind == "bridge":
        path = foellmer(config.noise * change)
        predicts = Fields(names=("drift",), epsilon="foellmer", start=present.name_of_condition)
        provenance = Provenance(coupling="present", data=config.data.data, notes=notes)
        objective = Interpolation(observation=present)
    else:
        # One Euler step from t = 0 over the whole interval gives the network's output there.
        path, predicts = "linear", Data(margin=0.0)
        provenance = Provenance(coupling=DISTILLED, data=config.data.data, notes={**notes, "steps": 1})
        objective = FlowMatching(times=Steps(1), observation=present)
    flow = Flow(
        build_network(config.network, shape, 0, seed, context=shape[0]),
        path=path,
        predicts=predicts,
        source=present,
        shape=shape,
        conditions=(present.name_of_condition,),
        provenance=provenance,
    )
    optimization = Optimization(lr=config.lr, warmup=config.warmup, decay="cosine", clip=config.clip)
    train_set, held_out = config._pairs(train, config.data.data), config._pairs(test, f"{config.data.data}/held-out")
    return FlowTask(flow, objective, train_set, held_out=held_out, optimization=optimization, average=config.average)


@torch.no_grad()
def forecast(
    flow: Flow,
    state: Tensor,
    *,
    members: int = 32,
    leads: int = 1,
    steps: int = 50,
    generator: torch.Generator | None = None,
    batch: int = 1024,
    **options: Any,
) -> Tensor:
    """Ensembles of what follows: each member goes on from its own last state.

    Args:
        flow: a bridge, or a regressor (whose members are all alike: one is enough).
        state: present states (N, *shape), standardised as in training.
        members: of the ensemble.
        leads: how many lags ahead.
        steps: of the bridge.
        generator: draws the noise.
        batch: rows at a time.
        options: of `Flow.sample`, such as `epsilon`.

    Returns:
        (leads, members, N, *shape).
    """
    one_step = flow.provenance.why_not_field() is not None
    options = {"steps": 1} if one_step else {"steps": steps, "generator": generator, **options}
    name = condition_name(tuple(state.shape[1:]))
    now = state.repeat(members, *[1] * (state.ndim - 1)).to(flow.device, flow.dtype)
    found = []
    with evaluation_mode(flow.network):
        for _ in range(leads):
            parts = [flow.sample(x0=part, condition={name: part}, **options) for part in now.split(batch)]
            now = torch.cat(parts)
            found.append(now.reshape(members, *state.shape))
    return torch.stack(found).to(state)


@dataclass(frozen=True)
class ForecastScores:
    """Scores of one way to forecast at one lead: lower is better, but spread / error, which is 1 where it is honest."""

    name: str
    lead: int
    energy: float
    crps: float
    spread: float | None


def score_forecasts(
    flows: dict[str, Flow],
    series: Tensor,
    *,
    leads: Sequence[int] = (1,),
    lag: int = 1,
    cases: int = 256,
    members: int = 32,
    steps: int = 50,
    seed: int = 0,
) -> list[ForecastScores]:
    """Energy score and CRPS of flows beside persistence, on held-out trajectories.

    Args:
        flows: name -> bridge or regressor.
        series: (trajectories, steps, ...), standardised.
        leads: how many lags ahead.
        lag: of the flows.
        cases: present states, drawn without repetition.
        members: of the ensembles.
        steps: of the bridges.
        seed: of the cases and the noise.

    Raises:
        ValueError: the trajectories are too short for these leads.
    """
    last = series.shape[1] - 1 - max(leads) * lag
    if last < 0:
        raise ValueError(f"leads: {max(leads)} lags of {lag} do not fit into trajectories of {series.shape[1]} states")
    places = torch.cartesian_prod(torch.arange(len(series)), torch.arange(last + 1))
    places = places[torch.randperm(len(places), generator=seeded(seed, 74))[:cases]]
    state = series[places[:, 0], places[:, 1]]
    truths = {lead: series[places[:, 0], places[:, 1] + lead * lag] for lead in leads}
    ensembles = {"persistence": dict.fromkeys(leads, state[None])}
    for number, (name, flow) in enumerate(flows.items()):
        count = 1 if flow.provenance.why_not_field() else members
        generator = seeded(seed, 75, number, device=flow.device)
        all_leads = forecast(flow, state, members=count, leads=max(leads), steps=steps, generator=generator)
        ensembles[name] = {lead: all_leads[lead - 1] for lead in leads}
    return [
        ForecastScores(
            name,
            lead,
            float(energy_score(ensemble[lead], truths[lead]).mean()),
            float(crps(ensemble[lead], truths[lead]).mean()),
            spread_skill(ensemble[lead], truths[lead]) if len(ensemble[lead]) > 1 else None,
        )
        for name, ensemble in ensembles.items()
        for lead in leads
    ]


def scores_table(scores: Sequence[ForecastScores], caption: str = "") -> Table:
    """For people."""
    rows = [(s.name, s.lead, s.energy, s.crps, "-" if s.spread is None else f"{s.spread:.2f}") for s in scores]
    return Table(("forecast", "lead", "energy score", "CRPS", "spread / error"), rows, caption)
