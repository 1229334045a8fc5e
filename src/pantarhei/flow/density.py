"""The density of a flow: of given data, and of its own samples."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pantarhei.flow.conditions import as_condition
from pantarhei.flow.likelihood import Divergence, Likelihood, log_likelihood, push_forward
from pantarhei.flow.modes import evaluation_mode
from pantarhei.flow.noise_amounts import Epsilon
from pantarhei.flow.path_likelihood import PathLikelihood, path_likelihood

if TYPE_CHECKING:
    from pantarhei.flow.flow import ConditionLike, Flow


def log_prob(
    flow: Flow,
    x: Tensor,
    *,
    condition: ConditionLike = None,
    divergence: Divergence = "exact",
    probes: int = 8,
    generator: torch.Generator | None = None,
    of: Literal["data", "samples"] = "data",
    details: bool = False,
    epsilon: Epsilon | None = None,
    **options: Any,
) -> Any:
    """log p(x) in nats, (B,), by the change of variables along the flow, or by random paths of its SDE.

    Args:
        flow: the flow.
        x: data (B, *shape), in the flow's space.
        condition: as in `sample`.
        divergence, probes, generator: see `log_likelihood`.
        of: after reflow the value is the density of the flow's own samples, no longer an estimate of the data's;
            it must then be asked for with "samples".
        details: return a `Likelihood` or a `PathLikelihood` (value, standard error, evaluations, ...).
        epsilon: the density of the SDE with this noise, see `path_likelihood`, which also names the options.
        options: `method`, `steps`, `rtol`, `atol`.

    Raises:
        ValueError: where the source has no density, or (with of="data") the flow was rectified.
    """
    flow.require_density(of)
    named = as_condition(condition, flow.null, x.shape[0])
    start = partial(_start_log_prob, flow)
    options |= {"divergence": divergence, "probes": probes, "generator": generator}
    result: Likelihood | PathLikelihood
    with evaluation_mode(flow.network):
        if epsilon is not None:
            result = path_likelihood(flow, x, epsilon, start, condition=named, **options)
        else:
            result = log_likelihood(lambda y, t: flow.velocity(y, t, named), x, flow.interval, start, **options)
    return result if details else result.value


def sample_with_log_prob(
    flow: Flow,
    count: int | None = None,
    *,
    x0: Tensor | None = None,
    condition: ConditionLike = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Likelihood:
    """Samples of the ODE together with their log-likelihood, in one solve.

    Args:
        flow: the flow.
        count, x0, condition, generator: as in `sample`.
        options: `divergence`, `probes`, `method`, `steps`, `rtol`, `atol`, see `push_forward`.

    Returns:
        A `Likelihood` whose `value` is log p in nats (B,) and whose `start` are the samples, in the flow's space.

    Raises:
        ValueError: the source has no density.
    """
    flow.require_density("samples")
    x0 = flow.draw(count, condition, generator) if x0 is None else x0
    named = as_condition(condition, flow.null, x0.shape[0])
    x = flow.first_sigma * x0
    with evaluation_mode(flow.network):
        return push_forward(
            lambda y, t: flow.velocity(y, t, named),
            x,
            flow.interval,
            _start_log_prob(flow, x),
            generator=generator,
            **options,
        )


def _start_log_prob(flow: Flow, x: Tensor) -> Tensor:
    """Log density of states at the first time, (B,)."""
    unit = flow.first_sigma
    return flow.source.log_prob(x / unit) - x[0].numel() * math.log(unit)
