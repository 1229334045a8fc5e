"""`pantarhei forecast RUN`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
import tyro
from torch import Tensor

from pantarhei.cli.opening import Device, open_flow, recipe_of
from pantarhei.data.seeds import generator as seeded
from pantarhei.files import write_json, write_tensors
from pantarhei.flow import Flow
from pantarhei.recipes.forecasting import ForecastConfig, forecast, score_forecasts, scores_table
from pantarhei.report import save_image_grid
from pantarhei.report.figures import scatter_2d


def forecast_run(
    run: tyro.conf.Positional[Path],
    out: Path,
    against: Path | None = None,
    leads: tuple[int, ...] = (1, 2, 4),
    members: int = 32,
    cases: int = 256,
    steps: int = 50,
    seed: int = 0,
    device: Device = "auto",
) -> int:
    """Forecast held-out trajectories with an ensemble, score it beside persistence, and draw it.

    Writes `forecast.json` (scores), `forecast.safetensors` (`state`, `truth`, `members` of a few cases, in the data's units)
    and `forecast.png`.

    Args:
        run: a run of `pantarhei train forecasting`.
        out: folder to write into.
        against: another such run, for example with `--kind regressor`.
        leads: how many lags ahead; an ensemble goes on from its own states.
        members: of the ensemble.
        cases: present states to start from.
        steps: sampling steps a lag.
        seed: of the cases and the noise.
        device: where to run.
    """
    if min(members, cases, steps, *leads) < 1:
        raise ValueError("--members, --cases, --steps, --leads: must be at least 1")
    recipe = recipe_of(run)
    if not isinstance(recipe, ForecastConfig):
        raise ValueError(f"{run} is no run of a forecast; train one with pantarhei train forecasting")
    flows = {name.name: open_flow(name, device=device) for name in (run, *([against] if against else []))}
    _, series, mean, scale = recipe.open_series()
    scores = score_forecasts(
        flows, series, leads=leads, lag=recipe.lag, cases=cases, members=members, steps=steps, seed=seed
    )
    caption = f"{cases} held-out states of {recipe.data.data}, {members} members, lag {recipe.lag}, standardised units."
    print(scores_table(scores, caption).text())
    write_json(out / "forecast.json", {"run": str(run), "scores": [asdict(s) for s in scores], "seed": seed})
    ahead = max(leads)
    state, truth = series[:4, 0], series[:4, ahead * recipe.lag]
    flow = flows[run.name]
    count = min(members, 200) if state.ndim == 2 else 4
    found = forecast(
        flow, state, members=count, leads=ahead, steps=steps, generator=seeded(seed, 76, device=flow.device)
    )
    drawn = {"state": state, "truth": truth, "members": found[-1]}
    write_tensors(out / "forecast.safetensors", {name: value * scale + mean for name, value in drawn.items()})
    _draw(flow, drawn, out / "forecast.png", seed, ahead, steps)
    print(out)
    return 0


def _draw(flow: Flow, drawn: dict[str, Tensor], path: Path, seed: int, ahead: int, steps: int) -> None:
    """Points: clouds of members about their truth. Fields: a row a case, with the state, the truth and members."""
    state, truth, members = drawn["state"], drawn["truth"], drawn["members"]
    if state.ndim == 4:
        columns = torch.stack([state, truth, *members], dim=1)[:, :, :1]
        save_image_grid((columns.flatten(0, 1) / 3).clamp(-1, 1), path, columns=columns.shape[1])
    elif state.shape[1] == 2:
        generator = seeded(seed, 77, device=flow.device)
        many = forecast(flow, state, members=500, leads=ahead, steps=steps, generator=generator)[-1]
        scatter_2d({f"case {i + 1}, {ahead} ahead": many[:, i] for i in range(len(state))}).savefig(path, dpi=120)
