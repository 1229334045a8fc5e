"""Low-rank adaptation (Hu et al. 2106.09685): weights W + (alpha / rank) B A, of which only A and B learn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRankSum(nn.Module):
    """W -> W + scale * B A on a weight (out, in, ...); B starts at zero, so nothing changes at first."""

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__()
        out, inputs = weight.shape[0], weight[0].numel()
        if not 1 <= rank <= min(out, inputs):
            raise ValueError(
                f"rank: must lie in 1 to {min(out, inputs)} for a weight {tuple(weight.shape)}, got {rank}"
            )
        self.down = nn.Parameter(weight.new_empty(rank, inputs))
        self.up = nn.Parameter(weight.new_zeros(out, rank))
        self.scale = scale
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The sum, shaped like the weight."""
        return weight + self.scale * (self.up @ self.down).reshape(weight.shape)


def add_lora(network: nn.Module, rank: int, alpha: float | None = None, targets: Sequence[str] = ()) -> nn.Module:
    """Give layers of a network low-rank additions; everything else stops learning. In place.

    Args:
        network: any module with linear layers or convolutions.
        rank: at least 1; layers smaller than it get their full rank.
        alpha: the additions count alpha / rank; alpha = rank by default.
        targets: parts of the names of the layers; all linear layers and convolutions by default.

    Returns:
        The network; `network.lora` keeps the settings, so that it can be saved and built again.

    Raises:
        ValueError: for rank < 1, a network that has some already, or targets that name no layer.
    """
    if rank < 1:
        raise ValueError(f"rank: must be at least 1, got {rank}")
    if getattr(network, "lora", None) is not None:
        raise ValueError("network: it has low-rank additions already; merge them first")
    network.requires_grad_(False)
    layers = [
        (name, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and (not targets or any(part in name for part in targets))
    ]
    if not layers:
        raise ValueError(f"targets: no linear layer or convolution is named like {', '.join(targets) or 'anything'}")
    scale = (rank if alpha is None else alpha) / rank
    for _, layer in layers:
        full = min(layer.weight.shape[0], layer.weight[0].numel())
        addition = LowRankSum(layer.weight, min(rank, full), scale)
        parametrize.register_parametrization(layer, "weight", addition, unsafe=True)  # a sum has its weight's shape
    network.lora = {"rank": rank, "alpha": alpha, "targets": list(targets)}  # type: ignore[assignment]
    return network


def merge_lora(network: nn.Module) -> nn.Module:
    """Put the additions into the weights; the network is then a plain one again. In place.

    Its parameters are new ones: those below the additions may be shared with an average or a network that it follows.
    """
    for layer in list(network.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            # Not by remove_parametrizations: that takes the weight from a class which copies of the layer share.
            merged = nn.Parameter(getattr(layer, "weight").detach())  # noqa: B009 - any layer may have one
            del layer.parametrizations
            layer.__class__ = type(layer).__bases__[0]
            layer.register_parameter("weight", merged)
    own: dict[int, nn.Parameter] = {}
    for layer in network.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            new = own.setdefault(id(parameter), nn.Parameter(parameter.detach().clone()))
            setattr(layer, name, new)
    network.lora = None  # type: ignore[assignment]
    return network.requires_grad_(True)


def split_lora(spec: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A network's spec without its additions, and their settings."""
    plain = {key: value for key, value in spec.items() if key != "lora"}
    return plain, spec.get("lora")


@torch.no_grad()
def size_of(network: nn.Module) -> tuple[int, int]:
    """Numbers that learn, and all numbers."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad), sum(p.numel() for p in network.parameters())
