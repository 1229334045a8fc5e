"""Images: opening sets of them, pixels, and augmentations."""

from pantarhei.images.augment import (
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
from pantarhei.images.pixels import from_uint8, to_uint8
from pantarhei.images.sources import ImageSource, open_images

__all__ = [
    "AUGMENTATIONS",
    "Compose",
    "HorizontalFlip",
    "ImageSource",
    "RandomCrop",
    "RandomShift",
    "augmentation",
    "from_uint8",
    "horizontal_flip",
    "open_images",
    "random_crop",
    "random_shift",
    "to_uint8",
]
