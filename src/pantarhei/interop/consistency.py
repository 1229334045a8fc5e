"""Checkpoints of consistency trajectory models (Kim et al. 2310.02279) and of consistency models (Song et al. 2303.01469).

All are flat state dicts. A `SongUNet` of CIFAR-10 has EDM's names under the prefix `model.`, and the branch for the second
time is `map_layer0_s`, `map_layer1_s` and every block's `affine_s`. An `ADM` of ImageNet and LSUN has guided diffusion's
names (see `networks.adm_keys`), and the branch is `time_embed_s` and every block's `emb_layers_s`. Without a branch nothing
in a file tells a consistency model from the teacher that it was distilled from, but perhaps its name: `edm_`, `cd_`, `ct_`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.data.pickled_modules import ModuleRecord
from pantarhei.data.pickles import load_weights
from pantarhei.files import write_atomically, write_tensors
from pantarhei.flow import Flow, Provenance
from pantarhei.flow.heads import CTM, Consistency
from pantarhei.flow.trajectory import TrajectoryModel
from pantarhei.interop import edm
from pantarhei.interop.edm_sizes import UNTOLD, infer_config
from pantarhei.naming import unknown
from pantarhei.networks import ADM, ADMConfig, SongUNet, adm_keys, spec_of

Kind = Literal["ctm", "cm", "edm"]
FileKind = Literal["ctm", "edm", "edm-or-cm", "discriminator", "optimizer", "ours", "unknown"]
Layout = Literal["songunet", "adm", "guided-diffusion", ""]
KINDS = ("ctm", "cm", "edm")
WORDS = {
    "ctm": "consistency trajectory model",
    "cm": "consistency model",
    "edm": "EDM denoiser",
    "edm-or-cm": "EDM denoiser or consistency model",
    "discriminator": "discriminator of a consistency trajectory model's training",
    "optimizer": "state of an optimiser",
    "ours": "weights of a run or folder of ours",
    "unknown": "not known here",
}
_FROM_NAME: dict[str, Kind] = {"edm_": "edm", "cd_": "cm", "ct_": "cm"}
_BRANCH = {
    "songunet": "map_layer0_s, map_layer1_s and affine_s",
    "adm": "map_layer0_s, map_layer1_s and affine_s",
    "guided-diffusion": "time_embed_s and emb_layers_s",
}


@dataclass(frozen=True)
class Sniffed:
    """What a file is.

    Attributes:
        kind: "ctm", "edm", "edm-or-cm" (the file does not say which), "discriminator" or "optimizer" (of a training),
            "ours" (weights without what says how to use them), or "unknown".
        layout: whose names its weights have: "songunet" and "adm" are EDM's, "" is none of the three.
        why: what it was recognised by.
        missing: what it lacks to be a consistency trajectory model; empty for nothing.
    """

    kind: FileKind
    layout: Layout
    why: str
    missing: str

    @property
    def words(self) -> str:
        """The kind in words."""
        return WORDS[self.kind]


def sniff(content: Mapping[str, Any]) -> Sniffed:
    """Say what a file is, by its names.

    Args:
        content: what the file holds, as `data.pickles.load_weights` or `interop.edm.load_snapshot` return it.
    """
    if "state" in content and "param_groups" in content:
        return Sniffed("optimizer", "", "it holds state and param_groups", "the weights (in model*.pt or ema_*.pt)")
    names = edm.bare(content)
    for place in ("flow.network.", "average.network."):
        if any(name.startswith(place) for name in names):
            return Sniffed("ours", "", f"its names start with {place}", "its run (open the folder)")
    judged = [
        name for name in names if name.startswith(("feature_networks.", "discriminators.")) or "mini_discs" in name
    ]
    if judged:
        return Sniffed("discriminator", "", f"it holds {judged[0]}", "the weights (in model*.pt or ema_*.pt)")
    if adm_keys.is_published(names):
        if adm_keys.has_second_time(names):
            return Sniffed("ctm", "guided-diffusion", "it holds time_embed_s", "")
        return Sniffed("edm-or-cm", "guided-diffusion", "it has no time_embed_s", _BRANCH["guided-diffusion"])
    if edm.recognise(content):
        layout = _layout(content)
        names = edm.bare(content.get("model_state_dict", content))
        if "map_layer0_s.weight" not in names:
            return Sniffed("edm", layout, "it has EDM's names, and no map_layer0_s", _BRANCH[layout])
        if layout == "adm":  # nobody publishes such a file, and its names do not tell what an ADM's times are
            return Sniffed("ours", "adm", "it holds map_layer0_s and out_conv", "its flow.json (open the folder)")
        return Sniffed("ctm", "songunet", "it holds map_layer0_s", "")
    return Sniffed("unknown", "", "no name of it is known here", "")


def kind_in_name(path: str | Path) -> Kind | None:
    """What the name of a file says it is, as OpenAI named theirs (`cd_imagenet64_l2.pt`); None where it says nothing."""
    return next((kind for start, kind in _FROM_NAME.items() if Path(path).name.startswith(start)), None)


def recognise(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is one that `read` has something to say about; EDM's own are left to `interop.edm`."""
    return sniff(content).kind not in ("edm", "unknown")


