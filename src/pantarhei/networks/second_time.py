"""A second time for networks that were trained with one.

Consistency trajectory models (Kim et al. 2310.02279) and other flow maps start from a network of t and learn one of t and s.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from pantarhei.networks import build, spec_of
from pantarhei.networks.adm import ADM
from pantarhei.networks.diffusers_adapters import merge_peft
from pantarhei.networks.diffusers_models import DiffusersNetwork
from pantarhei.networks.dit_parts import TimeEmbedder
from pantarhei.networks.edm_blocks import Block
from pantarhei.networks.embeddings import TimeEmbedding
from pantarhei.networks.lora import merge_lora
from pantarhei.networks.mlp import MLP
from pantarhei.networks.ncsnpp import NCSNpp
from pantarhei.networks.sit import SiT
from pantarhei.networks.songunet import SongUNet
from pantarhei.networks.unet import UNet

_ONE_NETWORK = (UNet, MLP, SiT, SongUNet, ADM, NCSNpp, DiffusersNetwork)


def with_second_time(
    network: nn.Module,
    *,
    initial: Literal["zero", "random"] = "zero",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A copy of a network that also takes a second time: `copy(x, t, ..., s=s)`.

    Without s it is the network itself. Low-rank additions are merged into the weights of the copy.

    Args:
        network: one of ours; one that has the branch already is copied as it is.
        initial: "zero": the last layer of the branch starts at zero, so that the copy computes what the network does,
            whatever s; "random": as a new network's, which is how consistency trajectory models start.
        generator: draws the seed of the branch's first values; the global generator draws them where it is left out.

    Returns:
        The copy, on the same device, of the same types, in the same mode. What did not learn still does not, the branch
        does.

    Raises:
        TypeError: for a network that is not ours, which must take s= itself.
        ValueError: for another name of `initial`.
    """
    if initial not in ("zero", "random"):
        raise ValueError(f"initial: must be zero or random, got {initial!r}")
    if not isinstance(network, _ONE_NETWORK):
        raise TypeError(
            f"network: a {type(network).__name__} gets no second time here; it must take one itself, forward(x, t, ..., s=)"
        )
    config: Any = network.config
    if config.second_time:
        return copy.deepcopy(network)
    with _seeded(generator):
        grown = _grown_diffusers(network) if isinstance(network, DiffusersNetwork) else _grown(network)
    if initial == "zero":
        for layer in _last_of_branch(grown):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return grown.train(network.training)


def last_layer(network: nn.Module) -> nn.Parameter:
    """The weight of the last layer, whose gradients weigh the terms of a loss (Esser et al. 2012.09841, section 3.2).

    Of an `ADM` it is the last convolution of the last block, as consistency trajectory models take it: the one after it
    starts at zero. Where that weight is frozen and others learn (low-rank additions), the last one of these.

    Raises:
        ValueError: the network has no parameter of two or more dimensions.
    """
    layer = _output_layer(network)
    weight = None if layer is None else layer._parameters.get("weight")
    wide = [parameter for parameter in network.parameters() if parameter.ndim >= 2]
    learning = [parameter for parameter in wide if parameter.requires_grad]
    if weight is not None and (weight.requires_grad or not learning):
        return weight
    if not wide:
        raise ValueError(f"network: {type(network).__name__} has no parameter of two or more dimensions")
    return (learning or wide)[-1]


def _output_layer(network: Any) -> nn.Module | None:
    if isinstance(network, SongUNet):
        side = network.config.size
        return network.dec[f"{side}x{side}_aux_conv"]
    if isinstance(network, ADM):
        block: Any = list(network.dec.values())[-1]
        return block.conv1
    if isinstance(network, UNet):
        return network.head
    if isinstance(network, MLP):
        return network.outputs
    if isinstance(network, SiT):
        return network.final_layer.linear
    if isinstance(network, NCSNpp):
        up: Any = network.up[-1]
        return up.head.conv
    if isinstance(network, DiffusersNetwork):
        return getattr(network.model, "conv_out", None) or getattr(network.model, "proj_out", None)
    return None


def _grown(network: nn.Module) -> nn.Module:
    """A network with a branch, and the weights of one without."""
    if getattr(network, "lora", None) is not None:
        network = merge_lora(copy.deepcopy(network))
    spec: Any = spec_of(network)
    grown = build({**spec, "second_time": True})
    kept = network.state_dict()
    first = next(network.parameters())
    state = {
        name: kept[name].clone() if name in kept else value.to(first.device, first.dtype)
        for name, value in grown.state_dict().items()
    }
    grown.load_state_dict(state, assign=True)
    learns = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    for name, parameter in grown.named_parameters():
        parameter.requires_grad_(learns.get(name, True))
    return grown


def _grown_diffusers(network: DiffusersNetwork) -> DiffusersNetwork:
    """The same around a copy of a model of diffusers."""
    merged = merge_peft(network) if network.config.adapter is not None else copy.deepcopy(network)
    grown = DiffusersNetwork(replace(merged.config, second_time=True), merged.model)
    grown._text = merged._text
    first = next(merged.model.parameters())
    assert grown.time_s is not None
    grown.time_s.to(first.device, first.dtype)
    return grown


def _last_of_branch(network: nn.Module) -> Iterator[Any]:
    """The layers that end the branch for the second time."""
    for module in network.modules():
        if isinstance(module, Block) and module.affine_s is not None:
            yield module.affine_s
    for name in ("time_s", "s_embedder", "time1_s"):
        branch = getattr(network, name, None)
        if isinstance(branch, TimeEmbedding):
            yield branch.layers[-1]
        elif isinstance(branch, TimeEmbedder):
            yield branch.mlp[-1]
        elif branch is not None:
            yield branch


@contextmanager
def _seeded(generator: torch.Generator | None) -> Iterator[None]:
    """Layers draw from the CPU's global generator; with one given, that is seeded by it and put back afterwards."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
