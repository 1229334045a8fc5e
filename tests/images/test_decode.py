import io

import numpy as np
import pytest
from PIL import Image

from pantarhei.images.decode import decode

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_give_their_pixels(form, options):
    assert np.array_equal(decode(encoded(COLOUR, form, **options), "a", None, None), COLOUR.transpose(2, 0, 1))


def test_channels_follow_the_image_or_the_wish():
    assert decode(encoded(GREY), "a", None, None).shape == (1, 6, 9)
    assert decode(encoded(COLOUR), "a", None, None).shape == (3, 6, 9)
    assert np.array_equal(decode(encoded(GREY), "a", None, 3), np.stack([GREY] * 3))
    weighed = decode(encoded(COLOUR), "a", None, 1)[0]
    # luma of ITU-R BT.601
    assert np.abs(weighed - COLOUR @ np.array([0.299, 0.587, 0.114])).max() <= 1


def test_transparency_is_laid_on_white():
    layer = np.dstack([COLOUR, np.full((6, 9), 255, dtype=np.uint8)])
    layer[:3, :, 3] = 0
    flat = decode(encoded(layer), "a", None, None).transpose(1, 2, 0)
    assert (flat[:3] == 255).all()
    assert np.array_equal(flat[3:], COLOUR[3:])
    half = np.dstack([GREY, np.full((6, 9), 255, dtype=np.uint8)])
    half[0, :, 1] = 0
    grey = decode(encoded(half), "a", None, None)
    assert grey.shape == (1, 6, 9)
    assert (grey[0, 0] == 255).all()
    assert np.array_equal(grey[0, 1:], GREY[1:])


def test_palettes_are_looked_up():
    palette = Image.fromarray(COLOUR).quantize(8)
    assert np.array_equal(
        decode(encoded(palette), "a", None, None), np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    )
    clear = encoded(palette, transparency=int(np.asarray(palette)[0, 0]))
    assert (decode(clear, "a", None, None)[:, 0, 0] == 255).all()


def test_sixteen_bits_are_rounded_to_eight():
    wide = (np.arange(54, dtype=np.uint16) * 1236).reshape(6, 9)
    assert np.array_equal(decode(encoded(wide), "a", None, None)[0], np.rint(wide / 257))
    with pytest.raises(ValueError, match="floating-point pixels"):
        decode(encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "a", None, None)


def test_the_orientation_of_the_camera_is_applied():
    tags = Image.Exif()
    tags[0x0112] = 6  # turn clockwise by a quarter to view
    turned = decode(encoded(COLOUR, exif=tags), "a", None, None)
    assert np.array_equal(turned.transpose(1, 2, 0), np.rot90(COLOUR, -1))


def test_size_scales_the_short_side_and_cuts_out_the_centre():
    columns = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None], 20, axis=0)  # 20 high, 60 wide, a ramp
    assert decode(columns, "a", 20, None).shape == (1, 20, 20)
    assert np.array_equal(decode(columns, "a", 20, None)[0], columns[:, 20:40])
    small = decode(columns, "a", 10, None)[0].astype(float)
    # Twice as coarse: each pixel is the mean of two, 2 apart from the ramp's values.
    assert np.abs(small - columns[::2, 20:40].reshape(10, 10, 2).mean(2)).max() <= 1.0
    large = decode(columns, "a", 40, None)[0]
    assert large.shape == (40, 40)
    assert abs(float(large.mean()) - float(columns[:, 20:40].mean())) < 1.0
    for shape in ((7, 5), (5, 7), (301, 100)):
        assert decode(np.zeros(shape, dtype=np.uint8), "a", 4, 3).shape == (3, 4, 4)


def test_reductions_do_not_alias():
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    grey = decode(board, "a", 8, None)[0].astype(float)
    assert np.abs(grey - 127.5).max() < 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_damaged_files_are_named_in_one_line(form):
    content = encoded(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8), form)
    for length in (0, 1, 10, len(content) // 2):
        with pytest.raises(ValueError) as caught:
            decode(content[:length], "folder/broken.x", None, None)
        assert str(caught.value).startswith("cannot read image folder/broken.x: ")
        assert "\n" not in str(caught.value)
