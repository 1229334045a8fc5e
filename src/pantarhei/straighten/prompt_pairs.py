"""Pairs as the code of Rectified Diffusion keeps them: a text, a picture, a noise and a latent file for each.

`<device>_<i:08d>.txt` holds the prompt, `noise_<device>_<i:08d>.pth` and `latent_<device>_<i:08d>.pth` one tensor (C, h, w)
each, mostly float16, and `<device>_<i:08d>.png` the decoded picture, which training does not need.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pantarhei.data.torch_files import read_torch
from pantarhei.files import write_atomically

Tokenize = Callable[[Sequence[str]], Tensor]
NOISE, LATENT = "noise_", "latent_"


class PromptPairs:
    """Such a folder as a source of pairs: `x0` (the noise), `x1` (the latent), float32, and `tokens` of the prompt.

    Only the names are read at first. The folder does not say how its pairs were made.

    Args:
        folder: the folder.
        tokenize: prompts to token ids (B, L), such as `flow.network.tokenize`.
        guidance: scale with which the pairs were made; the published recipe took 5.

    Raises:
        FileNotFoundError: there are no pairs, or one lacks its noise or latent.
    """

    def __init__(self, folder: str | Path, tokenize: Tokenize, *, guidance: float = 5.0):
        self.folder, self.name = Path(folder), Path(folder).name
        self._tokenize = tokenize
        there = {entry.name for entry in self.folder.iterdir()} if self.folder.is_dir() else set()
        self._stems = sorted(name.removesuffix(".txt") for name in there if name.endswith(".txt"))
        if not self._stems:
            raise FileNotFoundError(
                f"{folder} holds no pairs: expected DEVICE_NUMBER.txt, noise_*.pth and latent_*.pth"
            )
        for stem in self._stems:
            for name in (f"{NOISE}{stem}.pth", f"{LATENT}{stem}.pth"):
                if name not in there:
                    raise FileNotFoundError(f"{folder}: {stem}.txt has no {name}")
        self._shape = tuple(self._tensor(f"{LATENT}{self._stems[0]}.pth").shape)
        self.header: dict[str, Any] = {
            "kind": "pairs",
            "count": len(self),
            "guidance": guidance,
            "conditions": ["tokens"],
            "teacher": "",
            "flow": {"shape": list(self._shape), "source": {"name": "normal"}},
        }

    def __len__(self) -> int:
        return len(self._stems)

    def missing(self) -> list[int]:
        """None ever are."""
        return []

    def prompts(self, indices: Sequence[int]) -> list[str]:
        """The texts of some pairs."""
        return [(self.folder / f"{self._stems[i]}.txt").read_text(encoding="utf-8").strip() for i in indices]

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """The pairs at `indices` (B,).

        Raises:
            ValueError: a file is damaged, or a pair has another shape or holds NaN or infinity.
        """
        rows = indices.tolist()
        out = {
            name: torch.stack([self._checked(f"{prefix}{self._stems[i]}.pth") for i in rows])
            for name, prefix in (("x0", NOISE), ("x1", LATENT))
        }
        return {**out, "tokens": self._tokenize(self.prompts(rows))}

    def tensors(self, limit: int | None = None) -> dict[str, Tensor]:
        """The first `limit` pairs."""
        return self.fetch(torch.arange(min(len(self), limit or len(self))))

    def describe(self) -> dict[str, Any]:
        """The header."""
        return {"name": self.name, **self.header}

    def _checked(self, name: str) -> Tensor:
        tensor = self._tensor(name)
        if tuple(tensor.shape) != self._shape:
            raise ValueError(f"{self.folder / name}: shape {tuple(tensor.shape)}, the first pair has {self._shape}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{self.folder / name} holds NaN or infinity; remove this pair")
        return tensor

    def _tensor(self, name: str) -> Tensor:
        path = self.folder / name
        tensor = read_torch(path)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path} holds a {type(tensor).__name__}; one tensor is needed")
        return (tensor[0] if tensor.ndim == 4 and len(tensor) == 1 else tensor).float()


def write_prompt_pairs(
    pairs: Any, prompts: Sequence[str], folder: str | Path, *, first: int = 0, dtype: torch.dtype = torch.float16
) -> Path:
    """Write pairs in this layout, for the published training script (pictures are left out).

    Args:
        pairs: a `PairSource`, or a batch with `x0` and `x1`.
        prompts: one a pair.
        folder: where to.
        first: number of the first pair.
        dtype: of the files.

    Raises:
        ValueError: another number of prompts than of pairs; or a value that is NaN or, as float16 is now and then, infinite
            in `dtype`. Nothing of that pair is written.
    """
    batch = pairs if isinstance(pairs, dict) else pairs.tensors()
    if len(prompts) != len(batch["x1"]):
        raise ValueError(f"prompts: {len(batch['x1'])} are needed, one a pair, got {len(prompts)}")
    folder = Path(folder)
    for i, prompt in enumerate(prompts):
        stem = f"0_{first + i:08d}"
        tensors = {NOISE: batch["x0"][i].to(dtype), LATENT: batch["x1"][i].to(dtype)}
        for prefix, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"pair {first + i}: {prefix.rstrip('_')} holds NaN or infinity as {dtype}; not written"
                )
        for prefix, tensor in tensors.items():
            buffer = io.BytesIO()
            torch.save(tensor.cpu().clone(), buffer)  # a view would bring its whole batch along
            write_atomically(folder / f"{prefix}{stem}.pth", buffer.getvalue())
        write_atomically(folder / f"{stem}.txt", prompt.encode())
    return folder
