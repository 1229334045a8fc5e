"""Small image files for the tests of this folder."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from pantarhei.images import open_images

RNG = np.random.default_rng(0)


def picture(height=6, width=6, channels=3):
    return RNG.integers(0, 256, (height, width, channels) if channels == 3 else (height, width), dtype=np.uint8)


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_tree(root, tree):
    for path, content in tree.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else png(content))
    return root


def write_zip(path, tree):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in tree.items():
            archive.writestr(name, content if isinstance(content, bytes) else png(content))
    return path


def everything(source):
    return source.fetch(torch.arange(len(source)))


def as_x1(*pictures):
    stacked = np.stack([each[None] if each.ndim == 2 else each.transpose(2, 0, 1) for each in pictures])
    return torch.from_numpy(stacked).float() / 127.5 - 1


def error(kind, *arguments, **options):
    with pytest.raises(kind) as caught:
        open_images(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


CLASSES = {f"{name}/{number}.png": picture() for name in ("dog", "cat") for number in range(3)}
SORTED = [CLASSES[path] for path in sorted(CLASSES)]
