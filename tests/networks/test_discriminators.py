"""Discriminators: shapes, spectral norms, what is frozen; augmentation and the losses of the game."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pantarhei.networks.discriminators import (
    ConvDiscriminator,
    PointDiscriminator,
    ProjectedDiscriminator,
    make_discriminator,
)
from pantarhei.straighten.adversarial import Adversarial, augmented, discriminator_loss, generator_loss


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


# Networks


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 3), channels=st.integers(1, 4), height=st.integers(4, 40), width=st.integers(4, 40))
def test_logits_of_images_of_any_size(rows, channels, height, width):
    judge = make_discriminator((channels, height, width), 4)
    logits = judge(normal(rows, channels, height, width))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in judge.parameters())  # as several processes need it
    while min(height, width) > 4:  # halved until the shorter side is 4 or less
        height, width = height // 2, width // 2
    assert logits.shape == (rows, height * width)


def test_the_small_discriminator_of_a_shape():
    assert isinstance(make_discriminator((3, 32, 32)), ConvDiscriminator)
    points = make_discriminator((5,), 8)
    assert isinstance(points, PointDiscriminator)
    assert points(normal(7, 5)).shape == (7, 1)
    for shape in ((), (3, 8), (1, 8, 8, 8)):
        with pytest.raises(ValueError, match="shape: there are discriminators for images"):
            make_discriminator(shape)
    for wrong in ((0, 4, 8), (3, 0, 8), (3, 4, 3)):
        with pytest.raises(ValueError, match="channels, width, side: at least"):
            ConvDiscriminator(*wrong)
    for x in (normal(2, 3, 1, 8), normal(2, 3)):
        with pytest.raises(ValueError, match="x: images"):
            ConvDiscriminator(3, 4, side=8)(x)


def layers(network):
    return {name: m for name, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


@pytest.mark.parametrize("shape", [(2,), (3, 16, 16)])
def test_every_layer_has_a_spectral_norm(shape):
    judge, x = make_discriminator(shape, 8), normal(4, *shape)
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter *= 5.0  # which changes nothing
    for _ in range(60):  # the norm is found by power iterations, one a call
        judge(x)
    for name, layer in layers(judge).items():
        assert "parametrizations" in dict(layer.named_children()), name
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert float(largest.detach()) == pytest.approx(1.0, abs=0.02), name


def test_a_discriminator_learns_to_tell_two_sets_apart():
    torch.manual_seed(0)
    judge = PointDiscriminator(2, 16)
    optimizer = torch.optim.Adam(judge.parameters(), 1e-2)
    real, fake = normal(256, 2) + 2, normal(256, 2, seed=1)
    for _ in range(60):
        loss = discriminator_loss(judge(fake), judge(real))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float((judge(real) > 0).float().mean()) > 0.85
    assert float((judge(fake) < 0).float().mean()) > 0.85


# On features


class Features(nn.Module):
    """Maps of three scales; it has batch normalisation and dropout, which must not act."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)
        self.norm, self.dropout = nn.BatchNorm2d(4), nn.Dropout(0.5)

    def forward(self, x):
        h = self.dropout(self.norm(self.first(x)))
        g = self.second(h)
        return [h, g, F.avg_pool2d(g, 2)]


def projected(seed=0, side=32, count=1, scales=3):
    torch.manual_seed(1)
    networks = [Features(i) for i in range(count)]
    return ProjectedDiscriminator(networks, mixed=(4, 8, 12)[:scales], side=side, seed=seed)


def test_the_projected_discriminator():
    judge, x = projected(count=2), normal(3, 3, 32, 32)
    logits = judge(x)
    # Maps of sides 16, 8 and 4: halved to 8 at most, then 4x4 positions of a valid convolution: 25 + 25 + 1.
    assert logits.shape == (3, 2 * (25 + 25 + 1))
    small = normal(3, 3, 20, 24)
    plain = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    judge.eval()
    assert torch.equal(judge(small), judge(plain))
    # Only so many maps as are mixed are looked at, the coarsest.
    assert projected(scales=1)(x).shape == (3, 1)
    # Grey images are shown as colours; features are no part of the state.
    assert torch.equal(judge(x[:, :1]), judge(x[:, :1].expand(-1, 3, -1, -1)))
    assert not any("features" in name for name in judge.state_dict())
    assert projected().double().features[0].first.weight.dtype == torch.float64
    assert projected(side=64)(x).shape == (3, 25 + 25 + 25)  # sides 32, 16 and 8, halved to 8 each


