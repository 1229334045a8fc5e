"""Exponential moving averages of networks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.training.task import unwrapped


class Average(nn.Module):
    """A moving average of a network that is itself a network: callable, and differentiable in its input.

    After the n-th update (n from 1) each parameter has moved by 1 - min(decay, (1 + n) / (10 + n)) towards the
    network's (the warm-up of Song et al. 2011.13456; without warm-up, by 1 - decay). Buffers are copied. Parameters that
    do not learn (`requires_grad` is false, as below low-rank additions) have no average: they are the network's own, shared.

    Args:
        network: the network to follow; the average starts as its copy.
        decay: in [0, 1).
        warmup: whether to use the warm-up.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999, warmup: bool = True):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay: must lie in [0, 1), got {decay}")
        followed = unwrapped(network)
        frozen: dict[int, Any] = {id(p): p for p in followed.parameters() if not p.requires_grad}
        self.network = copy.deepcopy(followed, frozen).requires_grad_(False).eval()
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
        pairs = list(zip(self.network.parameters(), source.parameters(), strict=True))
        if any(mine is theirs and theirs.requires_grad for mine, theirs in pairs):
            raise ValueError("network: parameters were unfrozen after its average was made; unfreeze them first")
        apart = [(_local(mine), _local(theirs)) for mine, theirs in pairs if mine is not theirs]
        if apart:
            torch._foreach_lerp_([mine for mine, _ in apart], [theirs for _, theirs in apart], 1 - decay)
        for mine, theirs in zip(self.network.buffers(), source.buffers(), strict=True):
            mine.copy_(theirs)

    def shared(self, network: nn.Module) -> Iterator[tuple[str, str]]:
        """Names of the parameters that are the network's own: in the state of the average, and in that of `network`."""
        theirs = {id(p): name for name, p in unwrapped(network).named_parameters(remove_duplicate=False)}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if id(parameter) in theirs:
                yield name, theirs[id(parameter)]


def _local(parameter: Tensor) -> Tensor:
    """This process's part of a sharded parameter."""
    data = parameter.detach()
    return data.to_local() if hasattr(data, "to_local") else data
