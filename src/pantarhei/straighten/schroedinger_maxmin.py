"""Schroedinger bridges by max-min over the interpolant (Albergo et al. 2303.08797, section 3.4).

For a given interpolant I(t, x0, x1) + gamma z the forward drift u is the minimiser of

    J(I, u) = int E[|u|^2 / 2 - (d_t I + (gamma' - epsilon / gamma) z) . u] dt,

and J at u is minus half its kinetic energy, int E|u|^2 dt. The interpolant of the least energy, max over I of min over u of
J, has the bridge's density, and its drift is the bridge's. The paper gives no numerics: here I is
(1 - t) x0 + t x1 + t (1 - t) N(t, x0, x1), and u takes several steps for one of N.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.data.seeds import generator as seeded
from pantarhei.data.sources import as_source
from pantarhei.flow import Flow
from pantarhei.flow.couplings import Coupling, Independent
from pantarhei.flow.objectives import draw_pairs, draw_times
from pantarhei.flow.times import Uniform
from pantarhei.straighten.schroedinger import Bridge, check_bridge_flow
from pantarhei.training import Average, Optimization, Task, Trained, Update, held, train

METHOD = "max-min over the interpolant"
EDGE = 2e-4  # distance kept from the ends, where gamma' is infinite


class BentLine(nn.Module):
    """The interpolant (1 - t) x0 + t x1 + t (1 - t) N(t, x0, x1) between points; N starts at zero.

    N sees the time as it is: the objective has its derivative in it, which high frequencies would make rough.

    Args:
        dimension: of the points.
        width, layers: of N, a perceptron.

    Raises:
        ValueError: a size below one.
    """

    def __init__(self, dimension: int, width: int = 64, layers: int = 2):
        super().__init__()
        if min(dimension, width, layers) < 1:
            raise ValueError(f"dimension, width, layers: must be at least 1, got {dimension}, {width} and {layers}")
        inner: list[nn.Module] = [nn.Linear(2 * dimension + 1, width), nn.SiLU()]
        for _ in range(layers - 1):
            inner += [nn.Linear(width, width), nn.SiLU()]
        last = nn.Linear(width, dimension)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.bend = nn.Sequential(*inner, last)

    def forward(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The point at t (B,) and its derivative in t, each (B, D)."""
        s = t[:, None].to(x0)
        ends = torch.cat([x0, x1], dim=1)
        moved: Any = torch.func.jvp(lambda u: self.bend(torch.cat([ends, u], dim=1)), (s,), (torch.ones_like(s),))
        (bend, rate), room = moved, s * (1 - s)
        return (1 - s) * x0 + s * x1 + room * bend, x1 - x0 + (1 - 2 * s) * bend + room * rate


