"""Checkpoints of the score_sde code (Song et al. 2011.13456) that hold rectified flows (Liu et al. 2209.03003).

A file `checkpoint_<n>.pth` holds `model` (weights `module.all_modules.<i>...` and a buffer `sigmas`), `ema` (a bare list
of the averaged trainable parameters, in order), `optimizer` and `step`. The network sees 999 t and was trained on t in
[0.001, 1]; samples start from unit noise at t = 0.001.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pantarhei.data.pickles import load_weights
from pantarhei.files import write_atomically
from pantarhei.flow import Flow, Provenance
from pantarhei.flow.provenance import DISTILLED, NOT_STATED
from pantarhei.networks import NCSNpp, NCSNppConfig
from pantarhei.networks import ncsnpp_keys as keys

EPSILON = 1e-3
PREFIX = "module."
OWN = "pantarhei"  # our own entry: the configuration, which their code passes over


def recognise(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is such a checkpoint, or the bare weights of one."""
    weights = content.get("model", content)
    return isinstance(weights, Mapping) and keys.is_reference(_bare(weights))


def read(
    path: str | Path,
    content: Mapping[str, Any] | None = None,
    *,
    averaged: bool = True,
    size: int | None = None,
    rectified: int | None = None,
    distilled: int | None = None,
    **overrides: Any,
) -> Flow:
    """A flow from a checkpoint.

    Args:
        path: the file.
        content: what it holds, where it has been read already.
        averaged: take the moving average (the file's `ema`); else the raw weights.
        size: side of the images where attention does not sit at side 16.
        rectified: how many reflow rounds the weights went through, which the file does not say: 0 for a first flow
            (1-rectified flow). Score, SDE and likelihood are refused while it is not known.
        distilled: steps that the weights were distilled to, where they were.
        overrides: fields of `NCSNppConfig` that the weights do not tell (`filter`, `divide`, ...).

    The layout is also that of score networks (VP, VE), which are no velocity fields and cannot be told apart by their names:
    give only rectified flows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds something else; the message says what was expected.
    """
    path = Path(path)
    content = load_weights(path) if content is None else content
    weights = content.get("model", content)
    if not isinstance(weights, Mapping) or not keys.is_reference(_bare(weights)):
        raise ValueError(f"{path}: expected weights named all_modules.<i> (or module.all_modules.<i>), got other names")
    tensors = {name: value for name, value in _bare(weights).items() if isinstance(value, Tensor)}
    for name, value in (("rectified", rectified), ("distilled", distilled)):
        if value is not None and value < (0 if name == "rectified" else 1):
            raise ValueError(f"{name}: must be at least {0 if name == 'rectified' else 1}, got {value}")
    known = content.get(OWN) if isinstance(content.get(OWN), Mapping) and not overrides and size is None else None
    config = NCSNppConfig(**known) if known else keys.infer_config(tensors, str(path), size=size, **overrides)
    network = NCSNpp(config)
    state = keys.from_reference(tensors, config, str(path))
    if averaged and "ema" in content:
        state = keys.from_reference(tensors | _shadow(content["ema"], tensors, str(path)), config, str(path))
    elif averaged and "model" in content:
        raise ValueError(f"{path}: there is no moving average (ema) in this file; ask for the raw weights")
    bad = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if bad:
        raise ValueError(f"{path}: {bad[0]} holds NaN or infinity")
    network.load_state_dict(state)
    coupling = NOT_STATED if rectified is None else "independent"
    notes: dict[str, Any] = {"read_from": path.name, "weights": "average" if averaged else "raw"}
    if distilled is not None:
        coupling, notes["steps"] = DISTILLED, distilled
    if "step" in content:
        notes["iterations"] = int(content["step"])
    return Flow(
        network.eval(),
        shape=(config.channels, config.size, config.size),
        interval=(EPSILON, 1.0),
        provenance=Provenance(coupling=coupling, rectified=rectified or 0, notes=notes),
    )


def write(
    flow: Flow,
    path: str | Path,
    *,
    raw: Mapping[str, Tensor] | None = None,
    decay: float = 0.999999,
    iterations: int = 0,
) -> Path:
    """Write a flow as the score_sde code saves it, so that its scripts sample from it.

    Args:
        flow: on the linear path, predicting the velocity, around an `NCSNpp`.
        path: `checkpoint_<n>.pth`.
        raw: state dict of the raw weights; those of the flow's network (which become the average) by default.
        decay: of the moving average, as stored.
        iterations: training length, as stored.

    Raises:
        TypeError, ValueError: the flow has no place in such a file.
    """
    network = flow.network
    if not isinstance(network, NCSNpp):
        raise TypeError(f"flow: only an NCSN++ has a place in the score_sde layout, got {type(network).__name__}")
    if flow.path.spec()["name"] != "linear" or flow.prediction.spec()["name"] != "velocity":
        raise ValueError("flow: the layout means the velocity of the linear path")
    if network.config.time_scale != 999.0:
        raise ValueError(f"flow: the layout multiplies the time by 999, this network by {network.config.time_scale:g}")
    averaged = {k: v.detach().cpu() for k, v in keys.to_reference(network.state_dict(), network.config).items()}
    own = averaged if raw is None else {k: v.detach().cpu() for k, v in keys.to_reference(raw, network.config).items()}
    # A table of noise levels that nothing uses; strict loaders expect it, in the size of the published configurations.
    largest, scales = (378.0, 2000) if network.config.embedding == "fourier" else (50.0, 1000)
    levels = torch.linspace(math.log(largest), math.log(0.01), scales, dtype=torch.float64).exp()
    group = {"lr": 2e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
    content = {
        "optimizer": {"state": {}, "param_groups": [{**group, "params": list(range(len(own)))}]},
        "model": {f"{PREFIX}sigmas": levels, **{f"{PREFIX}{name}": value for name, value in own.items()}},
        "ema": {
            "decay": decay,
            "num_updates": iterations,
            "shadow_params": [averaged[name] for name in keys.trainable(averaged)],
        },
        "step": iterations,
        OWN: asdict(network.config),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(Path(path), buffer.getvalue())
    return Path(path)


def _bare(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Names without the prefix that DataParallel puts before them."""
    return {str(name).removeprefix(PREFIX): value for name, value in weights.items()}


def _shadow(ema: Any, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The averaged tensors by name: the list has the order of the trainable parameters."""
    names = keys.trainable(tensors)
    shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(shadow, (list, tuple)) or len(shadow) != len(names):
        got = len(shadow) if isinstance(shadow, (list, tuple)) else "no list"
        raise ValueError(f"{where}: ema.shadow_params must hold {len(names)} tensors, one a parameter; got {got}")
    for name, value in zip(names, shadow, strict=True):
        if value.shape != tensors[name].shape:
            raise ValueError(
                f"{where}: the average of {name} has shape {tuple(value.shape)}, expected {tuple(tensors[name].shape)}"
            )
    return dict(zip(names, shadow, strict=True))
