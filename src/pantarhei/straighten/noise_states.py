"""Noise kept as the state of the generator that draws it: 32 bytes instead of four a number.

Rectified flow++ (2405.20320) stores a pair's noise as the two 128-bit numbers of NumPy's PCG64 before the draw, its state
and the increment of its stream, big-endian one after the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pantarhei.flow import Flow
from pantarhei.flow.numbered import Conditions, path_noise

STATE_BYTES = 32
BIT_GENERATOR = "PCG64"


def numbered_state(seed: int, number: int) -> bytes:
    """The state from which noise `number` of a seed is drawn: a `SeedSequence` child of its own."""
    state = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(number,))).state["state"]
    return b"".join(int(state[name]).to_bytes(16, "big") for name in ("state", "inc"))


def noise_from_states(states: Sequence[bytes], shape: Sequence[int], names: Sequence[str] | None = None) -> Tensor:
    """Unit normal noise of stored generator states.

    Args:
        states: 32 bytes a row: PCG64's state and increment, each 16 bytes, big-endian.
        shape: of one draw.
        names: what errors call the rows.

    Returns:
        float32 (B, *shape): each row is `standard_normal` in float64, rounded.

    Raises:
        ValueError: a state is not 32 bytes long, or its increment is even, which PCG64's never is.
    """
    bits = np.random.PCG64(0)  # one generator, moved from state to state: making one costs more than a small draw
    generator = np.random.Generator(bits)
    out = np.empty((len(states), *shape), dtype=np.float32)
    drawn = np.empty(tuple(shape))
    for row, content in enumerate(states):
        name = names[row] if names is not None else f"states[{row}]"
        if len(content) != STATE_BYTES:
            raise ValueError(f"{name} has {len(content)} bytes; a PCG64 state is {STATE_BYTES}: state, then increment")
        state, increment = (int.from_bytes(content[k : k + 16], "big") for k in (0, 16))
        if increment % 2 == 0:
            raise ValueError(f"{name} is no PCG64 state: its increment (bytes 16 to 31) must be odd, got an even one")
        bits.state = {
            "bit_generator": BIT_GENERATOR,
            "state": {"state": state, "inc": increment},
            "has_uint32": 0,
            "uinteger": 0,
        }
        generator.standard_normal(out=drawn)
        out[row] = drawn
    return torch.from_numpy(out)


def checksum(noise: Tensor) -> str:
    """SHA-256 (hexadecimal) of noise as little-endian float32."""
    return hashlib.sha256(noise.numpy().astype("<f4").tobytes()).hexdigest()


def state_samples(
    flow: Flow, numbers: Sequence[int], *, seed: int, conditions: Conditions, batch: int = 256, **options: Any
) -> Iterator[dict[str, Tensor]]:
    """Samples in batches, from noise of generator states: `state` uint8 (B, 32), `x1` float32, the conditions; on the CPU.

    The twin of `flow.numbered.numbered_samples`.

    Args:
        flow: the flow, from unit normal noise.
        numbers: which samples.
        seed: of their states.
        conditions: of these numbers.
        batch: rows at a time.
        options: of `Flow.sample`.
    """
    assert flow.shape is not None
    stochastic = options.get("epsilon") is not None or flow.stochastic
    for first in range(0, len(numbers), batch):
        part = numbers[first : first + batch]
        condition = conditions(part)
        states = [numbered_state(seed, number) for number in part]
        x0 = noise_from_states(states, flow.shape).to(flow.device, flow.dtype)
        if stochastic:
            options["noise"] = path_noise(seed, part)
        x1 = flow.sample(x0=x0, condition=condition or None, **options)
        kept = torch.from_numpy(np.frombuffer(b"".join(states), dtype=np.uint8).reshape(-1, STATE_BYTES).copy())
        yield {"state": kept, "x1": x1.float().cpu(), **{name: value.cpu() for name, value in condition.items()}}
