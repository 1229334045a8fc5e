"""Models of jumps from the command line: from teachers and from data, sampled, scored, compared; mistakes in one line."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pantarhei as pr
from pantarhei.cli.main import main
from pantarhei.data.toys import two_moons
from pantarhei.flow import TrajectoryModel
from pantarhei.flow.heads import CTM, Consistency, MeanVelocity

QUIET = ["--batch", "16", "--threads", "1", "--no-tensorboard", "--preview-every", "0"]
SHORT = ["--iterations", "3", *QUIET]
HEADS = {"ctm": CTM(), "cd": Consistency(), "ct": Consistency(), "ict": Consistency(), "meanflow": MeanVelocity()}


def run(*arguments):
    return main([str(a) for a in arguments])


def refused(capsys, said, *arguments):
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.strip().splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, error
    assert lines[0].startswith("pantarhei: ")
    assert said in lines[0], error


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def teacher(folder):
    sizes = ["--width", "8", "--blocks", "1", "--path", "edm", "--predicts", "edm", "--average", "0.95", "--lr", "3e-3"]
    assert run("train", "rectified-flow", "--out", folder / "teacher", "--iterations", 30, *sizes, *QUIET) == 0
    return folder / "teacher"


@pytest.fixture(scope="module")
def plain(folder):
    """A run on points, without labels."""
    np.save(folder / "moons.npy", two_moons(400, torch.Generator().manual_seed(0)).numpy())
    points = ["--data", folder / "moons.npy", "--width", "8", "--blocks", "1", "--path", "edm", "--predicts", "edm"]
    assert run("train", "rectified-flow", "--out", folder / "plain", "--iterations", 2, *points, *QUIET) == 0
    return folder / "plain"


@pytest.fixture(scope="module")
def students(folder, teacher):
    """A student of each kind on images, made when it is asked for."""

    def student(kind):
        out = folder / f"student-{kind}"
        if not out.is_dir():
            command = ["straighten", "trajectory", teacher, "--out", out, "--kind", kind, "--no-check", *SHORT]
            assert run(*command, *(["--points", 5] if kind in ("ctm", "cd") else [])) == 0
        return out

    return student


# Students


@pytest.mark.parametrize("kind", ["ctm", "cd", "ict", "meanflow"])
def test_a_student_of_each_kind(students, teacher, tmp_path, kind, capsys):
    capsys.readouterr()
    out = students(kind)
    printed = said(capsys)
    assert "mean squared distance to the teacher's samples, by evaluations: teacher" in printed
    model = pr.load(out)
    assert isinstance(model, TrajectoryModel)
    assert model.head == HEADS[kind]
    assert model.provenance.teacher == str(teacher)
    assert model.provenance.notes["method"] == kind
    assert model.path.spec()["name"] == ("linear" if kind == "meanflow" else "edm")
    assert run("info", out) == 0
    assert kind in said(capsys)
    # One jump by default; and several.
    assert run("sample", out, "--out", tmp_path / "one", "--count", 8, "--label", 3) == 0
    assert "8 samples, 1 evaluations of the network each" in said(capsys)
    assert (tmp_path / "one/samples.png").is_file()
    one = load_file(tmp_path / "one/samples.safetensors")
    found = model.sample(x0=one["x0"], condition=one["label"])
    assert torch.allclose(found, one["x"], atol=1e-5)
    assert run("sample", out, "--out", tmp_path / "three", "--count", 8, "--steps", 3, "--guidance", 1.5) == 0
    assert "8 samples, 6 evaluations of the network each" in said(capsys)
    card = (out / "README.md").read_text()
    assert "--steps 1" in card


def test_noise_on_the_way(students, tmp_path):
    ctm = students("ctm")
    options = ["--count", 6, "--steps", 3]
    for name, more in (("none", []), ("zero", ["--gamma", 0]), ("half", ["--gamma", 0.5])):
        assert run("sample", ctm, "--out", tmp_path / name, *options, *more) == 0
    again = ["--gamma", 0.5, "--batch", 2]
    assert run("sample", ctm, "--out", tmp_path / "again", *options, *again) == 0
    none, zero, half, parts = (
        load_file(tmp_path / name / "samples.safetensors")["x"] for name in ("none", "zero", "half", "again")
    )
    assert torch.equal(none, zero)
    assert not torch.allclose(none, half, atol=1e-3)
    assert torch.allclose(half, parts, atol=1e-4)  # sample i depends on the seed and i only
    cd = students("cd")
    for name, more in (("all", []), ("one", ["--gamma", 1])):
        assert run("sample", cd, "--out", tmp_path / name, *options, *more) == 0
    assert torch.equal(*(load_file(tmp_path / name / "samples.safetensors")["x"] for name in ("all", "one")))
    # From noise of a file, as before.
    given = ["--input", tmp_path / "half/samples.safetensors", "--gamma", 0.5]
    assert run("sample", ctm, "--out", tmp_path / "given", *options, *given) == 0
    assert torch.allclose(load_file(tmp_path / "given/samples.safetensors")["x"], half, atol=1e-4)


def test_the_score_is_sampled_by_any_other_method(students, tmp_path, capsys):
    capsys.readouterr()
    ctm = students("ctm")
    assert run("sample", ctm, "--out", tmp_path / "a", "--count", 4, "--steps", 2, "--method", "heun") == 0
    assert "4 samples, 5 evaluations of the network each" in said(capsys)  # with the closing denoising step
    assert run("sample", ctm, "--out", tmp_path / "b", "--count", 4, "--steps", 2, "--sde", "--epsilon", 0.2) == 0
    # Data to noise goes by the score as well.
    assert run("invert", students("meanflow"), "--out", tmp_path / "c", "--count", 4, "--steps", 3) == 0
    assert load_file(tmp_path / "c/inverted.safetensors")["x0"].shape == (4, 1, 8, 8)


def test_evaluation(students, plain, folder, tmp_path, capsys):
    out = folder / "points"
    options = ["--kind", "ctm", "--points", 4, "--no-check", *SHORT]
    assert run("straighten", "trajectory", plain, "--out", out, *options) == 0
    assert run("evaluate", out, "--steps", 1, 2, "--gamma", 0.5, "--count", 40, "--out", tmp_path / "e.json") == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert [row["evaluations"] for row in found["rows"]] == [1, 2]
    assert all(row["frechet"][0] > 0 for row in found["rows"])
    assert run("evaluate", out, "--steps", 2, "--method", "edm", "--count", 40, "--out", tmp_path / "h.json") == 0
    assert json.loads((tmp_path / "h.json").read_text())["method"] == "edm"
    capsys.readouterr()


def test_a_discriminator_and_all_the_options(folder, teacher, capsys):
    out = folder / "adversarial"
    options = ["--adversarial", "conv", "--adversarial-after", 1, "--adversarial-weight", 0.5, "--points", 5]
    options += ["--span", "global", "--longest", 3, "--per-row", "--metric", "gradients", "--denoising", 0.5]
    options += ["--outer", "variance", "--initial", "random", "--guidance", 1.5, "--label-dropout", 0.1]
    command = ["straighten", "trajectory", teacher, "--out", out, *options, "--no-check", *SHORT]
    assert run(*command, "--log-every", 1) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert ["discriminator/discriminator" in line for line in lines if "lr" in line] == [False, True, True]
    model = pr.load(out)
    assert model.head == CTM("variance")
    assert model.provenance.notes["guidance_of_teacher"] == 1.5
    assert "gradient pyramid" in model.provenance.notes["metric"]
    assert run("sample", out, "--out", out / "s", "--count", 4) == 0
    # A second phase goes on from the first.
    second = ["straighten", "trajectory", teacher, "--start", out, "--out", folder / "second", "--points", 5]
    assert run(*second, "--outer", "variance", "--no-adaptive", "--no-check", *SHORT) == 0
    # And an interrupted one goes on.
    assert run(*command, "--resume", "--iterations", 5) == 0
    assert (out / "checkpoints/00000005").is_dir()


def test_low_rank_without_a_teacher(folder, teacher):
    out = folder / "low-rank"
    options = ["--without-teacher", "--rank", 2, "--points", 4, "--no-check", *SHORT]
    assert run("straighten", "trajectory", teacher, "--out", out, *options) == 0
    model = pr.load(out)
    assert model.network.lora["rank"] == 2
    assert model.provenance.notes["low_rank"] == 2


@pytest.mark.parametrize("kind", ["ict", "ct", "ctm", "meanflow"])
def test_training_from_data_alone(folder, kind, capsys):
    out = folder / f"alone-{kind}"
    sizes = ["--width", 8, "--blocks", 1, "--kind", kind, *SHORT]
    assert run("train", "trajectory", "--out", out, *sizes) == 0
    assert str(out) in said(capsys)
    model = pr.load(out)
    assert isinstance(model, TrajectoryModel)
    assert model.head == HEADS[kind]
    assert model.sample(2, condition=torch.tensor([1, 2])).shape == (2, 1, 8, 8)
    assert run("train", "trajectory", "--out", out, *sizes, "--resume", "--iterations", 4) == 0


# Comparison


def test_a_small_comparison(plain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pantarhei.recipes.comparison.TRIAL", 0.05)
    command = ["straighten", "compare", plain, "--out", tmp_path, "--budget", 0.01, "--count", 50, "--no-check"]
    command += ["--evaluations", 1, 2, "--methods", "consistency", "--threads", 1]
    assert run(*command, "--pair-steps", 2, "--batch", 32) == 0
    assert "best with 1 evaluations" in said(capsys)
    found = json.loads((tmp_path / "comparison.json").read_text())
    rows = [(row["arm"], row["asked"]) for row in found["rows"] if row["sampler"] == "jump"]
    arms = ("consistency distillation", "consistency trajectory", "consistency training")
    assert rows == [(arm, number) for arm in arms for number in (1, 2)]
    assert all(row["evaluations"] == row["asked"] for row in found["rows"] if row["sampler"] == "jump")
    assert found["about"]["pairs"] == 0
    assert not (tmp_path / "pairs").exists()
    for arm in arms:
        assert arm in (tmp_path / "comparison.html").read_text()


def test_a_trajectory_teacher_competes_with_its_own_jumps(folder, plain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pantarhei.recipes.comparison.TRIAL", 0.05)
    made = ["straighten", "trajectory", plain, "--out", folder / "jumps", "--points", 4, "--no-check", *SHORT]
    assert run(*made) == 0
    command = ["straighten", "compare", folder / "jumps", "--out", tmp_path, "--budget", 0.01, "--count", 50]
    command += ["--evaluations", 1, 2, "--methods", "distillation", "rectified", "--threads", 1, "--no-check"]
    assert run(*command, "--batch", 32) == 0
    found = json.loads((tmp_path / "comparison.json").read_text())
    rows = [(row["arm"], row["evaluations"]) for row in found["rows"] if row["sampler"] == "jump"]
    assert rows == [(arm, number) for arm in ("own jumps", "consistency distillation") for number in (1, 2)]
    assert "its jumps go stale" in found["about"]["skipped"]["rectified flow++"]
    assert not (tmp_path / "pairs").exists()


# Mistakes


def test_mistakes_are_one_line(teacher, plain, students, tmp_path, capsys):
    new = ["--out", tmp_path / "new"]
    base = ["straighten", "trajectory", teacher, *new, "--no-check", *SHORT]
    refused(capsys, "there is no folder or file", "straighten", "trajectory", tmp_path / "nobody", *new, *SHORT)
    refused(capsys, "grid: at least 2 times are needed, got 1", *base, "--points", 1)
    refused(capsys, "grid: at least 2 times are needed, got 0", *base, "--points", 0)
    refused(capsys, "longest: must lie in [1, 3]", *base, "--points", 4, "--longest", 9)
    refused(capsys, "without_teacher: consistency distillation has one", *base, "--kind", "cd", "--without-teacher")
    refused(capsys, "denoising: goes with 'ctm'", *base, "--kind", "cd", "--denoising", 0.5)
    refused(capsys, "denoising: a weight must not be negative", *base, "--denoising", -1)
    refused(capsys, "adversarial: weight > 0", *base, "--adversarial", "conv", "--adversarial-weight", 0)
    refused(capsys, "adversarial: ", *base, "--adversarial", "conv", "--kind", "meanflow")
    refused(capsys, "--vgg: a file of weights is needed for --adversarial vgg", *base, "--adversarial", "vgg")
    refused(capsys, "v.pth", *base, "--adversarial", "vgg", "--vgg", tmp_path / "v.pth")
    refused(capsys, "--vgg: a file of weights is needed for --metric lpips", *base, "--metric", "lpips")
    refused(capsys, "--vgg: a file", *base, "--preset", "cifar10")
    refused(capsys, "waypoint: goes with kind='ctm'", *base, "--kind", "cd", "--waypoint", "self")
    refused(capsys, "guidance: is that of a teacher", *base, "--kind", "ict", "--guidance", 2)
    refused(capsys, "no linear layer or convolution is named like attn", *base, "--rank", 2, "--targets", "attn")
    points = ["straighten", "trajectory", plain, *new, "--no-check", *SHORT]
    refused(capsys, "--guidance: this teacher has no condition", *points, "--guidance", 2)
    refused(capsys, "images", *points, "--metric", "gradients")
    cd = ["straighten", "trajectory", students("cd"), *new, "--no-check", *SHORT]
    refused(capsys, "a consistency model knows where trajectories end", *cd)
    assert not list(tmp_path.glob("new/checkpoints/*"))
    refused(capsys, "consistency distillation has a teacher", "train", "trajectory", *new, "--kind", "cd")
    linear = ["--path", "linear", "--predicts", "velocity", "--outer", "variance", "--kind", "ctm"]
    refused(capsys, "needs predicts='edm'", "train", "trajectory", *new, *linear, *SHORT)


def test_mistakes_of_sampling_are_one_line(teacher, plain, students, tmp_path, capsys):
    out = ["--out", tmp_path / "new", "--count", 4]
    cd, ctm = students("cd"), students("ctm")
    refused(capsys, "--gamma: is for the jumps of trajectory models", "sample", teacher, *out, "--gamma", 0.5)
    refused(capsys, "gamma: must lie in [0, 1], got 2", "sample", ctm, *out, "--steps", 2, "--gamma", 2)
    refused(capsys, "goes with jumps, not with method 'heun'", "sample", ctm, *out, "--method", "heun", "--gamma", 0.5)
    refused(capsys, "--gamma", "sample", ctm, *out, "--sde", "--gamma", 0.5)
    refused(capsys, "final: the last jump is the sample", "sample", ctm, *out, "--final", "denoise")
    refused(capsys, "not their velocity", "sample", cd, *out, "--method", "heun")
    refused(capsys, "not their velocity", "sample", cd, *out, "--sde")
    refused(capsys, "not their velocity", "invert", cd, *out)
    refused(capsys, "always jumps to the end, gamma = 1", "sample", cd, *out, "--steps", 3, "--gamma", 0.5)
    refused(capsys, "gamma", "evaluate", plain, "--gamma", 0.5, "--steps", 1, "--count", 20)