def read(
    path: str | Path,
    content: Mapping[str, Any] | None = None,
    *,
    kind: Kind | None = None,
    size: int | None = None,
    heads: int | None = None,
    sigma_data: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    outer: Literal["euler", "variance", "mixed"] | None = None,
    averaged: bool = True,
    **overrides: Any,
) -> Flow:
    """A flow from a checkpoint: a `TrajectoryModel` ("ctm" or "cm"), or the denoiser that such a model is distilled from.

    Args:
        path: the file.
        content: what it holds, where it has been read already.
        kind: "ctm", "cm" or "edm", where the file does not say it; by default what its name starts with, `edm_`, `cd_` or
            `ct_`.
        size: side of the images; of guided diffusion's names only, which do not tell it. By default that of the published
            network with these resolutions, or 64.
        heads: channels of an attention head, of these names too; 64 by default.
        sigma_data: deviation of the data that the model was made for; 0.5 by default.
        sigma_min, sigma_max: noise levels of its path; 0.002 and 80 by default.
        outer: of a "ctm", the form of its jumps, see `flow.heads.CTM`; "euler" by default.
        averaged: of a training state of rectified flow++ take the moving average; any other file holds one set of weights.
        overrides: `dropout`, `label_dropout`, which weights do not tell.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds something else, or is not of the kind asked for; the message says what it is.
    """
    path = Path(path)
    if content is None:
        content = edm.load_snapshot(path) if path.suffix == ".pkl" else load_weights(path)
    if kind is not None and kind not in KINDS:
        raise ValueError(unknown("kind", kind, KINDS))
    told: dict[str, Any] = {"sigma_data": sigma_data, "sigma_min": sigma_min, "sigma_max": sigma_max}
    levels = {name: value for name, value in told.items() if value is not None}
    for name, value in levels.items():
        if not value > 0:
            raise ValueError(f"{name}: must be positive, got {value}")
    unfit = sorted(set(overrides) - set(UNTOLD))
    if unfit:
        raise ValueError(
            f"{unfit[0]}: no option of this kind of file; there are kind, size, heads, outer, {', '.join(UNTOLD)}"
        )
    found, stored = sniff(content), edm.own_entry(path, content)
    own = "flow" in stored and kind is None and outer is None and not levels
    if own and found.kind != "ctm":
        kind = _kind_of(stored["flow"])
    chosen = _kind(path, found, kind)
    if outer is not None and chosen != "ctm":
        raise ValueError(
            f"outer: says how a consistency trajectory model jumps; {path.name} is read as {WORDS[chosen]}"
        )
    if chosen == "edm" and found.kind == "edm":
        return edm.read(path, content, averaged=averaged, **told, **overrides)
    settings = {name: stored["network"][name] for name in UNTOLD if name in stored.get("network", {})} | overrides
    tensors, about = _tensors(content, found, averaged, str(path))
    network = _network(tensors, found, size, heads, stored.get("network", {}), settings, str(path))
    notes = {"read_from": path.name, "weights": about}
    if found.layout != "guided-diffusion":
        notes["licence"] = edm.LICENCE
    if own:
        try:
            flow = Flow.from_spec(stored["flow"], network)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: the entry {edm.OWN!r} does not describe a flow ({error})") from None
        return flow.like(network, notes={**flow.provenance.notes, **notes})
    return _flow(network, chosen, outer, levels, notes)


