import numpy as np
import pytest
import torch
from PIL import Image

from pantarhei.report import image_grid, save_image_grid


def pixels(image):
    return np.asarray(image)


def test_pixels_are_where_and_what_they_should_be():
    images = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 2, 4)
    grid = pixels(image_grid(images, columns=2, padding=1, scale=1))
    assert grid.shape == (2 * 3 + 1, 2 * 5 + 1, 3)
    assert (grid[1:3, 1:5] == 0).all()
    assert (grid[1:3, 6:10] == 128).all()
    assert (grid[4:6, 1:5] == 255).all()
    assert (grid[0] == 255).all()  # the space between is white,
    assert (grid[4:6, 6:10] == 255).all()  # and so is the place without an image


def test_magnified_pixels_are_blocks():
    small = pixels(image_grid(torch.rand(4, 1, 8, 8) * 2 - 1, scale=1))
    large = pixels(image_grid(torch.rand(4, 1, 8, 8) * 2 - 1, scale=5))
    assert large.shape[0] == 5 * small.shape[0]
    assert (large.reshape(large.shape[0] // 5, 5, large.shape[1] // 5, 5, 3).std((1, 3)) == 0).all()


@pytest.mark.parametrize(("shape", "side"), [((64, 1, 8, 8), 584), ((16, 3, 64, 64), 261), ((9, 3, 256, 256), 772)])
def test_small_images_are_magnified_and_large_ones_are_not(shape, side):
    assert image_grid(torch.zeros(1, *shape[1:]).expand(shape)).size == (side, side)


def test_not_finite_is_magenta_and_too_large_is_clamped():
    images = torch.tensor([[float("nan"), 5.0], [float("inf"), -5.0]]).view(1, 1, 2, 2)
    grid = pixels(image_grid(images, padding=0, scale=1))
    assert grid.tolist() == [[[255, 0, 255], [255, 255, 255]], [[255, 0, 255], [0, 0, 0]]]


def test_four_channels_keep_their_transparency():
    images = torch.ones(1, 4, 2, 2)
    images[:, 3] = -1
    grid = image_grid(images, scale=1)
    assert grid.mode == "RGBA"
    assert pixels(grid)[1, 1].tolist() == [255, 255, 255, 0]
    assert pixels(grid)[0, 0].tolist() == [255, 255, 255, 255]


def test_bfloat16_with_gradient_is_fine():
    assert image_grid(torch.zeros(2, 1, 4, 4, dtype=torch.bfloat16, requires_grad=True)).mode == "RGB"


def test_saved_pictures_are_the_grid_and_replace_older_ones(tmp_path):
    images = torch.rand(5, 3, 8, 8) * 2 - 1
    path = tmp_path / "new" / "samples.png"
    save_image_grid(torch.zeros(1, 1, 8, 8), path)
    assert save_image_grid(images, path) == path
    assert (pixels(Image.open(path)) == pixels(image_grid(images))).all()
    assert [file.name for file in path.parent.iterdir()] == ["samples.png"]


def test_bad_input_is_refused(tmp_path):
    images = torch.zeros(2, 1, 4, 4)
    for call, message in [
        (lambda: image_grid(images[0]), r"\(N, C, H, W\)"),
        (lambda: image_grid(torch.zeros(2, 2, 4, 4)), "C = 1, 3 or 4"),
        (lambda: image_grid(images[:0]), r"\(0, 1, 4, 4\)"),
        (lambda: image_grid(images, columns=0), "columns"),
        (lambda: image_grid(images, padding=-1), "padding"),
        (lambda: image_grid(images, scale=0), "scale"),
        (lambda: save_image_grid(images, tmp_path / "samples.jpg"), ".png"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="bytes"):
        image_grid(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(TypeError, match="list"):
        image_grid([images])
