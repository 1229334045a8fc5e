"""`pantarhei forecast RUN`."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import asdict
from pathlib import Path

import torch
import tyro
from torch import Tensor

from pantarhei.cli.opening import Device, open_flow, recipe_of
from pantarhei.data import read_points
from pantarhei.data.seeds import generator as seeded
from pantarhei.files import read_tensors, write_json, write_tensors
from pantarhei.flow import Flow
from pantarhei.recipes.forecasting import ForecastConfig, forecast, score_forecasts, scores_table
from pantarhei.report import save_image_grid
from pantarhei.report.figures import scatter_2d


def forecast_run(
    run: tyro.conf.Positional[Path],
    out: Path,
    against: Path | None = None,
    input: Path | None = None,
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
        against: another such run on the same series, for example with `--kind regressor`.
        input: present states (N, ...) of your own, in the data's units: a .npy file, or `state` in a .safetensors file. They
            are forecast, and nothing is scored.
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
    flows = {_label(run): open_flow(run, device=device)}
    if against is not None:
        other = recipe_of(against)
        if not isinstance(other, ForecastConfig) or (other.data, other.lag) != (recipe.data, recipe.lag):
            raise ValueError(f"--against: {against} is no forecast of the same series at the same lag as {run}")
        flows[_label(against, flows)] = open_flow(against, device=device)
    _, series, mean, scale = recipe.open_series()
    flow = flows[_label(run)]
    if input is not None:
        return _forecast_input(flow, input, mean, scale, out, members, max(leads), steps, seed)
    scores = score_forecasts(
        flows, series, leads=leads, lag=recipe.lag, cases=cases, members=members, steps=steps, seed=seed
    )
    cases = min(cases, len(series) * (series.shape[1] - max(leads) * recipe.lag))
    caption = f"{cases} held-out states of {recipe.data.data}, {members} members, lag {recipe.lag}, standardised units."
    print(scores_table(scores, caption).text())
    write_json(out / "forecast.json", {"run": str(run), "scores": [asdict(s) for s in scores], "seed": seed})
    ahead = max(leads)
    state, truth = series[:4, 0], series[:4, ahead * recipe.lag]
    count = min(members, 200) if state.ndim == 2 else 4
    found = forecast(
        flow, state, members=count, leads=ahead, steps=steps, generator=seeded(seed, 76, device=flow.device)
    )
    drawn = {"state": state, "truth": truth, "members": found[-1]}
    write_tensors(out / "forecast.safetensors", {name: value * scale + mean for name, value in drawn.items()})
    _draw(flow, drawn, out / "forecast.png", seed, ahead, steps)
    print(out)
    return 0


def _label(run: Path, taken: Container[str] = ()) -> str:
    """A run's name in the table: its folder's, or its whole path where that is taken."""
    name = run.resolve().name
    return str(run) if name in taken or name == "persistence" else name


def _forecast_input(
    flow: Flow, path: Path, mean: Tensor, scale: Tensor, out: Path, members: int, leads: int, steps: int, seed: int
) -> int:
    state = read_states(path, flow.shape or ())
    generator = seeded(seed, 76, device=flow.device)
    found = forecast(flow, (state - mean) / scale, members=members, leads=leads, steps=steps, generator=generator)
    write_tensors(out / "forecast.safetensors", {"state": state, "members": found * scale + mean})
    print(f"{members} members of {len(state)} states, {leads} lags ahead, (leads, members, states, ...) in {out}")
    return 0


def read_states(path: Path, shape: tuple[int, ...]) -> Tensor:
    """States (N, *shape) from a .npy file, or `state` in a .safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, other shapes, or values that are not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--input: there is no file {path}")
    if path.suffix == ".safetensors":
        tensors = read_tensors(path)
        if "state" not in tensors:
            raise ValueError(f"--input: {path} holds {', '.join(tensors)}; 'state' is missing")
        state = tensors["state"].float()
    elif path.suffix == ".npy":
        source = read_points(path)
        state = source.fetch(torch.arange(len(source)))["x1"].float()
    else:
        raise ValueError(f"--input: a .npy or .safetensors file is needed, got {path.name}")
    if tuple(state.shape[1:]) != shape or not len(state) or not bool(state.isfinite().all()):
        raise ValueError(
            f"--input: finite states (N, {', '.join(map(str, shape))}) are needed, got {tuple(state.shape)}"
        )
    return state


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
