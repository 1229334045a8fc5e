"""`pantarhei optimize`: what each kind writes, and mistakes in one line."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pantarhei as pr
from pantarhei.cli.main import main
from pantarhei.cli.posterior import _operator
from pantarhei.data import kolmogorov_flow, velocity_of
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import differentiable_sample
from pantarhei.recipes.sample_metrics import classified_as, clip_similarity, function_of, like_example

QUIET = ["--batch", "16", "--threads", "1", "--no-tensorboard", "--preview-every", "0"]
SHORT = ["--iterations", 3, "--steps", 3, "--count", 6]


def run(*arguments):
    return main([str(a) for a in arguments])


def refused(capsys, said, *arguments):
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, lines
    assert said in lines[0], lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimize")
    (folder / "measures.py").write_text(
        "import torch\n"
        "def dark(x):\n    return (x.flatten(1).mean(dim=1) + 1) ** 2\n"
        "def corner(x):\n    return x[..., :3, :3]\n"
        "value = 3\n"
    )
    return folder


@pytest.fixture(scope="module")
def classes(folder):
    sizes = ["--width", "8", "--blocks", "1", "--average", "0.9", "--lr", "2e-3"]
    assert run("train", "rectified-flow", "--out", folder / "classes", "--iterations", 20, *sizes, *QUIET) == 0
    return folder / "classes"


@pytest.fixture(scope="module")
def plain(folder):
    sizes = ["--width", "8", "--blocks", "1", "--no-conditional"]
    assert run("train", "rectified-flow", "--out", folder / "plain", "--iterations", 2, *sizes, *QUIET) == 0
    return folder / "plain"


def written(out):
    assert all((out / name).is_file() for name in ("samples.png", "measure.png", "measure.json"))
    return load_file(out / "optimized.safetensors")


def test_noise(classes, folder, tmp_path, capsys):
    metric = ["--metric", f"{folder / 'measures.py'}:dark"]
    assert run("optimize", "noise", classes, *metric, *SHORT, "--lr", 0.1, "--out", tmp_path / "a") == 0
    assert "measure" in capsys.readouterr().out
    found = written(tmp_path / "a")
    dark = function_of(f"{folder / 'measures.py'}:dark")
    assert float(dark(found["after"]).mean()) < float(dark(found["before"]).mean())
    flow = pr.load(classes).eval()
    again = flow.sample(x0=found["x0"], condition=torch.arange(6) % 10, steps=3)
    assert again.shape == found["after"].shape
    bounded = ["--keep", "free", "--bound", 0.05, "--label", 3, "--through", "symplectic", "--method", "heun"]
    assert run("optimize", "noise", classes, *metric, *SHORT, *bounded, "--out", tmp_path / "b") == 0
    x = differentiable_sample(
        flow, written(tmp_path / "b")["x0"], condition=torch.full((6,), 3), steps=3, method="heun"
    )
    assert torch.allclose(x, load_file(tmp_path / "b/optimized.safetensors")["after"], atol=1e-5)


def test_condition_weights_and_audit(classes, folder, tmp_path, capsys):
    wanted = ["--metric", f"classifier:{classes}", "--target", 7]
    assert run("optimize", "condition", classes, *wanted, *SHORT, "--guidance", 1.5, "--out", tmp_path / "c") == 0
    found = written(tmp_path / "c")
    assert found["label"].ndim == 1
    flow = pr.load(classes).eval()
    assert flow.sample(2, condition={"label": found["label"].expand(2, -1)}, steps=2).shape == (2, 1, 8, 8)
    example = ["--example", tmp_path / "c/optimized.safetensors"]
    refused(capsys, "expected x or x1", "optimize", "condition", classes, *example, *SHORT, "--out", tmp_path / "d")
    metric = ["--metric", f"{folder / 'measures.py'}:dark", "--rank", 2]
    assert run("optimize", "weights", classes, *metric, *SHORT, "--out", tmp_path / "w") == 0
    tuned = pr.load(tmp_path / "w/flow")
    assert tuned.network.lora["rank"] == 2
    assert run("sample", tmp_path / "w/flow", "--count", 2, "--steps", 2, "--out", tmp_path / "s") == 0
    audit = ["--classifier", classes, "--iterations", 2, "--steps", 3, "--count", 64, "--out", tmp_path / "x"]
    # Drawn labels are of every class, so that some are right whatever the samples are.
    assert run("optimize", "audit", classes, *audit) == 0
    figures = json.loads((tmp_path / "x/audit.json").read_text())
    assert 0 <= figures["control"] <= 1
    assert figures["fooled"] <= figures["correct"]
    assert set(load_file(tmp_path / "x/optimized.safetensors")["label"].tolist()) == set(range(10))


@pytest.mark.parametrize("operator", ["mask:0.4", "box:4", "blur:1", "sensors:9", "corner"])
@pytest.mark.parametrize("way", ["guidance", "noise"])
def test_posterior(plain, folder, tmp_path, operator, way):
    operator = f"{folder / 'measures.py'}:corner" if operator == "corner" else operator
    searched = ["--iterations", 8, "--lr", 0.3] if way == "noise" else []
    options = ["--operator", operator, "--way", way, *searched, "--steps", 5, "--count", 3]
    assert run("optimize", "posterior", plain, *options, "--out", tmp_path) == 0
    found = load_file(tmp_path / "posterior.safetensors")
    assert found["x"].shape == found["truth"].shape == (3, 1, 8, 8)
    assert (tmp_path / "posterior.png").is_file()
    # Samples agree with the measurement better than those that know nothing of it.
    free = pr.load(plain).eval().sample(x0=found["x0"], steps=5)
    measure = _operator(operator, (1, 8, 8), seeded(0, 74))
    misses = [float((measure(x) - found["measured"]).square().mean()) for x in (found["x"], free)]
    assert misses[0] < 0.8 * misses[1]


@pytest.mark.parametrize("way", ["guidance", "noise"])
def test_items_do_not_depend_on_their_batch(plain, tmp_path, way):
    found = []
    for batch in (2, 5):
        searched = ["--iterations", 2] if way == "noise" else []
        options = ["--operator", "mask:0.3", "--way", way, *searched, "--steps", 3, "--count", 5]
        assert run("optimize", "posterior", plain, *options, "--batch", batch, "--out", tmp_path / str(batch)) == 0
        found.append(load_file(tmp_path / str(batch) / "posterior.safetensors"))
    assert torch.allclose(found[0]["x"], found[1]["x"], atol=1e-4)
    images = ["--example", tmp_path / "5/posterior.safetensors", *SHORT]
    for batch in (2, 6):
        assert run("optimize", "noise", plain, *images, "--batch", batch, "--out", tmp_path / f"e{batch}") == 0
    after = [load_file(tmp_path / f"e{batch}/optimized.safetensors")["after"] for batch in (2, 6)]
    assert torch.allclose(*after, atol=1e-3)


def test_a_vector_field_from_sensors(tmp_path):
    velocity = velocity_of(kolmogorov_flow(12, 2, size=8, wave_number=2, burn_in=1.0)).flatten(0, 1)
    np.save(tmp_path / "fields.npy", velocity.numpy())
    sizes = ["--width", "8", "--blocks", "1", "--iterations", 5]
    data = ["--data", tmp_path / "fields.npy"]
    assert run("train", "rectified-flow", *data, "--out", tmp_path / "run", *sizes, *QUIET) == 0
    options = ["--operator", "sensors:9", "--input", tmp_path / "fields.npy", "--steps", 3, "--count", 2]
    assert run("optimize", "posterior", tmp_path / "run", *options, "--out", tmp_path / "field") == 0
    found = load_file(tmp_path / "field/posterior.safetensors")
    assert found["measured"].shape == (2, 2, 9)
    assert torch.equal(found["truth"], velocity[:2])
    assert (tmp_path / "field/posterior.png").is_file()


def test_posterior_of_a_class(classes, tmp_path):
    found = []
    for name, label in (("any", []), ("three", ["--label", 3])):
        options = ["--operator", "box:4", "--steps", 3, "--count", 3, *label, "--out", tmp_path / name]
        assert run("optimize", "posterior", classes, *options) == 0
        found.append(load_file(tmp_path / name / "posterior.safetensors")["x"])
    assert not torch.equal(*found)


def test_mistakes_are_one_line(classes, plain, folder, tmp_path, capsys):
    out = ["--out", tmp_path / "o"]
    noise = ["optimize", "noise", classes, *out, *SHORT]
    file = folder / "measures.py"
    refused(capsys, "--metric, --example: one of the two", *noise)
    refused(capsys, "--target: which label", *noise, "--metric", f"classifier:{classes}")
    refused(capsys, "the classifier knows 0 to 9", *noise, "--metric", f"classifier:{classes}", "--target", 12)
    refused(capsys, "has no function 'light'", *noise, "--metric", f"{file}:light")
    refused(capsys, "has no function 'value'; it has dark, corner", *noise, "--metric", f"{file}:value")
    refused(capsys, "there is no file", *noise, "--metric", f"{tmp_path / 'none.py'}:dark")
    refused(capsys, "a function is given as FILE.py:name", *noise, "--metric", "dark")
    refused(capsys, "--text: what", *noise, "--metric", f"clip:{tmp_path}")
    refused(capsys, "holds no CLIP model", *noise, "--metric", f"clip:{tmp_path}", "--text", "a cat")
    refused(capsys, "metric: one number a sample", *noise, "--metric", f"{file}:corner")
    refused(capsys, "--label: must lie in 0 to 9, got 11", *noise, "--metric", f"{file}:dark", "--label", 11)
    refused(capsys, "bound: must be positive", *noise, "--metric", f"{file}:dark", "--bound", 0)
    refused(capsys, "this flow has no classes", "optimize", "condition", plain, *out, "--metric", f"{file}:dark")
    posterior = ["optimize", "posterior", plain, *out]
    box = [*posterior, "--operator", "box:2"]
    refused(capsys, "go with --way noise", *box, "--iterations", 3)
    refused(capsys, "--variables, --gamma: go with --way noise", *box, "--variables", "rho")
    refused(capsys, "--scale, --spread: go with --way guidance", *box, "--way", "noise", "--scale", 2)
    refused(capsys, "--scale: must be positive", *box, "--scale", -1)
    refused(capsys, "must be at least 1, got 0", *box, "--steps", 0)
    refused(capsys, "--gamma: is for the jumps", *box, "--way", "noise", "--gamma", 0.5)
    refused(
        capsys, "--bound: must be positive", "optimize", "audit", classes, *out, "--classifier", classes, "--bound", -1
    )
    refused(capsys, "--example: there is no", "optimize", "noise", plain, *out, "--example", tmp_path / "none.png")
    refused(
        capsys, "clip: there is no folder", "optimize", "noise", plain, *out, "--metric", "clip:none", "--text", "a"
    )
    refused(capsys, "trained without labels", *posterior, "--operator", "box:2", "--label", 3)
    refused(capsys, "blur needs a number", *posterior, "--operator", "blur:wide")
    refused(capsys, "9 is out of range for box", *posterior, "--operator", "box:9")
    refused(capsys, "noise and spread must be positive", *posterior, "--operator", "box:2", "--noise", 0)
    assert not (tmp_path / "o").exists()


def test_measures():
    example = torch.zeros(2, 1, 4, 4)
    assert like_example(example)(torch.ones(3, 1, 4, 4)).tolist() == [1.0, 1.0, 1.0]
    images, labels = torch.rand(40, 1, 8, 8) * 2 - 1, torch.arange(40) % 4
    classifier = pr.metrics.train_classifier(images, labels, iterations=2)
    x = images[:3].clone().requires_grad_(True)
    classified_as(classifier, 2)(x).sum().backward()
    assert float(x.grad.abs().max()) > 0


def test_clip(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", "a</w>", "a", "c", "t</w>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.CLIPTextConfig(vocab_size=6, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes)
    vision = transformers.CLIPVisionConfig(image_size=32, patch_size=16, **sizes)
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    measure = clip_similarity(tmp_path, "a cat")
    for channels in (1, 3):
        x = (torch.rand(2, channels, 8, 8) * 2 - 1).requires_grad_(True)
        value = measure(x)
        assert value.shape == (2,)
        assert bool(((value >= 0) & (value <= 2)).all())
        value.sum().backward()
        assert float(x.grad.abs().max()) > 0
