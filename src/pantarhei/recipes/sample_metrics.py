"""Measures of samples by name: a function of a file, a classifier of a run's data, CLIP."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pantarhei.metrics import ClassifierFeatures
from pantarhei.recipes.optimization import Metric, OfRows


def function_of(text: str) -> Callable[..., Any]:
    """The function that `FILE.py:name` says; the file is run, as Python runs it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no such function, or does not run.
    """
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not name or path.suffix != ".py":
        raise ValueError(f"a function is given as FILE.py:name, got {text!r}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec: Any = importlib.util.spec_from_file_location(f"pantarhei_user_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} does not run: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{path} has no function {name!r}; it has {', '.join(known) or 'none'}")
    return found


def classified_as(classifier: ClassifierFeatures, label: int) -> Metric:
    """-log of the chance that a classifier gives images of a label.

    Raises:
        ValueError: it does not know the label.
    """
    classes = classifier.network.head.weight.shape[0]
    if not 0 <= label < classes:
        raise ValueError(f"label: the classifier knows 0 to {classes - 1}, got {label}")

    def measure(x: Tensor) -> Tensor:
        logits = classifier.classify(x)
        return F.cross_entropy(logits, torch.full((len(x),), label, device=logits.device), reduction="none")

    return measure


def like_example(example: Tensor) -> OfRows:
    """Mean squared difference to examples (n, ...): sample i to example i, modulo their number."""

    def measure(x: Tensor, rows: Tensor) -> Tensor:
        wanted = example.to(x)[rows.to(x.device) % len(example)]
        return (x - wanted).square().flatten(1).mean(dim=1)

    return OfRows(measure)


def clip_similarity(folder: str | Path, prompt: str) -> Metric:
    """1 - cosine similarity of images and a text by CLIP (Radford et al. 2103.00020), from a folder of transformers.

    Raises:
        FileNotFoundError: there is no such folder.
        ImportError: transformers is not installed.
        ValueError: the folder holds no CLIP model with its tokenizer.
    """
    try:
        from transformers import CLIPModel, CLIPTokenizer
    except ImportError:
        raise ImportError("CLIP needs transformers: pip install 'pantarhei[diffusers]'") from None
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"clip: there is no folder {folder}")
    try:
        model: Any = CLIPModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"clip: {folder} holds no CLIP model with its tokenizer ({str(error).splitlines()[0]})"
        ) from None
    tokens = tokenizer([prompt], padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        text = F.normalize(_embedded(model.get_text_features(**tokens)), dim=-1)
    side = model.config.vision_config.image_size
    mean, deviation = (
        torch.tensor(values)[:, None, None]
        for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )

    def measure(x: Tensor) -> Tensor:
        images = (x.clamp(-1, 1) + 1) / 2
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        images = F.interpolate(images, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
        model.to(x.device)
        seen = (images - mean.to(x)) / deviation.to(x)
        found = F.normalize(_embedded(model.get_image_features(pixel_values=seen.to(model.dtype))), dim=-1)
        return 1 - (found @ text.to(found).T)[:, 0]

    return measure


def _embedded(output: Any) -> Tensor:
    """The embedding, which newer versions of transformers wrap."""
    return output if isinstance(output, Tensor) else output.pooler_output
