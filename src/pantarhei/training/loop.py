"""The one training loop: precision, accumulation, clipping, stepping, distribution and checkpoints for every task."""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pantarhei.data.seeds import generator as seeded
from pantarhei.data.seeds import mix
from pantarhei.data.sources import as_source
from pantarhei.data.stream import Augment, Stream
from pantarhei.report.progress import Progress
from pantarhei.training import checkpoints
from pantarhei.training.averages import Average
from pantarhei.training.logs import Call, JsonLines, Logger, TensorBoard, WandB
from pantarhei.training.machines import Precision, Strategy, is_out_of_memory, make_fabric, same_everywhere
from pantarhei.training.runs import Run
from pantarhei.training.task import Task, Update, submodule_set, unwrapped


@dataclass(frozen=True)
class LoopConfig:
    """How long and where a task is trained.

    Attributes:
        iterations: batches to train on.
        batch: global batch size, over all devices.
        seed: of the data order, the noise and everything else that is drawn.
        accumulate: micro-batches a batch.
        precision: "fp32", or "bf16" (autocast; weights and averages stay float32).
        compile: torch.compile the trained networks.
        channels_last: memory layout of networks and images.
        checkpoint_every, keep: how often to save, and how many of the last checkpoints to keep (with the best one).
        log_every: iterations between two logged lines.
        preview_every: iterations between pictures; 0 makes none.
        workers: processes that fetch data; 0 fetches in the loop.
        threads: CPU threads; None leaves torch's choice, and a resumed run takes the recorded one.
        devices, nodes, strategy, accelerator: machines; "auto" is one process, or DDP for several devices.
        tensorboard, wandb: further loggers.
        progress: show a progress line.
    """

    iterations: int = 10_000
    batch: int = 128
    seed: int = 0
    accumulate: int = 1
    precision: Precision = "fp32"
    compile: bool = False
    channels_last: bool = False
    checkpoint_every: int = 1000
    keep: int = 2
    log_every: int = 50
    preview_every: int = 0
    workers: int = 0
    threads: int | None = None
    devices: int = 1
    nodes: int = 1
    strategy: Strategy = "auto"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    tensorboard: bool = True
    wandb: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "accumulate", "checkpoint_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("preview_every", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision: must be fp32 or bf16, got {self.precision!r}")


@dataclass(frozen=True)
class TrainResult:
    """How a training run ended: its folder, the iterations done, why it stopped, the seconds it took in all."""

    run: Run
    iteration: int
    reason: Literal["finished", "done", "interrupted"]
    seconds: float


class TrainingDiverged(RuntimeError):
    """The loss or the weights are no longer finite; the message names the last good checkpoint."""


def train(
    task: Task,
    run: str | Path,
    *,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    augment: Augment | None = None,
    loggers: Sequence[Logger | Callable[[int, Mapping[str, float]], None]] = (),
    **options: Any,
) -> TrainResult:
    """Train a task, leaving everything in the run folder `run`.

    Killed at any moment, it goes on from its last checkpoint with `resume=True`; on a CPU with the same number of
    threads the weights are then bit for bit those of an undisturbed run. Ctrl-C (or SIGTERM) ends after the current
    iteration with a checkpoint.

    Args:
        task: what to train; its networks are trained in place.
        run: the run folder.
        resume: go on with what `run` holds (or start, if it holds nothing).
        config: more entries for `config.yaml` (the recipe).
        augment: `(batch, generator) -> batch`, applied to every batch.
        loggers: further loggers, or functions `(iteration, values)`.
        options: fields of `LoopConfig`.

    Raises:
        ValueError: for bad options, a folder that holds something else, or a checkpoint that does not fit.
        TrainingDiverged: where the loss or the weights become NaN or infinite.
        OSError: the disk is full; the last checkpoint is whole.
    """
    settings = LoopConfig(**options)
    with Trainer(task, Path(run), settings, resume, config or {}, augment, loggers) as trainer:
        return trainer.run_to_end()


