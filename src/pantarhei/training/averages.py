"""Exponential moving averages of networks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.training.task import unwrapped


class Average(nn.Module):
    """A moving average of a network that is itself a network: callable, and differentiable in its input.

    After the n-th update (n from 1) each parameter has moved by 1 - min(decay, (1 + n) / (10 + n)) towards the
    network's (the warm-up of Song et al. 2011.13456; without warm-up, by 1 - decay). Buffers are copied.

    Args:
        network: the network to follow; the average starts as its copy.
        decay: in [0, 1).
        warmup: whether to use the warm-up.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999, warmup: bool = True):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay: must lie in [0, 1), got {decay}")
        self.network = copy.deepcopy(unwrapped(network)).requires_grad_(False).eval()
        self.decay = decay
        self.warmup = warmup
        self.updates = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged network's output."""
        return self.network(*args, **kwargs)

    def train(self, mode: bool = True) -> Average:
        """Averages stay in evaluation mode."""
        return self

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move towards `network`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        source = unwrapped(network)
        own, new = [_local(p) for p in self.network.parameters()], [_local(p) for p in source.parameters()]
        if own:
            torch._foreach_lerp_(own, new, 1 - decay)
        for mine, theirs in zip(self.network.buffers(), source.buffers(), strict=True):
            mine.copy_(theirs)


def _local(parameter: Tensor) -> Tensor:
    """This process's part of a sharded parameter."""
    data = parameter.detach()
    return data.to_local() if hasattr(data, "to_local") else data
