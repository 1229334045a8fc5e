"""ADM under the names of guided diffusion: every depth there and back, the order of queries, refusals."""

import pytest
import torch

from pantarhei.networks import ADM, ADMConfig, adm_keys
from pantarhei.networks.adm import GUIDED
from pantarhei.networks.edm_blocks import Block

SMALL = ADMConfig(
    size=16,
    width=32,
    multipliers=(1, 2),
    blocks=1,
    attention=(8,),
    classes=5,
    head=16,
    dropout=0.0,
    groups=32,
    time_scale=1000.0,
)
SIZES = {
    "small": {},
    "second time": {"second_time": True},
    "deeper": {"multipliers": (1, 2, 3), "blocks": 3, "attention": (16, 4), "second_time": True},
    "attention nowhere but in the middle": {"attention": (), "blocks": 2},
    "one resolution": {"multipliers": (2,), "attention": (16,), "blocks": 2},
    "no classes": {"classes": 0, "channels": 1},
    "added embedding": {"adaptive": False},
    "equal widths": {"multipliers": (1, 1, 1), "attention": (16, 8, 4), "blocks": 2},
}


def network_of(config):
    torch.manual_seed(0)
    network = ADM(config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def sized(**changes):
    return ADMConfig(**{**SMALL.__dict__, **changes})


@pytest.mark.parametrize("kind", SIZES)
def test_there_and_back(kind):
    config = sized(**SIZES[kind])
    own = network_of(config).state_dict()
    published = adm_keys.to_published(own, config)
    assert adm_keys.is_published(published)
    assert adm_keys.has_second_time(published) == config.second_time
    assert adm_keys.infer_config(published, "file", size=16, head=16) == config
    back = adm_keys.from_published(published, config, "file")
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], value) for name, value in own.items())
    numbers = sum(v.numel() for n, v in own.items() if not n.endswith("resample_filter"))
    assert sum(value.numel() for value in published.values()) == numbers


def test_the_published_sizes():
    with torch.device("meta"):
        network = ADM(GUIDED)
    published = adm_keys.to_published(network.state_dict(), GUIDED)
    assert adm_keys.infer_config(published, "file") == GUIDED
    assert published["input_blocks.4.0.in_layers.2.weight"].shape == (192, 192, 3, 3)
    assert published["output_blocks.15.0.out_layers.3.weight"].shape == (192, 192, 3, 3)
    assert published["output_blocks.3.2.in_layers.0.weight"].shape == (768,)
    assert published["middle_block.1.qkv.weight"].shape == (2304, 768, 1, 1)
    # At 256 x 256 there are six resolutions.
    large = ADMConfig(
        size=256,
        width=256,
        multipliers=(1, 1, 2, 2, 4, 4),
        blocks=2,
        classes=0,
        groups=32,
        time_scale=1000.0,
        dropout=0.0,
    )
    with torch.device("meta"):
        network = ADM(large)
    published = adm_keys.to_published(network.state_dict(), large)
    assert adm_keys.infer_config(published, "file") == large
    assert adm_keys.infer_config(published, "file", size=128).attention == (16, 8, 4)


def test_queries_keys_and_values_are_reordered():
    config = sized(width=32, multipliers=(1,), attention=(16,), head=8)
    block = network_of(config).double().dec["16x16_in0"]
    assert isinstance(block, Block)
    state = adm_keys.to_published({f"dec.16x16_in0.{n}": v for n, v in block.state_dict().items()}, config)
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64)
    h = block.norm2(x)
    weight, bias = (state[f"middle_block.1.qkv.{part}"] for part in ("weight", "bias"))
    q, k, v = torch.nn.functional.conv2d(h, weight, bias).reshape(2, 3, 4, 8, 16).unbind(1)  # which, head, feature
    weights = torch.einsum("bhdi,bhdj->bhij", q, k).div(8**0.5).softmax(dim=-1)
    mixed = torch.einsum("bhij,bhdj->bhdi", weights, v).reshape(2, 32, 4, 4)
    expected = x + torch.nn.functional.conv2d(mixed, block.proj.weight, block.proj.bias)
    assert torch.allclose(block._attended(x), expected, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("out.0.bias"), r"out.0.bias is missing; expected a tensor of shape \(32,\)"),
        (lambda w: w.pop("out.2.weight"), "out.2.weight is missing; expected a tensor of 4 dimensions"),
        (lambda w: w.update(other=torch.zeros(2)), r"other \(2,\) has no place in an ADM"),
        (lambda w: w.update({"out.0.weight": torch.zeros(3)}), r"out.0.weight has shape \(3,\), expected \(32,\)"),
        (lambda w: w.update({"out.2.weight": torch.zeros(6, 32, 3, 3)}), "3 channels in and 6 out"),
        (lambda w: [w.pop(n) for n in list(w) if n.startswith("input_blocks.2.")], "expected 0 to"),
        (
            lambda w: [w.pop(n) for n in list(w) if n.startswith("output_blocks.1.2.")],
            r"input_blocks.3.0.in_layers.2.weight has shape",
        ),
        (lambda w: w.update({"input_blocks.2.0.op.weight": torch.zeros(1)}), "resamples outside a residual block"),
        (lambda w: w.pop("time_embed.0.weight"), "expected weights named time_embed.0.weight"),
        (
            lambda w: w.update({"middle_block.1.qkv.weight": w["middle_block.1.qkv.weight"][..., 0]}),
            "guided diffusion's own files order its channels otherwise",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, said):
    weights = adm_keys.to_published(network_of(SMALL).state_dict(), SMALL)
    change(weights)
    with pytest.raises(ValueError, match=said):
        adm_keys.from_published(weights, adm_keys.infer_config(weights, "file", size=16, head=16), "file")


def test_heads_that_do_not_fit_and_networks_without_a_place():
    weights = adm_keys.to_published(network_of(SMALL).state_dict(), SMALL)
    with pytest.raises(ValueError, match="heads: 64 channels do not split into heads of 48"):
        adm_keys.infer_config(weights, "file", size=16, head=48)
    with pytest.raises(ValueError, match="file: size: 2 resolutions need a side divisible by 2, got 15"):
        adm_keys.infer_config(weights, "file", size=15, head=16)
    with pytest.raises(ValueError, match="no place for what augmentation did"):
        adm_keys.to_published({}, sized(augment_dim=3))
