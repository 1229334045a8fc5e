"""`pantarhei evaluate RUN`."""

from __future__ import annotations

from pathlib import Path

import tyro

from pantarhei.cli.opening import Device, data_of, open_flow
from pantarhei.cli.sample import Method, Stochastic
from pantarhei.files import write_json
from pantarhei.flow.endings import Final
from pantarhei.recipes.evaluation import bits_per_dimension, check_gamma, evaluate_flow, make_reference


def evaluate(
    run: tyro.conf.Positional[Path],
    steps: tuple[int, ...] = (1, 2, 4, 8, 50),
    count: int = 2000,
    seed: int = 0,
    method: Method = "auto",
    final: Final = "auto",
    gamma: float | None = None,
    rtol: float | None = None,
    guidance: float = 1.0,
    noise: Stochastic = Stochastic(),
    inception: Path | None = None,
    likelihood: int = 0,
    batch: int = 256,
    device: Device = "auto",
    out: Path | None = None,
) -> int:
    """Print a table of quality against steps and write `evaluation.json`.

    Args:
        run: a run folder.
        steps: numbers of sampling steps, such as 1 2 4 8 50.
        count: samples for each.
        seed: of noise and labels.
        method: of the sampler; see `pantarhei sample --help`.
        final: the same; with clean the steps of one evaluation each are all the evaluations there are.
        gamma: share of noise of a trajectory model's jumps, see `pantarhei sample --help`.
        rtol: error control with this tolerance instead of numbers of steps (with bosh3, dopri5 or tsit5; the paper's figures
            have dopri5 at 1e-5).
        guidance: classifier-free guidance scale.
        noise: sample a stochastic equation instead.
        inception: file of Inception weights; without it features come from a small classifier trained on the data.
        likelihood: held-out images whose bits per dimension are measured too; 0 for none.
        batch: samples at a time.
        device: where to run.
        out: where to write; RUN/evaluation.json by default.
    """
    if count < 10:
        raise ValueError(f"--count: at least 10 samples are needed, got {count}")
    if not steps or min(steps) < 1:
        raise ValueError(f"--steps: every number must be at least 1, got {list(steps)}")
    if likelihood < 0:
        raise ValueError(f"--likelihood: must not be negative, got {likelihood}")
    flow = open_flow(run, device=device)
    check_gamma(flow, gamma, method)  # before a classifier is trained
    stochastic = noise.wanted or flow.stochastic
    train_set, held_out = data_of(run)
    reference = make_reference(train_set, held_out, inception=inception, cache=run / "classifier.safetensors")
    result = evaluate_flow(
        flow,
        reference,
        steps=steps,
        count=count,
        seed=seed,
        method=method,
        rtol=rtol,
        guidance=guidance,
        conditions=held_out if flow.conditions and flow.conditions != ("label",) else None,
        batch=batch,
        progress=True,
        noise=noise.options(flow, method) if stochastic else None,
        final=final,
        gamma=gamma,
    )
    bits = None
    if likelihood:
        bits = bits_per_dimension(flow, held_out, likelihood, seed=seed, batch=batch)
    said = {"sampler": noise.said()} if stochastic else {}
    found = {"run": str(run), **said, **result.data(), **({} if bits is None else {"bits_per_dimension": bits})}
    path = write_json(out or run / "evaluation.json", found)
    print(result.table().text())
    if stochastic:
        print(noise.said())
    if bits is not None:
        print(
            f"bits per dimension: {bits['mean']:.3f} +- {bits['standard_error']:.3f} ({bits['images']} held-out images)"
        )
    print(path)
    return 0
