"""Rectified flow from the command line: presets, transfer, rounds, distillation, inversion, analysis, claims."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pantarhei as pr
from pantarhei.cli.main import main
from pantarhei.data.shards import ShardStore
from pantarhei.recipes.rectified_flow import PRESETS, DataConfig, RectifiedFlowConfig, build_task
from pantarhei.straighten import write_array_pairs

COMMON = ["--batch", "32", "--threads", "1", "--no-tensorboard", "--preview-every", "0"]
TINY = ["--width", "8", "--blocks", "1", *COMMON]
MADE = ["--pairs", "64", "--pair-steps", "2", "--iterations", "3", *COMMON]


def run(*arguments):
    return main([str(a) for a in arguments])


def refused(capsys, said, *arguments):
    assert run(*arguments) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error
    assert "Traceback" not in error


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    points = ["--data", "two_moons", "--source", "eight_gaussians"]
    assert run("train", "rectified-flow", *points, "--out", folder / "transfer", "--iterations", 5, *TINY) == 0
    assert run("train", "rectified-flow", "--out", folder / "digits", "--iterations", 3, *TINY) == 0
    return folder


def test_transfer_starts_from_held_out_items_and_runs_back(runs, tmp_path):
    assert run("sample", runs / "transfer", "--count", 30, "--steps", 4, "--out", tmp_path / "a") == 0
    found = load_file(tmp_path / "a/samples.safetensors")
    held_out = DataConfig().open("eight_gaussians")[1]
    known = held_out.fetch(torch.arange(len(held_out)))["x1"]
    assert torch.cdist(found["x0"], known).amin(dim=1).max() < 1e-4
    assert (tmp_path / "a/starts.png").is_file()
    given = ["--input", tmp_path / "a/samples.safetensors", "--count", 7, "--steps", 4]
    assert run("sample", runs / "transfer", *given, "--out", tmp_path / "b") == 0
    assert len(load_file(tmp_path / "b/samples.safetensors")["x"]) == 7
    assert run("invert", runs / "transfer", "--count", 20, "--steps", 30, "--out", tmp_path / "i") == 0
    back = load_file(tmp_path / "i/inverted.safetensors")
    assert torch.allclose(back["x"], back["reconstruction"], atol=1e-2)
    assert run("evaluate", runs / "transfer", "--steps", 1, "--count", 50) == 0
    # From Python the run opens without its source, for given starts only.
    flow = pr.load(runs / "transfer")
    assert flow.sample(x0=known[:3], steps=2).shape == (3, 2)
    with pytest.raises(ValueError, match="eight_gaussians"):
        flow.sample(3)


def test_rounds_distillation_and_analysis(runs, tmp_path, capsys):
    assert run("straighten", "reflow", runs / "transfer", "--rounds", 2, "--out", tmp_path / "r", *MADE) == 0
    last = tmp_path / "r/round-2"
    assert pr.load(last).provenance.rectified == 2
    assert run("straighten", "distil", last, "--steps", 2, "--out", tmp_path / "d", *MADE) == 0
    assert run("sample", tmp_path / "d", "--count", 5, "--out", tmp_path / "s") == 0
    capsys.readouterr()
    assert run("analyze", last, "--count", 64, "--steps", 50) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("transfer", "round-1", "round-2", "remainder"))
    found = json.loads((last / "analysis/analysis.json").read_text())
    assert [name for name, _ in found["rounds"]] == ["transfer", "round-1", "round-2"]
    assert (last / "analysis/analysis.html").stat().st_size > 10_000
    assert (last / "analysis/trajectories.png").is_file()


def test_wrong_pairs_are_refused_from_the_command_line(runs, tmp_path, capsys):
    assert run("straighten", "reflow", runs / "transfer", "--out", tmp_path / "a", *MADE) == 0
    pairs = ["--pairs-from", tmp_path / "a/pairs", "--iterations", 2, *COMMON]
    again = ["straighten", "distil", tmp_path / "a", "--out", tmp_path / "b"]
    refused(capsys, "made by other weights", *again, *pairs)
    assert run(*again, *pairs, "--any-teacher") == 0
    refused(capsys, "samples of shape", "straighten", "reflow", runs / "digits", "--out", tmp_path / "c", *pairs)
    refused(capsys, "holds no pairs", *again[:-1], tmp_path / "e", "--pairs-from", tmp_path, *COMMON)
    write_array_pairs(ShardStore(tmp_path / "a/pairs"), tmp_path / "arrays/0")
    arrays = ["--pairs-from", tmp_path / "arrays", "--iterations", 2, *COMMON]
    assert run("straighten", "reflow", runs / "transfer", "--out", tmp_path / "f", *arrays) == 0
    refused(
        capsys,
        "later rounds",
        "straighten",
        "reflow",
        runs / "transfer",
        "--rounds",
        2,
        "--out",
        tmp_path / "g",
        *arrays,
    )
    assert run("straighten", "reflow", runs / "transfer", "--online", "--out", tmp_path / "h", *MADE) == 0


def test_stochastic_sampling_and_likelihood(runs, tmp_path, capsys):
    sample = ["sample", runs / "digits", "--count", 4, "--steps", 3, "--out", tmp_path]
    assert run(*sample, "--sde", "--epsilon", 0.3) == 0
    refused(capsys, "--method euler or heun", *sample, "--sde", "--method", "rk4")
    refused(capsys, "first time", *sample, "--published-grid")
    refused(capsys, "not Gaussian", "sample", runs / "transfer", "--sde", "--out", tmp_path)
    assert run("evaluate", runs / "digits", "--steps", 1, "--count", 20, "--likelihood", 4) == 0
    found = json.loads((runs / "digits/evaluation.json").read_text())["bits_per_dimension"]
    assert found["levels"] == 17
    assert found["images"] == 4
    assert found["mean"] > 0


def test_images_with_classifier_metric_and_feature_loss(runs, tmp_path):
    distil = ["straighten", "distil", runs / "digits", "--metric", "gradients", "--squared-too", *MADE]
    assert run(*distil, "--out", tmp_path / "d") == 0
    assert "surrogate" in (tmp_path / "d/README.md").read_text()
    generator = torch.Generator().manual_seed(0)
    for name, shift in (("dark", -0.5), ("light", 0.5)):
        images = torch.rand(60, 1, 8, 8, generator=generator) * 0.4 + shift
        np.save(tmp_path / f"{name}.npy", images.numpy())
    recipe = RectifiedFlowConfig(
        data=DataConfig(str(tmp_path / "light.npy")), source=str(tmp_path / "dark.npy"), feature_loss=True
    )
    task, _ = build_task(recipe, 0)
    batch = task.data.fetch(torch.arange(8))
    loss, _ = task.objective(task.flow, batch, torch.Generator().manual_seed(0))
    assert loss.isfinite()
    assert loss > 0


def test_presets_are_defaults_that_options_change(tmp_path, capsys):
    assert run("train", "rectified-flow", "--preset", "cifar10", "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "800000" in printed
    assert "0.999999" in printed
    refused(capsys, "did you mean 'cifar10'", "train", "rectified-flow", "--preset=cifar11", "--out", tmp_path / "a")
    paper = PRESETS["cifar10"].recipe
    assert (paper.lr, paper.warmup, paper.first_time, paper.network.dropout) == (2e-4, 5000, 1e-3, 0.15)
    small = ["--data", "digits", "--architecture", "unet", "--multipliers", "1", "2", *TINY]
    options = ["--iterations", 2, "--precision", "fp32", "--no-compile", "--no-channels-last"]
    assert run("train", "rectified-flow", "--preset", "cifar10-small", *small, *options, "--out", tmp_path / "a") == 0
    loaded = pr.load(tmp_path / "a")
    assert loaded.shape == (1, 8, 8)


def test_claims_run_and_go_on(tmp_path, capsys):
    command = ["reproduce", "rectified-flow", "--quick", "--seeds", 1, "--only", "balance", "--out", tmp_path]
    assert run(*command) == 0
    assert "remainder" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["quick"]
    assert (tmp_path / "report.html").is_file()
    capsys.readouterr()
    assert run(*command) == 0
    assert "kept from" in capsys.readouterr().out
    refused(capsys, "did you mean 'balance'", "reproduce", "rectified-flow", "--only", "balanse", "--out", tmp_path)
    refused(capsys, "rectified-flow", "reproduce", "nothing", "--out", tmp_path)


def test_reverse_students_inputs_and_error_control(runs, tmp_path, capsys):
    distil = ["straighten", "distil", runs / "transfer", "--reverse", "--out", tmp_path / "back"]
    assert run(*distil, *MADE) == 0
    assert "pantarhei invert" in (tmp_path / "back/README.md").read_text()
    assert run("invert", tmp_path / "back", "--count", 10, "--out", tmp_path / "x") == 0
    assert "reconstruction" not in load_file(tmp_path / "x/inverted.safetensors")
    refused(capsys, "use pantarhei invert", "sample", tmp_path / "back", "--out", tmp_path / "y")
    # What invert wrote starts samples: x0, not the data.
    assert run("invert", runs / "digits", "--count", 6, "--steps", 5, "--out", tmp_path / "i") == 0
    noise = tmp_path / "i/inverted.safetensors"
    assert run("sample", runs / "digits", "--input", noise, "--steps", 5, "--out", tmp_path / "s") == 0
    again, known = load_file(tmp_path / "s/samples.safetensors"), load_file(noise)
    assert torch.equal(again["x0"], known["x0"])
    assert torch.equal(again["label"], known["label"])
    save_file({"x0": torch.full((2, 1, 8, 8), float("nan"))}, tmp_path / "nan.safetensors")
    bad = ["sample", runs / "digits", "--out", tmp_path / "z", "--input"]
    refused(capsys, "NaN", *bad, tmp_path / "nan.safetensors")
    save_file({"x0": torch.zeros(0, 1, 8, 8)}, tmp_path / "none.safetensors")
    refused(capsys, "expected items of shape", *bad, tmp_path / "none.safetensors")
    capsys.readouterr()
    adaptive = ["--method", "dopri5", "--rtol", "1e-3", "--count", 4]
    assert run("sample", runs / "digits", *adaptive, "--out", tmp_path / "a") == 0
    assert "evaluations of the network" in capsys.readouterr().out
    refused(capsys, "without --steps", "sample", runs / "digits", *adaptive, "--steps", 3, "--out", tmp_path / "a")
    assert run("evaluate", runs / "digits", "--method", "dopri5", "--rtol", "1e-2", "--count", 20) == 0
    assert "adaptive" in capsys.readouterr().out


def test_rounds_go_on_after_an_interruption(runs, tmp_path, capsys):
    command = ["straighten", "reflow", runs / "transfer", "--out", tmp_path, *MADE]
    assert run(*command, "--rounds", 1, "--out", tmp_path / "round-1") == 0
    assert run(*command, "--rounds", 2, "--resume") == 0
    assert pr.load(tmp_path / "round-2").provenance.rectified == 2
    distil = ["straighten", "distil", runs / "transfer", "--out", tmp_path / "d", *MADE]
    refused(capsys, "compares images", *distil, "--metric", "gradients")
    refused(capsys, "eps", *distil, "--eps", "0.7")
    assert not (tmp_path / "d").exists()
    assert run("straighten", "distil", "--preset", "cifar10", "--help") == 0
    assert "dopri5" in capsys.readouterr().out
