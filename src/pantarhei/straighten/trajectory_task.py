"""The training of trajectory models: matching, a denoising term, an adversarial term, and their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pantarhei.flow import Condition, Flow, Objective, evaluation_mode
from pantarhei.flow.conditions import as_condition
from pantarhei.flow.couplings import Independent
from pantarhei.flow.numbered import numbered_noise
from pantarhei.flow.objectives import draw_pairs, drop_conditions
from pantarhei.flow.trajectory import TrajectoryModel
from pantarhei.networks.second_time import last_layer
from pantarhei.straighten.adversarial import Adversarial, discriminator_loss, generator_loss
from pantarhei.straighten.jump_times import JumpDraw, JumpTimes
from pantarhei.straighten.stores import check_data
from pantarhei.straighten.students import name_of
from pantarhei.straighten.trajectory_matching import Compared, TrajectoryMatching, to_data
from pantarhei.training import FlowTask, Optimization
from pantarhei.training.task import Trained, Update, held, slope, unwrapped

LARGEST, SMALLEST = 1e4, 1e-4  # of an adaptive weight, and what is added to the norm it is divided by


class TrajectoryTask(FlowTask):
    """Train a trajectory model.

    The loss is E[matching] + w_d lambda_d E[denoising] + w_a lambda_a E[adversarial] (Kim et al. 2310.02279, section 3),
    where an adaptive lambda is |grad matching| / (|grad other| + 1e-4), both gradients those of the network's last layer
    (Esser et al. 2012.09841), kept below 1e4; each process and micro-batch weighs by its own.

    Args:
        model: the student, trained in place.
        matching: how it is compared with itself.
        times: law of its jumps, or a function of the iteration that gives it.
        data, held_out, optimization, average: as of a `FlowTask`. The average is who jumps to the data end.
        denoising: an objective of the flow at s = t; None leaves it out.
        denoising_weight: w_d.
        adaptive: whether the other terms have adaptive weights.
        adversarial: a discriminator and its settings; None leaves it out.
        dropout: how often a condition is dropped, for guidance.

    Raises:
        ValueError: a denoising term for a head that has no field, or pairs that a rectified teacher needs are not there.
    """

    def __init__(
        self,
        model: TrajectoryModel,
        matching: TrajectoryMatching,
        times: JumpTimes | Callable[[int], JumpTimes],
        data: Any = None,
        *,
        denoising: Objective | None = None,
        denoising_weight: float = 1.0,
        adaptive: bool = True,
        adversarial: Adversarial | None = None,
        dropout: float = 0.0,
        held_out: Any = None,
        optimization: Optimization | None = None,
        average: float = 0.999,
        warmup_average: bool = True,
    ):
        if denoising is not None and not model.head.anywhere:
            raise ValueError("denoising: a consistency model has no field that could denoise")
        if not average:
            raise ValueError("average: trajectory models need one: it jumps to the data end; give a decay in (0, 1)")
        super().__init__(
            model,
            None,
            data,
            held_out=held_out,
            optimization=optimization or Optimization(lr=4e-4, optimizer="radam"),
            average=average,
            warmup_average=warmup_average,
        )
        self.matching, self.denoising, self.adversarial = matching, denoising, adversarial
        self.denoising_weight, self.adaptive, self.dropout = denoising_weight, adaptive, dropout
        self._times = times
        self.teacher = matching.teacher
        if adversarial is not None:
            self.discriminator = adversarial.discriminator
            self.groups = {**self.groups, "discriminator": Trained(("discriminator",), adversarial.optimization)}
        check_data(matching.teacher, self.data)
        self._truth: tuple[Tensor, Tensor, Condition | None] | None = None

    @property
    def model(self) -> TrajectoryModel:
        """The student."""
        model: Any = self.flow
        return model

    def times(self) -> JumpTimes:
        """The law of jumps of this iteration."""
        return self._times(self.iteration) if callable(self._times) else self._times

    def updates(self, batch: dict[str, Tensor], generator: torch.Generator) -> Iterator[Update]:
        """The student's update, and the discriminator's."""
        batch = {**batch, "x1": self.model.encode(batch["x1"])}  # once, for both terms
        model, average = self._models()
        _, x0, x1, condition = draw_pairs(model, batch, Independent(), None, generator)
        condition = drop_conditions(condition, self.dropout, x1, generator)
        wide = torch.promote_types(x1.dtype, torch.float32)
        draw = self.times().draw(len(x1), generator, self.shared, device=x1.device, dtype=wide)
        with self.autocast():  # teacher and average, too
            compared = self.matching.compare(model, average, draw, x0, x1, condition)
        distance = self.matching.loss(model, draw, compared).mean()
        playing = self.adversarial is not None and self.iteration >= self.adversarial.after
        # The gradient of the landing once: the graph through the average's jump is left before the student's is walked.
        along = slope(distance, compared.landing, keep=playing)
        total = _carried(distance, along, compared.landing)
        log: dict[str, Any] = {"loss": distance.detach()}
        norm = self._norm(total) if self.adaptive and (self.denoising is not None or playing) else None
        if self.denoising is not None:
            term, _ = self.denoising(model, batch, generator)
            weight = self._weight(norm, term)
            total = total + self.denoising_weight * weight * term
            log |= {"denoising": term.detach(), "denoising_weight": weight}
        if playing:
            shown = self._shown(compared, draw, x0, x1, condition, generator)
            term = self._played(shown, generator)
            weight = self._weight(norm, term, self.adversarial.limits)  # type: ignore[union-attr]
            total = total + self.adversarial.weight * weight * term  # type: ignore[union-attr]
            log |= {"adversarial": term.detach(), "adversarial_weight": weight}
        yield Update(total, "network", log)
        if playing:
            yield self._judged(shown.sample.detach(), x1, generator)

    def _shown(
        self,
        compared: Compared,
        draw: JumpDraw,
        x0: Tensor,
        x1: Tensor,
        condition: Condition | None,
        generator: torch.Generator,
    ) -> Shown:
        """What the discriminator is shown of the student."""
        assert self.adversarial is not None
        of = self.adversarial
        if of.times is None and of.shows == "estimate":
            return Shown(compared.estimate, compared.landing)
        model, average = self._models()
        if of.times is not None:
            draw = of.times.draw(len(x1), generator, self.shared, device=x1.device, dtype=draw.s.dtype)
        s = draw.s if of.shows == "estimate" else draw.s.new_tensor(model.interval[1])
        x = model.path.sample(x0, x1, None, draw.t)[0]
        with self.autocast():
            landing = model.land(x, draw.t, s, condition)
            sample = to_data(average, landing, s, condition) if of.shows == "estimate" else landing
        return Shown(sample, landing)

    def _played(self, shown: Shown, generator: torch.Generator) -> Tensor:
        """The student's adversarial loss, with the gradient of its landing."""
        assert self.adversarial is not None
        with held(self.discriminator) as judge:
            term = generator_loss(judge(self.adversarial.shown(shown.sample, generator)))
        return _carried(term, slope(term, shown.landing, keep=False), shown.landing)

    def _judged(self, fake: Tensor, real: Tensor, generator: torch.Generator) -> Update:
        """The discriminator's update."""
        assert self.adversarial is not None
        # One after the other: statistics of a batch norm are of either.
        false, true = (self.discriminator(self.adversarial.shown(x, generator)) for x in (fake, real))
        loss = discriminator_loss(false, true)
        log = {"discriminator": loss.detach(), "accuracy": ((false < 0).float().mean() + (true > 0).float().mean()) / 2}
        return Update(loss, "discriminator", log)

    def _norm(self, term: Tensor) -> Tensor:
        layer = last_layer(unwrapped(self.flow.network))
        if hasattr(layer, "to_local"):  # its shards are not what the graph was made with
            raise ValueError(
                "adaptive: weights of terms need whole layers, which fsdp has not; turn it off, or take ddp"
            )
        return slope_norm(term, layer)

    def _weight(
        self, norm: Tensor | None, term: Tensor, limits: tuple[float, float] = (0.0, LARGEST)
    ) -> Tensor | float:
        return 1.0 if norm is None else adaptive_weight(norm, self._norm(term), limits)

    def _models(self) -> tuple[TrajectoryModel, TrajectoryModel]:
        """Student and average in the flow's own space, where data are encoded already; not submodules."""
        made = self.__dict__.get("_of_latents")
        if made is None or made[0].network is not self.flow.network:  # the training loop wraps it
            models: tuple[Any, Any] = (self.flow.like(self.flow.network), self.result())
            for model in models:
                model.codec = None
            made = self.__dict__["_of_latents"] = models
        return made

    @torch.no_grad()
    def validate(self) -> float | None:
        """Mean squared distance of one jump from noise to where the teacher leads; none without a teacher."""
        if self.teacher is None or self.flow.shape is None:
            return None
        _, model = self._models()
        if self._truth is None:
            data = self.held_out or self.data
            self._truth = _teacher_samples(self.teacher, self.matching.guidance, data, model.dtype)
        x0, x1, condition = self._truth
        with evaluation_mode(model.network):
            parts = [
                model.sample(x0=x0[rows], condition=None if condition is None else condition.index(rows), decode=False)
                for rows in torch.arange(len(x0)).split(self.validation_batch)
            ]
        return float((torch.cat(parts) - x1).square().mean())

    def config(self) -> dict[str, Any]:
        """Flow, network, and what is learned of jumps, as data: resuming compares them."""
        matching, playing = self.matching, self.adversarial
        learned: dict[str, Any] = {
            "waypoint": matching.waypoint,
            "guidance": matching.guidance,
            "follower": matching.follower,
            "metric": name_of(matching.metric),
            "weight": matching.weight,
            "denoising": self.denoising_weight if self.denoising is not None else 0.0,
            "adaptive": self.adaptive,
            "dropout": self.dropout,
            "times": self._times.spec() if hasattr(self._times, "spec") else "custom",
        }
        if playing is not None:
            name = type(playing.discriminator).__name__
            learned["adversarial"] = {
                "discriminator": name,
                "weight": playing.weight,
                "after": playing.after,
                "shows": playing.shows,
            }
        return {**super().config(), "jumps": learned}

    def preview(self, folder: Path, iteration: int) -> None:
        """A grid of 64 samples of one jump from fixed noise (images), or a scatter of 2,000 (points)."""
        self._draw_preview(folder, iteration, steps=1)


