"""Our networks: shapes, conditions, precision, and rebuilding from their sizes."""

import pytest
import torch

from pantarhei.networks import MLP, MLPConfig, UNet, UNetConfig, build, spec_of
from pantarhei.networks.embeddings import sinusoids


def awake(network):
    """Give layers that start at zero some weight, so that inputs matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
    return network.eval()


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (UNetConfig(channels=1, width=8), 8),
        (UNetConfig(channels=3, width=8, multipliers=(1, 2, 2), blocks=(1, 1, 2)), 16),
        (UNetConfig(channels=3, width=16, multipliers=(1,), blocks=1, attention=False, dropout=0.1), 6),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unets_keep_the_shape_and_dtype_and_start_at_zero(config, size, dtype):
    network = UNet(config).to(dtype)
    x = torch.randn(2, config.channels, size, size, dtype=dtype)
    out = network(x, torch.rand(2, dtype=dtype))
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert not out.any()


def cases():
    image = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    points = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    yield awake(UNet(UNetConfig(channels=1, width=8, blocks=1, classes=4, vector=5))), image
    yield awake(MLP(MLPConfig(width=16, classes=4, vector=5))), points


def test_time_label_and_vector_matter_and_no_label_is_the_null_class():
    for network, x in cases():
        t, label, vector = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 2]), torch.ones(3, 5)
        out = network(x, t, label=label, vector=vector)
        for change in ({"label": label.flip(0)}, {"vector": -vector}):
            assert not torch.allclose(network(x, t, **{"label": label, "vector": vector, **change}), out)
        assert not torch.allclose(network(x, t.flip(0), label=label, vector=vector), out)
        null = torch.full((3,), 4)
        assert torch.allclose(network(x, t), network(x, t, label=null))


def test_rows_do_not_mix():
    for network, x in cases():
        t = torch.tensor([0.1, 0.5, 0.9])
        assert torch.allclose(network(x, t)[1:2], network(x[1:2], t[1:2]), atol=1e-5)


def test_channels_last_gives_the_same_numbers():
    torch.manual_seed(0)
    network = awake(UNet(UNetConfig(channels=3, width=16, blocks=1)))
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    expected = network(x, t)
    moved = network.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t)
    assert torch.allclose(moved, expected, atol=1e-5)


def test_sinusoids_separate_times_on_the_unit_interval():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    features = sinusoids(t, 64)
    assert features.shape == (101, 64)
    distance = torch.cdist(features, features) + 10 * torch.eye(101, dtype=torch.float64)
    assert float(distance.min()) > 0.5


def test_a_network_is_rebuilt_from_its_sizes():
    for network, _ in cases():
        again = build(spec_of(network))
        again.load_state_dict(network.state_dict())
        assert again.config == network.config
    assert spec_of(torch.nn.Linear(1, 1)) is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "unet", "width": 12}, "width"),
        ({"name": "unet", "blocks": (1, 2, 3)}, "blocks"),
        ({"name": "unet", "blocks": 0}, "blocks"),
        ({"name": "mlp", "layers": 0}, "layers"),
        ({"name": "unnet"}, "did you mean 'unet'"),
        ({"name": "unet", "depth": 3}, "settings"),
    ],
)
def test_bad_sizes_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec)


def test_conditions_a_network_was_not_built_for_are_refused():
    network = UNet(UNetConfig(channels=1, width=8))
    with pytest.raises(ValueError, match="without classes"):
        network(torch.zeros(1, 1, 8, 8), torch.zeros(1), label=torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="without a conditioning vector"):
        network(torch.zeros(1, 1, 8, 8), torch.zeros(1), vector=torch.zeros(1, 3))
