"""The VGG16 feature network behind LPIPS, for weight files that the user supplies.

VGG16 (Simonyan and Zisserman 2014, arXiv:1409.1556, configuration D) up to its last convolution. Module names are those of
torchvision's published file, whose `features.*` keys therefore fit without a map.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.data import load_weights
from pantarhei.data.torch_files import read_torch

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16Features(nn.Module):
    """Thirteen convolutions in five stages; the output of each stage's last ReLU (relu1_2, 2_2, 3_3, 4_3, 5_3).

    Args:
        average_pooling: halve by averages between stages, as piq's LPIPS may; the classifier's own pooling is by maximum.
        divisor: of all channel counts, for small networks of random weights.

    A map of one row or column is not halved any more, so that images below 16 x 16 pass through as well.

    Raises:
        ValueError: the divisor leaves no channel.
    """

    def __init__(self, *, average_pooling: bool = True, divisor: int = 1):
        super().__init__()
        if not 1 <= divisor <= STAGES[0][0]:
            raise ValueError(f"divisor: must lie in 1..{STAGES[0][0]}, got {divisor}")
        self.average_pooling = average_pooling
        self.widths = tuple(stage[-1] // divisor for stage in STAGES)
        layers: list[nn.Module] = []
        inputs = 3
        for number, stage in enumerate(STAGES):
            if number:
                layers.append(_Halve(average_pooling))
            for channels in stage:
                layers += [nn.Conv2d(inputs, channels // divisor, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = channels // divisor
        self.features = nn.Sequential(*layers)

    @staticmethod
    def from_file(path: str | Path, *, average_pooling: bool = True) -> VGG16Features:
        """The network with the weights of a file, frozen.

        Args:
            path: torchvision's `vgg16-397923af.pth` or the same tensors as `.safetensors`, with or without the classifier.
            average_pooling: see the class.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or not this network's state dict; names the first key that does not fit.
        """
        state = _fitting(path, load_weights(path))
        # Weights replace what initialisation would draw, so nothing is drawn.
        with torch.device("meta"):
            network = VGG16Features(average_pooling=average_pooling)
        for key, wanted in network.state_dict().items():
            if key not in state:
                raise ValueError(f"vgg: {path} lacks {key!r}; expected torchvision's VGG16 (vgg16-397923af.pth)")
            if state[key].shape != wanted.shape:
                got, want = tuple(state[key].shape), tuple(wanted.shape)
                raise ValueError(f"vgg: {key!r} in {path} has shape {got}, VGG16 has {want}")
        network.load_state_dict({key: state[key] for key in network.state_dict()}, assign=True)
        return network.eval().requires_grad_(False)

    @staticmethod
    def random(seed: int = 0, *, average_pooling: bool = True, divisor: int = 1) -> VGG16Features:
        """Fixed random weights, frozen: variance 2 / fan-in (He et al. 2015, 1502.01852), zero biases."""
        with torch.device("meta"):
            network = VGG16Features(average_pooling=average_pooling, divisor=divisor)
        network.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in network.features:
                if isinstance(layer, nn.Conv2d):
                    layer.weight.normal_(0.0, math.sqrt(2 / layer.weight[0].numel()), generator=generator)
                    layer.bias.zero_()  # type: ignore[union-attr]
        return network.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to five feature maps (B, F, h, w)."""
        maps = []
        for layer in self.features:
            if isinstance(layer, _Halve):
                maps.append(x)
            x = layer(x)
        return [*maps, x]


class _Halve(nn.Module):
    def __init__(self, average: bool):
        super().__init__()
        self.pool = F.avg_pool2d if average else F.max_pool2d

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x, 2) if min(x.shape[-2:]) > 1 else x


def linear_weights(path: str | Path) -> list[Tensor]:
    """The five channel weights of LPIPS from a file.

    Args:
        path: the official `vgg.pth` (keys `lin0.model.1.weight` to `lin4.model.1.weight`), or five tensors as a list or by
            names with a number in them, as other packages ship them; `.pth`, `.pt` or `.safetensors`.

    Returns:
        Weights (F,) of the five stages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or does not hold five tensors of VGG16's channels.
    """
    path = Path(path)
    loaded = _listed(path) or load_weights(path)
    if isinstance(loaded, Mapping):
        weights = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
        numbered = {key: re.search(r"\d+", key) for key in weights}
        if not all(numbered.values()):
            raise ValueError(f"linear: {path} holds {', '.join(list(weights)[:5])}; expected lin0 to lin4 of LPIPS")
        loaded = [weights[key] for key in sorted(weights, key=lambda key: int(numbered[key][0]))]  # type: ignore[index]
    shapes = [tuple(value.shape) for value in loaded]
    if [(value.numel(), max(shape, default=0)) for value, shape in zip(loaded, shapes, strict=True)] != [
        (stage[-1], stage[-1]) for stage in STAGES
    ]:
        wanted = ", ".join(f"(1, {stage[-1]}, 1, 1)" for stage in STAGES)
        raise ValueError(f"linear: {path} holds shapes {', '.join(map(str, shapes))}; LPIPS for VGG16 has {wanted}")
    return [value.detach().float().flatten() for value in loaded]


def _listed(path: Path) -> Sequence[Tensor] | None:
    """The tensors of a file that holds a plain list of them, which `load_weights` has no names for."""
    if not path.is_file() or path.suffix == ".safetensors":
        return None
    try:
        loaded = read_torch(path)
    except ValueError:  # `load_weights` tells what is wrong
        return None
    plain = isinstance(loaded, (list, tuple)) and loaded and all(isinstance(value, Tensor) for value in loaded)
    return loaded if plain else None


def _fitting(path: str | Path, loaded: Mapping[str, Any]) -> dict[str, Tensor]:
    """The convolutions' tensors by our keys; a state dict of torchvision's `features` alone lacks the prefix."""
    nested = loaded.get("state_dict", loaded)
    if not isinstance(nested, Mapping):
        got = type(nested).__name__
        raise ValueError(f"vgg: 'state_dict' in {path} is a {got}; expected the state dict of torchvision's VGG16")
    found = {}
    for key, value in nested.items():
        if isinstance(value, Tensor) and isinstance(key, str):
            found[f"features.{key}" if re.match(r"\d", key) else key] = value.float()
    if not any(key.startswith("features.") for key in found):
        names = ", ".join([str(key) for key in nested][:3]) or "nothing"
        raise ValueError(f"vgg: {path} holds {names}, ...; expected the state dict of torchvision's VGG16")
    return found
