"""A loss that counts errors by what they change in some features (Liu et al. 2209.03003, section 5.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pantarhei.flow.metrics import follow

if TYPE_CHECKING:
    from pantarhei.flow.flow import Flow
    from pantarhei.flow.objectives import Draw


class FeatureJacobian:
    """|J_h(x_t) (dx_t/dt - v(x_t, t))|^2, averaged over the features h: errors that h does not see are free.

    For the transfer of one kind of images to another, with h the hidden features of a classifier that tells the two apart:
    the flow then changes what makes the kind and keeps the rest. J_h u is one forward-mode derivative, so the cost is
    about two passes through h.

    Args:
        features: h, images (B, C, H, W) to (B, F); differentiable twice; frozen.
        weight: of this term.
        name: what the logged value is called.
    """

    def __init__(self, features: Callable[[Tensor], Tensor], weight: float = 1.0, name: str = "features"):
        self.features, self.weight, self.name = features, weight, name

    def __call__(self, flow: Flow, draw: Draw, output: Tensor) -> Tensor:
        """The loss of each row, (B,)."""
        follow(self.features, draw.x_t)
        error = draw.velocity - flow.prediction.velocity(flow.path, draw.x_t, draw.t, output)
        # Value and direction in one memory layout: forward-mode GroupNorm takes views of both.
        x, direction = (part.clone(memory_format=torch.contiguous_format) for part in (draw.x_t, error))
        change: Tensor = torch.func.jvp(self.features, (x,), (direction,))[1]
        return self.weight * change.square().flatten(1).mean(dim=1)
