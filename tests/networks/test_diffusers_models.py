"""Networks around models of diffusers: clock, sign, conditions, text encoders, adapters."""

import copy
import sys

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from interop.tiny_pipelines import LENGTH, UNET, ddpm, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from pantarhei import networks
from pantarhei.flow.paths import Numbered
from pantarhei.flow.pretrained import fingerprint
from pantarhei.interop.diffusers import read
from pantarhei.networks import DiffusersConfig, DiffusersNetwork
from pantarhei.networks.diffusers_adapters import add_peft, merge_peft, write_peft

GREY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    makers = {"sd": stable_diffusion, "xl": stable_diffusion_xl, "sd3": stable_diffusion_3}
    made = {name: make(root / name) for name, make in makers.items()}
    return {**made, "sd3-t5": stable_diffusion_3(root / "sd3-t5", with_t5=True)}


def test_the_number_is_whole_at_the_schedules_times():
    network = DiffusersNetwork(DiffusersConfig("UNet2DModel", GREY))
    numbers = torch.arange(1000)
    assert torch.equal(network.clock(Numbered().time_of(numbers).float()), numbers.float())
    between = torch.tensor([0.25 / 999, 0.3337])
    assert torch.allclose(network.clock(between), 999 * (1 - between))
    x = draw(2, 1, 8, 8)
    assert torch.equal(network(x, torch.tensor(1 - 700 / 999)), network.model(x, 700).sample)


def test_a_flow_matching_model_predicts_minus_our_velocity_at_1000_times_the_noise_level():
    network = DiffusersNetwork(DiffusersConfig("UNet2DModel", GREY, clock="flow"))
    x, t = draw(2, 1, 8, 8), torch.tensor([0.25, 0.9])
    assert torch.equal(network(x, t), -network.model(x, 1000 * (1 - t)).sample)


def test_a_learned_variance_is_left_out():
    network = DiffusersNetwork(DiffusersConfig("UNet2DModel", {**GREY, "out_channels": 2}))
    x = draw(2, 1, 8, 8)
    assert torch.equal(network(x, torch.tensor(0.0)), network.model(x, 999).sample[:, :1])


def test_networks_are_rebuilt_from_their_spec():
    network = DiffusersNetwork(DiffusersConfig("UNet2DConditionModel", UNET))
    again = networks.build(networks.spec_of(network))
    assert again.state_dict().keys() == network.state_dict().keys()
    assert all(name.startswith("model.") for name in network.state_dict())
    again.load_state_dict(network.state_dict())
    assert fingerprint(again) == fingerprint(network)


def test_the_label_after_the_last_class_adds_no_embedding(tmp_path):
    flow = read(ddpm(tmp_path / "a", classes=3))
    assert flow.null == {"label": 3}
    x, t = draw(2, 1, 8, 8), torch.tensor(0.5)
    null = flow.network(x, t, label=torch.tensor([3, 3]))
    table = flow.network.model.class_embedding
    assert list(flow.network.state_dict()).count("model.class_embedding.weight") == 1
    with torch.no_grad():
        table.weight[1] = 0
    assert torch.equal(null, flow.network(x, t, label=torch.tensor([1, 1])))
    assert not torch.equal(null, flow.network(x, t, label=torch.tensor([2, 2])))
    assert read(tmp_path / "a", null_label=0).null == {"label": 0}


@pytest.mark.parametrize("name", ["sd", "xl", "sd3", "sd3-t5"])
def test_prompts_are_embedded_as_their_pipeline_does(folders, name):
    import diffusers

    flow, prompts = read(folders[name]), ["a cat", "dog"]
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders[name], **without_t5)
    tokens = flow.network.tokenize(prompts)
    assert tokens.shape == (2, {"sd": LENGTH, "sd3-t5": 2 * LENGTH + 256}.get(name, 2 * LENGTH))
    found = flow.network._encoders().encode(torch.cat([tokens, flow.null["tokens"].expand_as(tokens)]), torch.float32)
    three = {"prompt_2": None, "prompt_3": None} if name.startswith("sd3") else {}
    plain = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    text, null, *pooled = pipeline.encode_prompt(prompts, **three, **plain)
    assert torch.allclose(
        found.text, torch.cat([text, null]), atol=5e-5
    )  # T5's attention rounds with and without gradients
    if pooled:
        assert torch.allclose(found.pooled, torch.cat(pooled), atol=1e-6)
    if name == "xl":
        assert not found.text[2:].any()  # force_zeros_for_empty_prompt


