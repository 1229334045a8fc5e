"""The commands on stochastic interpolants and forecasts, as a user would type them; tiny runs."""

import json

import numpy as np
import pytest
import torch

from pantarhei.cli.main import main
from pantarhei.files import read_tensors

SMALL = ["--width", "16", "--preview-every", "0", "--no-tensorboard"]


def train(out, *options, recipe="stochastic-interpolants", iterations=20):
    return main(["train", recipe, "--out", str(out), "--iterations", str(iterations), *SMALL, *options])


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "bridge"
    assert train(out, "--data", "two_moons", "--source", "circles") == 0
    return out


def samples(folder):
    return read_tensors(folder / "samples.safetensors")


def test_noise_is_chosen_at_sampling(bridge, tmp_path, capsys):
    found = {}
    for name, options in {
        "ode": [],
        "sde": ["--sde", "--epsilon", "0.5"],
        "again": ["--sde", "--epsilon", "0.5", "--batch", "7"],
        "heun": ["--sde", "--method", "heun", "--form", "bump", "--last", "denoise", "--last-step", "0.05"],
    }.items():
        assert (
            main(["sample", str(bridge), "--out", str(tmp_path / name), "--count", "20", "--steps", "8", *options]) == 0
        )
        found[name] = samples(tmp_path / name)
        assert (tmp_path / name / "samples.png").is_file()
    assert torch.equal(found["ode"]["x0"], found["sde"]["x0"])
    assert not torch.allclose(found["ode"]["x"], found["sde"]["x"], atol=0.05)
    capsys.readouterr()
    strong = ["--count", "4", "--steps", "8", "--sde", "--epsilon", "50"]
    assert main(["sample", str(bridge), "--out", str(tmp_path / "strong"), *strong]) == 0
    assert capsys.readouterr().err.startswith("warning: epsilon was lowered from 50")
    assert main(["sample", str(bridge), "--out", str(tmp_path / "wild"), *strong, "--cap", "None"]) == 0
    assert "steps overshoot above 1" in capsys.readouterr().err
    # An epsilon without --sde is not passed over.
    options = ["--count", "20", "--steps", "8", "--epsilon", "0.5"]
    assert main(["sample", str(bridge), "--out", str(tmp_path / "implied"), *options]) == 0
    assert torch.equal(samples(tmp_path / "implied")["x"], found["sde"]["x"])
    # Sample i depends on the seed and i only, its noise on the way included.
    assert torch.allclose(found["sde"]["x"], found["again"]["x"], atol=1e-5)


