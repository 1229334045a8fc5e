"""A small classifier trained on the data at hand: the feature extractor where no pretrained one is at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pantarhei.metrics.checks import positive

_FORMAT = "pantarhei classifier 1"


class SmallClassifier(nn.Module):
    """A convolutional classifier for images of 8 to 64 pixels and more.

    Pairs of 3x3 convolutions, halved to about 4x4 pixels, one hidden layer. GroupNorm instead of BatchNorm, so that the
    features of an image do not depend on other images, in training or after.

    Args:
        channels: channels of the images.
        size: height and width of the images, at least 8 each.
        classes: number of classes, at least 2.
        width: channels of the first stage; later ones have twice and four times as many.
        features: width of the penultimate layer.
    """

    def __init__(
        self, channels: int, size: tuple[int, int], classes: int, *, width: int = 32, features: int = 64
    ) -> None:
        super().__init__()
        if min(size) < 8:
            raise ValueError(f"size must be at least 8 pixels each way, got {size[0]} x {size[1]}")
        if classes < 2:
            raise ValueError(f"classes must be at least 2, got {classes}")
        self.channels, self.size, self.classes = channels, size, classes
        self.options = {"channels": channels, "size": size, "classes": classes, "width": width, "features": features}
        halvings = max(1, (min(size) // 4).bit_length() - 1)
        layers: list[nn.Module] = []
        previous = channels
        for stage in range(halvings):
            wide = width * min(2**stage, 4)
            layers += [*_block(previous, wide), *_block(wide, wide), nn.MaxPool2d(2)]
            previous = wide
        self.convolutions = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(previous * 16, features), nn.SiLU())
        self.head = nn.Linear(features, classes)

    def features(self, images: Tensor) -> Tensor:
        """The penultimate layer, (B, C, H, W) -> (B, features)."""
        return self.hidden(self.convolutions(images))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (B, C, H, W) -> (B, classes)."""
        return self.head(self.features(images))


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(8, outputs), nn.SiLU()]