class Trainer:
    """The state of one training run."""

    def __init__(
        self,
        task: Task,
        folder: Path,
        settings: LoopConfig,
        resume: bool,
        config: Mapping[str, Any],
        augment: Augment | None,
        loggers: Sequence[Any],
    ):
        self.task, self.settings, self.augment = task, settings, augment
        self.source = as_source(task.data)
        found = checkpoints.newest(folder / "checkpoints") if resume else None
        self._set_threads(found)
        self.fabric = make_fabric(
            devices=settings.devices,
            nodes=settings.nodes,
            strategy=settings.strategy,
            precision=settings.precision,
            accelerator=settings.accelerator,
        )
        self.rank, self.world = self.fabric.global_rank, self.fabric.world_size
        described = {"loop": asdict(settings), "task": task.config(), "data": self.source.describe(), **config}
        if resume and (folder / "config.yaml").is_file():
            self.run = Run.open(folder)
            if self.rank == 0:
                self._continue_config(described)
        elif self.rank == 0:
            self.run = Run.create(folder, described)
        self.fabric.barrier()
        if not hasattr(self, "run"):
            self.run = Run.open(folder)
        self._seed()
        self._wrap()
        self.iteration, self.seconds, self.parts = 0, 0.0, settings.accumulate
        self.best: tuple[int, float] | None = None  # iteration and validation figure
        if found is not None:
            self._restore(found)
        self._loggers = self._open_loggers(loggers) if self.rank == 0 else []
        self._stop = False

    # Set-up

    def _set_threads(self, found: Path | None) -> None:
        threads = self.settings.threads
        if threads is None and found is not None:
            threads = checkpoints.read_json(found / checkpoints.STATE).get("threads")
        if threads is not None:
            torch.set_num_threads(threads)

    def _continue_config(self, described: Mapping[str, Any]) -> None:
        """A resumed run may be longer, elsewhere or logged otherwise; what decides its weights must not change."""
        old, new = self.run.config, _plain(described)
        fixed = [k for k in ("batch", "seed", "precision") if old["loop"].get(k) != new["loop"][k]]
        changes = [f"{k} ({old['loop'].get(k)}, now {new['loop'][k]})" for k in fixed]
        if old.get("task") != new["task"]:
            changes.append("network or task")
        if changes:
            where = f"{self.run.folder} was started with another {', '.join(changes)}"
            raise ValueError(f"--resume: {where}; use the same, or another --out")
        self.run.config = {**old, "loop": new["loop"]}
        self.run.write_config()

    def _seed(self) -> None:
        seed = self.settings.seed
        torch.manual_seed(mix(seed, self.rank, 10))
        np.random.seed(mix(seed, self.rank, 11) % 2**32)  # noqa: NPY002 - users' data sets may draw from it
        random.seed(mix(seed, self.rank, 12))
        device = self.fabric.device
        self.generators = {
            "own": seeded(seed, self.rank, 13, device=device),
            "shared": seeded(seed, 14, device=device),
        }
        self.task.shared, self.task.autocast = self.generators["shared"], self.fabric.autocast

    def _wrap(self) -> None:
        """Move, shard and wrap the networks where they stand; build the optimisers."""
        task, settings = self.task, self.settings
        task.to(self.fabric.device)
        self._originals: dict[str, torch.nn.Module] = {}
        self.optimizers: dict[str, Any] = {}
        for path in [p for group in task.groups.values() for p in group.paths]:
            network = task.get_submodule(path)
            same_everywhere(network, self.world)
            if settings.channels_last:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if settings.compile:
                network.compile()
            self._originals[path] = network
        for path in task.averages:
            same_everywhere(task.get_submodule(path), self.world)
            if settings.strategy == "fsdp":
                self.fabric.setup_module(_average(task, path).network)
        for path, network in self._originals.items():
            submodule_set(task, path, self.fabric.setup_module(network))
        for name, group in task.groups.items():
            parameters = [p for path in group.paths for p in self._originals[path].parameters()]
            self.optimizers[name] = self.fabric.setup_optimizers(group.optimization.build(parameters))

    def _plain_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {name: optimizer.optimizer for name, optimizer in self.optimizers.items()}

    def _restore(self, found: Path) -> None:
        state = checkpoints.load(found, self.task, self._plain_optimizers(), self.generators, rank=self.rank)
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        self.parts = max(self.parts, state["parts"])
        self.best = tuple(state["best"]) if state["best"] else None
        if self.iteration > self.settings.iterations:
            raise ValueError(f"--iterations: {self.run.folder} is already at iteration {self.iteration}; ask for more")

    def _open_loggers(self, more: Sequence[Any]) -> list[Logger]:
        found: list[Logger] = [JsonLines(self.run.folder / "metrics.jsonl", self.iteration)]
        if self.settings.tensorboard:
            found.append(TensorBoard(self.run.folder / "tensorboard", self.iteration))
        if self.settings.wandb:
            found.append(WandB(self.run.folder, self.run.config))
        return found + [logger if hasattr(logger, "log") else Call(logger) for logger in more]

    # Running

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *error: object) -> None:
        for logger in self._loggers:
            logger.close()
        for path, network in self._originals.items():  # the user gets plain modules back
            submodule_set(self.task, path, network)

    def run_to_end(self) -> TrainResult:
        """Train until the last iteration, an early stop or an interruption; a finished run is left as it is."""
        settings = self.settings
        if self.iteration == settings.iterations:
            return TrainResult(self.run, self.iteration, "finished", self.seconds)
        stream = Stream(
            self.source,
            settings.batch,
            seed=settings.seed,
            rank=self.rank,
            world=self.world,
            start=self.iteration,
            augment=self.augment,
            workers=settings.workers,
        )
        self.task.train()
        reason: Literal["finished", "done", "interrupted"] = "finished"
        shown = settings.progress and self.rank == 0
        window = _Window()
        began = time.monotonic() - self.seconds
        with (
            self._interruptible(),
            Progress(settings.iterations, "training", "it", start=self.iteration, shown=shown) as progress,
        ):
            for batch in stream:
                rows = len(next(iter(batch.values()))) * self.world
                values = self._iterate(self.fabric.to_device(self._laid_out(batch)))
                self.iteration += 1
                self.seconds = time.monotonic() - began
                window.add(values, rows)
                if self.fabric.device.type == "cpu":
                    self._check_finite(window)
                last = self.iteration >= settings.iterations
                if last or self.iteration % settings.log_every == 0:
                    self._check_finite(window)
                    text = self._log(window)
                    progress.update(self.iteration, text)
                    window = _Window()
                if settings.preview_every and (last or self.iteration % settings.preview_every == 0):
                    self._preview()
                stopped = self._agree(self._stop)
                done = self.task.done
                if last or stopped or done or self.iteration % settings.checkpoint_every == 0:
                    self._save(window)
                if last or stopped or done:
                    reason = "finished" if last else "interrupted" if stopped else "done"
                    break
        return TrainResult(self.run, self.iteration, reason, self.seconds)

    def _preview(self) -> None:
        """Pictures by the first process; every forward of a sharded network needs the others too."""
        if self.rank == 0:
            self.task.preview(self.run.samples, self.iteration)
        elif self.settings.strategy == "fsdp":
            with tempfile.TemporaryDirectory() as unseen:
                self.task.preview(Path(unseen), self.iteration)

    def _laid_out(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.settings.channels_last:
            return batch
        return {k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in batch.items()}

    def _iterate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One iteration; where memory runs out, the batch is split further and tried again."""
        task = self.task
        task.iteration = self.iteration
        for name, optimizer in self.optimizers.items():
            optimization = task.groups[name].optimization
            lr = optimization.lr * optimization.factor(self.iteration, self.settings.iterations)
            for group in optimizer.param_groups:
                group["lr"] = lr
        while True:
            states = {name: g.get_state() for name, g in self.generators.items()}
            steps = [0]
            try:
                values = self._updates(task.split(batch, self.parts) if self.parts > 1 else [batch], steps)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.world > 1 or steps[0]:
                    raise
            self._halve()
            for name, state in states.items():
                self.generators[name].set_state(state)
        for path, followed in task.averages.items():
            _average(task, path).update(task.get_submodule(followed))
        return values

    def _updates(self, parts: list[dict[str, Tensor]], steps: list[int]) -> dict[str, Tensor]:
        """All updates of a batch. The micro-batches' iterators advance in lock step, so that each update sees the
        gradient of the whole batch before the next one begins.
        """
        iterators = [self.task.updates(part, self.generators["own"]) for part in parts]
        values: dict[str, Tensor] = {}
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        while True:
            group, weights = None, []
            for i, iterator in enumerate(iterators):
                with ExitStack() as stack:
                    if self.world > 1 and i + 1 < len(iterators):  # exchange gradients once, with the last micro-batch
                        for path in self._originals:
                            stack.enter_context(self.fabric.no_backward_sync(self.task.get_submodule(path)))
                    update = next(iterator, None)
                    if update is None:
                        break
                    group = update.group
                    weights.append(update.weight)
                    self._backward(update, len(parts))
                for key, value in {"loss": update.loss, **update.log}.items():
                    value = (
                        torch.as_tensor(value).detach().float().cpu()
                        if not isinstance(value, Tensor)
                        else value.detach()
                    )
                    name = key if len(self.optimizers) == 1 else f"{group}/{key}"
                    values[name] = values.get(name, 0) + value / len(parts)
            if group is None:
                return values
            self._step(group, weights)
            steps[0] += 1

    def _backward(self, update: Update, parts: int) -> None:
        plain = isinstance(update.weight, float) and update.weight == 1.0
        self.fabric.backward(update.loss / parts if plain else update.loss * update.weight)

    def _step(self, name: str, weights: list[float | Tensor]) -> None:
        optimizer, optimization = self.optimizers[name], self.task.groups[name].optimization
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if any(isinstance(w, Tensor) or w != 1.0 for w in weights):
            total = torch.stack(
                [torch.as_tensor(w, dtype=torch.float32, device=self.fabric.device) for w in weights]
            ).sum()
            total = self.fabric.all_reduce(total, reduce_op="mean") if self.world > 1 else total
            for parameter in parameters:
                parameter.grad /= total
        if optimization.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, optimization.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # A group's step must not leave gradients of other groups behind (a generator's loss reaches the discriminator).
        for other in self.optimizers.values():
            other.zero_grad(set_to_none=True)

    def _halve(self) -> None:
        if self.parts >= self.settings.batch // self.world:
            raise MemoryError("memory ran out with micro-batches of one item; use a smaller network")
        self.parts *= 2
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"memory ran out: going on with {self.parts} micro-batches a batch", file=sys.stderr, flush=True)
        if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in self.task.modules()):
            print("warning: batch normalisation now sees smaller batches", file=sys.stderr, flush=True)

    # Looking after it

    def _check_finite(self, window: _Window) -> None:
        if window.finite():
            return
        raise TrainingDiverged(self._diverged("the loss is"))

    def _diverged(self, what: str) -> str:
        last = checkpoints.newest(self.run.checkpoints)
        where = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        return (
            f"{what} not finite at iteration {self.iteration}: training stopped, {where}; "
            "try a lower learning rate or stronger clipping, and look at the data"
        )

    def _log(self, window: _Window) -> str:
        values = window.means()
        if self.world > 1:
            values = {
                k: float(self.fabric.all_reduce(torch.tensor(v, device=self.fabric.device))) for k, v in values.items()
            }
        values["lr"] = float(next(iter(self.optimizers.values())).param_groups[0]["lr"])
        values["seconds"] = self.seconds
        values["items_per_second"] = window.rate()
        for logger in self._loggers:
            logger.log(self.iteration, values)
        return f"loss {values['loss']:.4g}" if "loss" in values else ""

    def _save(self, window: _Window) -> None:
        self._check_finite(window)
        if not all(bool(p.isfinite().all()) for n in self._originals.values() for p in n.parameters()):
            last = checkpoints.newest(self.run.checkpoints)
            raise TrainingDiverged(
                f"the weights are not finite at iteration {self.iteration}; the last good checkpoint is {last}"
            )
        score = self.task.validate()
        if score is not None:
            for logger in self._loggers:
                logger.log(self.iteration, {"validation": score})
            if self.best is None or score < self.best[1]:
                self.best = (self.iteration, score)
        extra = {
            "seconds": self.seconds,
            "best": self.best,
            "parts": self.parts,
            "threads": torch.get_num_threads(),
            "seed": self.settings.seed,
            "batch": self.settings.batch,
        }
        checkpoints.save(
            self.run.checkpoints,
            self.iteration,
            self.task,
            self._plain_optimizers(),
            self.generators,
            extra=extra,
            rank=self.rank,
            barrier=self.fabric.barrier,
        )
        if self.rank == 0:
            checkpoints.prune(self.run.checkpoints, self.settings.keep, self.best[0] if self.best else None)

    def _agree(self, flag: bool) -> bool:
        """Whether any process was asked to stop."""
        if self.world == 1:
            return flag
        asked = torch.tensor(float(flag), device=self.fabric.device)
        return bool(self.fabric.all_reduce(asked, reduce_op="sum") > 0)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask for a stop after the iteration; a second Ctrl-C stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self._stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Window:
    """Values since the last logged line."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = self._rows = 0
        self._began = time.monotonic()

    def add(self, values: Mapping[str, Tensor], rows: int) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1
        self._rows += rows

    def finite(self) -> bool:
        return all(bool(torch.isfinite(value).all()) for value in self._sums.values())

    def means(self) -> dict[str, float]:
        return {name: float(value) / self._count for name, value in self._sums.items()}

    def rate(self) -> float:
        return self._rows / max(time.monotonic() - self._began, 1e-9)


def _average(task: Task, path: str) -> Average:
    module = unwrapped(task.get_submodule(path))
    assert isinstance(module, Average)
    return module


def _plain(value: Any) -> Any:
    """As it comes back from YAML."""
    import yaml

    return yaml.safe_load(yaml.safe_dump(value))
