"""Sampling by denoising: the point is taken apart into data and noise, which are put together again at the next time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pantarhei.flow.conditions import as_condition
from pantarhei.flow.modes import evaluation_mode
from pantarhei.flow.paths import AffinePath

if TYPE_CHECKING:
    from pantarhei.flow.flow import ConditionLike, Flow


@torch.no_grad()
def denoising_steps(flow: Flow, x: Tensor, times: Sequence[float], condition: ConditionLike = None) -> Tensor:
    """x(t') = alpha(t') E[x1 | x_t] + sigma(t') E[x0 | x_t], step by step.

    The sampler of Albergo et al. 2303.08797, section 3, and the DDIM of Song et al. 2010.02502: consistent with the flow's
    ODE, of first order, exact where the data estimate is constant along the path, and finite where velocity and score are
    not.

    Args:
        flow: on an affine path.
        x: states at `times[0]`, (B, *shape).
        times: the grid, either way, inside the flow's interval but for the last time, which is not evaluated.
        condition: as in `Flow.sample`.

    Raises:
        ValueError: the path has a latent, or there are fewer than two times.
    """
    if not isinstance(flow.path, AffinePath):
        raise ValueError(
            "flow: denoising steps are for affine paths from noise; a path with a latent has last='denoise'"
        )
    if len(times) < 2:
        raise ValueError(f"times: two or more are needed, got {list(times)}")
    named = as_condition(condition, flow.null, x.shape[0], x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with evaluation_mode(flow.network):
        for t, end in pairwise(times):
            data, noise = flow.ends(x, torch.tensor(t, dtype=dtype, device=x.device), named)
            at = flow.path.at(torch.tensor(end, dtype=dtype, device=x.device), x)
            x = at.alpha * data + at.sigma * noise
    return x
