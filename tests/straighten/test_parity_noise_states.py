"""Noise from stored generator states and the images LPIPS compares, against the code of rectified flow++."""

import pytest
import torch

from pantarhei.flow import LPIPS
from pantarhei.networks.vgg import VGG16Features
from pantarhei.straighten.noise_states import noise_from_states
from parity import Golden

pytestmark = pytest.mark.parity


@pytest.fixture
def golden():
    return Golden("rectified-flow-plus-plus", "losses_tdist")


def test_noise_comes_back_bit_for_bit(golden):
    assert golden.config["bit_generator"] == "PCG64"
    states = [bytes.fromhex(state) + bytes.fromhex(inc) for state, inc in golden.config["noise_states_hex_state_inc"]]
    shape = golden["out.noise_from_states"].shape[1:]
    noise = noise_from_states(states, shape)
    assert noise.dtype == torch.float32
    golden.check("out.noise_from_states", noise)
    # Each row hangs on its own state only.
    golden.check("out.noise_from_states", noise_from_states(states[::-1], shape).flip(0))


def test_images_are_resized_for_lpips_without_clipping(golden):
    config = golden.config
    assert (config["upsample_mode"], config["upsample_align_corners"]) == ("bilinear", False)
    name, _, rows = config["upsample_input"].partition("[")
    first, last = map(int, rows.rstrip("]").split(":"))
    metric = LPIPS(VGG16Features(divisor=64), size=config["upsample_size"])
    crop = slice(*config["crop"])
    golden.check("out.upsampled_pred_x_first_crop", metric.resized(golden[name][first:last])[..., crop, crop])
