import math

import pytest
import torch

from pantarhei.data import TOYS, toy_source, toys

COUNT = 40_000


def draw(name, count=COUNT, seed=0):
    return TOYS[name](count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_is_centred_of_unit_scale_and_repeats_with_its_generator(name):
    points = draw(name)
    assert points.shape == (COUNT, 2)
    assert points.dtype == torch.float32
    # Five standard errors of the mean of a coordinate whose deviation is at most 2.4.
    assert points.mean(0).abs().max() < 5 * 2.4 / math.sqrt(COUNT)
    assert ((points.std(0) > 0.6) & (points.std(0) < 2.4)).all()
    assert torch.equal(points, draw(name))
    assert not torch.equal(points, draw(name, seed=1))


@pytest.mark.parametrize(
    ("name", "deviations"),
    [
        ("eight_gaussians", (math.sqrt(2.04), math.sqrt(2.04))),
        # radius^2/2 of the two rings, and the noise
        ("circles", (math.sqrt(1.25 + 0.08**2), math.sqrt(1.25 + 0.08**2))),
        ("checkerboard", (4 / math.sqrt(3), 4 / math.sqrt(3))),
        # 1.5 cos(a) around centres 1.5 apart; 1.5 sin(a) around centres that leave the means 2/pi and 1/2 - 2/pi
        ("two_moons", (1.3021, math.sqrt(2.25 * (0.5 - 4 / math.pi**2 + (2 / math.pi - 0.25) ** 2) + 0.08**2))),
    ],
)
def test_deviations_are_those_of_the_law(name, deviations):
    assert torch.allclose(draw(name).std(0), torch.tensor(deviations), rtol=0.015)


def test_eight_gaussians_sit_on_a_ring_in_equal_numbers():
    points = draw("eight_gaussians")
    sector = torch.round(torch.atan2(points[:, 1], points[:, 0]) / (math.pi / 4)).long() % 8
    counts = torch.bincount(sector, minlength=8)
    assert (counts - COUNT / 8).abs().max() < 5 * math.sqrt(COUNT / 8)
    centre = torch.stack([points[sector == k].mean(0) for k in range(8)])
    assert torch.allclose(centre.norm(dim=1), torch.full((8,), 2.0), atol=0.03)


def test_checkerboard_fills_the_dark_squares_only():
    points = draw("checkerboard")
    assert points.abs().max() <= 4.0
    square = torch.floor(points / 2.0)
    assert (torch.remainder(square.sum(1), 2.0) == 0).all()
    counts = torch.unique(square, dim=0, return_counts=True)[1]
    assert len(counts) == 8
    assert (counts - COUNT / 8).abs().max() < 5 * math.sqrt(COUNT / 8)


def test_circles_have_two_radii():
    radius = draw("circles").norm(dim=1)
    assert torch.minimum((radius - 1).abs(), (radius - 2).abs()).max() < 0.5
    assert abs(float((radius < 1.5).float().mean()) - 0.5) < 0.02


def test_swiss_roll_winds_by_its_radius():
    points = draw("swiss_roll") + torch.tensor([0.4, 2 / (15 * math.pi)])
    radius = points.norm(dim=1)
    # r = angle / 5, so turning a point back by 5 r puts it on the positive axis, up to the noise.
    turned = torch.atan2(points[:, 1], points[:, 0]) - 5 * radius
    assert torch.cos(turned).mean() > 0.9


def test_spiral_has_two_opposite_arms():
    points = draw("spiral")
    radius = points.norm(dim=1)
    turned = torch.atan2(points[:, 1], points[:, 0]) - math.pi * radius
    far = radius > 1.0
    assert (torch.cos(turned[far]).abs() > 0.5).float().mean() > 0.95
    assert abs(float((torch.cos(turned[far]) > 0).float().mean()) - 0.5) < 0.02


def test_pinwheel_looks_the_same_after_a_fifth_of_a_turn():
    points = draw("pinwheel")
    angle = torch.atan2(points[:, 1], points[:, 0]) - 0.25 * torch.exp(points.norm(dim=1) / 2)
    assert torch.cos(5 * angle).mean() > 0.7
    blade = torch.bincount((torch.round(angle / (2 * math.pi / 5)).long() % 5), minlength=5)
    assert (blade - COUNT / 5).abs().max() < 5 * math.sqrt(COUNT / 5)


def test_toy_source_keeps_one_draw():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    source = toy_source("two-moons", 100, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(source) == 100
    assert source.name == "two_moons"
    drawn = toys.two_moons(100, torch.Generator().manual_seed(3))
    assert torch.equal(source.fetch(torch.arange(100))["x1"], drawn)


def test_toy_source_refuses_unknown_names_and_no_points():
    with pytest.raises(
        ValueError, match=r"unknown toy 'two_moon' \(did you mean 'two_moons'\?\); known: eight_gaussians"
    ):
        toy_source("two_moon")
    with pytest.raises(ValueError, match="count is 0"):
        toy_source("circles", 0)
