"""The autoencoder of a diffusers pipeline as a flow's codec: images in [-1, 1] to latents and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pantarhei.files import read_json
from pantarhei.naming import unknown
from pantarhei.networks.diffusers_models import import_diffusers

ROWS = 8  # images decoded at a time: a decoder needs far more memory than the flow


class LatentCodec:
    """z = (E(x) - shift_factor) scaling_factor, of an `AutoencoderKL`; frozen, float32, loaded when it is first used.

    Latents may have means and deviations of their own (`latents_mean`, `latents_std`), which then come first.

    Args:
        folder: of the autoencoder (`vae` in a pipeline).

    Attributes:
        factor: how many times smaller a latent's side is.

    Raises:
        FileNotFoundError, ValueError: the folder holds no `AutoencoderKL`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        settings = read_json(self.folder / "config.json")
        if settings.get("_class_name") != "AutoencoderKL":
            raise ValueError(
                f"{self.folder}: {unknown('autoencoder', str(settings.get('_class_name')), ['AutoencoderKL'])}"
            )
        self.factor = 2 ** (len(settings.get("block_out_channels", (64,))) - 1)
        self._model: Any = None

    def __deepcopy__(self, memo: Any) -> LatentCodec:
        return self

    @torch.no_grad()
    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) to latents (B, C, h, w): the most likely ones, or a draw where a generator is given."""
        model = self._on(x.device)
        parts = []
        for part in x.float().split(ROWS):
            law = model.encode(part).latent_dist
            parts.append(law.mode() if generator is None else law.sample(generator))
        z = torch.cat(parts)
        mean, deviation, shift, scale = self._numbers(z)
        return ((z - mean) / deviation - shift).mul(scale).to(x.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """Latents to images in [-1, 1]."""
        model = self._on(z.device)
        mean, deviation, shift, scale = self._numbers(z.float())
        plain = (z.float() / scale + shift) * deviation + mean
        return torch.cat([model.decode(part).sample for part in plain.split(ROWS)]).clamp(-1, 1).to(z.dtype)

    def _numbers(self, z: Tensor) -> tuple[Tensor | float, Tensor | float, float, float]:
        config = self._model.config
        mean, deviation = (config.get(name) for name in ("latents_mean", "latents_std"))
        if mean is None or deviation is None:
            return 0.0, 1.0, float(config.get("shift_factor") or 0.0), float(config.scaling_factor)
        rows = [z.new_tensor(list(v)).reshape(1, -1, 1, 1) for v in (mean, deviation)]
        return rows[0], rows[1], float(config.get("shift_factor") or 0.0), float(config.scaling_factor)

    def _on(self, device: torch.device) -> Any:
        if self._model is None:
            model = import_diffusers().AutoencoderKL.from_pretrained(self.folder, local_files_only=True)
            self._model = model.eval().requires_grad_(False)
        return self._model.to(device)
