"""VGG16 features and LPIPS: readers of weight files, the arithmetic against a plain computation, gradients and limits."""

import pytest
import torch
from torch.nn import functional as F

from pantarhei.flow import LPIPS
from pantarhei.networks.vgg import STAGES, VGG16Features, linear_weights
from pantarhei.recipes.perceptual import build_metric

WIDTHS = [stage[-1] for stage in STAGES]
SMALL = {"divisor": 8, "size": None}


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    network = VGG16Features.random(3)
    state = {**network.state_dict(), "classifier.0.weight": torch.zeros(2, 2)}
    torch.save(state, folder / "vgg16.pth")
    generator = torch.Generator().manual_seed(1)
    linear = [torch.rand(1, width, 1, 1, generator=generator) for width in WIDTHS]
    torch.save({f"lin{i}.model.1.weight": value for i, value in enumerate(linear)}, folder / "vgg.pth")
    torch.save(linear, folder / "list.pt")
    return folder, network, linear


def test_the_network_has_the_published_layout():
    network = VGG16Features.random(0)
    convolutions = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # torchvision's numbers
    assert list(network.state_dict()) == [f"features.{i}.{kind}" for i in convolutions for kind in ("weight", "bias")]
    assert sum(p.numel() for p in network.parameters()) == 14_714_688  # VGG16 without its classifier
    maps = network(images(1, 3, 32, 32))
    assert [tuple(m.shape[1:]) for m in maps] == [(c, 32 >> i, 32 >> i) for i, c in enumerate(WIDTHS)]
    assert all(bool((m >= 0).all()) for m in maps)


def test_poolings_differ_and_tiny_images_pass():
    x = images(2, 3, 32, 32)
    mean, maximum = (VGG16Features.random(0, average_pooling=average, divisor=16)(x) for average in (True, False))
    assert torch.equal(mean[0], maximum[0])
    assert not torch.allclose(mean[1], maximum[1])
    assert [m.shape[-1] for m in VGG16Features.random(0, divisor=16)(images(1, 3, 8, 8))] == [8, 4, 2, 1, 1]


def test_weight_files_are_read(files):
    folder, network, linear = files
    read = VGG16Features.from_file(folder / "vgg16.pth")
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), network.parameters(), strict=True))
    assert not any(p.requires_grad for p in read.parameters())
    bare = {key.removeprefix("features."): value for key, value in network.state_dict().items()}
    torch.save(bare, folder / "bare.pth")
    assert torch.equal(VGG16Features.from_file(folder / "bare.pth").features[28].bias, network.features[28].bias)
    for name in ("vgg.pth", "list.pt"):
        for found, wanted in zip(linear_weights(folder / name), linear, strict=True):
            assert torch.equal(found, wanted.flatten())
    metric = build_metric("lpips", vgg=folder / "vgg16.pth", linear=folder / "vgg.pth")
    assert metric.name == "LPIPS (VGG16, vgg16.pth, vgg.pth)"
    assert metric.size == 224


