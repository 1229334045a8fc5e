"""From image files to pixels of one form."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
_SIXTEEN = ("I", "I;16", "I;16B", "I;16L")


def decode(content: bytes | np.ndarray, name: str, size: int | None, channels: int | None) -> np.ndarray:
    """Decode one image.

    The orientation that a camera noted is applied, transparency is laid on white, palettes are looked up, 16-bit
    greyscale is rounded to 8 bits. With ``size`` the short side is brought to it (Lanczos; large reductions are halved
    by box averages first, so nothing aliases) and the centre square is cut out.

    Args:
        content: content of an image file, or pixels uint8 (H, W) or (H, W, C).
        name: how errors call the image.
        size: side of the result, or None to keep the image's own.
        channels: 1 (greyscale), 3 (RGB), or None to take the image's own.

    Returns:
        uint8 (C, H, W).

    Raises:
        ValueError: the image cannot be read.
    """
    image = _opened(content, name)
    if channels is None:
        channels = 1 if image.mode in _GREY else 3
    image = _plain(image, name).convert("L" if channels == 1 else "RGB")
    if size is not None:
        image = _fitted(image, size)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _opened(content: bytes | np.ndarray, name: str) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError(f"cannot read image {name}: not an image, or its beginning is damaged") from None
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read image {name}: {reason}") from None


def _plain(image: Image, name: str) -> Image:
    from PIL import Image

    if image.mode == "F":
        raise ValueError(f"cannot read image {name}: floating-point pixels have no fixed range; save it with 8 bits")
    if image.mode in _SIXTEEN:
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.rint(values / 257.0).clip(0.0, 255.0).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image


def _fitted(image: Image, size: int) -> Image:
    from PIL import Image

    width, height = image.size
    if (width, height) == (size, size):
        return image
    scale = size / min(width, height)
    new = max(size, round(width * scale)), max(size, round(height * scale))
    image = image.resize(new, Image.Resampling.LANCZOS, reducing_gap=3.0)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    return image.crop((left, top, left + size, top + size))
