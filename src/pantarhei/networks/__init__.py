"""Domain-free networks, by name: `build({"name": "unet", "width": 32})`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from pantarhei.naming import build as _build
from pantarhei.networks.adm import ADM, ADMConfig
from pantarhei.networks.diffusers_models import DiffusersConfig, DiffusersNetwork
from pantarhei.networks.discriminators import ProjectedDiscriminator, VGGMaps, make_discriminator
from pantarhei.networks.lora import add_lora, split_lora
from pantarhei.networks.mlp import MLP, MLPConfig
from pantarhei.networks.ncsnpp import NCSNpp, NCSNppConfig
from pantarhei.networks.pair import Pair, PairConfig
from pantarhei.networks.sit import SiT, SiTConfig
from pantarhei.networks.songunet import SongUNet, SongUNetConfig
from pantarhei.networks.unet import UNet, UNetConfig

CONFIGS: dict[str, type[Any]] = {
    "unet": UNetConfig,
    "ncsnpp": NCSNppConfig,
    "mlp": MLPConfig,
    "sit": SiTConfig,
    "songunet": SongUNetConfig,
    "adm": ADMConfig,
    "pair": PairConfig,
    "diffusers": DiffusersConfig,
}
NETWORKS: dict[type[Any], type[nn.Module]] = {
    UNetConfig: UNet,
    NCSNppConfig: NCSNpp,
    MLPConfig: MLP,
    SiTConfig: SiT,
    SongUNetConfig: SongUNet,
    ADMConfig: ADM,
    PairConfig: Pair,
    DiffusersConfig: DiffusersNetwork,
}


def build(spec: Mapping[str, Any]) -> nn.Module:
    """A network from its name and sizes.

    Raises:
        ValueError: for an unknown name or size.
    """
    plain, lora = split_lora(spec)
    config = _build("network", CONFIGS, plain)
    network = NETWORKS[type(config)](config)
    return network if lora is None else add_lora(network, **lora)


def spec_of(network: nn.Module) -> dict[str, Any] | None:
    """What `build` needs to make such a network again; None for a network that is not one of ours."""
    config: Any = getattr(network, "config", None)
    name = next((name for name, kind in CONFIGS.items() if type(config) is kind), None)
    if name is None:
        return None
    lora = getattr(network, "lora", None)
    spec = {"name": name, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}}
    return spec if lora is None else {**spec, "lora": lora}


__all__ = [
    "ADM",
    "MLP",
    "ADMConfig",
    "DiffusersConfig",
    "DiffusersNetwork",
    "MLPConfig",
    "NCSNpp",
    "NCSNppConfig",
    "Pair",
    "PairConfig",
    "ProjectedDiscriminator",
    "SiT",
    "SiTConfig",
    "SongUNet",
    "SongUNetConfig",
    "UNet",
    "UNetConfig",
    "VGGMaps",
    "build",
    "make_discriminator",
    "spec_of",
]