def test_the_rest_of_the_commands_on_a_bridge(bridge, tmp_path, capsys):
    assert main(["info", str(bridge)]) == 0
    assert main(["invert", str(bridge), "--out", str(tmp_path / "back"), "--count", "8", "--steps", "4"]) == 0
    options = ["--steps", "4", "--count", "50", "--sde", "--epsilon", "0.3"]
    assert main(["evaluate", str(bridge), *options, "--out", str(tmp_path / "evaluation.json")]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["sampler"].startswith("SDE, epsilon 0.3")
    capsys.readouterr()
    assert train(bridge, "--data", "two_moons", "--source", "circles", "--resume", iterations=30) == 0
    card = (bridge / "README.md").read_text()
    assert "velocity+latent" in card
    assert "interpolant" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sde", "--epsilon", "-1"], "epsilon"),
        (["--sde", "--method", "rk4"], "--sde"),
        (["--sde", "--form", "diffusion"], "one-sided"),
        (["--sde", "--last-step", "2"], "last_step"),
    ],
)
def test_bad_options_are_one_line(bridge, tmp_path, capsys, options, message):
    assert main(["sample", str(bridge), "--out", str(tmp_path / "no"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_is_straightened(bridge, tmp_path, capsys):
    made = ["--pairs", "32", "--pair-steps", "2", "--iterations", "3", "--preview-every", "0", "--no-tensorboard"]
    assert main(["straighten", "reflow", str(bridge), "--out", str(tmp_path / "a"), *made]) == 2
    assert "path has a latent" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()  # nothing was made before
    assert train(tmp_path / "noise", "--data", "two_moons", iterations=3) == 0
    assert main(["straighten", "reflow", str(tmp_path / "noise"), "--out", str(tmp_path / "b"), *made]) == 0
    assert main(["evaluate", str(tmp_path / "b"), "--steps", "1", "--count", "20"]) == 0  # its data are the teacher's


def test_a_flow_without_a_score_says_how_to_get_one(tmp_path, capsys):
    out = tmp_path / "run"
    assert train(out, "--data", "two_moons", "--source", "circles", "--gamma", "none", iterations=2) == 0
    assert main(["sample", str(out), "--out", str(tmp_path / "s"), "--count", "4", "--sde"]) == 2
    assert "velocity+latent" in capsys.readouterr().err


def test_mirror_and_inpainting_start_from_data(tmp_path):
    out = tmp_path / "mirror"
    assert train(out, "--data", "two_moons", "--path", "mirror", iterations=2) == 0
    assert main(["sample", str(out), "--out", str(tmp_path / "m"), "--count", "6", "--steps", "4", "--sde"]) == 0
    out = tmp_path / "inpaint"
    assert train(out, "--observe", "inpainting", "--networks", "two", iterations=2) == 0
    for name, options in (("i", ["--sde", "--epsilon", "0.2"]), ("j", [])):
        assert main(["sample", str(out), "--out", str(tmp_path / name), "--count", "4", "--steps", "3", *options]) == 0
    found = samples(tmp_path / "i")
    labelled = ["--count", "4", "--steps", "2", "--label", "3"]
    assert main(["sample", str(out), "--out", str(tmp_path / "k"), *labelled]) == 0
    assert samples(tmp_path / "k")["label"].tolist() == [3] * 4
    mask = found["context"][:, -1:]
    assert torch.equal(found["x0"] * mask, found["context"][:, :1] * mask)
    assert (tmp_path / "i" / "starts.png").is_file()


def test_forecasts(tmp_path, capsys):
    draws = np.random.default_rng(0)
    np.save(tmp_path / "series.npy", draws.normal(size=(12, 10, 2)).cumsum(axis=1).astype(np.float32))
    data = ["--data", str(tmp_path / "series.npy")]
    for kind in ("bridge", "regressor"):
        assert train(tmp_path / kind, *data, "--kind", kind, recipe="forecasting", iterations=5) == 0
    assert "pantarhei forecast" in capsys.readouterr().out
    against = [
        "--against",
        str(tmp_path / "regressor"),
        "--leads",
        "1",
        "3",
        "--members",
        "4",
        "--cases",
        "8",
        "--steps",
        "3",
    ]
    assert main(["forecast", str(tmp_path / "bridge"), "--out", str(tmp_path / "f"), *against]) == 0
    table = capsys.readouterr().out
    assert "persistence" in table
    assert "regressor" in table
    scores = json.loads((tmp_path / "f" / "forecast.json").read_text())["scores"]
    assert {(row["name"], row["lead"]) for row in scores} == {
        (name, lead) for name in ("persistence", "bridge", "regressor") for lead in (1, 3)
    }
    assert read_tensors(tmp_path / "f" / "forecast.safetensors")["members"].shape == (4, 2, 2)
    assert (tmp_path / "f" / "forecast.png").is_file()
    np.save(tmp_path / "now.npy", np.zeros((3, 2), dtype=np.float32))
    given = ["--input", str(tmp_path / "now.npy"), "--members", "5", "--leads", "2", "--steps", "3"]
    assert main(["forecast", str(tmp_path / "bridge"), "--out", str(tmp_path / "h"), *given]) == 0
    assert read_tensors(tmp_path / "h" / "forecast.safetensors")["members"].shape == (2, 5, 3, 2)
    assert main(["invert", str(tmp_path / "bridge"), "--out", str(tmp_path / "i")]) == 2
    assert "has no ODE" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "bridge"), "--steps", "2", "--count", "20"]) == 0
    other = tmp_path / "x" / "bridge"
    assert train(other, *data, "--lag", "2", recipe="forecasting", iterations=2) == 0
    refused = ["--against", str(other), "--leads", "1"]
    assert main(["forecast", str(tmp_path / "bridge"), "--out", str(tmp_path / "j"), *refused]) == 2
    assert "same lag" in capsys.readouterr().err
    assert main(["forecast", str(tmp_path / "bridge"), "--out", str(tmp_path / "g"), "--leads", "40"]) == 2
    assert "do not fit" in capsys.readouterr().err


def test_only_forecasts_are_forecast(bridge, tmp_path, capsys):
    assert main(["forecast", str(bridge), "--out", str(tmp_path / "f")]) == 2
    assert "train forecasting" in capsys.readouterr().err
