"""Tensors of images as one picture to look at."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pantarhei.files import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

_COMFORTABLE = 64  # pixels that a cell should have at least
_LARGEST = 1600  # magnification stops before the grid gets wider or higher than this
_MAGENTA = (255, 0, 255)  # not finite: a colour that data hardly have
_MODES = {1: "RGB", 3: "RGB", 4: "RGBA"}


def image_grid(
    images: Tensor,
    columns: int | None = None,
    padding: int = 1,
    scale: int | None = None,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image:
    """Lay images out in a grid, row by row.

    Values beyond [-1, 1] are clamped. A pixel that is NaN or infinite in any channel is painted magenta, so that a
    broken model shows at a glance.

    Args:
        images: (N, C, H, W) in [-1, 1] with 1 (grey), 3 (RGB) or 4 (RGBA) channels.
        columns: images a row; None makes the grid about square.
        padding: space between images and around them, in pixels of the images, so it grows with `scale`.
        scale: whole number by which every pixel is repeated; None magnifies small images to about 64 pixels.
        background: colour of the space between, RGB.

    Returns:
        A PIL image, "RGB", or "RGBA" for 4 channels.

    Raises:
        TypeError: `images` is no floating-point tensor.
        ValueError: another shape, or a number out of range.
    """
    from PIL import Image

    images = _checked(images)
    count, channels, height, width = images.shape
    columns = min(_at_least("columns", math.ceil(math.sqrt(count)) if columns is None else columns, 1), count)
    rows = math.ceil(count / columns)
    _at_least("padding", padding, 0)
    if scale is None:
        wanted = round(_COMFORTABLE / max(height, width))
        scale = max(1, min(wanted, _LARGEST // max(columns * (width + padding), rows * (height + padding))))
    _at_least("scale", scale, 1)

    depth = len(_MODES[channels])
    step_down, step_right = height + padding, width + padding
    canvas = torch.empty(rows * step_down + padding, columns * step_right + padding, depth, dtype=torch.uint8)
    canvas[..., :3] = torch.tensor(background, dtype=torch.uint8)
    canvas[..., 3:] = 255
    for number, image in enumerate(to_bytes(images)):
        top, left = number // columns * step_down + padding, number % columns * step_right + padding
        canvas[top : top + height, left : left + width] = image
    canvas = canvas.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return Image.fromarray(canvas.numpy(), _MODES[channels])


def save_image_grid(
    images: Tensor,
    path: str | os.PathLike[str],
    columns: int | None = None,
    padding: int = 1,
    scale: int | None = None,
) -> Path:
    """Write an `image_grid` as PNG; an older file is replaced at once.

    Args:
        images: (N, C, H, W) in [-1, 1].
        path: the file, which must end in ".png"; parent folders are made.
        columns: as for `image_grid`.
        padding: as for `image_grid`.
        scale: as for `image_grid`.

    Returns:
        The path.

    Raises:
        TypeError: `images` is no floating-point tensor.
        ValueError: another shape, a number out of range, or another suffix.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f'path must end in ".png", got {os.fspath(path)!r}')
    return write_atomically(path, png_bytes(image_grid(images, columns, padding, scale)))


def png_bytes(image: Image) -> bytes:
    """A PIL image as the content of a PNG file.

    Args:
        image: any image that PNG can hold.

    Returns:
        The bytes.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def to_bytes(images: Tensor) -> Tensor:
    """Round images to 8 bits, channels last.

    Args:
        images: (N, C, H, W) in [-1, 1] with 1, 3 or 4 channels.

    Returns:
        (N, H, W, 3 or 4) uint8 on the CPU; what is not finite is magenta.
    """
    images = images.detach().float().cpu()
    broken = ~torch.isfinite(images).all(1)
    pixels = ((images.nan_to_num().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)
    pixels = pixels.expand(*pixels.shape[:-1], 3).clone() if pixels.shape[-1] == 1 else pixels.contiguous()
    pixels[broken] = torch.tensor([*_MAGENTA, 255][: pixels.shape[-1]], dtype=torch.uint8)
    return pixels


def _checked(images: Tensor) -> Tensor:
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor (N, C, H, W), got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [-1, 1], got {images.dtype}; bytes b are b / 127.5 - 1")
    if images.ndim != 4 or images.shape[1] not in _MODES or 0 in images.shape:
        raise ValueError(f"images must have shape (N, C, H, W) with C = 1, 3 or 4, got {tuple(images.shape)}")
    return images


def _at_least(name: str, value: int, least: int) -> int:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value
