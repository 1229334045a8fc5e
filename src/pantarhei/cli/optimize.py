"""`pantarhei optimize noise|condition|weights|audit RUN`: change what samples come from, for a measure of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    save_rows,
)
from pantarhei.cli.sample import conditions_of, in_turn, prompts_of
from pantarhei.files import write_json, write_tensors
from pantarhei.flow import Flow, TrajectoryModel
from pantarhei.flow.numbered import numbered_conditions, numbered_source
from pantarhei.flow.reparameterisation import Variables
from pantarhei.metrics import ClassifierFeatures
from pantarhei.recipes.auditing import audit
from pantarhei.recipes.evaluation import make_reference
from pantarhei.recipes.optimization import (
    Found,
    Metric,
    Search,
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
class Sampling:
    """How samples are drawn.

    Attributes:
        steps: of the sampler; what a distilled flow was made for, one jump of a trajectory model, or the command's own.
        method: of the sampler, as of `pantarhei sample`.
        guidance: classifier-free guidance; by default what the flow's notes name.
        shift: resolution shift of the time grid.
        gamma: noise between the jumps of a trajectory model.
        variables: solve in other variables: rho, snr, flow or angle.
        batch: samples at a time.
    """

    steps: int | None = None
    method: str = "auto"
    guidance: float | None = None
    shift: float = 1.0
    gamma: float | None = None
    variables: Variables | None = None
    batch: int = 64

    def options(self, flow: Flow, steps: int) -> dict[str, Any]:
        """Those of `differentiable_sample`; with so many steps where nothing else says how many.

        Raises:
            ValueError: numbers out of range, or what does not go with the flow.
        """
        if self.batch < 1 or (self.steps is not None and self.steps < 1):
            raise ValueError(f"--steps, --batch: must be at least 1, got {self.steps} and {self.batch}")
        if self.gamma is not None and not isinstance(flow, TrajectoryModel):
            raise ValueError("--gamma: is for the jumps of trajectory models")
        found: dict[str, Any] = {"method": self.method, "shift": self.shift, "variables": self.variables}
        found["steps"] = default_steps(flow, self.method, steps) if self.steps is None else self.steps
        found["guidance"] = own_guidance(flow) if self.guidance is None else self.guidance
        return found if self.gamma is None else {**found, "gamma": self.gamma}


@dataclass(frozen=True)
class Searching:
    """How it is searched.

    Attributes:
        iterations: updates.
        lr: learning rate of AdamW, or length of a normalised step.
        weight_decay: of AdamW.
        through: how gradients are found: checkpoint (exact), backprop, symplectic, adjoint, backsolve or reversible.
        truncate: gradients of the last so many steps only (of condition and weights).
    """

    iterations: int = 30
    lr: float = 0.05
    weight_decay: float = 0.0
    through: Through = "checkpoint"
    truncate: int | None = None

    def search(self, flow: Flow, sampling: Sampling, seed: int, steps: int = 20) -> Search:
        """As settings of a search."""
        options = {**sampling.options(flow, steps), "through": self.through, "truncate": self.truncate}
        return Search(self.iterations, self.lr, self.weight_decay, sampling=options, batch=sampling.batch, seed=seed)


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
            examples, _ = read_input(self.example, flow, count, ("x", "x1"), data_shape(flow), "--example")
            return like_example(examples)
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
        """The flow, noise, and the conditions of the samples: a label or a prompt, or evenly drawn labels.

        Raises:
            ValueError: a count, label or prompt that does not fit.
        """
        flow = self.open_flow(run)
        condition = self.conditions(run, flow, self.count, label)
        return flow, self.noise(flow, self.count, condition), condition

    def conditions(self, run: Path, flow: Flow, count: int, label: int | None) -> dict[str, Tensor] | None:
        """What so many samples are conditioned on.

        Raises:
            ValueError: a label or prompt that does not fit.
        """
        texts = prompts_of(flow, (self.prompt,) if self.prompt else (), None)
        given = in_turn(flow, texts) if texts is not None else conditions_of(run, flow, label)
        found = numbered_conditions(flow, self.seed, given)(range(count))
        return {name: value.to(flow.device) for name, value in found.items()} or None

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
    sampling: Sampling = Sampling(),
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
        sampling: the sampler; 20 steps by default.
        drawing: which samples.
        label: of all samples; drawn evenly by default.
        keep: norm keeps each noise on the sphere it began on, where Gaussian noise is; free lets it go.
        bound: largest change of any element of the noise.
    """
    flow, x0, condition = drawing.open(run, label)
    given = (flow, measuring.open(flow, drawing.count), x0)
    how: dict[str, Any] = {"condition": condition, "keep": keep, "bound": bound}
    found = with_bar("optimizing noise", searching.search(flow, sampling, drawing.seed), optimize_noise, *given, **how)
    made = {"label": label, "keep": keep, "bound": bound}
    return _written(
        out, found, run, {"x0": found.value, **(condition or {})}, made, measuring, searching, sampling, drawing
    )


