"""The common task: one flow, one objective, one optimiser, one average."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pantarhei import networks
from pantarhei.data.seeds import generator as seeded
from pantarhei.data.sources import as_source
from pantarhei.flow import Flow, FlowMatching, Interpolant, Interpolation, Objective, evaluation_mode
from pantarhei.flow.numbered import numbered_noise
from pantarhei.training.averages import Average
from pantarhei.training.task import Optimization, Task, Trained, Update


class FlowTask(Task):
    """Train `flow.network` with an objective.

    Args:
        flow: the flow; its network is trained in place.
        objective: `objective(flow, batch, generator) -> (loss, log)`; flow matching by default, `Interpolation` on a path
            with a latent.
        data: a data source, a tensor, a dict of tensors or a torch Dataset.
        held_out: more of the same, for validation and the best checkpoint.
        optimization: optimiser settings.
        average: decay of the moving average that is used for sampling; 0 for none.
        warmup_average: whether the average's decay warms up.

    Attributes:
        teacher: a frozen flow that the objective asks, where there is one; a submodule, so that it moves to the device.
    """

    validation_batch = 128

    def __init__(
        self,
        flow: Flow,
        objective: Objective | None = None,
        data: Any = None,
        *,
        held_out: Any = None,
        optimization: Optimization | None = None,
        average: float = 0.999,
        warmup_average: bool = True,
    ):
        super().__init__()
        if data is None:
            raise ValueError("data: a data source, tensor, dict of tensors or Dataset is needed")
        self.flow = flow
        default = Interpolation() if isinstance(flow.path, Interpolant) else FlowMatching()
        self.objective = objective or default
        self.data = as_source(data)
        self.held_out = None if held_out is None else as_source(held_out)
        self.groups = {"network": Trained(("flow.network",), optimization or Optimization())}
        self.teacher: Flow | None = None
        self.average = Average(flow.network, average, warmup_average) if average else None
        self.averages = {"average": "flow.network"} if average else {}

    def result(self) -> Flow:
        """The flow to use: around the average where there is one."""
        return self.flow if self.average is None else self.flow.like(self.average.network)

    def train(self, mode: bool = True) -> FlowTask:
        """Training or evaluation mode of all but the teacher, which is always asked in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def updates(self, batch: dict[str, Tensor], generator: torch.Generator) -> Iterator[Update]:
        """One update: the objective's loss."""
        loss, log = self.objective(self.flow, batch, generator)
        yield Update(loss, "network", log)

    @torch.no_grad()
    def validate(self) -> float | None:
        """The objective on up to 1,024 held-out items, some at a time, with the same noise and times each time."""
        if self.held_out is None:
            return None
        flow = self.result()
        total, rows = 0.0, torch.arange(min(len(self.held_out), 1024))
        with evaluation_mode(flow.network):
            for number, part in enumerate(rows.split(self.validation_batch)):
                batch = {name: value.to(flow.device) for name, value in self.held_out.fetch(part).items()}
                loss, _ = self.objective(flow, batch, seeded(0, 20, number, device=flow.device))
                total += float(loss) * len(part) / len(rows)
        return total

    def preview(self, folder: Path, iteration: int) -> None:
        """A grid of 64 samples from fixed noise (images), or a scatter of 2,000 (points)."""
        path: Any = self.flow.path
        straight = path.spec()["name"] in ("linear", "interpolant") if hasattr(path, "spec") else True
        self._draw_preview(folder, iteration, steps=8, method="heun" if straight else "edm")

    def _draw_preview(self, folder: Path, iteration: int, **sampling: Any) -> None:
        flow = self.result()
        if flow.shape is None or not getattr(flow.source, "gaussian", False):
            return
        image = len(flow.shape) == 3 and flow.shape[0] in (1, 3)
        if not image and flow.shape != (2,):
            return
        count = 64 if image else 2000
        x0 = numbered_noise(0, range(count), flow.shape, salt=21).to(flow.device, flow.dtype)
        condition = None
        if flow.conditions:
            batch = self.data.fetch(torch.arange(count) % len(self.data))
            condition = {name: batch[name] for name in flow.conditions}
        x = flow.sample(x0=x0, condition=condition, **sampling).float().cpu()
        if image:
            from pantarhei.report import save_image_grid

            save_image_grid(x, folder / f"{iteration:08d}.png")
        else:
            from pantarhei.report import figures

            folder.mkdir(parents=True, exist_ok=True)
            figures.scatter_2d({f"iteration {iteration}": x}).savefig(folder / f"{iteration:08d}.png")

    def config(self) -> dict[str, Any]:
        """Flow and network as data."""
        network = networks.spec_of(self.flow.network)
        return {"flow": self.flow.spec(), "network": network or {"name": "custom"}}
