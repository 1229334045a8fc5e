"""The commands: what they write, and that sample i depends on (seed, i) only."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pantarhei.cli.main import main

TINY = ["--width", "8", "--blocks", "1", "--batch", "16", "--threads", "1", "--no-tensorboard", "--preview-every", "0"]


def run(*arguments):
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A trained and a straightened run."""
    folder = tmp_path_factory.mktemp("runs")
    assert run("train", "rectified-flow", "--data", "digits", "--out", folder / "a", "--iterations", 12, *TINY) == 0
    short = ["--batch", "16", "--threads", "1", "--no-tensorboard", "--preview-every", "0"]
    made = ["--pairs", 40, "--pair-steps", 2, "--iterations", 6]
    assert run("straighten", "reflow", folder / "a", "--out", folder / "b", *made, *short) == 0
    return folder


def test_a_run_folder_holds_what_is_documented(runs):
    for name in ("a", "b"):
        present = {path.name for path in (runs / name).iterdir()}
        assert {"config.yaml", "checkpoints", "metrics.jsonl", "README.md"} <= present
    assert "| teacher |" in (runs / "b/README.md").read_text()
    assert {path.name for path in (runs / "b/pairs").iterdir()} == {"header.json", "00000.safetensors"}


def test_samples_are_written_as_documented_and_numbered(runs, tmp_path):
    assert run("sample", runs / "a", "--count", 10, "--steps", 3, "--out", tmp_path / "ten") == 0
    assert run("sample", runs / "a", "--count", 4, "--batch", 3, "--steps", 3, "--out", tmp_path / "four") == 0
    ten, four = (load_file(tmp_path / name / "samples.safetensors") for name in ("ten", "four"))
    assert ten["x"].dtype == torch.float32
    assert ten["x"].shape == (10, 1, 8, 8)
    assert ten["label"].shape == (10,)
    assert torch.allclose(ten["x"][:4], four["x"], atol=1e-5)
    assert torch.equal(ten["label"][:4], four["label"])
    assert Image.open(tmp_path / "ten/samples.png").size[0] > 40
    options = ["--label", 7, "--guidance", 2.0, "--method", "heun", "--seed", 5]
    assert run("sample", runs / "b", "--count", 3, "--steps", 1, "--out", tmp_path / "seven", *options) == 0
    assert load_file(tmp_path / "seven/samples.safetensors")["label"].tolist() == [7, 7, 7]


def test_evaluation_prints_a_table_and_writes_its_figures(runs, capsys):
    assert run("evaluate", runs / "b", "--steps", 1, 2, "--count", 40) == 0
    printed = capsys.readouterr().out
    assert "classifier trained on digits" in printed
    saved = json.loads((runs / "b/evaluation.json").read_text())
    assert [row["steps"] for row in saved["rows"]] == [1, 2]
    assert {"frechet", "kernel", "precision", "recall", "density", "coverage", "accuracy"} <= saved["rows"][0].keys()
    assert (saved["count"], saved["seed"], saved["method"]) == (40, 0, "euler")


def test_info_and_list_describe(runs, capsys):
    for path, said in ((runs / "a", "UNet"), (runs / "b", "rectified 1x"), (runs / "b/pairs", "warnings")):
        assert run("info", path) == 0
        assert said in capsys.readouterr().out
    assert run("list") == 0
    assert "ifactformer" in capsys.readouterr().out


def test_a_run_is_resumed_and_protected(runs, capsys):
    command = ["train", "rectified-flow", "--data", "digits", "--out", runs / "a", *TINY]
    assert run(*command, "--iterations", 20) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(*command, "--iterations", 14, "--resume") == 0
    assert (runs / "a/checkpoints/00000014").is_dir()


def test_images_from_folders_and_points_from_toys(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(6):
            pixels = torch.randint(0, 256, (10, 12, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    common = ["--iterations", 2, *TINY]
    source = ["--data", tmp_path / "images", "--size", 8, "--augment", "flip"]
    assert run("train", "rectified-flow", *source, "--out", tmp_path / "i", *common) == 0
    assert run("sample", tmp_path / "i", "--count", 2, "--steps", 1, "--out", tmp_path / "si") == 0
    assert load_file(tmp_path / "si/samples.safetensors")["x"].shape == (2, 3, 8, 8)
    assert run("train", "rectified-flow", "--data", "two_moons", "--out", tmp_path / "p", *common) == 0
    assert run("sample", tmp_path / "p", "--count", 50, "--steps", 2, "--out", tmp_path / "sp") == 0
    assert (tmp_path / "sp/samples.png").is_file()
    assert run("evaluate", tmp_path / "p", "--steps", 1, "--count", 50) == 0


def test_help_is_there_for_every_command(capsys):
    assert run("--help") == 0
    assert "straighten" in capsys.readouterr().out
    for command in (["train", "rectified-flow"], ["straighten", "reflow"], ["sample"], ["evaluate"], ["quickstart"]):
        assert run(*command, "--help") == 0
        assert "--out" in capsys.readouterr().out
    assert run("train", "--help") == 0
    done = subprocess.run([sys.executable, "-m", "pantarhei", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("pantarhei 0.")
