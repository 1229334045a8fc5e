"""Domain-free networks, by name: `build({"name": "unet", "width": 32})`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from pantarhei.naming import build as _build
from pantarhei.networks.mlp import MLP, MLPConfig
from pantarhei.networks.ncsnpp import NCSNpp, NCSNppConfig
from pantarhei.networks.pair import Pair, PairConfig
from pantarhei.networks.sit import SiT, SiTConfig
from pantarhei.networks.unet import UNet, UNetConfig

CONFIGS: dict[str, type[Any]] = {
    "unet": UNetConfig,
    "ncsnpp": NCSNppConfig,
    "mlp": MLPConfig,
    "sit": SiTConfig,
    "pair": PairConfig,
}
NETWORKS: dict[type[Any], type[nn.Module]] = {
    UNetConfig: UNet,
    NCSNppConfig: NCSNpp,
    MLPConfig: MLP,
    SiTConfig: SiT,
    PairConfig: Pair,
}


def build(spec: Mapping[str, Any]) -> nn.Module:
    """A network from its name and sizes.

    Raises:
        ValueError: for an unknown name or size.
    """
    config = _build("network", CONFIGS, spec)
    return NETWORKS[type(config)](config)


def spec_of(network: nn.Module) -> dict[str, Any] | None:
    """What `build` needs to make such a network again; None for a network that is not one of ours."""
    config: Any = getattr(network, "config", None)
    name = next((name for name, kind in CONFIGS.items() if type(config) is kind), None)
    if name is None:
        return None
    return {"name": name, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}}


__all__ = [
    "MLP",
    "MLPConfig",
    "NCSNpp",
    "NCSNppConfig",
    "Pair",
    "PairConfig",
    "SiT",
    "SiTConfig",
    "UNet",
    "UNetConfig",
    "build",
    "spec_of",
]
