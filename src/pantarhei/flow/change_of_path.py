"""A flow on another path, exactly and without training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pantarhei.flow.affine import AffinePath
from pantarhei.flow.paths import build_path
from pantarhei.flow.predictions import EDMPreconditioned, Elsewhere

if TYPE_CHECKING:
    from pantarhei.flow.flow import Flow


def on_path(flow: Flow, path: AffinePath | str = "linear") -> Flow:
    """The same flow, network and all, along another affine path: the same source draw leads to the same data.

    A change of time and scale (2209.03003, section 2.3; 2405.20320, section 3.2), so a diffusion model becomes a velocity
    field on the linear path as it is. An EDM-preconditioned network reads sigma / alpha itself and needs no detour, whatever
    the path. The flow starts where its network has been trained: sigma_max = 80 is t = 1/81 on the linear path, where the
    state is still the unit draw but for one part in 80.

    Args:
        flow: on an affine path.
        path: where to.

    Raises:
        ValueError: the flow's path is not affine.
    """
    path = build_path(path)
    if not isinstance(flow.path, AffinePath):
        raise ValueError("flow: only a flow on an affine path has the same flow on another one")
    if path == flow.path:
        return flow.like(flow.network)
    prediction = flow.prediction
    if isinstance(prediction, Elsewhere) and prediction.origin == path:
        prediction = prediction.prediction
    elif not isinstance(prediction, (EDMPreconditioned, Elsewhere)):
        prediction = Elsewhere(prediction.margin, prediction, flow.path)
    low, high = _image(flow, path)
    first, last = prediction.interval(path)
    interval = (max(low, first), min(high, last))
    return flow.like(flow.network, path=path, predicts=prediction, interval=interval, starts_scaled=True)


def _image(flow: Flow, path: AffinePath) -> tuple[float, float]:
    """The times of `path` with the ratios alpha / sigma that the flow's interval has."""
    ends = torch.tensor(flow.interval, dtype=torch.float64)
    ratio = flow.path.alpha(ends) / flow.path.sigma(ends).clamp_min(1e-30)
    low, high = path.time_at(ratio.clamp(max=1e12)).tolist()
    return max(low, path.regular[0]), min(high, path.regular[1])
