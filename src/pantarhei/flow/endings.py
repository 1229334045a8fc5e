"""From the first time to the data, and how it ends: with the state there, or with one more estimate of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from pantarhei.flow.conditions import as_condition
from pantarhei.flow.estimates import Estimates
from pantarhei.flow.grids import solver_grid
from pantarhei.flow.updates import path_step
from pantarhei.naming import unknown

if TYPE_CHECKING:
    from pantarhei.flow.flow import Flow

Final = Literal["auto", "denoise", "state", "clean"]
NOISE_LEFT = 5e-4  # at the end of an interval, above which samples are better denoised


def carried(
    flow: Flow,
    x: Tensor,
    carry: Callable[..., Tensor],
    *,
    condition: Any = None,
    final: Final = "auto",
    stochastic: bool = False,
    **options: Any,
) -> Tensor:
    """States of a flow's first time carried to the data end, by whoever integrates.

    Args:
        flow: whose states.
        x: states (B, *shape).
        carry: from one time to another: `carry(x, (low, high), condition=..., **options)`.
        condition, final, options: as in `Flow.sample`.
        stochastic: noise is drawn on the way: no step is left out then.
    """
    if final not in get_args(Final):
        raise ValueError(unknown("final", final, get_args(Final)))
    low, high = flow.interval
    noisy = flow.last_sigma > NOISE_LEFT
    if final == "auto":
        few = flow.provenance.rectified and not stochastic and options.get("steps", 50) is not None
        final = "clean" if noisy and few else "denoise" if noisy else "state"
    if final == "clean" and not stochastic:
        high, options = _without_last_step(flow, options)
    if high > low:
        x = carry(x, (low, high), condition=condition, **options)
    if final == "state":
        return x
    t = x.new_full((), high, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    named = as_condition(condition, flow.null, x.shape[0], x.device)
    guided = Estimates(flow, options.get("guidance", 1.0), options.get("transforms", ()))
    return guided.ends(x, t, named).data


def _without_last_step(flow: Flow, options: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """The last time but one of a sampler's grid, and its options up to there."""
    low, high = flow.interval
    steps = options.get("steps", 50)
    if steps is None:
        raise ValueError("final: 'clean' replaces the last step of a grid; under error control take 'denoise'")
    steps = solver_grid(flow.path, steps, (low, high), options.get("grid", "uniform"), options.get("shift", 1.0))
    method = path_step(options.get("method", "auto"), flow.path, high)
    return float(steps[-2]), {**options, "steps": tuple(steps[:-1]), "method": method}
