"""The two networks of consistency trajectory models, and their jumps, against the reference."""

import pytest
import torch

from pantarhei.networks import ADM, SongUNet, SongUNetConfig, adm_keys
from parity import Golden

pytestmark = pytest.mark.parity
FLOOR = 0.002  # the least noise level, of the forms that keep the variance


def unet_adm(golden):
    """The network of ImageNet, from its published names."""
    c = golden.config
    weights = {name.removeprefix("w."): golden[name].float() for name in golden.names("w.")}
    config = adm_keys.infer_config(weights, "golden", size=c["image_size"], head=c["num_head_channels"])
    assert config.attention == tuple(c["image_size"] // factor for factor in c["attention_downsample_factors"])
    assert (config.width, config.blocks, config.classes) == (c["model_channels"], c["num_res_blocks"], c["num_classes"])
    assert (config.multipliers, config.channels) == (tuple(c["channel_mult"]), c["in_channels"])
    assert (config.adaptive, config.second_time) == (c["use_scale_shift_norm"], c["use_s"])
    assert config.time_scale / 4 == c["time_scale"]
    network = ADM(config).eval()
    network.load_state_dict(adm_keys.from_published(weights, config, "golden"))
    back = adm_keys.to_published(network.state_dict(), config)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    return network


def songunet(golden):
    """The network of CIFAR-10, whose names are ours."""
    c = golden.config
    weights = {name.removeprefix("w.model."): golden[name] for name in golden.names("w.")}
    embedded = weights["map_layer0.weight"].shape[0]
    assert c["time_scale"] == 0.25
    config = SongUNetConfig(
        size=c["img_resolution"],
        channels=golden["in.x_t"].shape[1],
        width=c["model_channels"],
        multipliers=tuple(c["channel_mult"]),
        blocks=c["num_blocks"],
        attention=tuple(c["attn_resolutions"]),
        embedding=c["embedding"],
        encoder=c["encoder"],
        filter=tuple(c["resample_filter"]),
        embedding_multiplier=embedded // c["model_channels"],
        noise_multiplier=c["channel_mult_noise"],
        classes=c["label_dim"],
        augment_dim=0,
        second_time=c["use_s"],
    )
    network = SongUNet(config).eval()
    network.load_state_dict(weights)
    return network


@pytest.mark.parametrize(("name", "make"), [("unet_adm", unet_adm), ("songunet_ddpmpp", songunet)])
@torch.no_grad()
def test_output_estimate_and_jump(name, make):
    golden = Golden("consistency-trajectory-models", name)
    network, sd = make(golden), golden.config["sigma_data"]
    x, t, s = (golden[f"in.{key}"] for key in ("x_t", "t", "s"))
    named = golden.config["label_input"]
    label = golden[named] if named else None
    tb, sb = (time[:, None, None, None] for time in (t, s))
    q = (tb**2 + sd**2).sqrt()

    def output(s):
        return network(x / q, t.log() / 4, label, s=None if s is None else s.log() / 4)

    def estimate(s):  # c_skip x + c_out F
        return (sd / q) ** 2 * x + tb * sd / q * output(s)

    golden.check("out.F", output(s))
    g, at_start = estimate(s), estimate(t)
    golden.check("out.denoised", g)
    euler = sb / tb * x + (1 - sb / tb) * g
    golden.check("out.G", euler)
    golden.check("out.denoiser_at_s_eq_t", at_start)
    if name == "unet_adm":
        for time, seen in (("rescaled_t", t), ("rescaled_s", s)):
            golden.check(f"out.{time}", network.config.time_scale * (seen.log() / 4))
        golden.check("out.F_no_s", output(None))
        golden.check("out.G_at_s_eq_t", x + 0 * at_start)
    else:
        # Of the form that keeps the variance the estimate is g and a share of the state, which its jump does not use.
        here, there = ((time - FLOOR) ** 2 + sd**2 for time in (tb, sb))
        more = (FLOOR**2 + sd**2 - FLOOR * tb) / here * x
        variance = (there / here).sqrt() * x + (1 - sb / tb) * g
        golden.check("out.variance.denoised", g + more)
        golden.check("out.variance.G", variance)
        golden.check("out.euler_variance_mixed.denoised", g + more / (1 + tb))
        golden.check("out.euler_variance_mixed.G", (tb * euler + variance) / (1 + tb))
    golden.assert_all_compared()
