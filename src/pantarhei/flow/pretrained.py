"""A flow as a folder: `flow.json` (what it is) and `model.safetensors` (its weights)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pantarhei import networks
from pantarhei.files import read_json, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from pantarhei.flow.flow import Flow

SPEC, WEIGHTS = "flow.json", "model.safetensors"


def save_pretrained(flow: Flow, folder: str | Path) -> Path:
    """Write a flow into a folder.

    Raises:
        OSError: the disk is full; files that were there are whole.
    """
    folder = Path(folder)
    write_tensors(folder / WEIGHTS, flow.network.state_dict())
    spec = {"version": 1, "flow": flow.spec(), "network": networks.spec_of(flow.network) or {"name": "custom"}}
    write_json(folder / SPEC, spec)
    return folder


def from_pretrained(folder: str | Path, network: nn.Module | None = None, **overrides: Any) -> Flow:
    """Read a flow that `save_pretrained` wrote.

    Args:
        folder: the folder.
        network: needed where the network is not one of ours; the weights are loaded into it, in its types. One of ours has
            the types of the saved weights.
        overrides: what a spec cannot hold (source, path, codec).

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: the weights do not fit.
    """
    from pantarhei.flow.flow import Flow

    folder = Path(folder)
    saved = read_json(folder / SPEC)
    own = build_network(saved["network"], network, str(folder))
    load_weights(own, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS), types=network is None)
    return Flow.from_spec(saved["flow"], own, **overrides)


def build_network(spec: dict[str, Any], network: nn.Module | None, where: str) -> nn.Module:
    """The given network, or the one that the spec names, whose weights are to be loaded.

    Raises:
        ValueError: the saved network is not one of ours and none is given.
    """
    if network is not None:
        return network
    if spec["name"] == "custom":
        raise ValueError(f"{where} holds a network that is not one of pantarhei's; pass network=YourModule()")
    return unfilled(lambda: networks.build(spec))


def unfilled(make: Callable[[], nn.Module]) -> nn.Module:
    """The network that `make` makes, without numbers in its weights (on the "meta" device) where that is safe.

    Billions of random numbers are then not drawn only to be overwritten. Safe is a network all of whose tensors are in its
    state, under one name each: loading that leaves nothing out.
    """
    try:
        with torch.device("meta"):
            network = make()
    except (RuntimeError, NotImplementedError):  # it looks at numbers while it is made
        return make()
    held = [id(tensor) for tensor in network.state_dict(keep_vars=True).values()]
    parts = [part for module in network.modules() for part in _tensors_of(module)]
    return network if sorted(held) == sorted(parts) and len(set(held)) == len(held) else make()


def _tensors_of(module: nn.Module) -> list[int]:
    """Parameters, buffers and other tensors that a module itself holds, by identity."""
    own = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    return [id(value) for value in own if isinstance(value, Tensor)]


def load_weights(network: nn.Module, tensors: dict[str, Tensor], where: str, *, types: bool = False) -> None:
    """Load a state dict, naming the first key that does not fit; with `types` the network takes its types, too.

    Raises:
        ValueError: names or shapes differ.
    """
    own = network.state_dict()
    for name in [*own, *tensors]:
        if name not in tensors or name not in own:
            raise ValueError(f"{where}: {name} is {'missing' if name not in tensors else 'not part of the network'}")
        if own[name].shape != tensors[name].shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}, the network {tuple(own[name].shape)}"
            )
    if any(value.is_meta for value in own.values()):
        # Copies: a file's tensors may be windows into it, and it may change.
        network.load_state_dict({name: value.clone() for name, value in tensors.items()}, assign=True)
        return
    found = {value.dtype for value in tensors.values() if value.is_floating_point()}
    if types and len(found) == 1:
        network.to(found.pop())
    network.load_state_dict(tensors)


@torch.no_grad()
def fingerprint(network: nn.Module) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a network's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        flat = value.detach().cpu().contiguous().reshape(-1)  # a single number has no dimension to view as bytes
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
