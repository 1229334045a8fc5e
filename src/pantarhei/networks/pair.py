"""Two networks side by side, for flows of two fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PairConfig:
    """The two networks of a `Pair`, as specs.

    Attributes:
        first, second: name and sizes of each, as `networks.build` takes them.
    """

    first: dict[str, Any]
    second: dict[str, Any]


class Pair(nn.Module):
    """`forward(x, t, **conditions)`: the outputs of two networks, stacked along dimension 1."""

    def __init__(self, config: PairConfig):
        super().__init__()
        from pantarhei.networks import build  # the table of networks has this one in it

        self.config = config
        self.first, self.second = build(config.first), build(config.second)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """(B, C, ...) to (B, 2 C, ...)."""
        return torch.cat([self.first(x, t, **conditions), self.second(x, t, **conditions)], dim=1)
