"""Checkpoints of EDM (Karras et al. 2206.00364) and of rectified flow++ (Lee et al. 2405.20320).

There are EDM's snapshots (`.pkl`: a pickled dict whose `ema` is the averaged network as a whole object; nothing in it is
run, see `pantarhei.data.pickled_modules`); flat state dicts of the same networks, with or without the prefix `model.`, as
rectified flow++ publishes its students and its re-saved teachers (`.pth`) and as users export them (`.safetensors`); and
training states of rectified flow++ (`model_state_dict`, `iter`, and `optimizer_state_dict`, which holds the average, `ema`).

A state dict does not say whether it is a teacher (a denoiser at EDM's noise levels) or a student (the same wrapper on the
linear path): `rectified` tells. Names and shapes say all else but the dropout.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.data.pickled_modules import ModuleRecord, read_modules
from pantarhei.data.pickles import load_weights
from pantarhei.files import write_atomically, write_tensors
from pantarhei.flow import Flow, Provenance, pretrained
from pantarhei.flow.provenance import DISTILLED
from pantarhei.interop.edm_sizes import UNTOLD, infer_config
from pantarhei.naming import unknown
from pantarhei.networks import ADM, ADMConfig, SongUNet, SongUNetConfig, spec_of
from pantarhei.networks.edm_blocks import filter_of

LICENCE = (
    "weights derived from NVlabs/edm are CC BY-NC-SA 4.0: no commercial use, same licence for what is made of them"
)
OWN = "pantarhei"  # our own entry: what the weights do not tell
PREFIX = "model."
NETWORKS = {"SongUNet": SongUNetConfig, "DhariwalUNet": ADMConfig}  # their names of the networks
REFUSED = {
    "VPPrecond": "its noise levels are numbered times of the VP process",
    "VEPrecond": "its network predicts the noise, at ln(sigma / 2)",
    "iDDPMPrecond": "its noise levels are numbered steps of a cosine schedule",
}
_BUFFERS = ("resample_filter", "map_noise.freqs")


def load_snapshot(path: str | Path) -> dict[str, Any]:
    """What a `.pkl` of EDM holds, by name: plain data and records of objects, nothing that can run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it asks for anything else than networks and plain data, or it is damaged.
    """
    content = read_modules(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dict with the network as 'ema'")
    return content


def recognise(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is such a checkpoint, or the bare weights of one."""
    if isinstance(content.get("ema"), ModuleRecord):
        return True
    weights = content.get("model_state_dict", content)
    return isinstance(weights, Mapping) and any(
        re.fullmatch(r"enc\.\d+x\d+_conv\.weight", name) for name in bare(weights)
    )


def read(
    path: str | Path,
    content: Mapping[str, Any] | None = None,
    *,
    averaged: bool = True,
    rectified: int | None = None,
    distilled: int | None = None,
    sigma_data: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    **overrides: Any,
) -> Flow:
    """A flow from a checkpoint: EDM's denoiser on EDM's path, or a rectified student on the linear path.

    Args:
        path: the file.
        content: what it holds, where it has been read already.
        averaged: of a training state take the moving average (`ema` in the optimiser); else the raw weights. A snapshot
            holds the average only, and bare weights are what they are.
        rectified: how many reflow rounds the weights went through: 0 for a teacher, 1 for the students of rectified flow++.
            By default as our own entry has it, else 0.
        distilled: steps that a student was distilled to, where it was.
        sigma_data: deviation of the data that the wrapper was made for; 0.5 where neither the file nor this says so.
        sigma_min, sigma_max: noise levels of a teacher's path; 0.002 and 80 by default.
        overrides: `dropout`, `label_dropout`, which weights do not tell: by default those of the published configuration of
            this structure, or none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds something else; the message says what was expected.
    """
    path = Path(path)
    if content is None:
        content = load_snapshot(path) if path.suffix == ".pkl" else load_weights(path)
    told = {"sigma_data": sigma_data, "sigma_min": sigma_min, "sigma_max": sigma_max}
    for name, value in told.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}: must be positive, got {value}")
    for name, count, least in (("rectified", rectified, 0), ("distilled", distilled, 1)):
        if count is not None and count < least:
            raise ValueError(f"{name}: must be at least {least}, got {count}")
    unfit = sorted(set(overrides) - set(UNTOLD))
    if unfit:
        raise ValueError(f"{unfit[0]}: the weights of an EDM network tell this; only {', '.join(UNTOLD)} can be given")
    own = own_entry(path, content)
    tensors, about = weights_of(content, averaged, str(path))
    known = {name: about.pop(name) for name in UNTOLD if name in about} | own.get("network", {})
    settings = {name: known[name] for name in UNTOLD if name in known} | overrides
    network = _network(tensors, str(path), settings)
    if sigma_data is None:
        told["sigma_data"] = about.pop("sigma_data", None)
    notes = {"read_from": path.name, **about}
    stored = own.get("flow")
    if stored and rectified is None and distilled is None and not any(told.values()):
        try:
            flow = Flow.from_spec(stored, network)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: the entry {OWN!r} does not describe a flow ({error})") from None
        # Anyone can write such an entry, which then must not hide whose weights these may be.
        return flow.like(network, notes={"licence": LICENCE, **flow.provenance.notes, **notes})
    return _flow(network, rectified or 0, distilled, told, {**notes, "licence": LICENCE})


