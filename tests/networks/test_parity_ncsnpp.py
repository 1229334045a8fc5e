"""NCSN++ and DDPM++ against the reference implementation of rectified flow."""

import pytest
import torch

from pantarhei.networks import NCSNpp, NCSNppConfig
from pantarhei.networks.ncsnpp_keys import from_reference, infer_config, to_reference
from parity import Golden

pytestmark = pytest.mark.parity


def described(golden: Golden) -> NCSNppConfig:
    """The network that the golden's configuration describes."""
    model, data = golden.config["model"], golden.config["data"]
    sides = [data["image_size"] >> level for level in range(len(model["ch_mult"]))]
    return NCSNppConfig(
        size=data["image_size"],
        channels=data["num_channels"],
        width=model["nf"],
        multipliers=tuple(model["ch_mult"]),
        blocks=model["num_res_blocks"],
        # Sides that do not occur have no attention.
        attention=tuple(side for side in sides if side in model["attn_resolutions"]),
        embedding={"positional": "sinusoid", "fourier": "fourier"}[model["embedding_type"]],
        fourier_scale=model["fourier_scale"],
        time_scale=golden.config["time_scale"],
        time_floor=1e-3 if model["embedding_type"] == "fourier" else 0.0,
        filter=tuple(model["fir_kernel"]) if model["fir"] else (1, 1),
        input_pyramid=model["progressive_input"] == "input_skip",
        output_pyramid=model["progressive"] == "output_skip",
        divide=model["scale_by_sigma"],
        rescale=model["skip_rescale"],
        dropout=model["dropout"],
    )


@pytest.mark.parametrize("name", ["ncsnpp_cifar_style", "ncsnpp_hires_style"])
def test_network_and_key_map(name):
    golden = Golden("rectified-flow", name)
    config = described(golden)
    weights = {k.removeprefix("w."): golden[k] for k in golden.names("w.")}
    # What the weights do not tell.
    untold = ("time_scale", "dropout", "fourier_scale", "filter", "divide", "rescale")
    known = {name: getattr(config, name) for name in untold}
    assert infer_config(weights, name, size=config.size, **known) == config
    network = NCSNpp(config).eval()
    network.load_state_dict(from_reference(weights, config, name))
    with torch.no_grad():
        golden.check("out.v", network(golden["in.x"], golden["in.t"]))
    golden.assert_all_compared()
    back = to_reference(network.state_dict(), config)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[k], weights[k]) for k in back)
