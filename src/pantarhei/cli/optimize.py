"""`pantarhei optimize noise|condition|weights|audit|posterior RUN`: change what samples come from, for a measure of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from torch import Tensor

from pantarhei.cli.opening import (
    Device,
    data_of,
    data_shape,
    default_steps,
    open_flow,
    own_guidance,
    read_input,
    save_picture,
    with_null_labels,
)
from pantarhei.cli.sample import conditions_of, in_turn, prompts_of
from pantarhei.data.seeds import generator as seeded
from pantarhei.files import write_json, write_tensors
from pantarhei.flow import Blurred, Flow, Masked, Measurement, Sensors, TrajectoryModel, posterior_sample
from pantarhei.flow.numbered import numbered_conditions, numbered_source
from pantarhei.flow.reparameterisation import Variables
from pantarhei.metrics import ClassifierFeatures
from pantarhei.recipes.evaluation import make_reference
from pantarhei.recipes.optimization import (
    Found,
    Metric,
    OfRows,
    Search,
    audit,
    class_row,
    optimize_condition,
    optimize_noise,
    optimize_weights,
)
from pantarhei.recipes.sample_metrics import classified_as, clip_similarity, function_of, like_example
from pantarhei.report.figures import curves
from pantarhei.report.progress import Progress
from pantarhei.solve.gradient import Through
from pantarhei.straighten import LowRank

Result = TypeVar("Result")


@dataclass(frozen=True)
class Searching:
    """How it is searched, and how samples are drawn meanwhile.

    Attributes:
        iterations: updates.
        lr: learning rate of AdamW, or length of a normalised step.
        weight_decay: of AdamW.
        steps: of the sampler; 20, what a distilled flow was made for, or one jump of a trajectory model.
        method: of the sampler, as of `pantarhei sample`.
        guidance: classifier-free guidance; by default what the flow's notes name.
        through: how gradients are found: checkpoint (exact), backprop, symplectic, adjoint, backsolve or reversible.
        variables: solve in other variables: rho, snr, flow or angle.
        truncate: gradients of the last so many steps only (of condition and weights).
        batch: samples at a time.
    """

    iterations: int = 30
    lr: float = 0.05
    weight_decay: float = 0.0
    steps: int | None = None
    method: str = "auto"
    guidance: float | None = None
    through: Through = "checkpoint"
    variables: Variables | None = None
    truncate: int | None = None
    batch: int = 64

    def search(self, flow: Flow) -> Search:
        """As settings of a search."""
        steps = self.steps or default_steps(flow, self.method, 20)
        sampling: dict[str, Any] = {"steps": steps, "method": self.method, "through": self.through}
        sampling |= {"variables": self.variables, "truncate": self.truncate}
        sampling["guidance"] = own_guidance(flow) if self.guidance is None else self.guidance
        return Search(self.iterations, self.lr, self.weight_decay, sampling=sampling, batch=self.batch)


@dataclass(frozen=True)
class Measuring:
    """What is made small.

    Attributes:
        metric: FILE.py:function (samples (B, ...) to a number each), classifier:RUN (trained on that run's data; minus the
            log of its chance of --target), or clip:FOLDER (one minus the similarity to --text).
        target: of classifier:RUN, the label.
        text: of clip:FOLDER, the prompt.
        example: images (a folder, zip or file), or .safetensors with x, or .npy, to be like, instead of a metric.
    """

    metric: str = ""
    target: int | None = None
    text: str = ""
    example: Path | None = None

    def open(self, flow: Flow, count: int) -> Metric:
        """The measure.

        Raises:
            ValueError, FileNotFoundError: it is not named well.
        """
        if (self.example is None) == (not self.metric):
            raise ValueError("--metric, --example: one of the two is needed")
        if self.example is not None:
            return like_example(read_input(self.example, flow, count, ("x", "x1"), data_shape(flow))[0])
        kind, _, rest = self.metric.partition(":")
        if kind == "classifier":
            if self.target is None:
                raise ValueError("--target: which label is wanted?")
            return classified_as(classifier_of(Path(rest)).to(flow.device), self.target)
        if kind == "clip":
            if not self.text:
                raise ValueError("--text: what is the image of?")
            return clip_similarity(rest, self.text)
        return function_of(self.metric)


@dataclass(frozen=True)
class Drawing:
    """Which samples.

    Attributes:
        count: how many.
        prompt: of a pipeline that reads prompts, the text.
        seed: noise i depends on (seed, i) only.
        checkpoint: newest, best or an iteration.
        device: where to run.
    """

    count: int = 16
    prompt: str = ""
    seed: int = 0
    checkpoint: str = "newest"
    device: Device = "auto"

    def open(self, run: Path, label: int | None = None) -> tuple[Flow, Tensor, dict[str, Tensor] | None]:
        """The flow, noise, and the conditions of the samples: a label or a prompt, or labels in turn.

        Raises:
            ValueError: a count, label or prompt that does not fit.
        """
        flow = self.open_flow(run)
        texts = prompts_of(flow, (self.prompt,) if self.prompt else (), None)
        given = in_turn(flow, texts) if texts is not None else conditions_of(run, flow, label)
        condition = numbered_conditions(flow, self.seed, given)(range(self.count)) or None
        return flow, self.noise(flow, self.count, condition), condition

    def open_flow(self, run: Path) -> Flow:
        """The flow alone.

        Raises:
            ValueError: a count below 1.
        """
        if self.count < 1:
            raise ValueError(f"--count: must be at least 1, got {self.count}")
        return open_flow(run, self.checkpoint, self.device)

    def noise(self, flow: Flow, count: int, condition: dict[str, Tensor] | None = None) -> Tensor:
        """What samples start from."""
        return numbered_source(flow, self.seed, range(count), condition).to(flow.device)


def with_bar(what: str, search: Search, run: Callable[..., Result], *given: Any, **options: Any) -> Result:
    """Run a search behind a progress bar."""
    with Progress(search.iterations, what) as bar:
        return run(*given, search=search, watch=lambda i, value: bar.update(i, f"measure {value:.4g}"), **options)


def classifier_of(run: Path) -> ClassifierFeatures:
    """A small classifier trained on a run's data, kept in the run.

    Raises:
        ValueError: its data are no labelled images.
    """
    extractor = make_reference(*data_of(run), cache=run / "classifier.safetensors").extractor
    if not isinstance(extractor, ClassifierFeatures):
        raise ValueError(
            f"{run}: its data are no labelled images of 8 x 8 or more; no classifier can be trained on them"
        )
    return extractor


def optimize_noise_of(
    run: tyro.conf.Positional[Path],
    out: Path,
    measuring: Measuring = Measuring(),
    searching: Searching = Searching(),
    drawing: Drawing = Drawing(),
    label: int | None = None,
    keep: Literal["norm", "free"] = "norm",
    bound: float | None = None,
) -> int:
    """Search, for each sample, the noise that gives it the least measure.

    Writes `optimized.safetensors` (`x0`, `before`, `after`), pictures and the curve of the measure.

    Args:
        run: a run, a saved flow, or a pipeline of diffusers.
        out: folder to write into.
        measuring: what is made small.
        searching: how.
        drawing: which samples.
        label: of all samples; labels in turn by default.
        keep: norm keeps each noise on the sphere it began on, where Gaussian noise is; free lets it go.
        bound: largest change of any element of the noise.
    """
    flow, x0, condition = drawing.open(run, label)
    given = (flow, measuring.open(flow, drawing.count), x0)
    how: dict[str, Any] = {"condition": condition, "keep": keep, "bound": bound}
    found = with_bar("optimizing noise", searching.search(flow), optimize_noise, *given, **how)
    return _written(out, found, run, {"x0": found.value})


def optimize_condition_of(
    run: tyro.conf.Positional[Path],
    out: Path,
    measuring: Measuring = Measuring(),
    searching: Searching = Searching(),
    drawing: Drawing = Drawing(),
    start: int | None = None,
) -> int:
    """Search the embedding whose samples have the least measure: what no class and no word stands for.

    Of a network with classes it is a row of its class embedding; of a pipeline that reads prompts the text's embedding, of
    which the prompt's own tokens stay. Writes `optimized.safetensors` (`label` or `text`; `x0`, `before`, `after`), pictures
    and the curve of the measure. From Python it is a condition: `flow.sample(condition={"label": row.expand(count, -1)})`.

    Args:
        run: a run, a saved flow, or a pipeline of diffusers.
        out: folder to write into.
        measuring: what is made small.
        searching: how.
        drawing: which samples, whose mean measure it is; with --example as many as there are examples.
        start: class to start from; the mean of all by default.
    """
    flow = drawing.open_flow(run)
    row, how = _embedding(flow, start, drawing.prompt)
    x0 = drawing.noise(flow, drawing.count)
    given = (flow, measuring.open(flow, drawing.count), x0, row)
    found = with_bar("optimizing condition", searching.search(flow), optimize_condition, *given, **how)
    return _written(out, found, run, {how["name"]: found.value, "x0": x0})


def _embedding(flow: Flow, start: int | None, prompt: str) -> tuple[Tensor, dict[str, Any]]:
    """The row to start from, and what else `optimize_condition` has to know of it."""
    if flow.conditions == ("label",):
        if prompt:
            raise ValueError("--prompt: this flow reads no prompts; --start names a class")
        null = flow.null["label"]
        return class_row(flow.network, start), {"name": "label", "nulls": {"label": class_row(flow.network, int(null))}}
    if flow.conditions != ("tokens",) or start is not None:
        raise ValueError("this flow has no classes; optimise its condition from Python (recipes.optimization)")
    network: Any = flow.network
    tokens = torch.stack([network.tokenize([prompt])[0], torch.as_tensor(flow.null["tokens"])]).to(flow.device)
    both = network.embed(tokens)
    row, nulls = both["text"][0], {name: value[1] for name, value in both.items()}
    ends = (tokens[0] != tokens[0, -1]).nonzero()
    own = int(ends[-1]) + 1 if len(ends) else 0  # the tokens before the padding
    free = torch.arange(len(row), device=row.device)[:, None] >= min(own, len(row) - 1)
    others = {name: value[0] for name, value in both.items() if name != "text"}
    return row, {"name": "text", "others": others, "nulls": nulls, "free": free}


def optimize_weights_of(
    run: tyro.conf.Positional[Path],
    out: Path,
    measuring: Measuring = Measuring(),
    searching: Searching = Searching(lr=1e-3, iterations=60),
    drawing: Drawing = Drawing(count=32),
    label: int | None = None,
    rank: int = 0,
    only: tuple[str, ...] = (),
) -> int:
    """Tune a copy of the weights until samples have a small measure, on fresh noise at every iteration.

    Writes the tuned flow into `flow` (sample it with `pantarhei sample OUT/flow`), `optimized.safetensors` (`x0`, `before`,
    `after`), pictures and the curve of the measure.

    Args:
        run: a run, a saved flow, or a pipeline of diffusers.
        out: folder to write into.
        measuring: what is made small.
        searching: how.
        drawing: which samples are shown; an iteration has as many.
        label: of all samples; labels in turn by default.
        rank: train low-rank additions of this rank; 0 trains the weights.
        only: parts of the names of the weights to train.
    """
    flow, x0, condition = drawing.open(run, label)
    given = (flow, measuring.open(flow, drawing.count), x0)
    how: dict[str, Any] = {"condition": condition, "only": only, "seed": drawing.seed}
    how["low_rank"] = LowRank(rank) if rank else None
    found = with_bar("optimizing weights", searching.search(flow), optimize_weights, *given, **how)
    found.value.save_pretrained(out / "flow")
    return _written(out, found, run, {"x0": x0})


def optimize_audit(
    run: tyro.conf.Positional[Path],
    out: Path,
    classifier: Annotated[Path, tyro.conf.arg(metavar="RUN2")],
    searching: Searching = Searching(lr=0.5, iterations=30),
    drawing: Drawing = Drawing(count=64),
    bound: float = 0.1,
) -> int:
    """How often does a classifier fail on samples from noise within a box around the drawn one?

    Only samples that it has right to begin with count, success is measured on images as they are saved (8 bits), and random
    noise in the same box is the control. Writes `audit.json`, `optimized.safetensors` and pictures.

    Args:
        run: a run with classes.
        out: folder to write into.
        classifier: a run on whose data the classifier is trained.
        searching: how; steps go along the gradient divided by its norm.
        drawing: which samples.
        bound: largest change of any element of the noise.
    """
    flow, x0, condition = drawing.open(run)
    if condition is None or "label" not in condition:
        raise ValueError("this flow has no classes; audit a classifier of your own from Python (recipes.optimization)")
    judge = classifier_of(classifier).to(flow.device)
    given = (flow, judge.classify, x0, condition["label"])
    how: dict[str, Any] = {"condition": condition, "bound": bound, "seed": drawing.seed}
    found = with_bar("searching", searching.search(flow), audit, *given, **how)
    correct, fooled, moved = int(found.correct.sum()), int(found.fooled.sum()), float(found.distance.mean())
    _written(out, found.found, run, {"x0": found.found.value, "fooled": found.fooled})
    figures = {"classifier": judge.name, "correct": correct, "fooled": fooled, "rate": found.rate}
    write_json(out / "audit.json", {**figures, "control": found.control, "bound": bound, "distance": moved})
    print(
        f"{judge.name}: of {correct} samples that it had right {fooled} fool it ({100 * found.rate:.1f} %), by chance "
        f"{100 * found.control:.1f} %; images moved by {moved:.3g} (root mean square)"
    )
    return 0


def optimize_posterior(
    run: tyro.conf.Positional[Path],
    out: Path,
    operator: str,
    input: Path | None = None,
    noise: float = 0.05,
    spread: float | None = None,
    way: Literal["guidance", "noise"] = "guidance",
    searching: Searching = Searching(iterations=60, steps=40),
    drawing: Drawing = Drawing(count=8),
    label: int | None = None,
    scale: float = 1.0,
) -> int:
    """Data from a noisy measurement: in-painting, deblurring, sparse sensors, or any function of yours.

    Measures items, adds noise, and draws samples that agree with what was measured: by guiding the ODE, or by searching for
    noise. Writes `posterior.safetensors` (`truth`, `measured`, `x`) and pictures.

    Args:
        run: a run, a saved flow, or a pipeline of diffusers.
        out: folder to write into.
        operator: mask:SHARE (that share of the pixels is known), box:SIDE (all but a square in the middle), blur:WIDTH,
            sensors:NUMBER, or FILE.py:function.
        input: what is measured: images (a folder, zip or file), .safetensors with x, or .npy; held-out data by default.
        noise: standard deviation of the noise.
        spread: of guidance, the standard deviation of data that are Gaussian noise; measured from the network by default.
        way: guidance (diffusion posterior sampling) or noise (D-Flow).
        searching: how noise is searched, and the sampler.
        drawing: how many items, and everything that is drawn.
        label: of all items; nothing is said of their labels by default.
        scale: of guidance by the measurement.
    """
    flow = drawing.open_flow(run)
    if input is not None:
        truth = read_input(input, flow, drawing.count, ("x", "x1"), data_shape(flow))[0]
    else:
        held_out = data_of(run)[1]
        truth = held_out.fetch(torch.arange(min(drawing.count, len(held_out))))["x1"].to(flow.device, flow.dtype)
    condition = None
    if label is None and flow.conditions == ("label",) and not drawing.prompt:
        condition = with_null_labels(flow, {}, len(truth))
    elif flow.conditions or label is not None:
        condition = replace(drawing, count=len(truth)).open(run, label)[2]
    measure = _operator(operator, tuple(truth.shape[1:]), seeded(drawing.seed, 74))
    clean, generator = measure(truth), seeded(drawing.seed, 73, device=flow.device)
    value = clean + noise * torch.randn(clean.shape, generator=generator, dtype=clean.dtype, device=clean.device)
    measurement = Measurement(measure, value, noise, spread)
    x0 = drawing.noise(flow, len(truth), condition)
    search = searching.search(flow)
    if way == "guidance":
        method = "heun" if searching.method == "auto" and isinstance(flow, TrajectoryModel) else searching.method
        sampler = {**{name: search.sampling[name] for name in ("steps", "guidance")}, "method": method}
        parts = []
        with Progress(len(truth), "guiding samples", "samples") as bar:
            for rows in torch.arange(len(truth), device=flow.device).split(searching.batch):
                given = {name: value[rows] for name, value in (condition or {}).items()} or None
                part = measurement.index(rows)
                parts.append(posterior_sample(flow, part, x0=x0[rows], condition=given, scale=scale, **sampler))
                bar.update(int(rows[-1]) + 1)
        x = torch.cat(parts)
    else:
        mismatch = OfRows(lambda x, rows: measurement.index(rows).mismatch(x))
        x = with_bar("searching noise", search, optimize_noise, flow, mismatch, x0, condition=condition).after
    misses = float(measurement.residual(x).square().mean().sqrt())
    error = float((x - truth).square().mean().sqrt())
    tensors = {"truth": truth, "measured": value, "x": x, "x0": x0}
    write_tensors(out / "posterior.safetensors", {k: v.float().cpu() for k, v in tensors.items()}, {"run": str(run)})
    shown = {"truth": truth, "x": x, **({"measured": value} if value.shape == truth.shape else {})}
    for name, images in shown.items():
        save_picture(images.float().cpu(), out / f"{name}.png", name)
    print(
        f"{len(x)} samples: they miss the measurement by {misses:.4g} (its noise is {noise:g}), the truth by {error:.4g} "
        f"(the data's deviation is {float(truth.std()):.3g}) in {out}"
    )
    return 0


def _operator(text: str, shape: tuple[int, ...], generator: torch.Generator) -> Any:
    kind, _, rest = text.partition(":")
    if kind not in ("mask", "box", "blur", "sensors"):
        return function_of(text)
    try:
        number = float(rest)
    except ValueError:
        raise ValueError(f"--operator: {kind} needs a number, such as {kind}:2, got {text!r}") from None
    if len(shape) != 3:
        raise ValueError(f"--operator: {kind} is for images and fields on a grid; give FILE.py:function")
    height, width = shape[1:]
    if kind == "mask" and 0 < number < 1:
        return Masked((torch.rand(1, height, width, generator=generator) < number).float())
    if kind == "box" and 1 <= number < min(height, width):
        side = int(number)
        mask = torch.ones(1, height, width)
        mask[:, (height - side) // 2 : (height + side) // 2, (width - side) // 2 : (width + side) // 2] = 0
        return Masked(mask)
    if kind == "blur" and number > 0:
        return Blurred(number)
    if kind == "sensors" and 1 <= number <= height * width:
        at = torch.randperm(height * width, generator=generator)[: int(number)]
        return Sensors(torch.stack([at // width, at % width], dim=1))
    raise ValueError(f"--operator: {rest} is out of range for {kind} on items of shape {shape}")


def _written(out: Path, found: Found, run: Path, more: dict[str, Tensor]) -> int:
    tensors = {"before": found.before, "after": found.after, **more}
    plain = {name: value.float().cpu() for name, value in tensors.items()}
    write_tensors(out / "optimized.safetensors", plain, {"run": str(run)})
    save_picture(found.before.float().cpu(), out / "before.png", "before")
    save_picture(found.after.float().cpu(), out / "after.png", "after")
    series = {"mean measure": (list(range(len(found.losses))), list(found.losses))}
    curves(series, xlabel="iteration", ylabel="measure").savefig(out / "measure.png", dpi=120)
    print(f"measure {found.losses[0]:.4g} before, {found.measure:.4g} after, in {out}")
    return 0
