"""SiT against its reference implementation: the network, and its guidance of some of the channels."""

import pytest
import torch

import pantarhei as pr
from pantarhei.flow.transforms import Guidance
from pantarhei.interop import sit
from pantarhei.networks import SiT, SiTConfig
from parity import Golden

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def golden():
    return Golden("stochastic-interpolants", "sit")


@pytest.fixture(scope="module")
def network(golden):
    c = golden.config
    config = SiTConfig(
        size=c["input_size"],
        patch=c["patch_size"],
        channels=c["in_channels"],
        width=c["hidden_size"],
        depth=c["depth"],
        heads=c["num_heads"],
        mlp=c.get("mlp_ratio", 4.0),
        classes=c["num_classes"],
        learn_sigma=c["learn_sigma"],
    )
    weights = {name.removeprefix("w."): golden[name] for name in golden.names("w.")}
    assert sit.infer_config(weights, "golden", heads=config.heads) == config
    network = SiT(config)
    assert torch.allclose(network.pos_embed, weights["pos_embed"], atol=1e-6)
    network.load_state_dict(weights)
    return network.eval()


def test_forward(golden, network):
    with torch.no_grad():
        golden.check("out.forward", network(golden["in.x"], golden["in.t"], golden["in.y"]))


def test_guidance_of_the_first_channels(golden, network):
    c = golden.config
    null, channels = c["null_class"], c["cfg_channels"]
    assert null == network.config.classes
    flow = pr.Flow(network, null={"label": null})
    # The reference takes the states twice, under their labels and under the null class; what is not guided stays
    # conditional in the first half and unconditional in the second.
    x, t, label = (golden[f"in.cfg_{name}"].chunk(2) for name in "xty")
    assert torch.equal(t[0], t[1])
    assert bool((label[1] == null).all())
    for batched in (True, False):
        field = flow.field(Guidance(c["cfg_scale"], batched=batched, channels=channels))
        with torch.no_grad():
            guided = field(x[0], t[0], pr.Condition({"label": label[0]}, flow.null))
            free = flow.velocity(x[0], t[0], label[1])
        second = torch.cat([guided[:, :channels], free[:, channels:]], dim=1)
        golden.check("out.forward_with_cfg", torch.cat([guided, second]))
