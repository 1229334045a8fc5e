"""Folders of diffusers: pipelines and models as flows, and flows back as folders; students of rectified diffusion.

A pipeline has `model_index.json` and a folder for each part: `unet` or `transformer`, `scheduler`, and where there are
prompts `tokenizer`, `text_encoder` (also with `_2`, `_3`) and `vae`. Nothing is ever fetched, and no pickle run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.data.pickles import load_weights
from pantarhei.files import read_json
from pantarhei.flow import Flow, Provenance
from pantarhei.flow.flow import Codec
from pantarhei.flow.pretrained import unfilled
from pantarhei.flow.provenance import DISTILLED
from pantarhei.interop.diffusers_codec import LatentCodec
from pantarhei.interop.diffusers_schedulers import BETAS, FILE, path_of, read_scheduler
from pantarhei.naming import unknown
from pantarhei.networks.diffusers_models import (
    FLOW_SCHEDULER,
    MODELS,
    DiffusersConfig,
    DiffusersNetwork,
    import_diffusers,
)

INDEX, CONFIG, OWN = "model_index.json", "config.json", "pantarhei.json"
PIPELINES = (
    "DDPMPipeline",
    "DDIMPipeline",
    "PNDMPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
)
PARTS = ("unet", "transformer")
# Rectified Diffusion (2410.07303), hub repository wangfuyun/Rectified-Diffusion. Every file holds the bare weights of a
# UNet, and with another schedule or guidance its samples are ruined.
STUDENTS: dict[str, dict[str, Any]] = {
    "rd.ckpt": {"schedule": "linear", "guidance": 1.5, "guidance_in_pairs": 5.0, "steps": 25, "fewest_steps": 1},
    "cm.ckpt": {"schedule": "linear", "guidance": 1.0, "guidance_in_pairs": 5.0, "steps": 4, "fewest_steps": 1},
    "phased.ckpt": {"schedule": "scaled_linear", "guidance": 1.5, "guidance_in_pairs": 3.0, "steps": 4, "phases": 4},
    "phasedxl.ckpt": {"schedule": "scaled_linear", "guidance": 1.5, "guidance_in_pairs": 7.5, "steps": 4, "phases": 4},
}
FIRST_KEYS = ("conv_in.weight", "pos_embed.proj.weight")


@dataclass(frozen=True)
class Layout:
    """Where the parts of a folder are.

    Attributes:
        model: folder of the model.
        scheduler: its settings.
        base: folder with tokenizers, text encoders and autoencoder, where there is one.
        index: what `model_index.json` says.
        own: what `pantarhei.json` says, of a folder that was written here.
    """

    model: Path
    scheduler: dict[str, Any]
    base: Path | None
    index: Mapping[str, Any]
    own: Mapping[str, Any]


def recognise(what: str | Path | Mapping[str, Any]) -> bool:
    """Whether a folder is one of diffusers, or a file's content the bare weights of one of its models."""
    if isinstance(what, Mapping):
        names = {str(name) for name in what}
        return any(key in names for key in FIRST_KEYS) and any(
            name.startswith(("time_embedding.", "time_text_embed.")) for name in names
        )
    folder = Path(what)
    if (folder / INDEX).is_file() or any((folder / part / CONFIG).is_file() for part in PARTS):
        return True
    return (folder / CONFIG).is_file() and "_class_name" in read_json(folder / CONFIG)