class ClassifierFeatures:
    """A trained classifier as a feature extractor.

    Args:
        network: the classifier; put into evaluation mode, its parameters frozen.
        name: what tables print.

    Attributes:
        name: what tables print, such as "classifier trained on digits (1,437 images, held-out accuracy 98.9 %)".
    """

    def __init__(self, network: SmallClassifier, name: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.name = name

    def __call__(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: (B, C, H, W) in [-1, 1], of the channels and size it was trained on.

        Returns:
            (B, D) on the classifier's device.

        Raises:
            ValueError: the images have another shape than the training images.
        """
        return self.network.features(self._checked(images))

    def classify(self, images: Tensor) -> Tensor:
        """Logits of images; arguments and errors as for calling it.

        Args:
            images: (B, C, H, W) in [-1, 1].

        Returns:
            (B, classes) on the classifier's device.
        """
        return self.network(self._checked(images))

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images that are classified as their label says.

        Args:
            images: (N, C, H, W) in [-1, 1], N >= 1.
            labels: (N,) int64.

        Returns:
            A number in [0, 1].
        """
        guesses = torch.cat([self.classify(some).argmax(1) for some in images.split(512)])
        return float((guesses == labels.to(guesses.device)).double().mean())

    def to(self, device: torch.device | str) -> Self:
        """Move to a device.

        Args:
            device: where to work from now on.

        Returns:
            Itself.
        """
        self.network.to(device)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file whose header says how to rebuild the network; replaces an older file at once.

        Args:
            path: the file.
        """
        from safetensors.torch import save_file

        path = Path(path)
        header = {"format": _FORMAT, "name": self.name, "network": self.network.options}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            tensors = {key: value.cpu().contiguous() for key, value in self.network.state_dict().items()}
            save_file(tensors, temporary, metadata={"pantarhei": json.dumps(header)})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Args:
            path: the file.

        Returns:
            The extractor, on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or something else.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"path: no classifier at {path}; write one with ClassifierFeatures.save")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("pantarhei", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            if header.get("format") != _FORMAT:
                raise ValueError(f"its format is {header.get('format')!r}, expected {_FORMAT!r}")
            options = {**header["network"], "size": tuple(header["network"]["size"])}
            with torch.device("meta"):
                network = SmallClassifier(**options)
            network.load_state_dict(tensors, assign=True)
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"path: {path} is no saved classifier ({str(error).splitlines()[0]})") from error
        return cls(network, header["name"])

    def _checked(self, images: Tensor) -> Tensor:
        channels, (height, width) = self.network.channels, self.network.size
        if images.ndim != 4 or tuple(images.shape[1:]) != (channels, height, width):
            raise ValueError(
                f"images must have shape (B, {channels}, {height}, {width}) like those that the classifier was "
                f"trained on, got {tuple(images.shape)}"
            )
        weight = self.network.head.weight
        return images.to(weight.device, weight.dtype)


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    classes: int | None = None,
    iterations: int = 400,
    seed: int = 0,
    held_out: tuple[Tensor, Tensor] | None = None,
    data: str = "the given images",
    on_iteration: Callable[[int], None] | None = None,
) -> ClassifierFeatures:
    """Train a `SmallClassifier` with a fixed recipe; the same seed and images give the same weights.

    AdamW with one cosine cycle, batches of 128 images each shifted by up to one pixel, label smoothing 0.1 (which keeps
    the scale of the features from growing with training). Touches no global random state.

    Args:
        images: (N, C, H, W) in [-1, 1], H and W at least 8; training runs on their device.
        labels: (N,) int64, from 0.
        classes: number of classes; None takes the largest label plus one.
        iterations: number of batches.
        seed: of the initial weights, the order and the shifts.
        held_out: images and labels that are not trained on; their accuracy becomes part of the name.
        data: what the images are, for the name.
        on_iteration: called with the number of batches done, for a progress bar.

    Returns:
        The trained extractor.

    Raises:
        TypeError: an argument is no tensor, or the images are not floating point.
        ValueError: shapes, sizes, labels or numbers that do not fit, or images that are not finite.
    """
    positive("iterations", iterations)
    images, labels, classes = _checked_data(images, labels, classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallClassifier(images.shape[1], (images.shape[2], images.shape[3]), classes)
    network.to(images.device)
    _fit(network, images, labels, iterations, torch.Generator().manual_seed(seed), on_iteration)
    extractor = ClassifierFeatures(network, "")
    accuracy = "" if held_out is None else f", held-out accuracy {extractor.accuracy(*held_out):.1%}".replace("%", " %")
    extractor.name = f"classifier trained on {data} ({images.shape[0]:,} images{accuracy})"
    return extractor


def _fit(
    network: SmallClassifier,
    images: Tensor,
    labels: Tensor,
    iterations: int,
    generator: torch.Generator,
    on_iteration: Callable[[int], None] | None,
) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=iterations + 1, pct_start=0.1)
    order = torch.empty(0, dtype=torch.int64)
    batch = min(128, images.shape[0])
    for done in range(1, iterations + 1):
        if len(order) < batch:
            order = torch.randperm(images.shape[0], generator=generator)
        index, order = order[:batch].to(images.device), order[batch:]
        with torch.enable_grad():
            logits = network(_shifted(images[index], generator))
            loss = F.cross_entropy(logits, labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
        if on_iteration is not None:
            on_iteration(done)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixels in each direction; its edge fills the gap."""
    count, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    down, right = torch.randint(3, (2, count, 1), generator=generator).to(images.device)
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    which = torch.arange(count, device=images.device)[:, None, None]
    # Indexing on both sides of a slice puts the channels last.
    return padded[which, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _checked_data(images: Tensor, labels: Tensor, classes: int | None) -> tuple[Tensor, Tensor, int]:
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if images.ndim != 4 or images.shape[0] == 0:
        raise ValueError(f"images must have shape (N, C, H, W) with N >= 1, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [-1, 1], got {images.dtype}")
    if not bool(torch.isfinite(images).all()):
        raise ValueError("images have NaN or infinite values; pixels must be finite, in [-1, 1]")
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be whole numbers of shape ({images.shape[0]},), got {labels.dtype} {tuple(labels.shape)}"
        )
    lowest, highest = int(labels.min()), int(labels.max())
    classes = highest + 1 if classes is None else classes
    if lowest < 0 or highest >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1} for {classes} classes, got {lowest}..{highest}")
    return images.float(), labels.to(images.device, torch.int64), classes
