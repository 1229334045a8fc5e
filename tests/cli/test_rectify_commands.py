"""Straightening, comparing, inverting, editing and converting pretrained models from the command line."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pantarhei as pr
from pantarhei.cli.main import main
from pantarhei.data.shards import ShardStore
from pantarhei.data.toys import two_moons
from pantarhei.straighten import StatePairs, open_pairs
from pantarhei.straighten.state_parts import StateParts

QUIET = ["--batch", "32", "--threads", "1", "--no-tensorboard", "--preview-every", "0"]
FEW = ["--pairs", "64", "--pair-method", "ddim", "--pair-steps", "2"]
SHORT = ["--iterations", "3", *QUIET]
MADE = [*FEW, *SHORT]


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
    assert run("train", "rectified-flow", "--out", folder / "teacher", "--iterations", 150, *sizes, *QUIET) == 0
    return folder / "teacher"


@pytest.fixture(scope="module")
def plus_plus(folder, teacher):
    out = folder / "plus-plus"
    assert run("straighten", "rfpp", teacher, "--out", out, "--store", "states", *MADE) == 0
    return out


@pytest.fixture(scope="module")
def plain(folder):
    """A run on points, without labels."""
    np.save(folder / "moons.npy", two_moons(400, torch.Generator().manual_seed(0)).numpy())
    points = ["--data", folder / "moons.npy", "--width", "8", "--blocks", "1", "--path", "edm", "--predicts", "edm"]
    assert run("train", "rectified-flow", "--out", folder / "plain", "--iterations", 2, *points, *QUIET) == 0
    return folder / "plain"


# Students


def test_rectified_flow_plus_plus_with_noise_states(plus_plus, teacher, capsys):
    student = pr.load(plus_plus)
    assert student.path.spec()["name"] == "linear"
    assert student.provenance.rectified == 1
    assert student.provenance.teacher == str(teacher)
    pairs = open_pairs(plus_plus / "pairs")
    assert isinstance(pairs, StatePairs)
    assert len(pairs) == 64
    capsys.readouterr()
    assert run("info", plus_plus / "pairs") == 0
    printed = said(capsys)
    assert "missing shards 0 of 1" in printed
    assert "x0 mean, deviation" in printed
    assert "PCG64" in printed
    assert run("info", plus_plus) == 0
    assert "rectified 1x" in said(capsys)


def test_a_student_is_evaluated_on_the_data_of_its_teacher(folder, plain):
    out = folder / "points"
    assert run("straighten", "rfpp", plain, "--out", out, "--no-check", *MADE) == 0
    options = ["--method", "dpm-solver", "--final", "clean", "--count", 40]
    assert run("evaluate", out, "--steps", 2, 5, *options) == 0
    found = json.loads((out / "evaluation.json").read_text())
    assert found["method"] == "dpm-solver"
    assert found["extractor"] == "the coordinates themselves"
    assert [row["evaluations"] for row in found["rows"]] == [2, 5]
    assert all(row["frechet"][0] > 0 for row in found["rows"])


def test_a_surrogate_and_low_rank(folder, teacher):
    out = folder / "low-rank"
    options = ["--perceptual", "lpips-surrogate", "--rank", 2, "--alpha", 4, "--no-divided", "--huber", 0.01]
    assert run("straighten", "rfpp", teacher, "--out", out, *options, *MADE) == 0
    student = pr.load(out)
    assert student.network.lora == {"rank": 2, "alpha": 4.0, "targets": []}
    card = (out / "README.md").read_text()
    assert "surrogate" in card
    assert "pseudo-Huber, c = 0.01 D" in card
    # Another student goes on from it, its additions merged, and from pairs that are there already.
    again = ["--pairs-from", out / "pairs", "--pair-method", "ddim", "--pair-steps", 2, *SHORT]
    assert run("straighten", "rfpp", teacher, "--out", folder / "again", "--start", out, *again) == 0
    assert getattr(pr.load(folder / "again").network, "lora", None) is None


@pytest.mark.parametrize("share", [0.5, 1])
def test_real_data_are_mixed_in(folder, teacher, share):
    out = folder / f"real-{share}"
    options = [*MADE, "--pair-steps", 1, "--real-share", share]
    assert run("straighten", "rfpp", teacher, "--out", out, *options) == 0
    assert pr.load(out).provenance.rectified == 1


@pytest.mark.parametrize("loss", ["data-huber", "noise-mse", "velocity", "native"])
def test_each_loss_of_rectified_diffusion(folder, teacher, capsys, loss):
    out = folder / f"diffusion-{loss}"
    if (folder / "diffusion-data-huber/pairs").is_dir() and loss != "data-huber":
        made = ["--pairs-from", folder / "diffusion-data-huber/pairs", *FEW[2:], *SHORT]
    else:
        made = MADE
    capsys.readouterr()
    assert run("straighten", "rectified-diffusion", teacher, "--out", out, "--loss", loss, *made) == 0
    captured = capsys.readouterr()
    assert ("warning: the plain squared error of the noise" in captured.err) == (loss == "noise-mse")
    assert "checked: relative error of denoised data" in captured.out
    assert "by evaluations: student" in captured.out
    student = pr.load(out)
    assert (student.path, student.prediction) == (pr.load(teacher).path, pr.load(teacher).prediction)
    assert student.provenance.notes["loss"] == loss


def test_phases_become_the_default_number_of_steps(folder, teacher, tmp_path, capsys):
    out = folder / "phased"
    assert run("straighten", "phased", teacher, "--out", out, "--phases", 3, "--substeps", 2, *SHORT) == 0
    assert pr.load(out).provenance.notes["sampling_steps"] == 3
    capsys.readouterr()
    assert run("sample", out, "--count", 6, "--method", "ddim", "--final", "clean", "--out", tmp_path) == 0
    assert "6 samples, 3 evaluations of the network each" in said(capsys)
    assert "--steps 3" in (out / "README.md").read_text()


def test_killed_pairs_go_on(folder, teacher, monkeypatch, capsys):
    command = [
        "straighten",
        "rfpp",
        teacher,
        "--out",
        folder / "killed",
        "--pairs",
        1100,
        *FEW[2:4],
        "--pair-steps",
        1,
        *SHORT,
    ]
    for kind, store, options in ((ShardStore, "tensors", []), (StateParts, "states", ["--store", "states"])):
        command[4] = folder / f"killed-{store}"
        write = kind.write

        def dies(self, shard, tensors, write=write):
            if shard == 1:
                raise KeyboardInterrupt
            write(self, shard, tensors)

        monkeypatch.setattr(kind, "write", dies)
        assert run(*command, *options) == 130
        monkeypatch.setattr(kind, "write", write)
        pairs = command[4] / "pairs"
        assert open_pairs(pairs).missing() == [1]
        first = next(p for p in pairs.rglob("00000.*"))
        stamp, before = first.stat().st_mtime_ns, first.read_bytes()
        # Other pairs than those that were begun are refused.
        refused(capsys, "already holds a store made with another", *command, *options, "--seed", 5)
        assert (first.stat().st_mtime_ns, first.read_bytes()) == (stamp, before)
        assert run(*command, *options) == 0
        assert not open_pairs(pairs).missing()
        if store == "tensors":
            assert first.stat().st_mtime_ns == stamp


def test_an_interrupted_student_goes_on(folder, teacher):
    out = folder / "resumed"
    command = ["straighten", "rectified-diffusion", teacher, "--out", out, *MADE, "--checkpoint-every", 2]
    assert run(*command) == 0
    assert run(*command, "--resume", "--iterations", 5) == 0
    assert (out / "checkpoints/00000005").is_dir()


# Few-step samples, inversion, edits


def test_sampling_that_keeps_its_noise(plus_plus, tmp_path, capsys):
    options = ["--steps", 3, "--count", 8, "--label", 7]
    assert (
        run("sample", plus_plus, *options, "--method", "reinterpolate", "--final", "clean", "--out", tmp_path / "a")
        == 0
    )
    assert "8 samples, 3 evaluations of the network each" in said(capsys)
    assert run("sample", plus_plus, *options, "--method", "ddim", "--final", "clean", "--out", tmp_path / "b") == 0
    kept, moved = (load_file(tmp_path / name / "samples.safetensors") for name in ("a", "b"))
    assert torch.equal(kept["x0"], moved["x0"])
    assert not torch.allclose(kept["x"], moved["x"], atol=1e-3)
    # Re-interpolation from Python is what the command does.
    flow = pr.load(plus_plus)
    found = flow.sample(x0=kept["x0"], condition=kept["label"], steps=3, method="reinterpolate", final="clean")
    assert torch.allclose(found, kept["x"], atol=1e-5)


def test_quick_inversion(plus_plus, tmp_path, capsys):
    assert run("invert", plus_plus, "--evaluations", 4, 4, "--count", 12, "--out", tmp_path) == 0
    printed = said(capsys)
    assert "reconstruction error with 4 + 4 evaluations" in printed
    assert "reconstruction error with 8 + 8 evaluations" in printed
    assert "teacher with Euler's method" in printed
    found = load_file(tmp_path / "inverted.safetensors")
    assert found["x0"].shape == found["x"].shape == found["reconstruction"].shape == (12, 1, 8, 8)
    assert found["label"].shape == (12,)
    assert all((tmp_path / f"{name}.png").is_file() for name in ("x", "x0", "reconstruction"))


def test_interpolation(plus_plus, tmp_path, capsys):
    command = ["edit", "interpolate", plus_plus, "--pairs", 2, "--count", 5, "--evaluations", 2, 2, "--out"]
    assert run(*command, tmp_path / "a") == 0
    assert "reconstruction error with 2 + 2 evaluations" in said(capsys)
    rows = load_file(tmp_path / "a/edited.safetensors")["x"]
    assert rows.shape == (2, 5, 1, 8, 8)
    assert (tmp_path / "a/edited.png").is_file()
    # Given pictures, of which there must be two.
    for i in range(2):
        Image.fromarray(np.full((8, 8), 80 * i + 60, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    given = ["--input", tmp_path, "--method", "heun-euler", "--evaluations", 3, 3]
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        shutil.move(tmp_path / f"{i}.png", tmp_path / "pictures" / f"{i}.png")
    given[1] = tmp_path / "pictures"
    assert run(*command, tmp_path / "b", *given) == 0
    assert load_file(tmp_path / "b/edited.safetensors")["x"].shape == (1, 5, 1, 8, 8)


def test_translation(plus_plus, tmp_path, capsys):
    command = ["edit", "translate", plus_plus, "--target", 3, "--count", 4, "--out"]
    assert run(*command, tmp_path / "a", "--source", 8) == 0
    found = load_file(tmp_path / "a/edited.safetensors")
    assert found["x"].shape == found["before"].shape == (4, 1, 8, 8)
    capsys.readouterr()
    # Into their own label they come back better than into another one.
    assert run(*command, tmp_path / "b", "--source", 3, "--evaluations", 16, 16, "--no-keep-noise") == 0
    same = load_file(tmp_path / "b/edited.safetensors")
    assert float((same["x"] - same["before"]).square().mean()) < 0.2
    assert "reconstruction error with 16 + 16 evaluations" in said(capsys)


# Comparison


def test_a_small_comparison(plain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pantarhei.recipes.comparison.TRIAL", 0.05)
    command = ["straighten", "compare", plain, "--out", tmp_path, "--budget", 0.01, "--count", 50, "--no-check"]
    command += ["--evaluations", 1, 2, "--methods", "rectified flow (reflow)", "--threads", 1, "--max-pairs", 100]
    assert run(*command, "--pair-steps", 2, "--batch", 32) == 0
    assert "best with 1 evaluations" in said(capsys)
    assert all((tmp_path / f"comparison.{suffix}").is_file() for suffix in ("html", "json", "md"))
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert {row["arm"] for row in found["rows"]} >= {"rectified flow (reflow)", "DDIM, own grid", "tuned grid"}
    refused(capsys, "is none of", *command, "--methods", "nothing")
    refused(capsys, "with another", *command, "--count", 60)
    refused(capsys, "budget: must be positive", *command, "--budget", 0)


# Mistakes


def test_mistakes_are_one_line(teacher, plain, plus_plus, tmp_path, capsys):
    new = ["--out", tmp_path / "new"]
    rfpp = ["straighten", "rfpp", teacher, *new, *MADE]
    refused(capsys, "there is no folder or file", "straighten", "rfpp", tmp_path / "nobody", *new, *MADE)
    refused(capsys, "nowhere", *rfpp, "--data", tmp_path / "nowhere")
    refused(capsys, "--real-share: must lie in 0 to 1, got 2", *rfpp, "--real-share", 2)
    refused(capsys, "needs two weight files", *rfpp, "--perceptual", "lpips")
    lost = ["--vgg", tmp_path / "v.pth", "--lpips", tmp_path / "l.pth"]
    refused(capsys, "v.pth", *rfpp, "--perceptual", "lpips", *lost)
    refused(capsys, "--ushape", *rfpp, "--ushape", -1)
    refused(capsys, "--pairs: must be at least 1, got 0", *rfpp, "--pairs", 0)
    refused(capsys, "--pair-rtol", *rfpp, "--pair-rtol", "1e-3")
    capsys.readouterr()
    assert run(*rfpp, "--iterations", 0) == 2  # of options that belong together several lines are said
    assert "--iterations: must be at least 1, got 0" in capsys.readouterr().err
    refused(
        capsys, "compares images", "straighten", "rfpp", plain, *new, "--perceptual", "gradients", "--no-check", *MADE
    )
    states = ["straighten", "rfpp", plain, *new, "--store", "states", "--no-check", *MADE]
    refused(capsys, "states go with images", *states)
    diffusion = ["straighten", "rectified-diffusion", teacher, *new, *MADE]
    refused(capsys, "only a numbered path has one", *diffusion, "--schedule", "linear")
    refused(capsys, "no linear layer or convolution is named like attn", *diffusion, "--rank", 2, "--targets", "attn")
    refused(capsys, "reads no prompts", "sample", plus_plus, *new, "--prompt", "a cat")
    refused(capsys, "phases: must be at least 1", "straighten", "phased", teacher, *new, "--phases", 0, *SHORT)
    assert not list((tmp_path).glob("new/checkpoints/*"))


@pytest.mark.parametrize("rank", [-1, 100_000])
def test_a_rank_that_no_layer_has(teacher, tmp_path, capsys, rank):
    # A rank above a layer's size is that layer's full rank, with more numbers than the weights have; below 1 there is none.
    command = ["straighten", "rectified-diffusion", teacher, "--out", tmp_path, *MADE, "--rank", rank]
    if rank < 0:
        refused(capsys, "rank: must be at least 1", *command)
    else:
        assert run(*command) == 0
        assert pr.load(tmp_path).network.lora["rank"] == rank


def test_edits_that_cannot_be(teacher, plain, plus_plus, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    refused(capsys, "trained without labels", "edit", "translate", plain, "--target", 3, *out)
    refused(capsys, "--target: must lie in 0 to 9, got 10", "edit", "translate", plus_plus, "--target", 10, *out)
    refused(capsys, "--source: must lie in 0 to 9", "edit", "translate", plus_plus, "--target", 1, "--source", -1, *out)
    refused(capsys, "--evaluations: must be at least 1", "invert", plus_plus, "--evaluations", 0, 4, *out)
    refused(capsys, "without --steps", "invert", plus_plus, "--evaluations", 4, 4, "--steps", 3, *out)
    heun = ["--method", "heun-euler", "--evaluations", 4, 4]
    refused(capsys, "takes an odd number, got 4", "edit", "interpolate", plus_plus, *heun, *out)
    refused(capsys, "--pairs: must be at least 1", "edit", "interpolate", plus_plus, "--pairs", 0, *out)
    save_file({"x": torch.zeros(1, 1, 8, 8)}, tmp_path / "one.safetensors")
    one = ["--input", tmp_path / "one.safetensors"]
    refused(capsys, "at least two items", "edit", "interpolate", plus_plus, *one, *out)


def test_a_teacher_that_is_not_what_it_says_is_refused(teacher, tmp_path, capsys):
    flow = pr.load(teacher)
    flow.like(flow.network, predicts=type(flow.prediction)(sigma_data=3.0)).save_pretrained(tmp_path / "wrong")
    made = ["--out", tmp_path / "new", *MADE]
    refused(
        capsys, "does not denoise as described", "straighten", "rfpp", tmp_path / "wrong", *made, "--data", "digits"
    )
    assert not (tmp_path / "new").exists()
    assert run("straighten", "rfpp", tmp_path / "wrong", *made, "--data", "digits", "--no-check") == 0


# Pipelines of diffusers, from the teacher to a folder that diffusers reads


@pytest.fixture(scope="module", params=["sd", "xl"])
def pipeline(request, folder):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from interop.tiny_pipelines import stable_diffusion, stable_diffusion_xl

    make = stable_diffusion if request.param == "sd" else stable_diffusion_xl
    return make(folder / f"pipeline-{request.param}")


SMALL = ["--batch", "4", "--threads", "1", "--no-tensorboard", "--preview-every", "0", "--iterations", "2"]


def test_a_pipeline_is_rectified_and_goes_back(pipeline, tmp_path, capsys):
    import diffusers

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\nthe dog\nred\n")
    sd = not pipeline.name.endswith("xl")
    command = ["straighten", "rectified-diffusion", pipeline, "--prompts", prompts, "--out", tmp_path / "run"]
    command += [
        "--pairs",
        8,
        "--pair-method",
        "dpm-solver",
        "--pair-steps",
        2,
        "--guidance",
        3,
        "--any-teacher",
        *SMALL,
    ]
    command += ["--schedule", "linear", "--rank", 2] if sd else ["--anchor", "state"]
    capsys.readouterr()
    assert run(*command) == 0
    printed = said(capsys)
    assert "the teacher's own sampler and ours differ by" in printed
    assert ("licence of the teacher's weights: creativeml-openrail-m" in printed) == sd
    student = pr.load(tmp_path / "run")
    assert student.provenance.notes["guidance_in_pairs"] == 3
    assert student.path.schedule == ("linear" if sd else "scaled-linear")
    assert (student.network.config.adapter is not None) == sd
    assert set(open_pairs(tmp_path / "run/pairs").tensors()) == {"x0", "x1", "tokens"}
    # Written for diffusers, with all its parts or beside them.
    convert = ["convert", tmp_path / "run", "--to", "diffusers"]
    assert run(*convert, "--out", tmp_path / "whole", "--complete", "--guidance", 1.5, "--steps", 2) == 0
    assert run(*convert, "--out", tmp_path / "unet") == 0
    assert not (tmp_path / "unet/vae").exists()
    card = (tmp_path / "whole/README.md").read_text()
    assert "| steps | 2 |" in card
    assert "| guidance at inference | 1.5 |" in card
    assert "| guidance in the pairs | 3.0 |" in card
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "whole")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.beta_schedule == ("linear" if sd else "scaled_linear")
    pictures = pipe(["a cat"], num_inference_steps=2, guidance_scale=1.5, output_type="np", height=16, width=16).images
    assert pictures.shape == (1, 16, 16, 3)
    assert np.isfinite(pictures).all()
    # Sampled here: a picture a prompt, the same from the run and from the folders.
    options = ["--prompt", "a cat", "the dog", "--steps", 2, "--guidance", 1.5]
    capsys.readouterr()
    for name in ("run", "whole", "unet"):
        assert run("sample", tmp_path / name, *options, "--out", tmp_path / f"s-{name}") == 0
    assert "2 samples, 4 evaluations of the network each" in said(capsys)  # two each under guidance
    found = [load_file(tmp_path / f"s-{name}/samples.safetensors")["x"] for name in ("run", "whole", "unet")]
    assert found[0].shape == (2, 3, 16, 16)
    assert torch.allclose(found[1], found[2], atol=1e-5)
    assert torch.allclose(found[0], found[1], atol=2e-2)  # the whole numbers of its time are float32's
    assert (tmp_path / "s-run/samples.png").is_file()
    with safe_open(tmp_path / "s-run/samples.safetensors", "pt") as file:
        assert json.loads(file.metadata()["prompts"]) == ["a cat", "the dog"]
    # Prompts of a file, in turn; sample 0 is the same whatever the count.
    assert (
        run("sample", tmp_path / "run", "--prompts", prompts, "--count", 5, *options[3:], "--out", tmp_path / "f") == 0
    )
    again = load_file(tmp_path / "f/samples.safetensors")
    assert torch.equal(again["tokens"][0], again["tokens"][3])
    assert torch.allclose(again["x"][0], found[0][0], atol=1e-4)
    refused(capsys, "this flow reads prompts", "sample", tmp_path / "run", "--out", tmp_path / "z")
    both = [*options, "--prompts", prompts]
    refused(capsys, "give one of the two", "sample", tmp_path / "run", *both, "--out", tmp_path / "z")


def test_a_pipeline_learns_phases_from_captioned_pictures(pipeline, tmp_path, capsys):
    generator = np.random.default_rng(0)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(6):
        Image.fromarray(generator.integers(0, 255, (20, 18, 3), dtype=np.uint8)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"a {i}\n")
    command = ["straighten", "phased", pipeline, "--prompts", pictures, "--out", tmp_path / "run", "--no-check"]
    assert run(*command, "--phases", 2, "--substeps", 2, "--guidance", 2, *SMALL) == 0
    student = pr.load(tmp_path / "run")
    assert student.provenance.notes["sampling_steps"] == 2
    assert student.codec is not None
    assert run("convert", tmp_path / "run", "--to", "diffusers", "--out", tmp_path / "out", "--complete") == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "| steps | 2 |" in card
    assert "| phases | " in card
    capsys.readouterr()
    sample = ["sample", tmp_path / "out", "--prompt", "a", "--count", 3, "--final", "clean"]
    assert run(*sample, "--out", tmp_path / "s") == 0
    assert "3 samples, 2 evaluations of the network each" in said(capsys)
    assert load_file(tmp_path / "s/samples.safetensors")["x"].shape == (3, 3, 16, 16)
    # Without pictures there is nothing to train phases on.
    (tmp_path / "prompts.txt").write_text("a\n")
    prompts = ["--prompts", tmp_path / "prompts.txt", "--no-check", "--out", tmp_path / "new", *SMALL]
    refused(capsys, "--data: phases are trained on real data", "straighten", "phased", pipeline, *prompts)
    refused(
        capsys, "--prompts: this teacher reads prompts", "straighten", "phased", pipeline, *SMALL, "--out", tmp_path
    )


def test_published_students_and_what_convert_refuses(folder, teacher, tmp_path, capsys):
    pytest.importorskip("diffusers")
    from interop.tiny_pipelines import ddpm, stable_diffusion

    base = stable_diffusion(tmp_path / "sd")
    weights = pr.load(base).network.model.state_dict()
    torch.save(weights, tmp_path / "phased.ckpt")
    convert = ["convert", tmp_path / "phased.ckpt", "--out", tmp_path / "own"]
    refused(capsys, "bare weights need base", *convert)
    assert run(*convert, "--base", base) == 0
    flow = pr.load(tmp_path / "own")
    assert (flow.provenance.rectified, flow.path.schedule) == (1, "scaled-linear")
    capsys.readouterr()
    assert run("info", tmp_path / "own") == 0
    assert "rectified 1x" in said(capsys)
    assert run("sample", tmp_path / "own", "--prompt", "a", "--out", tmp_path / "s") == 0
    assert "1 samples, 8 evaluations" in said(capsys)  # four phases, and two rows each under the guidance in its notes
    assert run("info", base) == 0
    assert "numbered, noise" in said(capsys)
    refused(capsys, "only a model of diffusers has", "convert", teacher, "--base", base, "--out", tmp_path / "a")
    refused(capsys, "--schedule", "convert", teacher, "--schedule", "linear", "--out", tmp_path / "a")
    assert run("convert", base, "--schedule", "linear", "--out", tmp_path / "a") == 0
    assert pr.load(tmp_path / "a").path.schedule == "linear"
    refused(capsys, "only a model of diffusers", "convert", teacher, "--to", "diffusers", "--out", tmp_path / "b")
    refused(capsys, "go with --to diffusers", "convert", teacher, "--complete", "--out", tmp_path / "c")
    refused(capsys, "is a run", "convert", base, "--to", "diffusers", "--out", teacher)
    # A model without prompts is checked, straightened and written alike.
    pipe = ddpm(tmp_path / "ddpm")
    made = [*FEW, "--any-teacher", "--data", "digits", "--no-check", *SHORT]
    assert run("straighten", "rfpp", pipe, "--out", tmp_path / "run", *made) == 0
    assert run("convert", tmp_path / "run", "--to", "diffusers", "--out", tmp_path / "out", "--steps", 1) == 0
    assert run("sample", tmp_path / "out", "--count", 3, "--steps", 2, "--out", tmp_path / "t") == 0