def test_text_encoders_belong_to_no_state_and_encode_a_batch_once(folders):
    network = read(folders["sd"]).network
    tokens = network.tokenize(["a", "b", "a"])
    embedded = network._encoders().encode(tokens, torch.float32).text
    assert torch.equal(embedded[0], embedded[2])
    calls = []
    network._text._encoders[0].register_forward_hook(lambda *_: calls.append(1))
    x = draw(3, 4, 8, 8)
    for t in (0.1, 0.5):
        by_tokens = network(x, torch.tensor(t), tokens=tokens)
        assert torch.equal(by_tokens, network(x, torch.tensor(t), text=embedded))
    assert not calls
    assert all(name.startswith("model.") for name in network.state_dict())
    assert copy.deepcopy(network)._text is network._text
    with pytest.raises(ValueError, match=f"shape \\(B, {LENGTH}\\)"):
        network(x, torch.tensor(0.5), tokens=tokens[:, :4])
    with pytest.raises(TypeError, match="list of texts"):
        network.tokenize("a cat")


def test_steps_with_the_same_tensor_do_not_look_at_its_numbers(folders, monkeypatch):
    network = read(folders["sd"]).network
    tokens, x = network.tokenize(["a", "b"]), draw(2, 4, 8, 8)
    first, looks, plain = network(x, torch.tensor(0.1), tokens=tokens), [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *args: (looks.append(1), plain(self, *args))[1])
    assert torch.equal(network(x, torch.tensor(0.1), tokens=tokens), first)
    assert not looks
    tokens[0] = tokens[1]  # changed where it stands, it is another prompt
    changed = network(x, torch.tensor(0.1), tokens=tokens)
    assert looks
    assert not torch.equal(changed, first)
    with torch.inference_mode():
        assert torch.equal(network(x, torch.tensor(0.1), tokens=tokens.clone()), changed)