def write(
    flow: Flow,
    path: str | Path,
    *,
    layout: Literal["weights", "train"] = "weights",
    raw: Mapping[str, Tensor] | None = None,
    iterations: int = 0,
) -> Path:
    """Write a flow so that the scripts of rectified flow++ open it, and those of EDM can load its weights.

    Args:
        flow: predicting as EDM's wrapper does, on EDM's or the linear path, around a `SongUNet` or an `ADM`.
        path: a `.pth`, `.pt` or (bare weights) `.safetensors` file.
        layout: "weights" is a bare state dict, as published; "train" what the training script of rectified flow++ saves, to
            go on training with a fresh optimiser. The latter, and safetensors, keep what `read` cannot see in the weights.
        raw: state dict of the raw weights, for "train"; by default those of the flow's network, which are its average.
        iterations: training length, for "train".

    Raises:
        TypeError, ValueError: the flow has no place in such a file, or the file has another suffix.
    """
    path, network = Path(path), flow.network
    if not isinstance(network, (SongUNet, ADM)):
        raise TypeError(f"flow: only a SongUNet or an ADM has a place in the EDM layout, got {type(network).__name__}")
    check_place(network.config)
    if flow.prediction.spec()["name"] != "edm" or flow.path.spec()["name"] not in ("edm", "linear"):
        raise ValueError("flow: the layout means the prediction 'edm', on EDM's or the linear path")
    if layout not in ("weights", "train"):
        raise ValueError(unknown("layout", layout, ("weights", "train")))
    suffixes = (".pth", ".pt", ".safetensors") if layout == "weights" else (".pth", ".pt")
    if path.suffix not in suffixes:
        raise ValueError(f"path: the {layout} layout is a {' or '.join(suffixes)} file, got {path.name}")
    own = {"network": spec_of(network), "flow": flow.spec()}
    averaged = {PREFIX + name: value.detach().cpu() for name, value in network.state_dict().items()}
    if path.suffix == ".safetensors":
        write_tensors(path, averaged, {OWN: json.dumps(own)})
        return path
    content: dict[str, Any] = averaged
    if layout == "train":
        current = averaged if raw is None else {PREFIX + name: value.detach().cpu() for name, value in raw.items()}
        group = {"lr": 2e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}
        state = [
            {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(averaged[name]),
                "exp_avg_sq": torch.zeros_like(averaged[name]),
                "ema": averaged[name],
            }
            for name in _trainable(averaged)
        ]
        content = {
            "optimizer_state_dict": {
                "state": dict(enumerate(state)),
                "param_groups": [{**group, "params": list(range(len(state)))}],
            },
            "model_state_dict": current,
            "iter": iterations,
            OWN: own,
        }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return write_atomically(path, buffer.getvalue())


def check_place(config: SongUNetConfig | ADMConfig) -> None:
    """Refuse a network that this layout cannot hold, because it says nothing of what is special about it.

    Raises:
        ValueError: naming what that is.
    """
    if config.second_time:
        raise ValueError("flow: EDM's layout has no place for a second time; interop.consistency.write has one")
    for name, usual in (("groups", 0), ("head", 64), ("time_scale", 1.0), ("adaptive", True)):
        if getattr(config, name, usual) != usual:
            raise ValueError(
                f"flow: its network has {name}={getattr(config, name)}, EDM's {usual}; interop.consistency.write has a place"
            )


def _flow(
    network: SongUNet | ADM,
    rectified: int,
    distilled: int | None,
    told: Mapping[str, float | None],
    notes: dict[str, Any],
) -> Flow:
    given = {name: value for name, value in told.items() if value is not None}
    prediction = {"name": "edm", **({"sigma_data": given.pop("sigma_data")} if "sigma_data" in given else {})}
    student = bool(rectified or distilled)
    if student and given:
        raise ValueError(f"{next(iter(given))}: a student has the linear path, which has no noise levels of its own")
    config = network.config
    return Flow(
        network,
        path="linear" if student else {"name": "edm", **given},
        predicts=prediction,
        shape=(config.channels, config.size, config.size),
        null={"label": config.classes} if config.classes else None,
        provenance=Provenance(
            coupling=DISTILLED if distilled else "independent",
            rectified=rectified,
            notes={**notes, "steps": distilled} if distilled else notes,
        ),
    )


def _network(tensors: dict[str, Tensor], where: str, settings: Mapping[str, Any]) -> SongUNet | ADM:
    try:
        config = infer_config(tensors, where, **settings)
    except (TypeError, OverflowError) as error:  # settings of a file that are no numbers
        raise ValueError(f"{where}: {error}") from None
    if config.second_time:
        raise ValueError(
            f"{where}: map_layer0_s is that of a consistency trajectory model; interop.consistency reads it"
        )
    return fill(config, tensors, where)


