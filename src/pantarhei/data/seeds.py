"""Seeds of independent random streams."""

from __future__ import annotations

import torch


def mix(*values: int) -> int:
    """Hash integers to a 63-bit seed (splitmix64 rounds), so that neighbouring seeds give unrelated streams."""
    state = 0
    for value in values:
        state = (state + (value & 0xFFFFFFFFFFFFFFFF) + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0x7FFFFFFFFFFFFFFF


def generator(*values: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `mix`."""
    return torch.Generator(device).manual_seed(mix(*values))