def write(flow: Flow, path: str | Path) -> Path:
    """Write a trajectory model, or a denoiser with guided diffusion's names, in the published layout of its network.

    Args:
        flow: on EDM's path, predicting as EDM's wrapper does, around a `SongUNet` or an ADM like `networks.adm.GUIDED`: a
            `TrajectoryModel` with the head "ctm" and a second time, or "consistency" (of scaling "boundary") without.
        path: a `.pt` or `.pth` file, which holds weights and nothing else; or `.safetensors`, which also keeps what `read`
            cannot see in them.

    Raises:
        TypeError, ValueError: the flow has no place in such a file, or the file has another suffix.
    """
    path, network = Path(path), flow.network
    if not isinstance(network, (SongUNet, ADM)):
        raise TypeError(f"flow: only a SongUNet or an ADM has a place in this layout, got {type(network).__name__}")
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise ValueError(f"path: the layout is a .pt, .pth or .safetensors file, got {path.name}")
    if flow.prediction.spec()["name"] != "edm" or flow.path.spec()["name"] != "edm":
        raise ValueError("flow: the layout means the prediction 'edm' on EDM's path")
    config = network.config
    head = getattr(flow, "head", None)
    if config.second_time != isinstance(head, CTM) or not (head is None or isinstance(head, (CTM, Consistency))):
        raise ValueError("flow: the layout means the head 'ctm' with a second time, or 'consistency' without one")
    if isinstance(head, Consistency) and head.scaling != "boundary":
        raise ValueError("flow: published consistency models have the scaling 'boundary', this one 'jump'")
    if isinstance(config, ADMConfig):
        if (config.groups, config.time_scale) != (32, 1000.0):
            raise ValueError(
                f"flow: the layout of guided diffusion means groups=32 and time_scale=1000, "
                f"got {config.groups} and {config.time_scale:g}; save_pretrained keeps them"
            )
        weights = adm_keys.to_published(network.state_dict(), config)
    else:
        weights = {edm.PREFIX + name: value for name, value in network.state_dict().items()}
    weights = {name: value.detach().cpu() for name, value in weights.items()}
    if path.suffix == ".safetensors":
        contiguous = {name: value.contiguous() for name, value in weights.items()}
        write_tensors(path, contiguous, {edm.OWN: json.dumps({"network": spec_of(network), "flow": flow.spec()})})
        return path
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return write_atomically(path, buffer.getvalue())


def _layout(content: Mapping[str, Any]) -> Layout:
    """Whether EDM's names are those of an ADM or a SongUNet; of a snapshot by the name of its class."""
    record: Any = content.get("ema")
    if isinstance(record, ModuleRecord):
        model = record.part("model") if "_modules" in record.state else None
        return "adm" if model is not None and edm.NETWORKS.get(model.class_name) is ADMConfig else "songunet"
    return "adm" if "out_conv.weight" in edm.bare(content.get("model_state_dict", content)) else "songunet"


def _kind_of(spec: Mapping[str, Any]) -> Kind:
    """What one of our own entries describes."""
    head = spec.get("head")
    if head is None:
        return "edm"
    return "ctm" if isinstance(head, Mapping) and head.get("name") == "ctm" else "cm"


