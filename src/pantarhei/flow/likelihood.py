"""Log-likelihood of a flow by the instantaneous change of variables (Chen et al. 1806.07366)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pantarhei.solve import ode
from pantarhei.solve.methods import MethodName
from pantarhei.solve.steps import Step

Divergence = Literal["exact", "hutchinson"]


class Likelihood(NamedTuple):
    """log p(x) (B,) in nats; its standard error over probes (B,) (None if exact); the encoded x(t0); field calls."""

    value: Tensor
    error: Tensor | None
    start: Tensor
    evaluations: int


def log_likelihood(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    interval: tuple[float, float],
    source_log_prob: Callable[[Tensor], Tensor],
    *,
    divergence: Divergence = "exact",
    probes: int = 8,
    generator: torch.Generator | None = None,
    method: MethodName | Step = "dopri5",
    steps: int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Likelihood:
    """log p_1(x) = log p_0(x(t0)) - int_t0^t1 div v dt along the path that ends at x.

    Args:
        velocity: v(x, t).
        x: data (B, ...).
        interval: (t0, t1), source end and data end.
        source_log_prob: log density at t0, (B, ...) -> (B,).
        divergence: "exact" takes one backward pass a dimension; "hutchinson" estimates the trace with Rademacher
            probes that stay fixed along the solve (a fresh probe a call would make the right-hand side noise).
        probes: number of probes; the standard error needs at least 2.
        generator: draws the probes.
        method, steps, rtol, atol: as in `solve.ode`; the integral is part of the controlled state.

    Raises:
        ValueError: for probes < 1 or an unknown divergence.
    """
    field, columns = _augmented(velocity, x, divergence, probes, generator)
    t0, t1 = interval
    start = (x, x.new_zeros(x.shape[0], columns))
    solution = ode(field, start, (t1, t0), method=method, steps=steps, rtol=rtol, atol=atol)
    encoded, integral = solution.x  # the integral of div v from t1 down to t0, hence with the sign already turned
    value, error = _mean_and_error(source_log_prob(encoded)[:, None] + integral.double())
    return Likelihood(value, error, encoded, solution.evaluations)


def push_forward(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    interval: tuple[float, float],
    log_prob: Tensor,
    *,
    divergence: Divergence = "exact",
    probes: int = 8,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Likelihood:
    """Samples and their log-likelihood in one solve: x(t1) from x0, and log p_1 = log p_0 - int div v dt along the way.

    Args:
        velocity: v(x, t).
        x0: states at the source end (B, ...).
        interval: (t0, t1), source end and data end.
        log_prob: their log density there, (B,).
        divergence, probes, generator: as in `log_likelihood`.
        options: of `solve.ode` (`method`, `steps`, `rtol`, `atol`).

    Returns:
        A `Likelihood`, whose `start` is the sample x(t1).
    """
    field, columns = _augmented(velocity, x0, divergence, probes, generator)
    solution = ode(field, (x0, x0.new_zeros(x0.shape[0], columns)), interval, **options)
    x1, integral = solution.x
    value, error = _mean_and_error(log_prob[:, None] - integral.double())
    return Likelihood(value, error, x1, solution.evaluations)


def probe_directions(x: Tensor, probes: int, generator: torch.Generator | None) -> Tensor:
    """Rademacher probes (probes, *x.shape)."""
    bits = torch.randint(0, 2, (probes, *x.shape), generator=generator, device=x.device)
    return (2 * bits - 1).to(x.dtype)


def divergence_of(field: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor | None) -> tuple[Tensor, Tensor]:
    """The field at x and its divergence, without a graph.

    Args:
        field: of the position alone.
        x: positions (B, ...).
        directions: probes (P, B, ...) of an estimate, or None for the exact trace.

    Returns:
        The value, and the divergence: (B, 1) exact, or (B, P), one a probe.
    """
    with torch.enable_grad():
        position = x.detach().requires_grad_(True)
        value = field(position)
        traces = _exact_trace(value, position) if directions is None else _probed(value, position, directions)
    return value.detach(), traces


def _augmented(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    divergence: Divergence,
    probes: int,
    generator: torch.Generator | None,
) -> tuple[Callable[[tuple[Tensor, Tensor], Tensor], tuple[Tensor, Tensor]], int]:
    """The field of (position, integral of the divergence), and how many integrals a row has."""
    if divergence not in ("exact", "hutchinson"):
        raise ValueError(f"divergence: must be 'exact' or 'hutchinson', got {divergence!r}")
    if probes < 1:
        raise ValueError(f"probes: must be at least 1, got {probes}")
    directions = None if divergence == "exact" else probe_directions(x, probes, generator)

    def field(state: tuple[Tensor, Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
        return divergence_of(lambda position: velocity(position, t), state[0], directions)

    return field, 1 if directions is None else probes


def _mean_and_error(values: Tensor) -> tuple[Tensor, Tensor | None]:
    columns = values.shape[1]
    return values.mean(dim=1), values.std(dim=1) / columns**0.5 if columns > 1 else None


def _exact_trace(value: Tensor, x: Tensor) -> Tensor:
    flat = value.flatten(1)
    trace = value.new_zeros(value.shape[0])
    for i in range(flat.shape[1]):
        (gradient,) = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)
        trace = trace + gradient.flatten(1)[:, i]
    return trace[:, None]


def _probed(value: Tensor, x: Tensor, directions: Tensor) -> Tensor:
    parts = []
    for direction in directions:
        (gradient,) = torch.autograd.grad((value * direction).sum(), x, retain_graph=True)
        parts.append((gradient * direction).flatten(1).sum(dim=1))
    return torch.stack(parts, dim=1)
