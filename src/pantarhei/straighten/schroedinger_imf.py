"""Schroedinger bridges by iterated Markovian fitting (Shi et al. 2303.16852, DSBM; Peluchetti 2304.00917).

Among the processes with given laws at both ends the bridge is the one that is Markov and, given its ends, a Brownian bridge.
The iteration restores one property after the other: fit the drifts of the Markov process that imitates the Brownian bridges
of the present coupling, simulate it, and take its ends as the next coupling. The simulations alternate, from the data down
and from the source up, so that one end of every coupling is exact and the errors of the other one do not pile up.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.data import Source
from pantarhei.data.seeds import generator as seeded
from pantarhei.data.seeds import mix
from pantarhei.data.sources import as_source
from pantarhei.files import read_json, write_json
from pantarhei.flow import Flow, Interpolation
from pantarhei.flow.conditions import Condition
from pantarhei.flow.couplings import Coupling, Independent, Pairs
from pantarhei.flow.entropic import check_epsilon, sinkhorn_potentials
from pantarhei.flow.pretrained import fingerprint
from pantarhei.flow.sources import SourceLaw
from pantarhei.flow.times import TimeLaw, Uniform
from pantarhei.straighten.schroedinger import Bridge, check_bridge_flow
from pantarhei.training import FlowTask, Optimization, train

METHOD = "iterated Markovian fitting"
PROGRESS = "rounds.json"


class Entropic:
    """A coupling: partners drawn from the entropic plan of each batch, with the bridge's own epsilon.

    The larger the batch, the closer to the plan of the two laws, which is what a bridge couples its ends by.

    Args:
        epsilon: of the reference process.
    """

    name = "minibatch-entropic"

    def __init__(self, epsilon: float):
        self.epsilon = check_epsilon(epsilon)

    def __call__(
        self,
        batch: Mapping[str, Tensor],
        source: SourceLaw,
        condition: Condition | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """x0, row by row the partner of `batch["x1"]`."""
        x1 = batch["x1"]
        x0 = Independent()(batch, source, condition, generator)
        found = sinkhorn_potentials(x0.flatten(1), x1.flatten(1), self.epsilon, tolerance=1e-2)
        partner = torch.multinomial(found.plan().T, 1, generator=generator)[:, 0]
        return x0[partner]


def markovian_fitting(
    flow: Flow,
    data: Any,
    *,
    to: str | Path | None = None,
    rounds: int = 3,
    pairs: int = 20_000,
    iterations: int = 2000,
    last: int | None = None,
    start: Literal["independent", "entropic"] | Coupling = "independent",
    steps: int = 50,
    seed: int = 0,
    times: TimeLaw | None = None,
    optimization: Optimization | None = None,
    average: float = 0.999,
    **options: Any,
) -> Bridge:
    """Fit a Schroedinger bridge from a flow's source to data by iterated Markovian fitting (DSBM, 2303.16852, algorithm 1).

    Args:
        flow: of `bridge_flow`, or any flow with a score on that path; its network is copied and goes on training from round
            to round.
        data: x1: a data source, a tensor or a Dataset.
        to: folder that keeps the weights of every round, so that a killed call with the same arguments goes on where it
            was; None keeps nothing.
        rounds: how often the process is simulated to couple the ends anew; the odd rounds run it from the data down, the
            even ones from the source up. One fit comes before them. After an odd number the last fit has seen the data
            themselves, which suits the forward drift.
        pairs: size of each coupling.
        iterations: training length of each fit.
        last: training length of the last fit, where that is another one: the couplings before it need no great precision.
        start: the first coupling: "independent", "entropic" (by Sinkhorn's algorithm in batches of 500), or any coupling.
        steps: of each simulation.
        seed: of couplings and trainings.
        times, optimization, average: of each fit; the average is what is simulated and what trains on.
        options: further fields of `LoopConfig`.

    Returns:
        The bridge. Its provenance has the method, epsilon and the number of rounds.

    Raises:
        ValueError: the flow has no such path or no score, a number is out of range, or `to` holds another fit.
    """
    check_bridge_flow(flow)
    if rounds < 0 or pairs < 1 or steps < 2:
        raise ValueError(f"rounds, pairs, steps: 0, 1 and 2 or more are needed, got {rounds}, {pairs} and {steps}")
    if flow.conditions or flow.codec is not None:
        raise ValueError("flow: this fits flows without conditions and codec; encode the data first")
    source = as_source(data)
    first = _first_coupling(start, Bridge(flow).epsilon)
    objective = Interpolation(times=times or Uniform(), coupling=Pairs())
    options = {"progress": False, "tensorboard": False, "checkpoint_every": max(iterations, last or 1), **options}
    with tempfile.TemporaryDirectory() as unkept:
        folder = Path(to if to is not None else unkept)
        described: dict[str, Any] = {"pairs": pairs, "iterations": iterations, "steps": steps, "seed": seed}
        if last is not None:
            described |= {"last": last, "rounds": rounds}
        described |= {"start": first.name, "first_weights": fingerprint(flow.network)}
        done, flow = _kept(folder, flow, described, rounds)
        for number in range(done, rounds + 1):
            draws = seeded(seed, number, 70, device=flow.device)
            coupled = _couple(flow, source, first, number, pairs, steps, draws)
            fresh = flow.like(copy.deepcopy(flow.network).requires_grad_(True), **_provenance(flow, first, number))
            task = FlowTask(fresh, objective, coupled, optimization=optimization, average=average)
            each = mix(seed, number, 71) % 2**31
            length = iterations if last is None or number < rounds else last
            train(task, folder / f"fit-{number}", iterations=length, seed=each, resume=True, **options)
            flow = task.result()
            flow.save_pretrained(folder / f"round-{number}")
            write_json(folder / PROGRESS, {**described, "done": number + 1})
    return Bridge(flow)


def _first_coupling(start: Any, epsilon: float) -> Coupling:
    if not isinstance(start, str):
        return start
    if start not in ("independent", "entropic"):
        raise ValueError(f"start: must be 'independent', 'entropic' or a coupling, got {start!r}")
    return Entropic(epsilon) if start == "entropic" else Independent()


def _couple(
    flow: Flow, source: Source, first: Coupling, number: int, pairs: int, steps: int, draws: torch.Generator
) -> dict[str, Tensor]:
    """The pairs of one round: x0 and x1, on the CPU."""
    if number == 0:
        x1 = _data(flow, source, pairs, draws)
        x0 = torch.cat([first({"x1": part}, flow.source, None, draws) for part in x1.split(500)])
    elif number % 2:
        x1 = _data(flow, source, pairs, draws)
        x0 = torch.cat([Bridge(flow).backward(part, steps=steps, generator=draws) for part in x1.split(5000)])
    else:
        x0 = flow.draw(pairs, generator=draws)
        x1 = torch.cat([Bridge(flow).forward(part, steps=steps, generator=draws) for part in x0.split(5000)])
    return {"x0": x0.cpu(), "x1": x1.cpu()}


def _data(flow: Flow, source: Source, count: int, draws: torch.Generator) -> Tensor:
    order = torch.cat(
        [torch.randperm(len(source), generator=draws, device=draws.device) for _ in range(-(-count // len(source)))]
    )
    return source.fetch(order[:count].cpu())["x1"].to(flow.device, flow.dtype)


def _provenance(flow: Flow, first: Coupling, rounds: int) -> dict[str, Any]:
    notes = {"method": METHOD, "epsilon": Bridge(flow).epsilon, "rounds": rounds, "first_coupling": first.name}
    coupling = "schroedinger bridge" if rounds else first.name
    return {"coupling": coupling, "notes": {**flow.provenance.notes, **notes}}


def _kept(folder: Path, flow: Flow, described: dict[str, Any], rounds: int) -> tuple[int, Flow]:
    """How many fits a folder holds, and the flow of the last one."""
    if not (folder / PROGRESS).is_file():
        return 0, flow
    kept = read_json(folder / PROGRESS)
    done = kept.pop("done")
    for name, value in described.items():
        if kept.get(name) != value:
            raise ValueError(
                f"to: {folder} holds a fit with {name} {kept.get(name)!r}, asked {value!r}; take another one"
            )
    if done > rounds + 1:
        raise ValueError(
            f"rounds: {folder} holds {done} fits, of {done - 1} rounds; ask for as many or more, got {rounds}"
        )
    network = copy.deepcopy(flow.network)
    saved = Flow.from_pretrained(folder / f"round-{done - 1}", network, source=flow.source, codec=flow.codec)
    return done, saved
