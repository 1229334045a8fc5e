"""A flow around a diffusers model as a folder that diffusers reads, with a model card that says how to sample it."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pantarhei.files import write_atomically, write_json
from pantarhei.flow import Flow
from pantarhei.flow.predictions import Elsewhere
from pantarhei.interop.diffusers import INDEX, OWN
from pantarhei.interop.diffusers_schedulers import FILE, scheduler_of
from pantarhei.networks.diffusers_adapters import merge_peft
from pantarhei.networks.diffusers_models import FLOW_SCHEDULER, DiffusersNetwork

COPIED = ("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")


def write(
    flow: Flow,
    folder: str | Path,
    *,
    guidance: float | None = None,
    steps: int | None = None,
    licence: str | None = None,
    complete: bool = False,
) -> Path:
    """Write a flow as a folder of diffusers: the model, the scheduler that samples it as we do, and a model card.

    `UNet2DConditionModel.from_pretrained(folder, subfolder="unet")` and `DDIMScheduler.from_pretrained(folder,
    subfolder="scheduler")` (of SD3 `transformer` and `FlowMatchEulerDiscreteScheduler`) read it, and `read` here. A model
    without prompts, and any with `complete`, is a whole pipeline. Adapters are added to the weights.

    Args:
        flow: around a `DiffusersNetwork`.
        folder: new, or written before.
        guidance: scale at inference, for the card; by default that in the notes of its provenance.
        steps: their number, for the card; likewise (of a student with phases their number).
        licence: of these weights; by default the teacher's, in the notes.
        complete: copy tokenizers, text encoders and autoencoder from the pipeline that the model came with.

    Raises:
        TypeError: the network is no model of diffusers.
        ValueError: diffusers has no scheduler for this path and prediction, the network takes a second time, or with
            `complete` the rest is not there.
    """
    folder = Path(folder)
    network: Any = flow.network
    if not isinstance(network, DiffusersNetwork):
        raise TypeError(f"flow: only a model of diffusers can be written so, got {type(network).__name__}")
    if network.config.second_time:
        raise ValueError("flow: models of diffusers have no place for a second time; save_pretrained keeps it")
    notes = flow.provenance.notes
    scheduler = scheduler_of(flow.path, flow.prediction, shift=float(notes.get("shift", 1.0)))
    if (scheduler["_class_name"] == FLOW_SCHEDULER) != (network.config.clock == "flow"):
        raise ValueError(
            f"flow: its path {flow.path.spec()['name']} is not that of its network; give predicts='elsewhere'"
        )
    base = notes.get("pipeline")
    if complete and (base is None or not Path(base).is_dir()):
        raise ValueError(f"complete: the pipeline of this model ({base or 'none'}) is not there")
    network = merge_peft(network) if network.config.adapter is not None else network
    part = "transformer" if network.config.model.startswith("SD3") else "unet"
    network.model.save_pretrained(folder / part, safe_serialization=True)
    write_json(folder / "scheduler" / FILE, scheduler)
    whole = complete or network.config.model == "UNet2DModel"
    if complete:
        for name in COPIED:
            if (Path(base) / name).is_dir():  # type: ignore[arg-type]
                shutil.copytree(Path(base) / name, folder / name, dirs_exist_ok=True)  # type: ignore[arg-type]
    if whole:
        write_json(folder / INDEX, _index(network, scheduler, folder))
    own: dict[str, Any] = {"provenance": asdict(flow.provenance)}
    if not complete and base is not None:
        own["base"] = base
    write_json(folder / OWN, own)
    card = model_card(flow, folder.name, scheduler, guidance=guidance, steps=steps, licence=licence, whole=whole)
    write_atomically(folder / "README.md", card.encode())
    return folder


def model_card(
    flow: Flow,
    name: str,
    scheduler: dict[str, Any],
    *,
    guidance: float | None = None,
    steps: int | None = None,
    licence: str | None = None,
    whole: bool = False,
) -> str:
    """The model card, in Markdown with the front matter of the hub: scheduler, guidance, steps, teacher, licences."""
    provenance, notes, network = flow.provenance, flow.provenance.notes, flow.network
    teachers = notes.get("teacher_licence", notes.get("licence"))
    known = licence or teachers
    teacher = provenance.teacher or (Path(notes["pipeline"]).name if "pipeline" in notes else "")
    guided = notes.get("guidance") if guidance is None else guidance
    taken = steps or notes.get("steps") or notes.get("sampling_steps")
    phases = notes.get("phases")  # their bounds, of a student trained here
    origin = flow.prediction.prediction if isinstance(flow.prediction, Elsewhere) else flow.prediction
    rows = {
        "scheduler": _scheduler_in_words(scheduler),
        "prediction": origin.spec()["name"],
        "steps": taken,
        "guidance at inference": guided,
        "guidance in the pairs": notes.get("guidance_in_pairs"),
        "rectified": f"{provenance.rectified}x" if provenance.rectified else None,
        "guidance of the teacher": notes.get("guidance_of_teacher"),
        "phases": len(phases) - 1 if isinstance(phases, (list, tuple)) else phases,
        "pairs": notes.get("pairs"),
        "teacher": teacher or None,
        "licence of the teacher": (teachers or "not stated in its card") if teacher else None,
        "data": provenance.data or None,
    }
    front = ["---", "library_name: diffusers", *([f"license: {known}"] if known else []), "---"]
    table = [f"| {key} | {value} |" for key, value in rows.items() if value is not None]
    kind, own = scheduler["_class_name"], network.config.model if isinstance(network, DiffusersNetwork) else ""
    part = "transformer" if own.startswith("SD3") else "unet"
    if whole:
        use = ["from diffusers import DiffusionPipeline", "", "pipeline = DiffusionPipeline.from_pretrained(FOLDER)"]
    else:
        use = [
            f"from diffusers import DiffusionPipeline, {kind}, {own}",
            "",
            f'model = {own}.from_pretrained(FOLDER, subfolder="{part}")',
            f'scheduler = {kind}.from_pretrained(FOLDER, subfolder="scheduler")',
            f"pipeline = DiffusionPipeline.from_pretrained(TEACHER, {part}=model, scheduler=scheduler)",
        ]
    options = {"num_inference_steps": taken, "guidance_scale": guided if own != "UNet2DModel" else None}
    given = ", ".join(f"{key}={value}" for key, value in options.items() if value is not None)
    if own != "UNet2DModel":
        given = ", ".join(part for part in ('"a prompt"', given) if part)
    use.append(f"image = pipeline({given}).images[0]")
    head = [
        *front,
        "",
        f"# {name}",
        "",
        "Written by PantaRhei. The samples are wrong with another schedule of the noise.",
        "",
    ]
    return "\n".join([*head, "| | |", "|---|---|", *table, "", "```python", *use, "```", ""])


def _scheduler_in_words(scheduler: dict[str, Any]) -> str:
    if scheduler["_class_name"] == FLOW_SCHEDULER:
        return f"{FLOW_SCHEDULER}, shift {scheduler['shift']:g}"
    betas = f"beta {scheduler['beta_schedule']} {scheduler['beta_start']:g}..{scheduler['beta_end']:g}"
    return f"DDIMScheduler, {betas}, trailing, clip_sample False, set_alpha_to_one False"


def _index(network: DiffusersNetwork, scheduler: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `DiffusionPipeline.from_pretrained` reads first."""
    config = network.config
    entries: dict[str, Any] = {"scheduler": ["diffusers", scheduler["_class_name"]]}
    if config.model == "UNet2DModel":
        return {"_class_name": "DDIMPipeline", **entries, "unet": ["diffusers", config.model]}
    sd3, sdxl = config.model.startswith("SD3"), config.settings.get("addition_embed_type") == "text_time"
    kind = "StableDiffusion3Pipeline" if sd3 else "StableDiffusionXLPipeline" if sdxl else "StableDiffusionPipeline"
    entries["transformer" if sd3 else "unet"] = ["diffusers", config.model]
    entries["vae"] = ["diffusers", "AutoencoderKL"]
    encoders = {
        "text_encoder": "CLIPTextModelWithProjection" if sd3 else "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    }
    for name in list(encoders)[: 3 if sd3 else 2 if sdxl else 1]:
        suffix = name.removeprefix("text_encoder")
        there = (folder / name).is_dir()
        tokenizer = "T5TokenizerFast" if suffix == "_3" else "CLIPTokenizer"
        entries[name] = ["transformers", encoders[name]] if there else [None, None]
        entries[f"tokenizer{suffix}"] = ["transformers", tokenizer] if there else [None, None]
    if sd3:
        return {"_class_name": kind, **entries}
    if sdxl:
        return {"_class_name": kind, **entries, "force_zeros_for_empty_prompt": config.zero_null}
    absent = {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
    return {"_class_name": kind, **entries, **absent, "requires_safety_checker": False}