def read(
    where: str | Path,
    content: Mapping[str, Any] | None = None,
    *,
    base: str | Path | None = None,
    scheduler: str | Path | Mapping[str, Any] | None = None,
    schedule: str | None = None,
    averaged: bool = True,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    size: int | None = None,
    null_label: int | None = None,
    rectified: int | None = None,
    distilled: int | None = None,
    codec: Codec | Literal["own"] | None = "own",
) -> Flow:
    """A flow from a folder of diffusers, or from the bare weights of its model.

    Args:
        where: a pipeline's folder, a model's folder (with its scheduler beside it or given), or a weight file, which needs
            `base`. The files of Rectified Diffusion (`rd.ckpt`, `cm.ckpt`, `phased.ckpt`, `phasedxl.ckpt`) get their
            schedule, and their notes name guidance and steps.
        content: what a weight file holds, where it has been read already.
        base: folder of the pipeline that the weights belong to, or whose text encoders and autoencoder a model uses.
        scheduler: a scheduler's settings, their file or folder, where the model's folder has none.
        schedule: of beta, "linear", "scaled_linear" or "squaredcos_cap_v2", where it is not the scheduler's.
        averaged: take `unet_ema` where a training checkpoint has one.
        variant: of the weight files, such as "fp16".
        dtype: of the weights.
        size: side of a sample in the flow's space, where it is not the model's.
        null_label: of a model with classes, the label that stands for none (see `DiffusersConfig`).
        rectified: how many times the model was rectified, where the folder does not say it.
        distilled: steps it was distilled to.
        codec: the autoencoder in the pipeline ("own"), another codec, or None: latents stay latents.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a pipeline, model, scheduler or prediction that is not known here, or weights that do not fit.
        ImportError: diffusers is not installed.
    """
    where = Path(where)
    student = STUDENTS.get(where.name, {}) if where.is_file() else {}
    if where.is_file():
        if base is None:
            raise ValueError(f"{where}: bare weights need base, the folder of the pipeline that they belong to")
        found = _layout(Path(base), None, scheduler, averaged)
    else:
        found = _layout(where, base, scheduler, averaged)
    beta = schedule or student.get("schedule")
    if beta is not None:
        found = replace(found, scheduler=_rescheduled(found.scheduler, beta))
    elif where.is_file() and scheduler is None and found.scheduler["_class_name"] != FLOW_SCHEDULER:
        warnings.warn(
            f"{where.name}: its name tells no schedule of beta, so {found.scheduler['beta_schedule']}, that of its base, is "
            "taken; another one (schedule=) would ruin its samples silently",
            stacklevel=2,
        )
    config, model = _model(found, null_label, size, variant, dtype, weights=not where.is_file())
    if where.is_file():
        _load_bare(model, load_weights(where) if content is None else content, str(where), dtype)
    network = DiffusersNetwork(config, model).eval()
    path, prediction = path_of(found.scheduler)
    names, nulls = network.condition_names, network.nulls()
    own_codec = _codec(found.base) if codec == "own" else codec
    return Flow(
        network,
        path=path,
        predicts=prediction,
        shape=_shape(config, size),
        null=nulls,
        conditions=[name for name in names if name not in nulls],
        codec=own_codec,
        provenance=_provenance(where, found, student, rectified, distilled),
    )


def with_schedule(flow: Flow, schedule: str) -> Flow:
    """A flow of a numbered model on another schedule of beta, whose network is told so (its own sampler follows).

    The network is shared, not copied. Rectified Diffusion trains Stable Diffusion's student on "linear".

    Args:
        flow: around a `DiffusersNetwork`.
        schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".

    Raises:
        ValueError: an unknown schedule, or a flow-matching model.
    """
    network = flow.network
    if not isinstance(network, DiffusersNetwork) or network.config.clock != "numbered":
        raise ValueError("flow: only a numbered diffusion model of diffusers has a schedule to change")
    scheduler = _rescheduled(network.config.scheduler, schedule)
    path, prediction = path_of(scheduler)
    return Flow(
        network.rescheduled(scheduler),
        path=path,
        predicts=prediction,
        source=flow.source,
        shape=flow.shape,
        null=flow.null,
        conditions=flow.conditions,
        codec=flow.codec,
        provenance=flow.provenance,
    )


