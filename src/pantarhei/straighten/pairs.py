"""Pairs of source draws and what a flow makes of them: the training set of reflow and of every distillation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pantarhei.data import Source
from pantarhei.data.seeds import mix
from pantarhei.data.shards import ShardStore
from pantarhei.flow import Flow
from pantarhei.flow.numbered import Conditions, numbered_conditions, numbered_samples
from pantarhei.flow.pretrained import fingerprint
from pantarhei.report.progress import Progress
from pantarhei.straighten.noise_states import state_samples
from pantarhei.straighten.state_pairs import StatePairs
from pantarhei.straighten.state_parts import StateParts

if TYPE_CHECKING:
    from pantarhei.straighten.stores import PairSource


PAIRS = 3  # name of their stream of random numbers, beside those of `flow.numbered`


@dataclass(frozen=True)
class Solver:
    """How pairs are made.

    Attributes:
        method: of the solver; each Heun step costs two evaluations.
        steps: number of steps.
        guidance: guidance scale, baked into the pairs.
        rtol: relative and absolute tolerance of error control instead of `steps` (with dopri5, tsit5 or bosh3); the
            published pairs are made by dopri5 with 1e-5.
    """

    method: str = "heun"
    steps: int = 20
    guidance: float = 1.0
    rtol: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"pair steps: must be at least 1, got {self.steps}")
        if self.rtol is not None and not self.rtol > 0:
            raise ValueError(f"pair rtol: must be positive, got {self.rtol}")

    def options(self) -> dict[str, Any]:
        """As options of `Flow.sample`."""
        common = {"method": self.method, "guidance": self.guidance}
        if self.rtol is None:
            return {**common, "steps": self.steps}
        return {**common, "steps": None, "rtol": self.rtol, "atol": self.rtol}


def make_pairs(
    flow: Flow,
    count: int,
    folder: str | Path,
    *,
    seed: int = 0,
    solver: Solver | None = None,
    conditions: Conditions | Source | None = None,
    teacher: str = "",
    batch: int = 256,
    shard_size: int = 1024,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
    store: Literal["tensors", "states"] = "tensors",
) -> PairSource:
    """Draw x0, carry it to x1 with the flow, and store (x0, x1, conditions), resumably.

    Pair i depends on (seed, i) and the flow only. Shards that are already there are kept, so a killed job goes on, and
    several processes share the shards by rank.

    Args:
        flow: the teacher; use the averaged weights.
        count: number of pairs.
        folder: where the store is, or goes on.
        seed: of the source draws and the conditions.
        solver: method, steps and guidance scale; guidance is baked into the pairs and written in the header.
        conditions: `(numbers) -> dict` of the conditions of these pairs, or a data source whose items' conditions are
            used; by default class labels are drawn evenly.
        teacher: name or path of the teacher, for the header.
        batch: rows integrated at a time.
        shard_size: pairs in a file.
        rank, world: this process's share.
        progress: show a progress line.
        store: "tensors" keeps everything in float32 (a `ShardStore`); "states" keeps the noise as states of its generator
            and the samples as PNG, an eighth of the bytes, for unconditional or labelled images (a `StatePairs`, see
            there). The two draw different noise.

    Raises:
        ValueError: for bad arguments, an existing store that was made otherwise, or pairs that "states" cannot hold.
        OSError: the disk is full; finished shards stay.
    """
    if count < 1:
        raise ValueError(f"pairs: must be at least 1, got {count}")
    solver = solver or Solver()
    stream = pair_stream(seed)
    named = numbered_conditions(flow, stream, conditions)
    header = pair_header(flow, solver, seed, teacher)
    if isinstance(conditions, Source):
        header["conditions_from"] = _described(conditions, flow)
    samples: Callable[..., Iterator[dict[str, Tensor]]]
    parts: ShardStore | StateParts
    if store == "states":
        parts, samples = StateParts.create(folder, flow, count, header, stream, shard_size), state_samples
    elif store == "tensors":
        parts, samples = ShardStore.create(folder, count, header, shard_size=shard_size), numbered_samples
    else:
        raise ValueError(f"store: must be 'tensors' or 'states', got {store!r}")
    missing = parts.missing(rank, world)
    mine = sum(len(parts.items(i)) for i in range(rank, parts.shards, world))
    done = mine - sum(len(parts.items(i)) for i in missing)
    options = {**solver.options(), "decode": False}
    with Progress(mine, "pairs", "pairs", start=done, shown=progress and rank == 0) as shown:
        for shard in missing:
            made = []
            for part in samples(flow, parts.items(shard), seed=stream, conditions=named, batch=batch, **options):
                made.append(part)
                done += len(part["x1"])
                shown.update(done)
            parts.write(shard, {name: torch.cat([p[name] for p in made]) for name in made[0]})
    if isinstance(parts, StateParts):
        parts.finish()
        return StatePairs(folder)
    return parts


def pair_stream(seed: int) -> int:
    """The seed of pairs: other draws than the samples of the same seed, on which a student must not have been trained."""
    return mix(seed, PAIRS)


def pair_header(flow: Flow, solver: Solver, seed: int, teacher: str) -> dict[str, Any]:
    """All that the pairs depend on."""
    return {
        "kind": "pairs",
        "version": 2,
        "direction": "x0 (source, t = 0) to x1 (data, t = 1)",
        "seed": seed,
        "method": solver.method,
        "steps": solver.steps if solver.rtol is None else None,
        "rtol": solver.rtol,
        "guidance": solver.guidance,
        "conditions": list(flow.conditions),
        "teacher": teacher,
        "teacher_weights": fingerprint(flow.network),
        "flow": flow.spec(),
    }


def _described(conditions: Source, flow: Flow) -> dict[str, Any]:
    """What a source of conditions is, so that a store does not go on with another one: its size, and some of its values."""
    rows = torch.linspace(0, len(conditions) - 1, min(len(conditions), 256)).long()
    batch = conditions.fetch(rows)
    digest = hashlib.sha256()
    for name in flow.conditions:
        digest.update(batch[name].contiguous().numpy().tobytes())
    return {"name": conditions.describe().get("name", ""), "count": len(conditions), "some": digest.hexdigest()[:16]}


@dataclass(frozen=True)
class PairReport:
    """What a look at a pair store found.

    Attributes:
        source_mean, source_std: moments of x0; 0 and 1 for a normal source.
        data_mean, data_std: moments of x1.
        swapped: x1 looks like the normal source and x0 does not.
        solver_error: relative root mean square change of x1 when the steps are doubled; None without the teacher.
        warnings: what a user should know, one sentence each.
    """

    source_mean: float
    source_std: float
    data_mean: float
    data_std: float
    swapped: bool
    solver_error: float | None
    warnings: tuple[str, ...]


def inspect_pairs(store: PairSource, flow: Flow | None = None, *, limit: int = 512, batch: int = 256) -> PairReport:
    """Check a pair store: moments, swapped ends, and (with the teacher) the solver's error by step doubling.

    Args:
        store: the pairs.
        flow: the teacher that made them.
        limit: how many pairs to look at.
        batch: rows integrated at a time; with a large teacher look at few pairs.
    """
    sample = store.tensors(limit)
    x0, x1 = sample["x0"].double(), sample["x1"].double()
    source = (float(x0.mean()), float(x0.std()))
    data = (float(x1.mean()), float(x1.std()))
    normal = store.header["flow"]["source"]["name"] == "normal"
    off = abs(source[1] - 1) > 0.1 or abs(source[0]) > 0.1
    like_noise = abs(data[1] - 1) < 0.05 and abs(data[0]) < 0.05 and _excess_kurtosis(x1) < 0.2
    swapped = normal and off and like_noise
    warnings = []
    if swapped:
        warnings.append("x0 and x1 look swapped: x1 has the moments of the source")
    elif normal and off:
        warnings.append(
            f"x0 does not look like the unit normal source: mean {source[0]:.3g}, deviation {source[1]:.3g}"
        )
    error = None
    if flow is not None and store.header.get("steps") is not None:
        error = _solver_error(store, flow, sample, batch)
        if error > 0.05:
            warnings.append(f"doubling the solver's steps changes x1 by {100 * error:.1f} %: use more steps")
    return PairReport(*source, *data, swapped, error, tuple(warnings))


def _solver_error(store: PairSource, flow: Flow, sample: dict[str, Tensor], batch: int) -> float:
    parts = []
    for rows in torch.arange(len(sample["x0"])).split(batch):
        named = {name: sample[name][rows] for name in store.header["conditions"]}
        finer = flow.sample(
            x0=sample["x0"][rows].to(flow.device, flow.dtype),
            condition=named or None,
            steps=2 * store.header["steps"],
            method=store.header["method"],
            guidance=store.header["guidance"],
            decode=False,
        )
        parts.append(finer.float().cpu())
    change = (torch.cat(parts) - sample["x1"]).square().mean().sqrt()
    return float(change / sample["x1"].std())


def _excess_kurtosis(x: Tensor) -> float:
    z = (x - x.mean()) / x.std()
    return abs(float(z.pow(4).mean()) - 3)
