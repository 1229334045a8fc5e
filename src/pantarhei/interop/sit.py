"""Checkpoints of SiT (Ma et al. 2401.08740): the published bare weights, and what its training script saves.

A published file (`SiT-XL-2-256.pt`) is a state dict under the names of `pantarhei.networks.SiT`. The training script saves a
dict with `model`, `ema` (both such state dicts), `opt` and `args` (its command line, an `argparse.Namespace`).

DiT (2212.09748) publishes weights under the same names, but those predict the noise of a numbered diffusion: they are no
velocity fields, and nothing in the file tells them apart. Give only SiT's.
"""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.data.pickles import load_weights
from pantarhei.files import write_atomically
from pantarhei.flow import Flow, Provenance, pretrained
from pantarhei.flow.flow import Codec
from pantarhei.flow.provenance import DISTILLED
from pantarhei.naming import unknown
from pantarhei.networks.sit import SIZES, SiT, SiTConfig

OWN = "pantarhei"  # our own entry of a training file: what the weights do not tell; their code passes over it
PATHS = {"Linear": "linear", "GVP": "cosine", "VP": "vp"}  # their names of paths, and ours
PREDICTIONS = ("velocity", "noise", "score")
HEAD_WIDTHS = range(64, 73)  # of all published sizes


def recognise(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is such a checkpoint, or the bare weights of one."""
    weights = content.get("ema", content.get("model", content))
    return isinstance(weights, Mapping) and any(
        str(name).startswith("blocks.") and ".adaLN_modulation.1." in str(name) for name in weights
    )


def read(
    path: str | Path,
    content: Mapping[str, Any] | None = None,
    *,
    averaged: bool = True,
    heads: int | None = None,
    size: int | None = None,
    rectified: int | None = None,
    distilled: int | None = None,
    codec: Codec | None = None,
) -> Flow:
    """A flow from a checkpoint: on the linear path, predicting the velocity, unless the file's `args` say otherwise.

    Args:
        path: the file.
        content: what it holds, where it has been read already.
        averaged: of a training file take the moving average (`ema`); else the raw weights. Bare weights are what they are.
        heads: attention heads, where neither a published size nor our own entry tells them.
        size: side of the images or latents, as a check: the table of positions tells it.
        rectified: how many reflow rounds the weights went through; 0, as published, where neither this nor our own entry
            says so.
        distilled: steps that the weights were distilled to, where they were.
        codec: turns the latents into images, such as the autoencoder of Stable Diffusion with its factor 0.18215.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds something else; the message says what was expected.
    """
    path = Path(path)
    content = load_weights(path) if content is None else content
    tensors = _weights(content, averaged, str(path))
    own = content.get(OWN)
    own = own if isinstance(own, Mapping) else {}
    if heads is None and isinstance(own.get("heads"), int):
        heads = own["heads"]
    config = infer_config(tensors, str(path), heads=heads, size=size)
    bad = [name for name, value in tensors.items() if not (value.is_floating_point() and bool(value.isfinite().all()))]
    if bad:
        raise ValueError(f"{path}: {bad[0]} holds {_what_is_wrong(tensors[bad[0]])}")
    if config.classes == 0 and TABLE in tensors:
        # A table of only the null class adds one constant row to the embedding of the time.
        tensors[LAST_BIAS] = tensors[LAST_BIAS] + tensors.pop(TABLE)[0]
    with torch.device("meta"):  # initial values of 675 million weights would be drawn in vain
        network = SiT(config)
    network = network.to_empty(device="cpu")
    pretrained.load_weights(network, tensors, str(path))
    args = content.get("args", {})
    args = vars(args) if isinstance(args, Namespace) else args if isinstance(args, Mapping) else {}
    their_path, prediction = args.get("path_type", "Linear"), args.get("prediction", "velocity")
    if their_path not in PATHS:
        raise ValueError(f"{path}: {unknown('args.path_type', str(their_path), PATHS)}")
    if prediction not in PREDICTIONS:
        raise ValueError(f"{path}: {unknown('args.prediction', str(prediction), PREDICTIONS)}")
    notes = {"read_from": path.name, "weights": _which(content, averaged)}
    return Flow(
        network.eval(),
        path=PATHS[their_path],
        predicts=prediction,
        shape=(config.channels, config.size, config.size),
        null={"label": config.classes} if config.classes else None,
        codec=codec,
        provenance=_provenance(own, rectified, distilled, notes),
    )


def infer_config(
    tensors: Mapping[str, Tensor], where: str, *, heads: int | None = None, size: int | None = None
) -> SiTConfig:
    """The sizes of the network that a state dict belongs to.

    Args:
        tensors: the state dict.
        where: the file, for messages.
        heads: attention heads. They leave no trace in the weights: without this they are those of the published size of
            this depth and width, or give heads of 64 to 72 features where only one number does.
        size: side of the images or latents, if it is to be checked.

    Raises:
        ValueError: this is no SiT, sizes contradict each other, or the heads must be given.
    """
    width, channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", "(width, channels, patch, patch)", where)
    _, tokens, _ = _shape(tensors, "pos_embed", "(1, tokens, width)", where)
    hidden, _ = _shape(tensors, "blocks.0.mlp.fc1.weight", "(hidden, width)", where)
    values, _ = _shape(tensors, "final_layer.linear.weight", "(values of a patch, width)", where)
    rows = _shape(tensors, TABLE, "(classes + 1, width)", where)[0] if TABLE in tensors else 1
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"{where}: pos_embed has {tokens} positions; expected a square number of patches")
    if size is not None and size != side * patch:
        raise ValueError(f"size: {where} is for side {side * patch} ({side} patches of {patch}), got {size}")
    plain = patch * patch * channels
    if values not in (plain, 2 * plain):
        raise ValueError(
            f"{where}: final_layer.linear.weight gives {values} values a patch; "
            f"expected {plain}, or {2 * plain} with learn_sigma, for {channels} channels in patches of {patch}"
        )
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    try:
        return SiTConfig(
            size=side * patch,
            patch=patch,
            channels=channels,
            width=width,
            depth=depth,
            heads=_heads(depth, width, where) if heads is None else heads,
            mlp=hidden / width,
            classes=rows - 1,
            learn_sigma=values == 2 * plain,
        )
    except ValueError as error:
        raise error if where in str(error) else ValueError(f"{where}: {error}") from None


def write(
    flow: Flow,
    path: str | Path,
    *,
    layout: Literal["weights", "train"] = "weights",
    raw: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a flow so that the scripts of SiT open it.

    Args:
        flow: on the linear path, predicting the velocity, around a `SiT`.
        path: a `.pt` file.
        layout: "weights" is a bare state dict, as published; "train" the dict of the training script, to sample from or to
            go on training (with a fresh optimiser). Only the latter also keeps what `read` cannot see in the weights.
        raw: state dict of the raw weights, for "train"; by default those of the flow's network, which are its average.

    An unconditional network gets a table that holds the null class only, and nothing in it.

    Raises:
        TypeError, ValueError: the flow has no place in such a file.
    """
    network = flow.network
    if not isinstance(network, SiT):
        raise TypeError(f"flow: only a SiT has a place in the SiT layout, got {type(network).__name__}")
    if flow.path.spec()["name"] != "linear" or flow.prediction.spec()["name"] != "velocity":
        raise ValueError("flow: the layout means the velocity of the linear path")
    if network.config.second_time:
        raise ValueError("flow: the SiT layout has no place for a second time; save_pretrained keeps it")
    if layout not in ("weights", "train"):
        raise ValueError(unknown("layout", layout, ("weights", "train")))
    averaged = _with_table(network.state_dict())
    content: dict[str, Any] = averaged
    if layout == "train":
        config = network.config
        group = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
        content = {
            "model": averaged if raw is None else _with_table(raw),
            "ema": averaged,
            # There the table of positions is a frozen parameter, which the optimiser counts.
            "opt": {"state": {}, "param_groups": [{**group, "params": list(range(len(averaged)))}]},
            "args": Namespace(
                model=f"SiT-{config.name}" if config.name else None,
                image_size=8 * config.size,  # the latents of their autoencoder are an eighth of it
                num_classes=config.classes,
                path_type="Linear",
                prediction="velocity",
                loss_weight=None,
                sample_eps=None,
                train_eps=None,
            ),
            OWN: {"heads": config.heads, "provenance": asdict(flow.provenance)},
        }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return write_atomically(path, buffer.getvalue())


TABLE, LAST_BIAS = "y_embedder.embedding_table.weight", "t_embedder.mlp.2.bias"


def _with_table(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {name: value.detach().cpu() for name, value in state.items()}
    return out if TABLE in out else {**out, TABLE: torch.zeros_like(out[LAST_BIAS])[None]}


def _which(content: Mapping[str, Any], averaged: bool) -> str:
    if "ema" not in content and "model" not in content:
        return "as stored"
    return "average" if averaged else "raw"


def _weights(content: Mapping[str, Any], averaged: bool, where: str) -> dict[str, Tensor]:
    """The state dict that is asked for; a new dict."""
    entry = {"as stored": None, "average": "ema", "raw": "model"}[_which(content, averaged)]
    if entry is not None and entry not in content:
        other = "raw weights" if averaged else "average"
        raise ValueError(f"{where}: there is no {entry!r} in this file; ask for the {other}")
    weights = content if entry is None else content[entry]
    if not isinstance(weights, Mapping) or not recognise(weights):
        raise ValueError(f"{where}: expected weights named blocks.<i>.adaLN_modulation.1.weight, got other names")
    return {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}


def _shape(tensors: Mapping[str, Tensor], name: str, meaning: str, where: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"{where}: {name} is missing; expected a tensor of shape {meaning}")
    shape = tuple(tensors[name].shape)
    if len(shape) != meaning.count(",") + 1 or 0 in shape:
        raise ValueError(f"{where}: {name} has shape {shape}, expected {meaning}")
    return shape


def _heads(depth: int, width: int, where: str) -> int:
    published = [heads for d, w, heads in SIZES.values() if (d, w) == (depth, width)]
    found = published or [width // head for head in HEAD_WIDTHS if width % head == 0]
    if len(found) != 1:
        raise ValueError(
            f"heads: {where} is no published size ({depth} blocks of width {width}), and weights do not tell the number "
            f"of attention heads; give it"
        )
    return found[0]


def _what_is_wrong(value: Tensor) -> str:
    return "NaN or infinity" if value.is_floating_point() else f"{value.dtype}; expected floating-point numbers"


def _provenance(
    own: Mapping[str, Any], rectified: int | None, distilled: int | None, notes: dict[str, Any]
) -> Provenance:
    """As told; else as our own entry has it; else independent, which is how SiT trains."""
    for name, value, least in (("rectified", rectified, 0), ("distilled", distilled, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}: must be at least {least}, got {value}")
    stored = own.get("provenance")
    try:
        known = Provenance(**stored) if isinstance(stored, Mapping) else Provenance()
    except TypeError:
        known = Provenance()  # written by another version
    coupling, notes = known.coupling, {**known.notes, **notes}
    if distilled is not None:
        coupling, notes["steps"] = DISTILLED, distilled
    rounds = known.rectified if rectified is None else rectified
    return Provenance(coupling, rounds, known.data, known.teacher, notes)
