"""Models of diffusers as networks of ours: our time, our sign, our conditions; weights and arithmetic are theirs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pantarhei.naming import unknown
from pantarhei.networks.embeddings import TimeEmbedding, check_second_time
from pantarhei.networks.text_encoders import TextEncoders, TextKind

MODELS = ("UNet2DModel", "UNet2DConditionModel", "SD3Transformer2DModel")
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
BETAS = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine"}  # their names, and ours
HALVES = (torch.float16, torch.bfloat16)
# What decides the path and the prediction of a numbered model; all else in a scheduler's file is about its own sampler.
PATH_SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)


@dataclass(frozen=True)
class DiffusersConfig:
    """A model of diffusers and how it is read.

    Attributes:
        model: its class: "UNet2DModel", "UNet2DConditionModel" or "SD3Transformer2DModel".
        settings: its own configuration (`config.json`).
        clock: what it takes for the time: "numbered", k = (1 - t) (count - 1), or "flow", the noise level times 1000 of flow
            matching, (1 - t) count. The second also means that it predicts noise - data, minus our velocity.
        count: numbers of the schedule.
        scheduler: the configuration of the scheduler it came with, for `own_sample`.
        text: folder of the pipeline whose tokenizers and text encoders read its prompts; without it the condition is the
            embedding itself.
        text_length: tokens for T5, of SD3.
        zero_null: the empty prompt's embedding is zeros.
        time_ids: of SDXL: height, width, top, left, target height, target width.
        null_label: of a model with classes: the label that means "none". By default the number of classes, for which no
            embedding is added; a model that keeps a row for it has that row's number.
        adapter: rank, alpha and targets of low-rank adapters (see `diffusers_adapters`).
        second_time: there is a branch for a second time, whose output is added to the model's own embedding of the time.
    """

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    clock: Literal["numbered", "flow"] = "numbered"
    count: int = 1000
    scheduler: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    text_length: int = 256
    zero_null: bool = False
    time_ids: Sequence[float] | None = None
    null_label: int | None = None
    adapter: dict[str, Any] | None = None
    second_time: bool = False

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(unknown("model", self.model, MODELS))
        if self.clock not in ("numbered", "flow"):
            raise ValueError(unknown("clock", self.clock, ("numbered", "flow")))
        for name in ("settings", "scheduler"):
            object.__setattr__(self, name, plain(getattr(self, name)))


class DiffusersNetwork(nn.Module):
    """`forward(x, t, s=None, **conditions)` of a diffusers model, in our conventions.

    s, a second time like t, needs the branch for it (`config.second_time`), which is left out without s.

    A model in half precision may be asked in float32: states and output keep their type, so that a sampler's small steps
    do not get lost in rounding.

    Conditions, by the model: `label` (B,) int64 of a UNet with classes; of a UNet with cross-attention and of SD3 either
    `tokens` (B, L), as `tokenize` gives them, or `text` (B, L, D), with `pooled` (B, P) where the model reads that; of SDXL
    also `time_ids` (B, 6), by default those of the configuration.

    Args:
        config: which model.
        model: the model itself, where it has been made already; else it is made with random weights.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: a kind of model, or of conditioning, that is not known here.
    """

    def __init__(self, config: DiffusersConfig, model: nn.Module | None = None):
        super().__init__()
        if model is None:
            model = getattr(import_diffusers(), config.model).from_config(config.settings)
        self.config = config
        _check(model, config)
        # Ahead of the model, whose last layer is that of the network.
        self.time_s = TimeEmbedding(_time_width(model)) if config.second_time else None
        self.model: Any = model
        self._text = self._text_encoders()
        table = getattr(self.model, "class_embedding", None)
        if isinstance(table, nn.Embedding) and not isinstance(table, _ClassTable):
            self.model.class_embedding = _ClassTable(table)
        if config.adapter is not None and not hasattr(self.model, "peft_config"):
            from pantarhei.networks.diffusers_adapters import inject

            inject(self.model, **config.adapter)

    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None, **conditions: Tensor) -> Tensor:
        """The model's output at states x (B, C, H, W) and our times t and s, 0-d or (B,); minus it of a flow-matching model.

        Raises:
            ValueError: s is given to a network without a branch for it, or a condition is missing.
        """
        check_second_time(self.time_s, s)
        if s is None:
            output = self._call(x, self.clock(t), conditions)
        else:
            # For this call only: the model may be shared with a network that has no second time.
            hook = _time_module(self.model).register_forward_hook(self._adding(s.expand(x.shape[0])))
            try:
                output = self._call(x, self.clock(t), conditions)
            finally:
                hook.remove()
        return -output if self.config.clock == "flow" else output

    def _adding(self, s: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        """What adds the embedding of s to that of the model's own time."""
        assert self.time_s is not None
        second = self.time_s(s)
        return lambda module, inputs, embedding: embedding + second.to(embedding.dtype)

    def clock(self, t: Tensor) -> Tensor:
        """The model's own time: k of a numbered schedule (whole where t is one of its times), 1000 (1 - t) of a flow."""
        if self.config.clock == "flow":
            return (1 - t) * self.config.count
        wide = t if t.dtype in (torch.float32, torch.float64) else t.float()
        number = (1 - wide) * (self.config.count - 1)
        whole = number.round()
        return torch.where((number - whole).abs() < 1e-3, whole, number)

    def requires_grad_(self, requires_grad: bool = True) -> DiffusersNetwork:
        """As of any module, but under adapters the weights below them stay frozen (the branch for a second time learns)."""
        if self.config.adapter is None:
            super().requires_grad_(requires_grad)
        else:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(requires_grad and ("lora_" in name or name.startswith("time_s.")))
        return self

    def rescheduled(self, scheduler: Mapping[str, Any]) -> DiffusersNetwork:
        """The same model, shared, with the settings of another scheduler."""
        other = DiffusersNetwork(replace(self.config, scheduler=dict(scheduler)), self.model)
        other._text, other.time_s = self._text, self.time_s
        return other.train(self.training)

    def follow(self, path: Mapping[str, Any]) -> DiffusersNetwork:
        """Let the model's own scheduler have the betas of a numbered path, given as its `spec()`. In place.

        Raises:
            ValueError: a flow-matching model, which has none.
        """
        if self.config.clock != "numbered":
            raise ValueError("path: a flow-matching model has no schedule of beta")
        betas = path.get("betas")
        scheduler = {
            **self.config.scheduler,
            "num_train_timesteps": int(path["count"]),
            "beta_start": path["beta_min"],
            "beta_end": path["beta_max"],
            "beta_schedule": next(theirs for theirs, ours in BETAS.items() if ours == path["schedule"]),
            "trained_betas": None if betas is None else list(betas),
            "rescale_betas_zero_snr": bool(path["zero_snr"]),
        }
        self.config = replace(self.config, scheduler=scheduler)
        return self

    def move_text(self, folder: str | Path) -> DiffusersNetwork:
        """Read prompts with the tokenizers and text encoders in another pipeline's folder, or the same one moved. In place.

        Raises:
            FileNotFoundError: there are none.
        """
        if not any(Path(folder).glob("tokenizer*")):
            raise FileNotFoundError(f"{folder} has no folder tokenizer: it turns no prompts into tokens")
        self.config = replace(self.config, text=str(folder))
        self._text = self._text_encoders()
        return self

    # Conditions

    @property
    def condition_names(self) -> tuple[str, ...]:
        """The conditions that the model takes."""
        if self.config.model == "UNet2DModel":
            return ("label",) if self.model.config.num_class_embeds else ()
        if self._text is not None:
            return ("tokens",)
        return ("text",) if self._text_kind == "clip" else ("text", "pooled")

    def nulls(self) -> dict[str, int | Tensor]:
        """For each condition that has one, the value that means "none"."""
        names = self.condition_names
        if names == ("label",):
            own = self.config.null_label
            return {"label": int(self.model.config.num_class_embeds) if own is None else own}
        return {"tokens": self._text.null} if self._text is not None else {}

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids int64 (B, L) of prompts.

        Raises:
            ValueError: the network has no text encoders.
        """
        return self._encoders().tokenize(prompts)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> dict[str, Tensor]:
        """What the text encoders make of token ids (B, L): the conditions `text` (B, L', D) and, where it is one, `pooled`.

        They serve as conditions in the place of tokens, and may be changed.

        Raises:
            ValueError: the network has no text encoders.
        """
        dtype = next(p.dtype for p in self.model.parameters())
        text, pooled = self._encoders().encode(tokens, torch.promote_types(dtype, torch.float32))
        return {"text": text, **({} if pooled is None else {"pooled": pooled})}

    def _text_encoders(self) -> TextEncoders | None:
        config = self.config
        if config.text is None:
            return None
        width = int(config.settings.get("joint_attention_dim") or 0)
        return TextEncoders(
            config.text, self._text_kind, width=width, length=config.text_length, zero_null=config.zero_null
        )

    def _encoders(self) -> TextEncoders:
        if self._text is None:
            raise ValueError("prompts: this network has no text encoders; read it with its pipeline's folder")
        return self._text

    @property
    def _text_kind(self) -> TextKind:
        if self.config.model == "SD3Transformer2DModel":
            return "sd3"
        return "sdxl" if self.config.settings.get("addition_embed_type") == "text_time" else "clip"

    def _call(self, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """The raw output at the model's own time."""
        time = time.expand(x.shape[0]) if time.ndim == 0 else time
        asked, own = x.dtype, next(self.model.parameters()).dtype
        if own in HALVES:
            x = x.to(own)
            conditions = {k: v.to(own) if v.is_floating_point() else v for k, v in conditions.items()}
        if self.config.model == "UNet2DModel":
            label = conditions.get("label")
            output = self.model(x, time, class_labels=label).sample
        else:
            output = self._conditioned(x, time, conditions)
        # Models with a learned variance put it behind the prediction.
        output = output[:, : x.shape[1]] if output.shape[1] == 2 * x.shape[1] else output
        return output.to(asked) if own in HALVES else output

    def _conditioned(self, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        text, pooled = conditions.get("text"), conditions.get("pooled")
        if "tokens" in conditions:
            text, pooled = self._encoders().encode(conditions["tokens"], x.dtype)
        if text is None:
            raise ValueError(f"condition: tokens or text are needed, got {', '.join(conditions) or 'nothing'}")
        if self._text_kind != "clip" and pooled is None:
            raise ValueError("condition: this model also needs pooled, the embedding of the whole prompt (B, P)")
        if self._text_kind == "sd3":
            return self.model(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=time).sample
        added = None
        if self._text_kind == "sdxl":
            added = {"text_embeds": pooled, "time_ids": self._time_ids(x, conditions)}
        return self.model(x, time, encoder_hidden_states=text, added_cond_kwargs=added).sample

    def _time_ids(self, x: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        if "time_ids" in conditions:
            return conditions["time_ids"].to(x)
        if self.config.time_ids is None:
            raise ValueError("condition: this model needs time_ids (B, 6)")
        return x.new_tensor(list(self.config.time_ids)).expand(x.shape[0], -1)

    # The sampler that the model came with

    def own_times(self, steps: int) -> tuple[float, ...]:
        """Our times of the steps of `own_sample`, the last of them that of the result (steps that divide `count`)."""
        scheduler = self._scheduler(steps)
        if self.config.clock == "flow":
            return tuple(1 - float(level) for level in scheduler.sigmas)
        return (*(1 - int(k) / (self.config.count - 1) for k in scheduler.timesteps), 1.0)

    @torch.no_grad()
    def own_sample(
        self, x0: Tensor, steps: int, condition: Mapping[str, Tensor] | None = None, *, guidance: float = 1.0
    ) -> Tensor:
        """What diffusers' own sampler makes of the noise x0: DDIM with trailing steps, or Euler of flow matching.

        Neither our time, nor our sign, nor our path has a part in it. The first state is x0 itself, as there; the last
        one of DDIM has the noise of number 0. `denoising_steps(flow, x0, own_times(steps))` is the same of ours.

        Args:
            x0: unit noise (B, C, H, W).
            steps: their number.
            condition: named tensors, as `forward` takes them.
            guidance: classifier-free guidance, 1 is none.
        """
        scheduler, condition = self._scheduler(steps), dict(condition or {})
        null = {k: torch.as_tensor(v, device=x0.device) for k, v in self.nulls().items()} if guidance != 1 else {}
        without = {k: null[k].expand_as(v) if k in null else v for k, v in condition.items()}
        training, x = self.training, x0
        self.eval()
        for time in scheduler.timesteps.to(x0.device):
            output = self._call(x, time, condition)
            if guidance != 1:
                other = self._call(x, time, without)
                output = other + guidance * (output - other)
            x = scheduler.step(output, time, x).prev_sample
        self.train(training)
        return x

    def _scheduler(self, steps: int) -> Any:
        diffusers = import_diffusers()
        if self.config.clock == "flow":
            own = {"num_train_timesteps": self.config.count, "shift": self.config.scheduler.get("shift", 1.0)}
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**own)
        else:
            scheduler = diffusers.DDIMScheduler(**ddim_settings(self.config.scheduler))
        scheduler.set_timesteps(steps)
        return scheduler


def ddim_settings(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a `DDIMScheduler` with the path of another scheduler: trailing steps, no clipping, noise 0 at the end."""
    own = {name: scheduler[name] for name in PATH_SETTINGS if scheduler.get(name) is not None}
    # Trailing steps have no offset; Stable Diffusion's pipeline still complains of any other number.
    fixed = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return {**own, **fixed}


def import_diffusers() -> Any:
    """The package diffusers.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import diffusers
    except ImportError:
        raise ImportError("models of diffusers need it: pip install 'pantarhei[diffusers]'") from None
    return diffusers


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them, without the entries that diffusers adds about itself."""
    kept = {key: value for key, value in settings.items() if not key.startswith("_") or key == "_class_name"}
    return json.loads(json.dumps(kept))


def _time_module(model: Any) -> nn.Module:
    """The part of a model that embeds its time."""
    return model.time_text_embed if hasattr(model, "time_text_embed") else model.time_embedding


def _time_width(model: Any) -> int:
    """Features of the embedded time."""
    embedder: Any = _time_module(model)
    return int(getattr(embedder, "timestep_embedder", embedder).linear_2.out_features)


class _ClassTable(nn.Embedding):
    """A table of class embeddings that gives zeros for the index after its last row."""

    def __init__(self, table: nn.Embedding):
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight)
        self.weight = table.weight

    def forward(self, input: Tensor) -> Tensor:
        known = input < self.num_embeddings
        return super().forward(input.clamp(max=self.num_embeddings - 1)) * known[:, None].to(self.weight.dtype)


def _check(model: Any, config: DiffusersConfig) -> None:
    """Refuse models whose inputs are not known here."""
    settings = model.config
    out = settings.get("out_channels") or settings["in_channels"]
    if out not in (settings["in_channels"], 2 * settings["in_channels"]):
        raise ValueError(
            f"model: it has {settings['in_channels']} channels in and {out} out (for inpainting?); equal numbers are needed"
        )
    wanted: dict[str, tuple[Any, ...]] = {
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
        "addition_embed_type": (None, "text_time"),
    }
    if config.model == "UNet2DConditionModel":
        wanted["num_class_embeds"] = (None,)
        wanted["time_cond_proj_dim"] = (None,)  # of distilled models that read the guidance as an embedding
    for name, known in wanted.items():
        if settings.get(name) not in known:
            raise ValueError(f"model: {name} {settings[name]!r} is not known here, only {' or '.join(map(str, known))}")