def _rescheduled(scheduler: Mapping[str, Any], schedule: str) -> dict[str, Any]:
    """Settings of a scheduler with another schedule; betas that its file lists would go before any schedule.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule not in BETAS:
        raise ValueError(unknown("schedule", schedule, BETAS))
    return {**scheduler, "beta_schedule": schedule, "trained_betas": None}


def attach(flow: Flow, base: str | Path | None = None, *, codec: bool = True) -> Flow:
    """Give a flow that was saved without its pipeline's parts these parts again, in place.

    Args:
        flow: any flow; without `base`, one that never had a pipeline stays as it is.
        base: where the pipeline is now; by default where it was. Its text encoders then read the prompts, too.
        codec: take its autoencoder.

    Returns:
        The flow. Where the pipeline is no longer there, a warning says what cannot be done.

    Raises:
        FileNotFoundError: there is no folder `base`, or it has no tokenizers though the flow reads prompts.
        ValueError: the flow has no use for a pipeline, or its prompts are those of another one.
    """
    network, notes = flow.network, flow.provenance.notes
    if base is not None:
        if not isinstance(network, DiffusersNetwork):
            raise ValueError(f"base: only a model of diffusers has a pipeline, this is a {type(network).__name__}")
        folder = Path(base).resolve()
        if not folder.is_dir():
            raise FileNotFoundError(f"base: there is no folder {folder}")
        if network.config.text is not None:
            null, before = network.move_text(folder).nulls()["tokens"], flow.null.get("tokens")
            if isinstance(before, Tensor) and not torch.equal(torch.as_tensor(null), before.cpu()):
                raise ValueError(f"base: {folder} turns prompts into other tokens than the pipeline of this flow did")
        flow.provenance = replace(flow.provenance, notes={**notes, "pipeline": str(folder)})
    place = flow.provenance.notes.get("pipeline")
    if codec and flow.codec is None and place is not None and isinstance(network, DiffusersNetwork):
        flow.codec = _codec(Path(place))
        if not Path(place).is_dir():
            warnings.warn(
                f"the pipeline {place} is not there: samples stay latents, and prompts cannot be read; if it was moved, "
                "give base=",
                stacklevel=3,
            )
    return flow


def own_sampler(
    flow: Flow | str | Path, noises: Tensor, steps: int, condition: Mapping[str, Tensor] | None = None
) -> Tensor:
    """What diffusers' own sampler makes of noises, in the flow's space (see `DiffusersNetwork.own_sample`).

    Args:
        flow: around a `DiffusersNetwork`, or the folder of one.
        noises: unit noise (B, C, H, W).
        steps: their number.
        condition: named tensors.

    Raises:
        TypeError: the flow is around another network.
    """
    flow = flow if isinstance(flow, Flow) else read(flow)
    if not isinstance(flow.network, DiffusersNetwork):
        raise TypeError(f"flow: its network is a {type(flow.network).__name__}, not a model of diffusers")
    return flow.network.own_sample(noises, steps, condition)


def _layout(folder: Path, base: str | Path | None, scheduler: Any, averaged: bool) -> Layout:
    """Find the parts of a folder.

    Raises:
        FileNotFoundError, ValueError: see `read`.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    own = read_json(folder / OWN) if (folder / OWN).is_file() else {}
    if index and index.get("_class_name") not in PIPELINES:
        raise ValueError(f"{folder}: {unknown('pipeline', str(index.get('_class_name')), PIPELINES)}")
    model, root = folder, folder.parent
    if not (folder / CONFIG).is_file():
        parts = [f"{part}_ema" for part in PARTS if averaged] + list(PARTS)
        named = next((part for part in parts if (folder / part / CONFIG).is_file()), None)
        if named is None:
            raise FileNotFoundError(f"{folder}: no model is in it; expected {CONFIG} in unet or transformer")
        model, root = folder / named, folder
    elif (root / INDEX).is_file():
        index = read_json(root / INDEX)
    if scheduler is None:
        places = [root / "scheduler" / FILE, model / FILE]
        scheduler = next((place for place in places if place.is_file()), None)
    if scheduler is None:
        raise FileNotFoundError(f"{folder}: it has no {FILE}, which tells the schedule; give scheduler=")
    base = base if base is not None else own.get("base")
    if base is None and (root / "tokenizer").is_dir() | (root / "tokenizer_2").is_dir() | (root / "vae").is_dir():
        base = root
    if base is not None and not Path(base).is_dir():
        raise FileNotFoundError(
            f"{folder}: its text encoders and autoencoder were in {base}, which is not there; give base="
        )
    return Layout(model, read_scheduler(scheduler), None if base is None else Path(base).resolve(), index, own)


def _model(
    found: Layout, null_label: int | None, size: int | None, variant: str | None, dtype: torch.dtype, *, weights: bool
) -> tuple[DiffusersConfig, Any]:
    """The model and how it is read; with `weights` false the weights are still to be loaded."""
    settings = read_json(found.model / CONFIG)
    name = str(settings.get("_class_name"))
    if name not in MODELS:
        raise ValueError(f"{found.model}: {unknown('model', name, MODELS)}")
    kind = getattr(import_diffusers(), name)
    if weights:
        model = _pretrained(kind, found.model, variant, dtype)
    else:
        model = unfilled(lambda: kind.from_config(settings))
    flow_matching = found.scheduler["_class_name"] == FLOW_SCHEDULER
    texts = found.base is not None and name != "UNet2DModel" and any(found.base.glob("tokenizer*"))
    index = found.index or (read_json(found.base / INDEX) if found.base and (found.base / INDEX).is_file() else {})
    empty_is_zero = settings.get("addition_embed_type") == "text_time"  # the default of SDXL's pipeline
    config = DiffusersConfig(
        model=name,
        settings=dict(model.config),
        clock="flow" if flow_matching else "numbered",
        count=int(found.scheduler["num_train_timesteps"]),
        scheduler=found.scheduler,
        text=str(found.base) if texts else None,
        zero_null=bool(index.get("force_zeros_for_empty_prompt", empty_is_zero)),
        null_label=null_label,
    )
    if config.settings.get("addition_embed_type") == "text_time":
        _, height, width = _shape(config, size)
        vae = _codec(found.base)
        factor = 8 if vae is None else vae.factor
        pixels = (float(height * factor), float(width * factor))
        config = replace(config, time_ids=[*pixels, 0.0, 0.0, *pixels])
    return config, model


