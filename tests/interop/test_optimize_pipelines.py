"""Optimising the embedding of a prompt of a pipeline, and its noise."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import pantarhei as pr
from pantarhei.cli.main import main

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from interop.tiny_pipelines import stable_diffusion, stable_diffusion_3, stable_diffusion_xl

SHORT = ["--iterations", 2, "--steps", 2, "--count", 2, "--guidance", 2]


def run(*arguments):
    return main([str(a) for a in arguments])


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl, stable_diffusion_3])
def test_the_embedding_of_a_prompt(make, tmp_path):
    folder = make(tmp_path / "pipeline")
    (tmp_path / "measure.py").write_text("def dark(x):\n    return (x.flatten(1).mean(dim=1) + 1) ** 2\n")
    metric = ["--metric", f"{tmp_path / 'measure.py'}:dark"]
    assert run("optimize", "condition", folder, *metric, *SHORT, "--prompt", "a cat", "--out", tmp_path / "c") == 0
    found = load_file(tmp_path / "c/optimized.safetensors")["text"]
    flow = pr.load(folder)
    start = flow.network.embed(flow.network.tokenize(["a cat"]))["text"][0]
    changed = (found - start).abs().sum(dim=1) > 1e-6
    assert bool(changed[-1])
    assert not bool(changed[0])
    tokens = flow.network.tokenize(["a cat"])
    given = flow.network.embed(tokens.expand(2, -1))
    x0 = torch.randn(2, *flow.shape, generator=torch.Generator().manual_seed(0))
    by_text = flow.sample(x0=x0, condition=given, steps=2)
    assert torch.allclose(by_text, flow.sample(x0=x0, condition={"tokens": tokens.expand(2, -1)}, steps=2), atol=1e-5)


def test_noise_and_weights_of_a_pipeline(tmp_path):
    folder = stable_diffusion(tmp_path / "pipeline")
    (tmp_path / "measure.py").write_text("def dark(x):\n    return (x.flatten(1).mean(dim=1) + 1) ** 2\n")
    metric = ["--metric", f"{tmp_path / 'measure.py'}:dark", "--prompt", "a cat"]
    assert run("optimize", "noise", folder, *metric, *SHORT, "--out", tmp_path / "n") == 0
    assert load_file(tmp_path / "n/optimized.safetensors")["after"].shape[0] == 2
    assert run("optimize", "weights", folder, *metric, *SHORT, "--only", "conv_out", "--out", tmp_path / "w") == 0
    assert pr.load(tmp_path / "w/flow").shape is not None


def test_measurements_and_examples_are_of_decoded_images(tmp_path):
    folder = stable_diffusion(tmp_path / "pipeline")
    flow = pr.load(folder)
    images = flow.decode(torch.randn(3, *flow.shape, generator=torch.Generator().manual_seed(1)))
    save_file({"x": images.detach().contiguous()}, tmp_path / "images.safetensors")
    given = ["--input", tmp_path / "images.safetensors", "--prompt", "a cat", "--operator", "box:8"]
    for way in ("guidance", "noise"):
        short = SHORT if way == "noise" else SHORT[2:]
        assert run("optimize", "posterior", folder, *given, *short, "--way", way, "--out", tmp_path / way) == 0
        found = load_file(tmp_path / way / "posterior.safetensors")
        assert found["x"].shape == found["measured"].shape == (2, *images.shape[1:])
    example = ["--example", tmp_path / "images.safetensors", "--prompt", "a cat"]
    assert run("optimize", "noise", folder, *example, *SHORT, "--lr", 0.3, "--out", tmp_path / "e") == 0
    found = load_file(tmp_path / "e/optimized.safetensors")
    off = [(found[name] - images[:2]).square().mean() for name in ("after", "before")]
    assert float(off[0]) < float(off[1])