def test_features_and_their_mixing_are_frozen():
    judge = projected().train()
    (features,) = judge.features
    assert not features.training
    assert judge.heads.training
    frozen = [*features.parameters(), *judge.mixing.parameters()]
    assert not any(p.requires_grad for p in frozen)
    judge.requires_grad_(True)
    assert not any(p.requires_grad for p in frozen)
    assert all(p.requires_grad for p in judge.heads.parameters())
    x = normal(2, 3, 32, 32).requires_grad_(True)
    before = copy.deepcopy(features.state_dict()), copy.deepcopy(judge.mixing.state_dict())
    judge(x).sum().backward()
    assert float(x.grad.abs().max()) > 0  # the student learns through them
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for p in judge.heads.parameters())
    for module, state in zip((features, judge.mixing), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    # Not even the running means of the feature networks' own normalisation move, nor does dropout act.
    maps = judge.features[0](x)
    assert all(torch.equal(a, b) for a, b in zip(maps, judge.features[0](x), strict=True))


def test_the_mixing_is_that_of_its_seed():
    a, b, c = projected(3), projected(3), projected(4)
    state = [m.mixing.state_dict() for m in (a, b, c)]
    assert all(torch.equal(state[0][name], state[1][name]) for name in state[0])
    assert not all(torch.equal(state[0][name], state[2][name]) for name in state[0])
    # The heads are not of the seed, but of the global generator, like any new layers.
    assert torch.equal(a.heads[0][0].last.weight, c.heads[0][0].last.weight)


def test_coarse_features_reach_the_finest_scale():
    mixing = projected().mixing[0]
    maps = [normal(1, 4, 16, 16), normal(1, 6, 8, 8), normal(1, 6, 4, 4)]
    whole = mixing(maps)
    assert [tuple(h.shape[1:]) for h in whole] == [(4, 16, 16), (8, 8, 8), (12, 4, 4)]
    changed = mixing([*maps[:2], maps[2] + 1])
    assert not torch.allclose(changed[0], whole[0])
    unchanged = mixing([maps[0] + 1, *maps[1:]])
    assert torch.equal(unchanged[1], whole[1])
    assert torch.equal(unchanged[2], whole[2])


def test_refused_projections():
    with pytest.raises(ValueError, match="features: at least one"):
        ProjectedDiscriminator([])
    for wrong in (nn.Conv2d(3, 4, 3), nn.Flatten()):
        with pytest.raises(ValueError, match="must give a list of maps"):
            ProjectedDiscriminator([wrong], side=16)


# What a discriminator sees


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 3, 16, 24), (2, 1, 8, 8), (1, 4, 4, 4)])
def test_augmented_images_are_images(shape, dtype):
    x = normal(*shape, dtype=dtype)
    seen = augmented(x, seeded(1))
    assert seen.shape == x.shape
    assert seen.dtype == dtype
    assert torch.equal(seen, augmented(x, seeded(1)))
    assert not torch.equal(seen, augmented(x, seeded(2)))


def test_augmentation_is_differentiable():
    x = normal(2, 3, 8, 8, dtype=torch.float64).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: augmented(x, seeded(3)), (x,))


def test_translation_and_hole():
    """A ramp shows where each pixel went: brightness and contrast change its slope, not its order."""
    side, rows = 32, 400
    ramp = torch.arange(side, dtype=torch.float64)[None, None, :, None].expand(rows, 1, side, side) + 100.0
    seen = augmented(ramp, seeded(5))
    down, missing, holes = [], [], []
    for image in seen[:, 0]:
        visible = image != 0
        # Rows and columns that came from outside are zero all along.
        up, left = visible.any(dim=1), visible.any(dim=0)
        missing.append((int((~up).sum()), int((~left).sum())))
        down.append(int(up.int().argmax()) - int(up.flip(0).int().argmax()))
        hole = ~visible[up][:, left]
        holes.append(int(hole.sum()))
    reach = round(side / 8)
    assert max(holes) == 6 * 6  # one fifth of the side, unless it lies where nothing is
    assert sorted(holes)[rows // 2] > 0
    shifts = torch.tensor(missing)
    assert int(shifts.max()) == reach
    assert bool((shifts >= 0).all())
    # Up and down alike, and every number of pixels.
    assert set(down) == set(range(-reach, reach + 1))
    assert abs(sum(down) / rows) < 0.5


def test_colours_change_row_by_row():
    x = normal(200, 3, 8, 8, dtype=torch.float64).expand(200, 3, 8, 8)
    grey = torch.zeros(200, 3, 8, 8, dtype=torch.float64)
    lit = augmented(grey, seeded(7)).flatten(1)
    shades = lit.gather(1, lit.abs().argmax(dim=1, keepdim=True))[:, 0]  # brightness alone
    assert -0.5 <= float(shades.min()) < -0.4
    assert 0.4 < float(shades.max()) <= 0.5
    assert len(shades.unique()) == 200
    assert augmented(x, seeded(8)).isfinite().all()


def test_points_and_plain_discriminators_see_samples_as_they_are():
    x, image = normal(4, 2), normal(2, 1, 8, 8)
    judge = make_discriminator((2,), 4)
    assert Adversarial(judge).shown(x, seeded()) is x
    assert Adversarial(judge, augment=False).shown(image, seeded()) is image
    assert torch.equal(Adversarial(judge).shown(image, seeded()), augmented(image, seeded()))


# Losses


def test_hinge_losses():
    fake, real = torch.tensor([[-3.0], [-0.5], [2.0]]), torch.tensor([[2.0], [0.25], [-1.0]])
    assert float(discriminator_loss(fake, real)) == pytest.approx((0 + 0.5 + 3) / 3 + (0 + 0.75 + 2) / 3)
    assert float(generator_loss(fake)) == pytest.approx(0.5)
    # Sure and right: nothing left to learn; the generator always has something.
    sure = torch.tensor([[-2.0]]).requires_grad_(True)
    discriminator_loss(sure, -sure).backward()
    assert float(sure.grad) == 0
    generator_loss(sure).backward()
    assert float(sure.grad) == -1
