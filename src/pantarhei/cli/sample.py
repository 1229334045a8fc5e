"""`pantarhei sample RUN` and `pantarhei invert RUN`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from pantarhei.cli.edit import invert_quickly_to, items_of
from pantarhei.cli.opening import (
    Device,
    counted_calls,
    data_of,
    default_steps,
    fine_method,
    open_flow,
    own_guidance,
    read_input,
    save_picture,
    with_null_labels,
)
from pantarhei.data import Source
from pantarhei.files import write_tensors
from pantarhei.flow import Flow, Stretched, TrajectoryModel, noise_amount
from pantarhei.flow.endings import Final
from pantarhei.flow.noise_amounts import NoiseForm
from pantarhei.flow.numbered import Conditions, join, numbered_conditions, numbered_samples, path_noise
from pantarhei.flow.stochastic import LastStep
from pantarhei.recipes.pipelines import Prompts, open_prompts, tokenizer_of
from pantarhei.straighten.editing import Inverter

Method = Literal[
    "auto",
    "jump",
    "euler",
    "ddim",
    "reinterpolate",
    "reinterpolate-heun",
    "dpm-solver",
    "edm",
    "heun-euler",
    "midpoint",
    "heun",
    "rk4",
    "bosh3",
    "dopri5",
    "tsit5",
]


@dataclass(frozen=True)
class Stochastic:
    """Sampling a stochastic equation with the marginals of the flow, with any amount of noise.

    Attributes:
        sde: sample it; so does any --epsilon. Flows that predict the drift of one always do.
        epsilon: amount of noise; 0 is the ODE. Of a flow that predicts a drift, by default, what it was trained with.
        form: how it changes with time: constant, sigma (times the noise level; SiT's default), variance, linear, decreasing,
            bump, diffusion (the score-based diffusion of the path) or fading.
        cap: epsilon is lowered where epsilon dt / gamma^2 would exceed this; near 1 steps become unstable. None leaves it.
        last: the last step: mean (drift without noise), euler or heun (of the ODE), or denoise.
        last_step: its length; the others then share the rest evenly.
    """

    sde: bool = False
    epsilon: float | None = None
    form: NoiseForm = "constant"
    cap: float | None = 0.5
    last: LastStep | None = None
    last_step: float | None = None

    @property
    def wanted(self) -> bool:
        """Whether a stochastic equation is asked for."""
        return self.sde or self.epsilon is not None

    def said(self) -> str:
        """In words, for results."""
        amount = "trained epsilon" if self.epsilon is None else f"epsilon {self.epsilon:g} ({self.form})"
        return f"SDE, {amount}, cap {self.cap}"

    def options(self, flow: Flow, method: str) -> dict[str, Any]:
        """As options of `Flow.sample`.

        Raises:
            ValueError: a method that has no stochastic form.
        """
        methods = {"auto": "euler_maruyama", "euler": "euler_maruyama", "heun": "heun"}
        if method not in methods:
            raise ValueError(f"--sde: goes with --method euler or heun, got {method}")
        trained = self.epsilon is None and flow.stochastic
        epsilon = 0.5 if self.epsilon is None else self.epsilon
        return {
            "epsilon": "trained" if trained else noise_amount(self.form, epsilon, flow.path),
            "method": methods[method],
            "cap": self.cap,
            "last": self.last,
            "last_step": self.last_step,
        }


def sample(
    run: tyro.conf.Positional[Path],
    out: Path,
    count: int | None = None,
    steps: int | None = None,
    method: Method = "auto",
    label: int | None = None,
    prompt: tuple[str, ...] = (),
    prompts: Path | None = None,
    guidance: float | None = None,
    shift: float = 1.0,
    final: Final = "auto",
    gamma: float | None = None,
    noise: Stochastic = Stochastic(),
    rtol: float | None = None,
    published_grid: bool = False,
    input: Path | None = None,
    seed: int = 0,
    batch: int = 256,
    checkpoint: str = "newest",
    device: Device = "auto",
) -> int:
    """Write `samples.png` (a grid) and `samples.safetensors` (`x` float32, `x0`, and `label` where there is one).

    A flow between two data sets starts from held-out items of the first, or from `--input`; one that reads prompts needs
    `--prompt` or `--prompts`, of which sample i takes number i, again from the first after the last.

    Args:
        run: a run folder, a saved flow, or somebody else's checkpoint or pipeline.
        out: folder to write into.
        count: number of samples: 64, or one a prompt.
        steps: sampling steps; 50, what a distilled flow was made for, or the phases of a phased one; of a trajectory model 1
            jump.
        method: of the sampler. auto is euler on straight paths and ddim on those of diffusion models, and jump of trajectory
            models, whose score any other method integrates; reinterpolate (with
            the noise it started from) suits straightened flows in 2 to 5 steps; dpm-solver and edm are made for diffusion
            models. Each step of heun, edm and midpoint costs two evaluations, of rk4 four.
        label: class of all samples; drawn evenly where it is left out.
        prompt: what to draw, one text or several.
        prompts: a text file with a prompt a line, or a folder of texts.
        guidance: classifier-free guidance scale; 1 is none. By default what the flow was published with, else none.
        shift: resolution shift of the time grid; above 1 spends more steps near the noise.
        final: denoise ends with one more evaluation where noise is left, state does not, clean ends with the last step's
            estimate of the data instead (no noise left, no evaluation added); auto is denoise where it is needed.
        gamma: of a trajectory model, the share of noise after each jump but the last, 0 to 1: none by default, all of it of
            consistency models.
        noise: sample a stochastic equation instead.
        rtol: error control with this relative and absolute tolerance instead of a number of steps (with bosh3, dopri5 or
            tsit5); the paper's figures have dopri5 at 1e-5.
        published_grid: Euler steps as the published rectified flow code takes them, to compare with its figures.
        input: what to start from: a .safetensors file with x0 (or x), or images (a folder, zip or file) for a flow that
            starts from images.
        seed: sample i depends on (seed, i) only.
        batch: samples at a time.
        checkpoint: newest, best or an iteration.
        device: where to run.
    """
    _check(1 if count is None else count, batch, steps)
    flow = open_flow(run, checkpoint, device)
    texts = prompts_of(flow, prompt, prompts)
    if count is None:
        count = len(texts) if texts is not None else 64
    if flow.provenance.notes.get("direction"):
        raise ValueError("this flow was distilled to run from data to source; use pantarhei invert")
    sde = noise.wanted or flow.stochastic
    options: dict[str, Any] = {
        "steps": steps or default_steps(flow, "sde" if sde else method),
        "guidance": own_guidance(flow) if guidance is None else guidance,
        "shift": shift,
    }
    if rtol is not None:
        if sde or steps is not None or method not in ("bosh3", "dopri5", "tsit5"):
            raise ValueError("--rtol: goes with --method bosh3, dopri5 or tsit5, and without --steps and --sde")
        options |= {"steps": None, "rtol": rtol, "atol": rtol}
    options |= noise.options(flow, method) if sde else {"method": method}
    options |= {"final": final}
    if gamma is not None:
        if sde or not isinstance(flow, TrajectoryModel):
            raise ValueError("--gamma: is for the jumps of trajectory models")
        options["gamma"] = gamma
    if published_grid:
        if sde or method not in ("auto", "euler"):
            raise ValueError("--published-grid: is a grid of Euler steps; leave --method and --sde out")
        if not flow.interval[0] > 0:
            raise ValueError("--published-grid: is for networks trained from a first time on, such as 0.001")
        options["transforms"] = [Stretched(1 / (1 - flow.interval[0]))]
    conditions = in_turn(flow, texts) if texts is not None else conditions_of(run, flow, label)
    began = time.monotonic()
    with counted_calls(flow) as calls:
        if input is None:
            found = join(numbered_samples(flow, range(count), seed=seed, conditions=conditions, batch=batch, **options))
        else:
            x0, given = read_input(input, flow, count, ("x0", "x"))
            named = None if conditions is None else numbered_conditions(flow, seed, conditions)
            found = _from_input(flow, x0, given, named, batch, options, seed if flow.draws_noise(**options) else None)
    evaluations = calls[0] / len(found["x1"])
    seconds = time.monotonic() - began
    x = found["x1"]
    settings = {"run": run, "seed": seed, **options, **(vars(noise) if sde else {})}
    metadata = {k: str(v) for k, v in settings.items()}
    if texts is not None:
        metadata["prompts"] = json.dumps([texts.prompts[i % len(texts)] for i in range(len(x))])
    write_tensors(out / "samples.safetensors", {"x": x, **{k: v for k, v in found.items() if k != "x1"}}, metadata)
    save_picture(x, out / "samples.png", f"{len(x)} samples")
    if not getattr(flow.source, "gaussian", False):
        save_picture(found["x0"], out / "starts.png", "what they started from")
    print(
        f"{len(x)} samples, {evaluations:.4g} evaluations of the network each, in {seconds:.2f} s "
        f"({len(x) / seconds:.0f} a second) in {out}"
    )
    return 0


def invert(
    run: tyro.conf.Positional[Path],
    out: Path,
    count: int = 64,
    steps: int | None = None,
    method: Method | None = None,
    evaluations: tuple[int, int] | None = None,
    input: Path | None = None,
    seed: int = 0,
    batch: int = 256,
    checkpoint: str = "newest",
    device: Device = "auto",
) -> int:
    """Run a flow backwards: data to noise, or the second data set of a transfer to the first.

    Writes `inverted.safetensors` (`x0`, the data `x`, their `reconstruction`, and `label` where there is one) and pictures,
    and prints how well the way back and forth reconstructs.

    Args:
        run: a run folder or a saved flow.
        out: folder to write into.
        count: how many items.
        steps: steps each way; 50, or what a distilled flow was made for.
        method: of the sampler; heun (edm where the path is curved), or euler for a distilled flow.
        evaluations: of the network, there and back (such as 4 4), instead of steps: the quick inversion of rectified flow++,
            whose error is compared with that of the teacher, where it is there.
        input: images (a folder, zip or file) or a .safetensors file with x; held-out data of the run by default.
        seed: which held-out items.
        batch: items at a time.
        checkpoint: newest, best or an iteration.
        device: where to run.
    """
    _check(count, batch, steps)
    flow = open_flow(run, checkpoint, device)
    distilled = flow.provenance.why_not_field() is not None
    if distilled and not flow.provenance.notes.get("direction"):
        raise ValueError(
            "this flow was distilled to run from source to data; distil its teacher with --reverse instead"
        )
    if evaluations is not None:
        if steps is not None or distilled or method not in (None, "auto", "euler", "ddim", "heun-euler"):
            raise ValueError(
                "--evaluations: goes without --steps, with --method auto, euler, ddim or heun-euler, and with a flow that "
                "is not distilled"
            )
        items = items_of(run, flow, count, input, seed)
        inverter: Inverter = method or "auto"
        return invert_quickly_to(run, flow, out, items, evaluations, inverter, seed)
    method = method or ("euler" if distilled else fine_method(flow))
    options: dict[str, Any] = {"steps": steps or default_steps(flow, "ode"), "method": method}
    items = items_of(run, flow, count, input, seed)
    parts = []
    for first in range(0, len(items["x1"]), batch):
        x = items["x1"][first : first + batch].to(flow.device, flow.dtype)
        condition = {name: items[name][first : first + batch] for name in flow.conditions} or None
        x0 = flow.invert(x, condition=condition, **options)
        part = {"x": x, "x0": x0}
        if not distilled:
            part["reconstruction"] = flow.sample(x0=x0, condition=condition, **options)
        parts.append({name: value.float().cpu() for name, value in part.items()})
    found = join(iter(parts)) | {name: items[name] for name in flow.conditions}
    write_tensors(out / "inverted.safetensors", found, {"run": str(run), **{k: str(v) for k, v in options.items()}})
    for name in ("x", "x0", "reconstruction"):
        if name in found:
            save_picture(found[name], out / f"{name}.png", name)
    x, x0 = found["x"], found["x0"]
    moments = f"x0 has mean {float(x0.mean()):.3g}, deviation {float(x0.std()):.3g}"
    print(f"{len(x)} items, {options['steps']} {method} steps: {moments}")
    if "reconstruction" in found:
        error = float((found["reconstruction"] - x).square().mean().sqrt())
        print(f"reconstruction error {error:.4g} (root mean square; the data's deviation is {float(x.std()):.3g})")
    print(out)
    return 0


def _check(count: int, batch: int, steps: int | None) -> None:
    if count < 1 or batch < 1:
        raise ValueError(f"--count, --batch: must be at least 1, got {count} and {batch}")
    if steps is not None and steps < 1:
        raise ValueError(f"--steps: must be at least 1, got {steps}")


def prompts_of(flow: Flow, given: tuple[str, ...], where: Path | None) -> Prompts | None:
    """The texts to draw; None for a flow that reads none.

    Raises:
        ValueError: it reads some and there are none, or the other way round, or both kinds are given.
    """
    reads = "tokens" in flow.conditions
    if given and where is not None:
        raise ValueError("--prompt, --prompts: give one of the two")
    if reads and not given and where is None:
        raise ValueError("--prompt: this flow reads prompts; give --prompt TEXT, or --prompts with a file of them")
    if not reads and (given or where is not None):
        raise ValueError(
            f"--prompt: this flow reads no prompts; its conditions: {', '.join(flow.conditions) or 'none'}"
        )
    if where is not None:
        return open_prompts(flow, where)
    return Prompts(given, tokenizer_of(flow), "--prompt") if given else None


def in_turn(flow: Flow, texts: Prompts) -> Conditions:
    """Sample i is of prompt i, modulo their number."""
    tokenize = tokenizer_of(flow)
    return lambda numbers: {"tokens": tokenize([texts.prompts[i % len(texts)] for i in numbers])}


def conditions_of(run: Path, flow: Flow, label: int | None) -> Conditions | Source | None:
    """What samples are conditioned on: one label, or what the run's held-out data bring; None for evenly drawn labels."""
    others = data_of(run)[1] if flow.conditions and flow.conditions != ("label",) else None
    return others if label is None else _fixed_label(flow, label, others)


def _fixed_label(flow: Flow, label: int, others: Source | None = None) -> Conditions:
    classes = flow.null.get("label")
    if "label" not in flow.conditions or not isinstance(classes, int):
        raise ValueError("--label: this flow was trained without labels")
    if not 0 <= label < classes:
        raise ValueError(f"--label: must lie in 0 to {classes - 1}, got {label}")

    drawn = numbered_conditions(flow, 0, others) if others is not None else None

    def fixed(numbers: Sequence[int]) -> dict[str, Tensor]:
        return {**(drawn(numbers) if drawn else {}), "label": torch.full((len(numbers),), label)}

    return fixed


def _from_input(
    flow: Flow,
    x0: Tensor,
    given: dict[str, Tensor],
    conditions: Any,
    batch: int,
    options: dict[str, Any],
    seed: int | None,
) -> dict[str, Tensor]:
    parts = []
    for first in range(0, len(x0), batch):
        part = x0[first : first + batch]
        numbers = range(first, first + len(part))
        own = {name: value[first : first + batch] for name, value in given.items()}
        named = with_null_labels(flow, own, len(part)) if conditions is None else conditions(numbers)
        if seed is not None:
            options["noise"] = path_noise(seed, numbers)
        x1 = flow.sample(x0=part, condition=named or None, **options)
        parts.append({"x0": part.float().cpu(), "x1": x1.float().cpu(), **named})
    return join(iter(parts))