def _pretrained(kind: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    """A model with its weights, all of them."""
    options = {"variant": variant, "torch_dtype": dtype, "local_files_only": True, "output_loading_info": True}
    try:
        model, told = kind.from_pretrained(folder, **options)
    except Exception as error:  # of missing, damaged and misfit files they raise one thing or another
        reason = str(error).split(". ")[0].splitlines()[0]
        what = FileNotFoundError if "no file named" in reason else ValueError
        raise what(f"{folder}: {reason}") from None
    bad = [f"{key} is {what}" for what in ("missing", "unexpected") for key in told[f"{what}_keys"]]
    bad += [*told["mismatched_keys"], *told["error_msgs"]]
    if bad:
        raise ValueError(f"{folder}: {bad[0]}")
    return model


def _load_bare(model: Any, weights: Mapping[str, Any], where: str, dtype: torch.dtype) -> None:
    own = model.state_dict()
    for name in [*own, *weights]:
        if name not in own or name not in weights:
            raise ValueError(f"{where}: {name} is {'missing' if name in own else 'not part of the model in base'}")
        if not isinstance(weights[name], Tensor) or own[name].shape != weights[name].shape:
            got = tuple(weights[name].shape) if isinstance(weights[name], Tensor) else type(weights[name]).__name__
            raise ValueError(f"{where}: {name} has shape {got}, the model in base {tuple(own[name].shape)}")
        if not bool(weights[name].isfinite().all()):
            raise ValueError(f"{where}: {name} holds NaN or infinity")
    ready = {k: v.to(dtype if v.is_floating_point() else v.dtype, copy=True) for k, v in weights.items()}
    model.load_state_dict(ready, assign=True)


def _shape(config: DiffusersConfig, size: int | None) -> tuple[int, int, int]:
    side = config.settings.get("sample_size") if size is None else size
    if side is None:
        raise ValueError("size: this model does not say the side of its samples; give size=")
    height, width = (side, side) if isinstance(side, int) else side
    return int(config.settings["in_channels"]), int(height), int(width)


def _codec(base: Path | None) -> LatentCodec | None:
    return LatentCodec(base / "vae") if base is not None and (base / "vae" / CONFIG).is_file() else None


def _provenance(
    where: Path, found: Layout, student: Mapping[str, Any], rectified: int | None, distilled: int | None
) -> Provenance:
    kept = dict(found.own.get("provenance", {}))
    notes: dict[str, Any] = {**kept.pop("notes", {}), "read_from": where.name, **student}
    if found.base is not None:
        notes["pipeline"] = str(found.base)
    if found.scheduler["_class_name"] == FLOW_SCHEDULER:
        notes["shift"] = float(found.scheduler.get("shift") or 1.0)
    licence = notes.get("teacher_licence") if kept else _licence(found.base or found.model.parent)
    if licence:
        notes["teacher_licence" if student or kept else "licence"] = licence
    if student:
        notes["scheduler"] = f"DDIM, trailing, {student['schedule']}"
        kept |= {"rectified": 1, "teacher": found.base.name if found.base else ""}
        kept["coupling"] = DISTILLED if where.name == "cm.ckpt" else "independent"
    if rectified is not None:
        kept["rectified"] = rectified
    if distilled is not None:
        kept["coupling"], notes["steps"] = DISTILLED, distilled
    return Provenance(**kept, notes=notes)


def _licence(folder: Path) -> str | None:
    """The licence in the front matter of a model card."""
    card = folder / "README.md"
    lines = card.read_text(errors="replace").splitlines() if card.is_file() else []
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            return None
        name, _, value = line.partition(":")
        if name.strip() == "license":
            return value.strip().strip("\"'") or None
    return None