def fill(config: SongUNetConfig | ADMConfig, tensors: dict[str, Tensor], where: str) -> SongUNet | ADM:
    """A network with the weights of a file.

    Args:
        config: which network.
        tensors: by our names.
        where: the file, for messages.

    Raises:
        ValueError: a tensor does not fit, or holds something else than finite numbers.
    """
    bad = [name for name, value in tensors.items() if not (value.is_floating_point() and bool(value.isfinite().all()))]
    if bad:
        wrong = "NaN or infinity" if tensors[bad[0]].is_floating_point() else f"{tensors[bad[0]].dtype}"
        raise ValueError(f"{where}: {bad[0]} holds {wrong}; expected finite floating-point numbers")
    kernel = filter_of(getattr(config, "filter", (1, 1)))
    for name, value in tensors.items():
        if name.endswith(".resample_filter") and not (
            value.shape == kernel.shape and torch.allclose(value.float(), kernel, atol=1e-3)
        ):
            raise ValueError(f"{where}: {name} is another filter than the first one of this file")
    with torch.device("meta"):  # initial values of 296 million weights would be drawn in vain
        network = SongUNet(config) if isinstance(config, SongUNetConfig) else ADM(config)
    network = network.to_empty(device="cpu")
    pretrained.load_weights(network, tensors, where)
    return network.eval()


def own_entry(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """What `write` left of the flow; empty where it did not write this file."""
    found: Any = content.get(OWN)
    if path.suffix == ".safetensors" and path.is_file():
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(OWN)
        try:
            found = json.loads(text) if text else None
        except json.JSONDecodeError:
            found = None
    known = found if isinstance(found, Mapping) else {}
    return {name: dict(known[name]) for name in ("network", "flow") if isinstance(known.get(name), Mapping)}


def weights_of(content: Mapping[str, Any], averaged: bool, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict that is asked for, a new dict without prefixes, and what the file says besides."""
    if isinstance(content.get("ema"), ModuleRecord):
        if not averaged:
            raise ValueError(f"{where}: a snapshot holds the average only; ask for it")
        return _snapshot(content["ema"], where)
    about: dict[str, Any] = {"weights": "as stored"}
    weights = content
    if "model_state_dict" in content:
        weights, about["weights"] = content["model_state_dict"], "average" if averaged else "raw"
        if isinstance(content.get("iter"), int):
            about["iterations"] = content["iter"]
    if not isinstance(weights, Mapping) or not recognise(weights):
        raise ValueError(f"{where}: expected weights named enc.<side>x<side>_conv.weight, got other names")
    tensors = {name: value for name, value in bare(weights).items() if isinstance(value, Tensor)}
    if about["weights"] == "average":
        tensors |= _average(content.get("optimizer_state_dict"), tensors, where)
    return tensors, about


def _snapshot(wrapper: ModuleRecord, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    name, model = wrapper.class_name, wrapper.part("model") if "_modules" in wrapper.state else None
    if name in REFUSED:
        raise ValueError(f"{where}: this network is wrapped as {name}: {REFUSED[name]}; only EDMPrecond is read here")
    if name != "EDMPrecond" or model is None:
        raise ValueError(f"{where}: expected a network wrapped as EDMPrecond, got {name}")
    if model.class_name not in NETWORKS:
        raise ValueError(f"{where}: {unknown('network', model.class_name, NETWORKS)}")
    about: dict[str, Any] = {"weights": "average"}
    numbers = {key: model.keywords.get(key) for key in ("dropout", "label_dropout")}
    numbers["sigma_data"] = wrapper.state.get("sigma_data")
    about |= {key: float(value) for key, value in numbers.items() if isinstance(value, (int, float))}
    try:
        return model.tensors(), about
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _average(optimizer: Any, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The averaged tensors by name: the optimiser numbers the trainable parameters in the order of the state dict."""
    state = optimizer.get("state") if isinstance(optimizer, Mapping) else None
    groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
    if not isinstance(state, Mapping) or not any(isinstance(v, Mapping) and "ema" in v for v in state.values()):
        raise ValueError(f"{where}: there is no moving average (ema in the optimiser's state); ask for the raw weights")
    numbers = [n for group in groups or () if isinstance(group, Mapping) for n in group.get("params", ())]
    names = _trainable(tensors)
    if len(numbers) != len(names):
        raise ValueError(f"{where}: the optimiser has {len(numbers)} parameters, the network {len(names)}")
    out: dict[str, Tensor] = {}
    for number, name in zip(numbers, names, strict=True):
        # What never had a gradient has no state, and is its own average.
        value = state.get(number, {}).get("ema", tensors[name])
        if not isinstance(value, Tensor) or value.shape != tensors[name].shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{where}: the average of {name} is {got}, expected the shape {tuple(tensors[name].shape)}"
            )
        out[name] = value
    return out


def _trainable(names: Mapping[str, Any]) -> list[str]:
    return [name for name in names if not name.endswith(_BUFFERS)]


def bare(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Names without what DataParallel, torch.compile and the wrapper put before them."""
    return {re.sub(r"^(?:module\.|_orig_mod\.|model\.)+", "", str(name)): value for name, value in weights.items()}
