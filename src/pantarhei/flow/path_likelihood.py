"""Log-likelihood of a flow's SDE, as a mean over random paths (Albergo et al. 2303.08797, section 2.4).

With b = v + epsilon s the drift of the forward SDE, the density of its end is, by Feynman-Kac,
rho(1, x) = E[exp(-int div b(t, Y_t) dt) rho_0(Y_0)] over paths that start at Y_1 = x and run down in time with dY = b dt +
sqrt(2 epsilon) dW, the *forward* drift. The mean is taken before the logarithm. Such paths run away from where the density
is, and few of them count; guided by the learned score they follow the reversed SDE instead, and Girsanov's theorem corrects
their weights: the same mean, with all weights equal where the score is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pantarhei.flow.conditions import as_condition
from pantarhei.flow.likelihood import Divergence, divergence_of, probe_directions
from pantarhei.flow.noise_amounts import Epsilon
from pantarhei.flow.stochastic import CLEAN, Equation

if TYPE_CHECKING:
    from pantarhei.flow.flow import ConditionLike, Flow


class PathLikelihood(NamedTuple):
    """log p(x) (B,) in nats, its standard error (delta method, B), Jensen's lower bound on it (B,), and network calls.

    With few paths the value is biased down by about half its squared standard error; the bound is a mean of logarithms.
    """

    value: Tensor
    error: Tensor
    bound: Tensor
    evaluations: int


@torch.no_grad()
def path_likelihood(
    flow: Flow,
    x: Tensor,
    epsilon: Epsilon,
    source_log_prob: Callable[[Tensor], Tensor],
    *,
    paths: int = 64,
    steps: int | Sequence[float] = 100,
    cap: float = 0.5,
    guided: bool = True,
    divergence: Divergence = "exact",
    probes: int = 1,
    condition: ConditionLike = None,
    generator: torch.Generator | None = None,
) -> PathLikelihood:
    """log p(x) under the SDE that samples with this epsilon.

    Args:
        flow: with a known score.
        x: data (B, *shape), in the flow's space.
        epsilon: a number or a function of t; epsilon / gamma^2 should be bounded: `noise_amount("variance", ...)`.
        source_log_prob: log density at the flow's first time.
        paths: random paths a row, at least 2.
        steps: number of steps, or a whole grid. Heun steps; the integral is taken by the trapezoidal rule.
        cap: epsilon is lowered as in `transport_sde`, with the same step length.
        guided: run the paths by the reversed SDE and correct their weights; without it, by the forward drift.
        divergence, probes: as in `log_likelihood`, but with new probes at each step.
        condition: one row a row of x.
        generator: draws noise and probes.

    Raises:
        ValueError: the score is not known, or paths < 2.
    """
    if paths < 2:
        raise ValueError(f"paths: at least 2 are needed for a standard error, got {paths}")
    low, high = flow.interval
    if divergence not in ("exact", "hutchinson"):
        raise ValueError(f"divergence: must be 'exact' or 'hutchinson', got {divergence!r}")
    nodes = torch.linspace(high, low, steps + 1, dtype=torch.float64).tolist() if isinstance(steps, int) else [*steps]
    nodes = sorted((float(t) for t in nodes), reverse=True)
    if len(nodes) < 2 or abs(nodes[0] - high) > 1e-6 or abs(nodes[-1] - low) > 1e-6:
        raise ValueError(f"steps: a grid must cover the flow's interval [{low:g}, {high:g}], got {nodes[::-1]}")
    named = as_condition(condition, flow.null, x.shape[0])
    if named is not None:
        named = named.index(torch.arange(x.shape[0]).repeat(paths))
    y = x.repeat(paths, *[1] * (x.ndim - 1))
    equation = Equation(flow, epsilon, y, named, 1.0, ())
    equation.place(nodes, True, cap)  # the forward drift, though time falls
    count = equation.number_steps(None)
    calls = 0

    def at(y: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """The forward drift, its divergence and the score (0 at a clean end, where epsilon is 0 too)."""
        nonlocal calls
        calls += 1
        moment = y.new_full((), t, dtype=torch.promote_types(y.dtype, torch.float32))
        clean = equation.level(t) < CLEAN
        score = torch.zeros_like(y)

        def field(p: Tensor) -> Tensor:
            nonlocal score
            if clean:
                return equation.estimates.velocity(p, moment, equation.condition)
            velocity, latent = equation.estimates.velocity_and_noise(p, moment, equation.condition)
            score = latent.detach() / -equation.level(t)
            return torch.sub(velocity, latent, alpha=equation.amount(t) / equation.level(t))

        # New probes at each step: kept along a path, their error would grow with it and, exponentiated, raise the mean.
        directions = None if divergence == "exact" else probe_directions(y, probes, generator)
        value, traces = divergence_of(field, y, directions)
        return value, traces.double().mean(dim=1), score

    integral = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    for step, (t, end) in enumerate(pairwise(nodes)):
        count(y, t, step)
        drift, trace, score = at(y, t)
        dt, eps = end - t, equation.amount(t)
        draw = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        kick = math.sqrt(2 * eps * -dt) * draw
        # Reversed by the score, dY = (v - eps s) dt + noise; Girsanov's theorem weighs the paths by what that changed.
        pull = 2 * eps * dt * score if guided else 0.0
        late = at(y + dt * drift - pull + kick, end)
        if guided:
            turned = (score * draw).flatten(1).double().sum(dim=1)
            square = score.flatten(1).double().square().sum(dim=1)
            integral += eps * dt * square - math.sqrt(2 * eps * -dt) * turned
        integral += 0.5 * dt * (trace + late[1])
        y = y + 0.5 * dt * (drift + late[0]) - pull + kick
    logs = (integral + source_log_prob(y).double()).reshape(paths, -1)
    value = torch.logsumexp(logs, dim=0) - math.log(paths)
    weights = torch.exp(logs - value)
    return PathLikelihood(value, weights.std(dim=0) / math.sqrt(paths), logs.mean(dim=0), calls)