def test_wrong_files_are_refused(files, tmp_path):
    folder, network, linear = files
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        LPIPS.from_files(tmp_path / "none.pth", folder / "vgg.pth")
    with pytest.raises(ValueError, match="expected the state dict of torchvision's VGG16"):
        VGG16Features.from_file(folder / "vgg.pth")
    state = network.state_dict()
    torch.save({k: v for k, v in state.items() if k != "features.28.bias"}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"lacks 'features\.28\.bias'"):
        VGG16Features.from_file(tmp_path / "short.pth")
    torch.save({**state, "features.0.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "thin.pth")
    with pytest.raises(ValueError, match=r"has shape \(32, 3, 3, 3\), VGG16 has \(64, 3, 3, 3\)"):
        VGG16Features.from_file(tmp_path / "thin.pth")
    torch.save({"state_dict": 5}, tmp_path / "five.pth")
    with pytest.raises(ValueError, match=r"'state_dict' in .* is a int; expected the state dict"):
        VGG16Features.from_file(tmp_path / "five.pth")
    torch.save({3: torch.zeros(1), (4, 5): "x"}, tmp_path / "keys.pth")
    with pytest.raises(ValueError, match=r"holds 3, \(4, 5\), \.\.\.; expected the state dict"):
        VGG16Features.from_file(tmp_path / "keys.pth")
    with pytest.raises(ValueError, match="LPIPS for VGG16 has"):
        linear_weights(tmp_path / "keys.pth")
    torch.save(linear[:4], tmp_path / "four.pt")
    with pytest.raises(ValueError, match="LPIPS for VGG16 has"):
        linear_weights(tmp_path / "four.pt")
    (tmp_path / "cut.pth").write_bytes((folder / "vgg.pth").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut\.pth"):
        linear_weights(tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="needs two weight files"):
        build_metric("lpips")
    with pytest.raises(ValueError, match="'vgg'"):
        build_metric("vgg")
    with pytest.raises(ValueError, match="weights for 3"):
        LPIPS(network, [torch.ones(3)])


def test_the_distance_is_the_papers_formula(files):
    _, network, linear = files
    x, y = images(2, 3, 12, 12), 1.3 * images(2, 3, 12, 12, seed=1)  # beyond 1: nothing is clipped
    found = LPIPS(network, linear, size=40)(x, y)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = torch.zeros(2, dtype=torch.float64)
    maps = []
    for z in (x, y):
        z = F.interpolate(0.5 * z + 0.5, size=(40, 40), mode="bilinear", align_corners=False)
        maps.append(network((z - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)))
    for weight, a, b in zip(linear, *maps, strict=True):
        a, b = (m.double() / m.double().square().sum(1, keepdim=True).sqrt() for m in (a, b))
        expected += (weight.double() * (a - b).square()).sum(1).mean(dim=(1, 2))
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_a_distance_of_images():
    metric = LPIPS.surrogate(0, **SMALL)
    x, y = images(4, 3, 16, 16), images(4, 3, 16, 16, seed=1)
    assert metric(x, x).abs().max() == 0
    assert bool((metric(x, y) > 0).all())
    assert torch.allclose(metric(x, y), metric(y, x))
    assert torch.allclose(metric(x[:2], y[:2]), metric(x, y)[:2], atol=1e-7)  # rows do not see each other
    nearer = metric(0.9 * x + 0.1 * y, x)
    assert bool((nearer < metric(y, x)).all())
    grey = images(2, 1, 8, 8), images(2, 1, 8, 8, seed=1)
    assert torch.allclose(metric(*grey), metric(*(g.repeat(1, 3, 1, 1) for g in grey)), atol=1e-7)


def test_the_surrogate_says_so_and_draws_nothing_globally():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    metric = LPIPS.surrogate(0)
    assert torch.equal(before, torch.get_rng_state())
    assert metric.name == "LPIPS surrogate: random VGG features, seed 0"
    small = build_metric("lpips-surrogate", seed=5)
    assert small.name == "LPIPS surrogate: random VGG features, seed 5, 1/4 of the channels"
    x, y = images(2, 1, 8, 8), images(2, 1, 8, 8, seed=1)
    assert torch.equal(small(x, y), build_metric("lpips-surrogate", seed=5)(x, y))
    assert not torch.equal(small(x, y), build_metric("lpips-surrogate", seed=6)(x, y))


def test_gradients_reach_the_prediction_only():
    metric = LPIPS.surrogate(0, **SMALL)
    x, y = images(2, 3, 16, 16).requires_grad_(), images(2, 3, 16, 16, seed=1).requires_grad_()
    metric(x, y).sum().backward()
    assert y.grad is None
    assert bool(x.grad.isfinite().all())
    assert float(x.grad.abs().max()) > 0
    # Checked against a difference quotient in double precision, which the distance follows.
    a, b = images(1, 3, 8, 8).double().requires_grad_(), images(1, 3, 8, 8, seed=1).double()
    value = metric(a, b)
    assert value.dtype == torch.float64
    (gradient,) = torch.autograd.grad(value.sum(), a)
    direction = images(1, 3, 8, 8, seed=2).double()
    with torch.no_grad():
        quotient = (metric(a + 1e-6 * direction, b) - metric(a - 1e-6 * direction, b)).sum() / 2e-6
    assert float((gradient * direction).sum()) == pytest.approx(float(quotient), rel=1e-4)


def test_it_stays_finite_and_small_where_the_prediction_meets_the_target():
    # Rectified flow++ weighs the distance by 1 / (1 - t), up to 1e5, where the prediction is the target but for O(1 - t).
    metric = LPIPS.surrogate(0, **SMALL)
    target, velocity_error = images(4, 3, 16, 16), images(4, 3, 16, 16, seed=1)
    for remaining in (1e-1, 1e-3, 1e-5):
        prediction = (target + remaining * velocity_error).requires_grad_()
        loss = (metric(prediction, target) / remaining).mean()
        loss.backward()
        assert torch.isfinite(loss)
        assert bool(prediction.grad.isfinite().all())
        assert float(loss.detach()) < remaining  # the distance is quadratic there: even loss / (1 - t) vanishes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    metric = LPIPS.surrogate(0, **SMALL)
    x, y = images(2, 3, 16, 16).to(dtype), images(2, 3, 16, 16, seed=1).to(dtype)
    exact = metric(x.float(), y.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(metric(x, y), exact)
    black = torch.full((1, 3, 16, 16), -1.0)
    assert torch.isfinite(metric(black, -black)).all()


@pytest.mark.parametrize("shapes", [((2, 2, 8, 8), (2, 2, 8, 8)), ((2, 3, 8, 8), (2, 3, 8, 9)), ((2, 3), (2, 3))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="LPIPS compares images"):
        LPIPS.surrogate(0, **SMALL)(*(torch.zeros(shape) for shape in shapes))
