import dataclasses

import pytest
import torch

from pantarhei.images import (
    AUGMENTATIONS,
    Compose,
    HorizontalFlip,
    RandomCrop,
    RandomShift,
    augmentation,
    horizontal_flip,
    random_crop,
    random_shift,
)


def images(batch=64, side=8, seed=0):
    return torch.rand(batch, 3, side, side + 2, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_flip_mirrors_some_images_and_leaves_the_others():
    x = images(400)
    flipped = horizontal_flip(x, 0.25, seeded())
    same = (flipped == x).flatten(1).all(1)
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert abs(float(mirrored.float().mean()) - 0.25) < 0.1
    assert torch.equal(horizontal_flip(x, 0.0, seeded()), x)
    assert torch.equal(horizontal_flip(x, 1.0, seeded()), x.flip(-1))


def offsets(height, width, most):
    return [(dy, dx) for dy in range(-most, most + 1) for dx in range(-most, most + 1)]


def test_a_shift_moves_and_fills():
    x = images(200)
    shifted = random_shift(x, 2, fill=-1.0, generator=seeded())
    seen = set()
    for before, after in zip(x, shifted, strict=True):
        for dy, dx in offsets(*x.shape[2:], 2):
            expected = torch.full_like(before, -1.0)
            height, width = before.shape[1:]
            expected[:, max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = before[
                :, max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)
            ]
            if torch.equal(after, expected):
                seen.add((dy, dx))
                break
        else:
            pytest.fail("an image is no shift of its original")
    assert len(seen) == 25


def test_a_crop_continues_by_reflection():
    x = images(100)
    cropped = random_crop(x, 3, seeded())
    assert cropped.shape == x.shape
    padded = torch.nn.functional.pad(x, [3] * 4, mode="reflect")
    for index in range(len(x)):
        windows = padded[index].unfold(1, 8, 1).unfold(2, 10, 1)  # (C, 7, 7, 8, 10)
        assert (windows == cropped[index][:, None, None]).all(dim=(0, 3, 4)).any()
    assert torch.equal(random_crop(x, 0, seeded()), x)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_repeats_with_its_generator_and_leaves_its_input(name):
    x = images()
    batch = {"x1": x.clone(), "label": torch.arange(64)}
    change = augmentation(name)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = change(batch, seeded(1)), change(batch, seeded(1)), change(batch, seeded(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first["x1"], again["x1"])
    assert not torch.equal(first["x1"], other["x1"])
    assert torch.equal(batch["x1"], x)
    assert first["label"] is batch["label"]
    assert (first["x1"].shape, first["x1"].dtype) == (x.shape, x.dtype)
    assert change({"x1": x.double()}, seeded())["x1"].dtype == torch.float64


def test_compose_goes_first_to_last():
    x = images()
    both = augmentation(["flip", "crop"])
    assert both == Compose((HorizontalFlip(), RandomCrop()))
    generator = seeded()
    expected = random_crop(horizontal_flip(x, generator=generator), generator=generator)
    assert torch.equal(both({"x1": x}, seeded())["x1"], expected)
    batch = {"x1": x}
    assert Compose()(batch) is batch


def test_augmentations_are_values():
    assert RandomShift(3) == RandomShift(3, -1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        RandomCrop().padding = 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: HorizontalFlip(1.5), "p of HorizontalFlip is 1.5"),
        (lambda: RandomCrop(-1), "padding of RandomCrop is -1"),
        (lambda: RandomShift(-1), "most of RandomShift is -1"),
        (lambda: augmentation("flop"), "unknown augmentation 'flop' (did you mean 'flip'?); known: flip, crop, shift"),
        (lambda: RandomCrop(8)({"x1": images()}), "padding 8 of random_crop must be below the height 8 and width 10"),
        (lambda: HorizontalFlip()({"x1": torch.zeros(4, 2)}), "x1 has shape (4, 2)"),
        (lambda: HorizontalFlip()({"x1": images(), "x0": images()}), "stored pairs"),
    ],
)
def test_mistakes_are_named(wrong, said):
    with pytest.raises(ValueError) as caught:
        wrong()
    assert said in str(caught.value)