def slope_norm(term: Tensor, layer: Tensor) -> Tensor:
    """Norm of a term's gradient with respect to a layer's weight, 0-d; the graph is kept."""
    return slope(term, layer).norm()


def adaptive_weight(norm: Tensor, other: Tensor, limits: tuple[float, float] = (0.0, LARGEST)) -> Tensor:
    """norm / (other + 1e-4), within limits: what makes another term's gradient as long as the first one's."""
    return (norm / (other + SMALLEST)).clamp(*limits).detach()


class Shown(NamedTuple):
    """Samples for the discriminator, and the student's landing that they were made of."""

    sample: Tensor
    landing: Tensor


class Truth(NamedTuple):
    """Noise, where the teacher leads, and the condition."""

    x0: Tensor
    x1: Tensor
    condition: Condition | None


def _teacher_samples(teacher: Flow, guidance: float, data: Any, dtype: torch.dtype, count: int = 256) -> Truth:
    """In the student's precision, in which the teacher is asked while it trains, too."""
    rows = torch.arange(count) % len(data)
    x0 = numbered_noise(0, range(count), teacher.shape or (), salt=22).to(teacher.device, dtype)
    condition = None
    if teacher.conditions:
        batch = data.fetch(rows)
        named = {name: batch[name].to(teacher.device) for name in teacher.conditions}
        condition = as_condition(named, teacher.null, count)
    x1 = teacher.sample(
        x0=x0, condition=condition, guidance=guidance, steps=18, method="edm", grid="edm", final="state", decode=False
    )
    return Truth(x0, x1, condition)


def _carried(term: Tensor, along: Tensor, landing: Tensor) -> Tensor:
    """A number of the term's value with its gradient, which is that of <along, landing>."""
    product = (along * landing).sum()
    return term.detach() + product - product.detach()
