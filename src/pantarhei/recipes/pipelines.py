"""Data for text-to-image models: prompts, captioned pictures, and their latents in a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pantarhei.data import Source
from pantarhei.data.shards import ShardStore
from pantarhei.flow import Flow
from pantarhei.images.decode import decode
from pantarhei.images.files import SUFFIXES
from pantarhei.images.pixels import from_uint8
from pantarhei.networks.diffusers_models import DiffusersNetwork

Tokenize = Callable[[Sequence[str]], Tensor]


class Prompts:
    """Prompts as a source of conditions: `tokens` (B, L), and no data.

    Args:
        prompts: the texts.
        tokenize: texts to token ids.
        name: what tables call them.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, prompts: Sequence[str], tokenize: Tokenize, name: str = "prompts"):
        if not prompts:
            raise ValueError(f"prompts: {name} holds none; give one a line")
        self.prompts, self.name, self._tokenize = list(prompts), name, tokenize

    def __len__(self) -> int:
        return len(self.prompts)

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """The token ids of the prompts at `indices` (B,)."""
        return {"tokens": self._tokenize([self.prompts[i] for i in indices.tolist()])}

    def describe(self) -> dict[str, Any]:
        """Name, kind and count."""
        return {"name": self.name, "kind": "prompts", "count": len(self)}


class CaptionedImages(Prompts):
    """Pictures with captions: `x1` (B, 3, size, size) in [-1, 1] and `tokens`.

    A picture `name.png` (or jpg, ...) has its caption in `name.txt` beside it. The short side is brought to `size`
    (Lanczos) and the centre square cut out.

    Args:
        folder: of pictures and texts.
        size: side in pixels.
        tokenize: texts to token ids.

    Raises:
        FileNotFoundError: there are no pictures, or one has no caption.
    """

    def __init__(self, folder: str | Path, size: int, tokenize: Tokenize):
        folder = Path(folder)
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
        if not files:
            raise FileNotFoundError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
        without = next((p for p in files if not p.with_suffix(".txt").is_file()), None)
        if without is not None:
            raise FileNotFoundError(f"{without} has no caption {without.with_suffix('.txt').name} beside it")
        captions = [p.with_suffix(".txt").read_text(encoding="utf-8").strip() for p in files]
        super().__init__(captions, tokenize, folder.name)
        self._files, self.size = files, size

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """The pictures at `indices` (B,) with their token ids.

        Raises:
            ValueError: a picture cannot be read.
        """
        pixels = [decode(self._files[i].read_bytes(), str(self._files[i]), self.size, 3) for i in indices.tolist()]
        x1 = torch.stack([from_uint8(torch.tensor(p)) for p in pixels])
        return {"x1": x1, **super().fetch(indices)}

    def describe(self) -> dict[str, Any]:
        """Name, kind, count and shape."""
        return {**super().describe(), "kind": "captioned images", "shape": [3, self.size, self.size]}


def open_prompts(flow: Flow, where: str | Path, *, size: int | None = None) -> Prompts:
    """Prompts or captioned pictures for a flow.

    `make_pairs(flow, ..., conditions=open_prompts(flow, "prompts.txt"))` makes pairs of them.

    Args:
        flow: around a `DiffusersNetwork` that has text encoders.
        where: a text file with a prompt a line, or a folder of pictures `name.png` with captions `name.txt`; a folder
            without pictures gives its captions alone.
        size: side of the pictures; by default that of the flow's samples in pixels.

    Raises:
        FileNotFoundError: there is no such file or folder, or nothing in it.
        ValueError: the flow reads no prompts, or the side is not known.
    """
    tokenize, where = tokenizer_of(flow), Path(where)
    if where.is_file():
        lines = where.read_text(encoding="utf-8").splitlines()
        return Prompts([line.strip() for line in lines if line.strip()], tokenize, where.name)
    if not where.is_dir():
        raise FileNotFoundError(f"there is no file of prompts or folder {where}")
    if not any(p.suffix.lower() in SUFFIXES for p in where.iterdir()):
        texts = sorted(where.glob("*.txt"))
        if not texts:
            raise FileNotFoundError(f"{where} holds neither pictures nor texts")
        return Prompts([p.read_text(encoding="utf-8").strip() for p in texts], tokenize, where.name)
    if size is None:
        factor = 1 if flow.codec is None else getattr(flow.codec, "factor", None)
        if flow.shape is None or factor is None:
            raise ValueError("size: the side of the pictures is not known; give size=")
        size = flow.shape[-1] * int(factor)
    return CaptionedImages(where, size, tokenize)


def tokenizer_of(flow: Flow) -> Tokenize:
    """What turns prompts into the flow's token ids.

    Raises:
        ValueError: the flow reads no prompts.
    """
    if not isinstance(flow.network, DiffusersNetwork) or "tokens" not in flow.conditions:
        raise ValueError(
            f"flow: it reads no prompts; its conditions are {', '.join(flow.conditions) or 'none'}, and prompts need a "
            "diffusers pipeline with text encoders"
        )
    return flow.network.tokenize


def write_latents(
    flow: Flow, data: Source, folder: str | Path, *, batch: int = 16, shard_size: int = 1024, seed: int | None = None
) -> ShardStore:
    """Encode pictures once: a resumable store of latents `x1`, with their conditions, to train on without the autoencoder.

    Args:
        flow: whose codec encodes; set its `codec` to None to train on the store.
        data: pictures, such as `CaptionedImages`.
        folder: of the store.
        batch: pictures encoded at a time.
        shard_size: latents in a file.
        seed: draw each latent from the encoder's law; None takes its mode.

    Raises:
        ValueError: the flow has no codec, a latent is not finite, or the store was begun with other data.
    """
    if flow.codec is None:
        raise ValueError("flow: it has no codec to encode pictures with")
    header = {"kind": "latents", "data": data.describe(), "shape": list(flow.shape or ()), "seed": seed}
    store = ShardStore.create(folder, len(data), header, shard_size=shard_size)
    for shard in store.missing():
        parts = []
        options: dict[str, Any] = {}
        if seed is not None:
            options["generator"] = torch.Generator(flow.device).manual_seed(seed + shard)
        for numbers in torch.tensor(store.items(shard)).split(batch):
            items = data.fetch(numbers)
            latents = flow.codec.encode(items["x1"].to(flow.device), **options)
            parts.append({**items, "x1": latents.float().cpu()})
        store.write(shard, {name: torch.cat([p[name] for p in parts]) for name in parts[0]})
    return store