class MaxMin(Task):
    """Train a bridge's fields and its interpolant against each other.

    Args:
        flow: of `bridge_flow`, without conditions; its network is trained in place: the forward drift and E[z | x_t].
        interpolant: `interpolant(x0, x1, t) -> (point, derivative)` with the right ends, such as `BentLine`.
        data: x1: a data source, a tensor or a Dataset.
        inner: updates of the fields for one of the interpolant.
        alone: iterations at the start, and as many at the end, in which the fields are trained alone.
        iterations: of the whole run, which decides where its end is.
        coupling: of x0 and x1.
        optimization, interpolant_optimization: of the fields and of the interpolant.
        average: decay of the fields' moving average.

    Raises:
        ValueError: the flow is no bridge flow that predicts its drift, or a number is out of range.
    """

    def __init__(
        self,
        flow: Flow,
        interpolant: nn.Module,
        data: Any,
        *,
        inner: int = 5,
        alone: int = 500,
        iterations: int,
        coupling: Coupling | None = None,
        optimization: Optimization | None = None,
        interpolant_optimization: Optimization | None = None,
        average: float = 0.99,
    ):
        super().__init__()
        check_bridge_flow(flow)
        if "drift" not in flow.prediction.names or flow.conditions or flow.codec is not None:
            raise ValueError(
                "flow: the max-min bridge needs a flow of bridge_flow that predicts its drift, without conditions"
            )
        if inner < 1 or alone < 0:
            raise ValueError(f"inner, alone: at least 1 and 0 are needed, got {inner} and {alone}")
        self.flow, self.interpolant, self.data = flow, interpolant, as_source(data)
        self.inner, self.alone, self.length = inner, alone, iterations
        self.coupling = coupling or Independent()
        self.average = Average(flow.network, average)
        self.averages = {"average": "flow.network"}
        self.groups = {
            "fields": Trained(("flow.network",), optimization or Optimization(lr=2e-3)),
            "interpolant": Trained(("interpolant",), interpolant_optimization or Optimization(lr=1e-3)),
        }

    def updates(self, batch: dict[str, Tensor], generator: torch.Generator) -> Iterator[Update]:
        """The fields' update, and now and then the interpolant's."""
        x0, x1, z, t = self._draw(batch, generator)
        with torch.no_grad():
            point, rate = self.interpolant(x0, x1, t)
        losses = self._inner(self.flow.network, point, rate, z, t)
        yield Update(sum(losses.values(), torch.zeros(())), "fields", {k: v.detach() for k, v in losses.items()})
        if self.alone <= self.iteration < self.length - self.alone and self.iteration % self.inner == 0:
            with held(self.flow.network) as fields:
                point, rate = self.interpolant(x0, x1, t)
                energy = -self._inner(fields, point, rate, z, t)["drift"]
            yield Update(energy, "interpolant", {"energy": energy.detach()})

    def result(self) -> Flow:
        """The flow around the averaged fields."""
        notes = {**self.flow.provenance.notes, "method": METHOD, "epsilon": self.flow.prediction.epsilon}
        return self.flow.like(self.average.network, coupling="schroedinger bridge", notes=notes)

    def _draw(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, x0, x1, _ = draw_pairs(self.flow, batch, self.coupling, None, generator)
        t = draw_times(Uniform(), x1, (EDGE, 1 - EDGE), False, generator)
        return x0, x1, torch.randn(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype), t

    def _inner(self, network: nn.Module, point: Tensor, rate: Tensor, z: Tensor, t: Tensor) -> dict[str, Tensor]:
        """J of each field, mean over dimensions, with z and -z together: single draws have 1 / gamma in their variance."""
        flow = self.flow
        c = flow.path.at(t, point)
        steep = c.gamma_dot - flow.prediction.epsilon / c.gamma
        x = torch.cat([point + c.gamma * z, point - c.gamma * z])
        found = flow.prediction.split(network(x, torch.cat([t, t])))
        targets = {"drift": torch.cat([rate + steep * z, rate - steep * z]), "latent": torch.cat([z, -z])}
        return {name: (f * (0.5 * f - targets[name])).mean() for name, f in found.items()}


def maxmin_bridge(
    flow: Flow,
    data: Any,
    *,
    to: str | Path | None = None,
    iterations: int = 10_000,
    interpolant: nn.Module | None = None,
    seed: int = 0,
    resume: bool = False,
    inner: int = 5,
    alone: int | None = None,
    coupling: Coupling | None = None,
    optimization: Optimization | None = None,
    interpolant_optimization: Optimization | None = None,
    average: float = 0.99,
    **options: Any,
) -> Bridge:
    """A Schroedinger bridge by max-min over the interpolant.

    Simulation-free, but a saddle point, and slow where independent ends cross far more often than those of the bridge. From
    two modes to two others (the experiment `two_modes`) it stopped 30 % (relative L2) from the exact drift, where
    `markovian_fitting` came to 3 %; with `coupling=Entropic(epsilon)`, which does most of the work, it came to 5 %.

    Args:
        flow: of `bridge_flow`, of points (B, D) unless an `interpolant` is given; its network is trained in place.
        data: x1.
        to: run folder (with `resume` it goes on); None keeps nothing.
        iterations: of the fields.
        interpolant: see `MaxMin`; a `BentLine` by default.
        seed: of everything drawn.
        resume: go on with what `to` holds.
        alone: iterations before and after in which the fields are trained alone; a tenth of them by default.
        inner, coupling, optimization, interpolant_optimization, average: see `MaxMin`.
        options: further fields of `LoopConfig`.

    Raises:
        ValueError: as `MaxMin`, or the data are no points and no interpolant is given.
    """
    if interpolant is None:
        if flow.shape is None or len(flow.shape) != 1:
            raise ValueError(
                f"interpolant: for samples of shape {flow.shape} give a network of your own; BentLine takes points"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seeded(seed, 72).initial_seed()) % 2**31)
            interpolant = BentLine(flow.shape[0])
    task = MaxMin(
        flow,
        interpolant.to(flow.device, flow.dtype),
        data,
        inner=inner,
        alone=iterations // 10 if alone is None else alone,
        iterations=iterations,
        coupling=coupling,
        optimization=optimization,
        interpolant_optimization=interpolant_optimization,
        average=average,
    )
    options = {"progress": False, "tensorboard": False, "checkpoint_every": iterations, **options}
    with tempfile.TemporaryDirectory() as unkept:
        folder = Path(to) if to is not None else Path(unkept) / "run"
        train(task, folder, iterations=iterations, seed=seed, resume=resume, **options)
    return Bridge(task.result())
