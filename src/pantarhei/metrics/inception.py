"""The Inception network behind published FID figures, for a weight file that the user supplies.

Inception-v3 (Szegedy et al. 2015, arXiv:1512.00567) in the variant of TensorFlow's 2015-12-05 graph, on which Heusel et
al. 2017 defined the FID. It differs from the network that torchvision publishes: its average pools do not count the
padding, the last block pools by maximum, there are 1008 classes. Module names are those of the widely used file
``pt_inception-2015-12-05-6726825d.pth``, whose keys therefore fit without a map.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pantarhei.data import load_weights

FEATURES = 2048
_CLASSES = 1008
_SIDE = 299

_average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve = partial(F.max_pool2d, kernel_size=3, stride=2)


class _FrozenBatchNorm(nn.Module):
    """Batch normalisation by stored moments; it carries no batch counter, which the public file lacks as well."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)


class _Conv(nn.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = _FrozenBatchNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _wide(inputs: int, outputs: int, length: int) -> _Conv:
    return _Conv(inputs, outputs, (1, length), padding=(0, length // 2))


def _tall(inputs: int, outputs: int, length: int) -> _Conv:
    return _Conv(inputs, outputs, (length, 1), padding=(length // 2, 0))


class _BlockA(nn.Module):
    """35 x 35: convolutions 1x1, 5x5 and twice 3x3."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64)
        self.branch5x5_1 = _Conv(inputs, 48)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average_pool(x))], 1)


class _BlockB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, 2)
        self.branch3x3dbl_1 = _Conv(inputs, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), twice, _halve(x)], 1)


class _BlockC(nn.Module):
    """17 x 17: 7x7 convolutions taken apart into 1x7 and 7x1."""

    def __init__(self, inputs: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 192)
        self.branch7x7_1 = _Conv(inputs, inner)
        self.branch7x7_2 = _wide(inner, inner, 7)
        self.branch7x7_3 = _tall(inner, 192, 7)
        self.branch7x7dbl_1 = _Conv(inputs, inner)
        self.branch7x7dbl_2 = _tall(inner, inner, 7)
        self.branch7x7dbl_3 = _wide(inner, inner, 7)
        self.branch7x7dbl_4 = _tall(inner, inner, 7)
        self.branch7x7dbl_5 = _wide(inner, 192, 7)
        self.branch_pool = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_average_pool(x))], 1)


class _BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(inputs, 192)
        self.branch3x3_2 = _Conv(192, 320, 3, 2)
        self.branch7x7x3_1 = _Conv(inputs, 192)
        self.branch7x7x3_2 = _wide(192, 192, 7)
        self.branch7x7x3_3 = _tall(192, 192, 7)
        self.branch7x7x3_4 = _Conv(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, _halve(x)], 1)


class _BlockE(nn.Module):
    """8 x 8: 3x3 convolutions spread into 1x3 beside 3x1; the two blocks of this kind pool differently."""

    def __init__(self, inputs: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = _Conv(inputs, 320)
        self.branch3x3_1 = _Conv(inputs, 384)
        self.branch3x3_2a = _wide(384, 384, 3)
        self.branch3x3_2b = _tall(384, 384, 3)
        self.branch3x3dbl_1 = _Conv(inputs, 448)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _wide(384, 384, 3)
        self.branch3x3dbl_3b = _tall(384, 384, 3)
        self.branch_pool = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once)]
        parts += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice), self.branch_pool(self.pool(x))]
        return torch.cat(parts, 1)


class InceptionV3(nn.Module):
    """The network itself: 299 x 299 images in [-1, 1] to the 2048 numbers before its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _BlockA(192, 32)
        self.Mixed_5c = _BlockA(256, 64)
        self.Mixed_5d = _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(768, 128)
        self.Mixed_6c = _BlockC(768, 160)
        self.Mixed_6d = _BlockC(768, 160)
        self.Mixed_6e = _BlockC(768, 192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b = _BlockE(1280, _average_pool)
        self.Mixed_7c = _BlockE(2048, _max_pool)
        self.fc = nn.Linear(FEATURES, _CLASSES)  # for the inception score; unused by the features

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features, (B, 3, 299, 299) -> (B, 2048)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halve(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


class InceptionFeatures:
    """The extractor of published FID figures (features "pool3", 2048 wide).

    Images are rounded to 8 bits, as image files would be, and resized bilinearly to 299 x 299 without antialiasing, as
    the widely used PyTorch implementation does; figures of pipelines that resize with antialiasing differ slightly.

    Args:
        weights_path: the public file (``.pth``, read as tensors only) or the same tensors as ``.safetensors``.
        quantize: round images to 8 bits; False takes them as they are.

    Attributes:
        name: what tables print, with the first 8 digits of the file's SHA-256.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or no state dict of this network; names the first key that is missing,
            unexpected or of the wrong shape.
    """

    def __init__(self, weights_path: str | os.PathLike[str], *, quantize: bool = True) -> None:
        path = Path(weights_path)
        if not path.is_file():
            raise FileNotFoundError(
                f"weights_path: no file at {path}; it should be the public pt_inception-2015-12-05-6726825d.pth"
            )
        # Weights replace what initialisation would draw, so nothing is drawn.
        with torch.device("meta"):
            network = InceptionV3()
        network.load_state_dict(_fitting(path, load_weights(path), network), assign=True)
        self.network = network.eval().requires_grad_(False)
        self.quantize = quantize
        with path.open("rb") as file:
            self.name = f"Inception-v3 pool3 (weights {hashlib.file_digest(file, 'sha256').hexdigest()[:8]})"

    def __call__(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: (B, C, H, W) in [-1, 1], any size, C = 3, or 1 for grey.

        Returns:
            (B, 2048) on the network's device.

        Raises:
            ValueError: another shape.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must have shape (B, 3, H, W) or (B, 1, H, W), got {tuple(images.shape)}")
        weight = self.network.fc.weight
        images = images.to(weight.device, weight.dtype).expand(-1, 3, -1, -1)
        if self.quantize:
            images = ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        images = F.interpolate(images, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)
        return self.network(images)

    def logits(self, features: Tensor) -> Tensor:
        """Class scores for the inception score, (B, 2048) to (B, 1008), without biases as is the custom."""
        return features @ self.network.fc.weight.T

    def to(self, device: torch.device | str) -> Self:
        """Move to a device.

        Args:
            device: where to work from now on.

        Returns:
            Itself.
        """
        self.network.to(device)
        return self


def _fitting(path: Path, loaded: dict[str, Any], network: nn.Module) -> dict[str, Tensor]:
    """The loaded state without batch counters, which some copies of the file carry, after a check of every key."""
    state: dict[str, Tensor] = {}
    for key, value in loaded.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"weights_path: {key!r} in {path} is a {type(value).__name__}; a plain state dict is wanted"
            )
        if not key.endswith("num_batches_tracked"):
            state[key] = value.float()
    wanted = network.state_dict()
    for key, value in wanted.items():
        if key not in state:
            raise ValueError(f"weights_path: {path} lacks {key!r}; it must be the FID Inception-v3's state dict")
        if state[key].shape != value.shape:
            got, want = tuple(state[key].shape), tuple(value.shape)
            raise ValueError(f"weights_path: {key!r} in {path} has shape {got}, the FID Inception-v3 has {want}")
    for key in state:
        if key not in wanted:
            raise ValueError(f"weights_path: {path} has {key!r}, which the FID Inception-v3 does not have")
    return state
