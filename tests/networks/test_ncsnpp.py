"""NCSN++: published sizes, what resampling must keep, conditions, and refusals."""

import pytest
import torch
from torch import nn

from pantarhei.networks import NCSNpp, NCSNppConfig, build, spec_of
from pantarhei.networks.ncsnpp import HIGH_RESOLUTION
from pantarhei.networks.ncsnpp_keys import module_list, to_reference
from pantarhei.networks.resampling import Resample

SMALL = {"size": 16, "width": 16, "multipliers": (1, 2), "blocks": 1, "attention": (8,)}


@pytest.mark.parametrize(
    ("config", "parameters", "modules"), [(NCSNppConfig(), 61_804_419, 55), (HIGH_RESOLUTION, 65_574_549, 77)]
)
def test_published_sizes(config, parameters, modules):
    with torch.device("meta"):
        state = NCSNpp(config).state_dict()
    assert sum(value.numel() for value in to_reference(state, config).values()) == parameters
    assert len(module_list(config)) == modules


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_keeps_constants_and_means(taps):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    up, down = Resample("up", taps), Resample("down", taps)
    inner = slice(2, -2)
    assert torch.allclose(up(torch.ones_like(x))[..., inner, inner], torch.ones(1, dtype=torch.float64))
    assert torch.allclose(down(torch.ones_like(x))[..., 1:-1, 1:-1], torch.ones(1, dtype=torch.float64))
    if taps == (1, 1):
        assert torch.equal(down(up(x)), x)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_doubling_and_convolving_at_once(taps):
    conv, up = nn.Conv2d(3, 5, 3, padding=1).double(), Resample("up", taps)
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    assert torch.allclose(up.convolved(x, conv), conv(up(x)), atol=1e-12)


def test_initial_output_is_nearly_zero_and_gradients_reach_everything():
    torch.manual_seed(0)
    network = NCSNpp(NCSNppConfig(**SMALL, classes=3))
    x, t = torch.randn(4, 3, 16, 16), torch.rand(4)
    assert network(x, t).abs().max() < 1e-3
    network(x, t, label=torch.tensor([0, 1, 2, 3])).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    network.eval()
    # Without a label the null class is meant.
    assert torch.equal(network(x, t), network(x, t, label=torch.full((4,), 3)))
    assert not torch.equal(network(x, t), network(x, t, label=torch.zeros(4).long()))


def test_time_zero_is_finite_with_logarithm_and_division():
    config = NCSNppConfig(**SMALL, embedding="fourier", time_floor=1e-3, divide=True)
    torch.manual_seed(0)
    network = NCSNpp(config).eval()
    x = torch.randn(2, 3, 16, 16)
    assert network(x, torch.zeros(2)).isfinite().all()
    assert torch.equal(network(x, torch.zeros(2)), network(x, torch.full((2,), 1e-3)))


def test_spec_builds_the_same_network_and_other_sizes_run():
    network = NCSNpp(NCSNppConfig(**SMALL))
    assert build(spec_of(network)).config == network.config
    assert network(torch.randn(1, 3, 24, 32), torch.rand(1)).shape == (1, 3, 24, 32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": 15}, "divisible by 2"),
        ({"width": 30}, "4 divides"),
        ({"filter": (1, 2)}, "symmetric"),
        ({"embedding": "fourier"}, "time_floor"),
        ({"embedding": "learned"}, "sinusoid or fourier"),
        ({"width": 20, "multipliers": (1, 7)}, "groups"),
    ],
)
def test_wrong_sizes_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        NCSNpp(NCSNppConfig(**{**SMALL, **change}))
    with pytest.raises(ValueError, match="without classes"):
        NCSNpp(NCSNppConfig(**SMALL))(torch.zeros(1, 3, 16, 16), torch.zeros(1), label=torch.zeros(1).long())


def test_compiles_whole_and_is_differentiable_forwards():
    torch.manual_seed(0)
    network = NCSNpp(NCSNppConfig(**SMALL)).eval()
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    x, t = torch.randn(2, 3, 16, 16), torch.rand(2)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, t), network(x, t), rtol=1e-4, atol=1e-4)
    direction, step = torch.randn_like(x), 1e-3
    _, slope = torch.func.jvp(lambda x: network(x, t), (x,), (direction,))
    with torch.no_grad():
        change = (network(x + step * direction, t) - network(x - step * direction, t)) / (2 * step)
    assert (slope - change).norm() < 0.01 * change.norm()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [2, 16])
def test_memory_layouts_and_batches_agree(memory_format, batch):
    torch.manual_seed(0)
    network = NCSNpp(NCSNppConfig(**SMALL)).eval().double()
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    x, t = torch.randn(batch, 3, 16, 16).double(), torch.rand(batch).double()
    expected = torch.cat([network(x[i : i + 1], t[i : i + 1]) for i in range(batch)])
    network.to(memory_format=memory_format)
    assert torch.allclose(network(x.contiguous(memory_format=memory_format), t), expected, atol=1e-9)