def test_text_encoders_are_as_wide_as_what_is_asked(folders):
    wide = read(folders["sd"]).network
    tokens = wide.tokenize(["a", "cd"])
    expected = wide._encoders().encode(tokens, torch.float32).text
    both = read(folders["sd"]).network._encoders()
    half = both.encode(tokens, torch.bfloat16).text
    assert half.dtype == torch.bfloat16
    assert torch.equal(both.encode(tokens, torch.float32).text, expected)
    assert not torch.equal(half.float(), expected)
    assert next(both._encoders[0].parameters()).dtype == torch.float32  # and stays so: no loading back and forth
    both.encode(tokens[:1], torch.bfloat16)
    assert next(both._encoders[0].parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", ["sd", "xl", "sd3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_is_asked_in_float32(folders, name, dtype):
    half, wide = read(folders[name], dtype=dtype).network, read(folders[name]).network
    tokens, x, t = half.tokenize(["a", "b"]), draw(2, 4, 8, 8), torch.tensor(0.3)
    output = half(x, t, tokens=tokens)
    assert output.dtype == torch.float32
    assert torch.equal(output, half(x.to(dtype), t, tokens=tokens).float())
    assert torch.allclose(output, wide(x, t, tokens=tokens), atol=0.1)


def test_the_own_scheduler_follows_a_path():
    path = Numbered("linear", 0.001, 0.01, 50)
    network = DiffusersNetwork(DiffusersConfig("UNet2DModel", GREY, scheduler={"trained_betas": [0.1, 0.2]}))
    network.follow(path.spec())
    assert torch.allclose(network._scheduler(5).alphas_cumprod.double(), path.alphas_cumprod(), rtol=1e-5)
    listed = Numbered(betas=(0.1, 0.3, 0.2))
    assert torch.allclose(
        network.follow(listed.spec())._scheduler(3).alphas_cumprod.double(), listed.alphas_cumprod(), rtol=1e-5
    )
    with pytest.raises(ValueError, match="flow-matching"):
        DiffusersNetwork(DiffusersConfig("UNet2DModel", GREY, clock="flow")).follow(path.spec())


def test_embeddings_may_be_given_directly():
    network = DiffusersNetwork(DiffusersConfig("UNet2DConditionModel", UNET))
    assert network.condition_names == ("text",)
    x, t = draw(1, 4, 8, 8), torch.tensor(0.3)
    assert network(x, t, text=draw(1, 5, 12)).shape == x.shape
    with pytest.raises(ValueError, match="tokens or text"):
        network(x, t)
    with pytest.raises(ValueError, match="no text encoders"):
        network.tokenize(["a"])


def test_adapters_start_as_nothing_train_alone_and_merge(folders, tmp_path):
    network = read(folders["sd"]).network
    before = fingerprint(network)
    adapted = add_peft(network, rank=2, alpha=4)
    assert fingerprint(network) == before
    x, t, tokens = draw(2, 4, 8, 8), torch.tensor([0.2, 0.7]), network.tokenize(["a", "b"])
    assert torch.equal(adapted(x, t, tokens=tokens), network(x, t, tokens=tokens))
    trained = {n for n, p in adapted.requires_grad_(True).named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * draw(*parameter.shape))
    expected = adapted(x, t, tokens=tokens)
    assert not torch.allclose(expected, network(x, t, tokens=tokens), atol=1e-3)
    again = networks.build(networks.spec_of(adapted))
    again.load_state_dict(adapted.state_dict())
    assert torch.equal(again(x, t, tokens=tokens), expected)
    merged = merge_peft(adapted)
    assert merged.state_dict().keys() == network.state_dict().keys()
    assert torch.allclose(merged(x, t, tokens=tokens), expected, atol=1e-5)
    # The file is what diffusers calls a LoRA.
    import diffusers

    write_peft(adapted, tmp_path)
    text = network._encoders().encode(tokens, torch.float32).text
    bare = diffusers.UNet2DConditionModel.from_pretrained(folders["sd"], subfolder="unet")
    bare.load_lora_adapter(tmp_path, prefix="unet", use_safetensors=True)
    assert torch.allclose(bare(x, network.clock(t), text).sample, expected, atol=1e-5)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folders["sd"], safety_checker=None)
    pipeline.load_lora_weights(tmp_path)
    assert torch.allclose(pipeline.unet(x, network.clock(t), text).sample, expected, atol=1e-5)
    with pytest.raises(ValueError, match="no layers named nothing"):
        add_peft(network, targets=["nothing"])
    with pytest.raises(ValueError, match="already"):
        add_peft(adapted)
    with pytest.raises(ValueError, match="no adapters"):
        write_peft(network, tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model": "UNet3D"}, "unknown model 'UNet3D'"),
        ({"model": "UNet2DModel", "clock": "sundial"}, "unknown clock 'sundial'"),
        ({"model": "UNet2DConditionModel", "settings": {**UNET, "in_channels": 9}}, "9 channels in and 4 out"),
        ({"model": "UNet2DConditionModel", "settings": {**UNET, "time_cond_proj_dim": 8}}, "time_cond_proj_dim 8"),
        ({"model": "UNet2DModel", "settings": {**GREY, "class_embed_type": "timestep"}}, "class_embed_type 'timestep'"),
    ],
)
def test_what_is_not_known_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        DiffusersNetwork(DiffusersConfig(**config))


def test_without_diffusers_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'pantarhei\[diffusers\]'"):
        DiffusersNetwork(DiffusersConfig("UNet2DModel", GREY))
