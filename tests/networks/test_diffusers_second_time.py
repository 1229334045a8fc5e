"""A second time for models of diffusers: beside their own, through none of their weights."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from interop.tiny_pipelines import UNET, stable_diffusion_3
from pantarhei import networks
from pantarhei.interop import diffusers, diffusers_write
from pantarhei.networks import DiffusersConfig, DiffusersNetwork
from pantarhei.networks.diffusers_adapters import add_peft
from pantarhei.networks.second_time import last_layer, with_second_time

GREY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "num_class_embeds": 3,
}
T, S = torch.tensor([0.2, 0.5]), torch.tensor([0.6, 1.0])


@pytest.fixture(scope="module", params=["UNet2DModel", "UNet2DConditionModel", "SD3Transformer2DModel"])
def case(request, tmp_path_factory):
    """A network, a state and its conditions."""
    torch.manual_seed(0)
    if request.param == "UNet2DModel":
        return (
            DiffusersNetwork(DiffusersConfig("UNet2DModel", GREY)),
            torch.randn(2, 1, 8, 8),
            {"label": torch.tensor([0, 3])},
        )
    if request.param == "UNet2DConditionModel":
        network = DiffusersNetwork(DiffusersConfig("UNet2DConditionModel", UNET))
        return network, torch.randn(2, 4, 8, 8), {"text": torch.randn(2, 5, UNET["cross_attention_dim"])}
    flow = diffusers.read(stable_diffusion_3(tmp_path_factory.mktemp("sd3")))
    return flow.network, torch.randn(2, *flow.shape), {"tokens": flow.network.tokenize(["a cat", "dog"])}


def test_it_is_added_to_the_models_own_time(case):
    network, x, conditions = case
    network.eval()
    names = list(network.state_dict())
    with torch.no_grad():
        expected = network(x, T, **conditions)
        grown = with_second_time(network)
        assert torch.equal(grown(x, T, s=S, **conditions), expected)
        other = with_second_time(network, initial="random")
        assert torch.equal(other(x, T, **conditions), expected)
        moved = other(x, T, s=S, **conditions)
        assert (moved - expected).abs().max() > 1e-5
        # A number is a time for all rows, and nothing stays behind in the model.
        assert torch.allclose(other(x, T, s=S[0], **conditions)[0], moved[0], atol=1e-5)
        assert torch.equal(other(x, T, **conditions), expected)
    assert list(network.state_dict()) == names
    assert list(other.state_dict())[-1] == names[-1]
    with pytest.raises(ValueError, match="s: this network was built without a second time"):
        network(x, T, s=S, **conditions)
    other(x, T, s=S, **conditions).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in other.time_s.parameters())
    last = network.model.proj_out if network.config.model.startswith("SD3") else network.model.conv_out
    assert last_layer(network) is last.weight
    assert next(with_second_time(network.bfloat16()).time_s.parameters()).dtype == torch.bfloat16
    network.float()


def test_it_is_rebuilt_and_shared_with_another_schedule():
    network = with_second_time(DiffusersNetwork(DiffusersConfig("UNet2DModel", GREY)), initial="random").eval()
    again = networks.build(networks.spec_of(network))
    again.load_state_dict(network.state_dict())
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(again.eval()(x, T, label=label, s=S), network(x, T, label=label, s=S))
        assert torch.equal(network.rescheduled({})(x, T, label=label, s=S), network(x, T, label=label, s=S))


def test_adapters_are_merged_and_later_ones_leave_the_branch_to_learn():
    pytest.importorskip("peft")
    torch.manual_seed(0)
    network = add_peft(DiffusersNetwork(DiffusersConfig("UNet2DConditionModel", UNET)), rank=2).eval()
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, UNET["cross_attention_dim"])
    grown = with_second_time(network)
    assert grown.config.adapter is None
    with torch.no_grad():
        assert torch.allclose(grown(x, T, s=S, text=text), network(x, T, text=text), atol=1e-5)
    adapted = add_peft(grown, rank=2)
    learning = {name.split(".")[0] for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name}
    assert learning == {"time_s"}
    assert last_layer(adapted).requires_grad


def test_the_layout_of_diffusers_has_no_place_for_it(tmp_path):
    import pantarhei as pr

    network = with_second_time(DiffusersNetwork(DiffusersConfig("UNet2DModel", GREY)))
    flow = pr.Flow(network, path="numbered", predicts="noise", shape=(1, 8, 8), null=network.nulls())
    with pytest.raises(ValueError, match="second time"):
        diffusers_write.write(flow, tmp_path / "folder")
