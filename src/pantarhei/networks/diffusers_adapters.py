"""Low-rank adapters (LoRA, Hu et al. 2106.09685) of diffusers models, by peft, so that others can load them."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pantarhei.files import write_tensors
from pantarhei.networks.diffusers_models import DiffusersNetwork

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
FILE = "pytorch_lora_weights.safetensors"


def add_peft(
    network: DiffusersNetwork, rank: int = 16, alpha: float | None = None, targets: Sequence[str] = TARGETS
) -> DiffusersNetwork:
    """A copy of a network with low-rank adapters, the only weights of it that train. It starts as the same function.

    Args:
        network: without adapters; it is not changed.
        rank: of the adapters.
        alpha: their scale is alpha / rank; the rank by default.
        targets: ends of the names of the layers that get one.

    Raises:
        ImportError: peft is not installed.
        ValueError: the network has adapters already, a number is below 1, or no layer has such a name.
    """
    _check(network, rank)
    return adapt(copy.deepcopy(network), rank, alpha, targets)


def adapt(
    network: DiffusersNetwork, rank: int = 16, alpha: float | None = None, targets: Sequence[str] = TARGETS
) -> DiffusersNetwork:
    """Give a network low-rank adapters where it stands, and freeze the rest of it; else as `add_peft`."""
    _check(network, rank)
    adapter: dict[str, Any] = {
        "rank": int(rank),
        "alpha": float(rank if alpha is None else alpha),
        "targets": list(targets),
    }
    inject(network.model, **adapter)
    network.config = replace(network.config, adapter=adapter)
    return network.requires_grad_(True)


def _check(network: DiffusersNetwork, rank: int) -> None:
    if network.config.adapter is not None:
        raise ValueError("network: it has adapters already; merge them first (merge_peft)")
    if rank < 1:
        raise ValueError(f"rank: must be at least 1, got {rank}")


def merge_peft(network: DiffusersNetwork) -> DiffusersNetwork:
    """A copy of a network with its adapters added to the weights, as a network without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(network)
    for name, module in list(merged.model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(merged.model.get_submodule(parent), leaf, module.get_base_layer())
    if hasattr(merged.model, "peft_config"):
        del merged.model.peft_config
    merged.config = replace(network.config, adapter=None)
    return merged.requires_grad_(True)


def write_peft(network: DiffusersNetwork, folder: str | Path) -> Path:
    """Write the adapters alone into a folder, as `pipeline.load_lora_weights(folder)` reads them.

    A bare model reads them by `load_lora_adapter(folder, prefix="unet", use_safetensors=True)` (of SD3 "transformer").

    Raises:
        ValueError: the network has no adapters.
    """
    if network.config.adapter is None:
        raise ValueError("network: it has no adapters to write (add_peft)")
    from peft.utils import get_peft_model_state_dict

    prefix = "transformer" if network.config.model.startswith("SD3") else "unet"
    tensors = get_peft_model_state_dict(network.model, adapter_name="default")
    settings = network.model.peft_config["default"].to_dict()
    known = {f"{prefix}.{key}": sorted(v) if isinstance(v, set) else v for key, v in settings.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(known, indent=2, sort_keys=True, default=str)}
    return write_tensors(Path(folder) / FILE, {f"{prefix}.{k}": v for k, v in tensors.items()}, metadata)


def inject(model: nn.Module, rank: int, alpha: Any, targets: Sequence[str]) -> None:
    """Put adapters into a model, in place.

    Raises:
        ImportError: peft is not installed.
        ValueError: no layer has such a name.
    """
    try:
        import peft
    except ImportError:
        raise ImportError("adapters of diffusers models need peft: pip install 'pantarhei[lora]'") from None
    settings: Any = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=True, lora_dropout=0.0
    )
    try:
        peft.inject_adapter_in_model(settings, model, adapter_name="default")
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        raise ValueError(f"targets: this model has no layers named {', '.join(targets)}") from None