def optimize_condition_of(
    run: tyro.conf.Positional[Path],
    out: Path,
    measuring: Measuring = Measuring(),
    searching: Searching = Searching(),
    sampling: Sampling = Sampling(),
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
        sampling: the sampler; 20 steps by default.
        drawing: which samples, whose mean measure it is; with --example as many as there are examples.
        start: class to start from; the mean of all by default.
    """
    flow = drawing.open_flow(run)
    row, how = _embedding(flow, start, drawing.prompt)
    x0 = drawing.noise(flow, drawing.count)
    given = (flow, measuring.open(flow, drawing.count), x0, row)
    found = with_bar(
        "optimizing condition", searching.search(flow, sampling, drawing.seed), optimize_condition, *given, **how
    )
    tensors = {how["name"]: found.value, "x0": x0}
    return _written(out, found, run, tensors, {"start": start}, measuring, searching, sampling, drawing)


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
    sampling: Sampling = Sampling(),
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
        sampling: the sampler; 20 steps by default.
        drawing: which samples are shown; an iteration has as many.
        label: of all samples; drawn evenly by default.
        rank: train low-rank additions of this rank; 0 trains the weights.
        only: parts of the names of the weights to train.
    """
    flow, x0, condition = drawing.open(run, label)
    given = (flow, measuring.open(flow, drawing.count), x0)
    how: dict[str, Any] = {"condition": condition, "only": only, "seed": drawing.seed}
    how["low_rank"] = LowRank(rank) if rank else None
    found = with_bar(
        "optimizing weights", searching.search(flow, sampling, drawing.seed), optimize_weights, *given, **how
    )
    found.value.save_pretrained(out / "flow")
    made = {"label": label, "rank": rank, "only": only}
    return _written(out, found, run, {"x0": x0, **(condition or {})}, made, measuring, searching, sampling, drawing)


def optimize_audit(
    run: tyro.conf.Positional[Path],
    out: Path,
    classifier: Annotated[Path, tyro.conf.arg(metavar="RUN2")],
    searching: Searching = Searching(lr=0.5, iterations=30),
    sampling: Sampling = Sampling(),
    drawing: Drawing = Drawing(count=64),
    label: int | None = None,
    bound: float = 0.1,
) -> int:
    """How often does a classifier fail on samples from noise within a box around the drawn one?

    Only samples that it has right to begin with count, success is measured on images as they are saved (8 bits), and random
    noise in the same box is the control. Writes `audit.json`, `optimized.safetensors` and pictures.

    Args:
        run: a run with classes, or a pipeline of diffusers.
        out: folder to write into.
        classifier: a run on whose data the classifier is trained.
        searching: how; steps go along the gradient divided by its norm.
        sampling: the sampler; 20 steps by default.
        drawing: which samples.
        label: what all samples are of; drawn evenly by default. Of a pipeline the classifier's label of its --prompt.
        bound: largest change of any element of the noise.
    """
    if not bound > 0:
        raise ValueError(f"--bound: must be positive, got {bound:g}")
    flow, x0, condition = drawing.open(run, label if not drawing.prompt else None)
    labels = (condition or {}).get("label")
    if labels is None and label is not None:
        labels = torch.full((len(x0),), label, device=flow.device)
    if labels is None:
        raise ValueError("--label: this flow has no classes; say what its samples are of")
    judge = classifier_of(classifier).to(flow.device)
    given = (flow, judge.classify, x0, labels)
    how: dict[str, Any] = {"condition": condition, "bound": bound, "seed": drawing.seed}
    found = with_bar("searching", searching.search(flow, sampling, drawing.seed), audit, *given, **how)
    correct, fooled, moved = int(found.correct.sum()), int(found.fooled.sum()), float(found.distance.mean())
    tensors = {"x0": found.found.value, "fooled": found.fooled, **(condition or {})}
    _written(out, found.found, run, tensors, {"classifier": classifier, "bound": bound}, searching, sampling, drawing)
    figures = {"classifier": judge.name, "correct": correct, "fooled": fooled, "rate": found.rate}
    write_json(out / "audit.json", {**figures, "control": found.control, "bound": bound, "distance": moved})
    print(
        f"{judge.name}: of {correct} samples that it had right {fooled} fool it ({100 * found.rate:.1f} %), by chance "
        f"{100 * found.control:.1f} %; images moved by {moved:.3g} (root mean square)"
    )
    return 0


def _written(out: Path, found: Found, run: Path, more: dict[str, Tensor], made: dict[str, Any], *how: Any) -> int:
    losses = torch.tensor(found.losses, dtype=torch.float64)
    write_made(out / "optimized.safetensors", {"before": found.before, "after": found.after, **more}, run, made, *how)
    save_rows({"before": found.before, "after": found.after}, out / "samples.png")
    series = {"mean measure": (list(range(len(losses))), losses.tolist())}
    curves(series, xlabel="iteration", ylabel="measure").savefig(out / "measure.png", dpi=120)
    write_json(out / "measure.json", {"measure": found.measure, "before_each_update": losses.tolist()})
    print(f"measure {found.losses[0]:.4g} before, {found.measure:.4g} after, in {out}")
    return 0


def write_made(path: Path, tensors: dict[str, Tensor], run: Path, made: dict[str, Any], *how: Any) -> None:
    """Tensors with everything that they were made with."""
    settings = {"run": run, **made, **{name: value for part in how for name, value in vars(part).items()}}
    plain = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    write_tensors(path, {name: value.cpu() for name, value in plain.items()}, {k: str(v) for k, v in settings.items()})