def _tensors(content: Mapping[str, Any], found: Sniffed, averaged: bool, where: str) -> tuple[dict[str, Tensor], str]:
    """The weights by bare names, and which they are."""
    if found.layout != "guided-diffusion":
        tensors, about = edm.weights_of(content, averaged, where)
        return tensors, about["weights"]
    return {name: value for name, value in edm.bare(content).items() if isinstance(value, Tensor)}, "as stored"


def _kind(path: Path, found: Sniffed, asked: Kind | None) -> Kind:
    """What the file is read as.

    Raises:
        ValueError: it holds no network, is not of the kind asked for, or does not say its kind.
    """
    if found.kind in ("discriminator", "optimizer", "ours", "unknown"):
        missing = f"; missing: {found.missing}" if found.missing else ""
        raise ValueError(f"{path} is no model ({found.words}: {found.why}){missing}")
    if found.kind == "ctm":
        if asked in (None, "ctm"):
            return "ctm"
        raise ValueError(f"kind: {path} is a consistency trajectory model ({found.why}), not {asked!r}")
    if asked == "ctm":
        known = (
            "; ct_imagenet64.pt and cd_imagenet64_*.pt are plain consistency models (kind='cm'), a consistency trajectory "
            "model of ImageNet is ema_0.999_049000.pt"
        )
        first, _, rest = found.missing.partition(" and ")
        said = (
            f"{first} is missing (and {rest})" if found.layout == "guided-diffusion" else f"{found.missing} are missing"
        )
        raise ValueError(f"{path} is no consistency trajectory model: {said}{known if rest == 'emb_layers_s' else ''}")
    if asked is not None:
        return asked
    if found.kind == "edm":
        return "edm"
    named = kind_in_name(path)
    if named is None:
        raise ValueError(
            f"kind: nothing in {path} says whether it is a consistency model or an EDM denoiser ({found.why}); "
            f"give 'cm' or 'edm'"
        )
    return named


def _network(
    tensors: dict[str, Tensor],
    found: Sniffed,
    size: int | None,
    heads: int | None,
    stored: Mapping[str, Any],
    settings: Mapping[str, Any],
    where: str,
) -> SongUNet | ADM:
    try:
        if found.layout != "guided-diffusion":
            for name, value in (("size", size), ("heads", heads)):
                if value is not None:
                    raise ValueError(f"{name}: the weights of {where} tell this")
            return edm.fill(infer_config(tensors, where, **settings), tensors, where)
        size, head = size or stored.get("size"), heads or stored.get("head", 64)
        told = {name: value for name, value in settings.items() if name != "fourier_scale"}
        config = adm_keys.infer_config(tensors, where, size=size, head=head, **told)
    except (TypeError, OverflowError) as error:  # settings of a file that are no numbers
        raise ValueError(f"{where}: {error}") from None
    return edm.fill(config, adm_keys.from_published(tensors, config, where), where)


def _flow(
    network: SongUNet | ADM,
    kind: Kind,
    outer: str | None,
    levels: dict[str, float],
    notes: dict[str, Any],
) -> Flow:
    config = network.config
    prediction = {"name": "edm", **{name: value for name, value in levels.items() if name == "sigma_data"}}
    settings: dict[str, Any] = {
        "path": {"name": "edm", **{name: value for name, value in levels.items() if name != "sigma_data"}},
        "predicts": prediction,
        "shape": (config.channels, config.size, config.size),
        "null": {"label": config.classes} if config.classes else None,
        "provenance": Provenance(notes=notes),
    }
    if kind == "edm":
        return Flow(network, **settings)
    if kind == "cm":
        return TrajectoryModel(network, head=Consistency(scaling="boundary"), **settings)
    head = {"name": "ctm", "outer": outer or "euler", "floor": levels.get("sigma_min", 0.002)}
    return TrajectoryModel(network, head=head, **settings)
