"""Where pairs come from besides `make_pairs`: arrays of the reference code, and a teacher that answers at once.

Whatever holds pairs for reflow and distillation is a data source with a `header` that says how they were made and
`missing()`; `open_pairs` finds out what a folder is, and `check_pairs` refuses pairs that do not belong to a flow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pantarhei.data import Source, Subset
from pantarhei.data.shards import HEADER, ShardStore
from pantarhei.flow import Flow
from pantarhei.flow.numbered import Conditions, join, numbered_conditions, numbered_samples
from pantarhei.flow.pretrained import fingerprint
from pantarhei.straighten.pairs import Solver, inspect_pairs, make_pairs, pair_header, pair_stream
from pantarhei.straighten.state_pairs import StatePairs, holds_states


@runtime_checkable
class PairSource(Source, Protocol):
    """A data source of `x0`, `x1` and conditions, with its history."""

    header: dict[str, Any]

    def missing(self) -> list[int]:
        """Parts that are not there yet."""
        ...

    def tensors(self, limit: int | None = None) -> dict[str, Tensor]:
        """The first `limit` pairs."""
        ...


class ArrayPairs:
    """Pairs as the rectified flow code keeps them: `<root>/<seed>/z0.npy` and `z1.npy`, float32 (N, ...), several seeds.

    The arrays stay on disk (memory-mapped).

    Args:
        root: the folder of the seeds' folders, or one of these.
        gaussian: x0 is unit normal noise (else it is data of another set).

    Raises:
        FileNotFoundError: there are no such arrays, or one of two is missing.
        ValueError: an array is truncated or of another type, or the arrays differ in shape.
    """

    def __init__(self, root: str | Path, *, gaussian: bool = True):
        root = Path(root)
        folders = [root] if (root / "z0.npy").is_file() else sorted(p.parent for p in root.glob("*/z0.npy"))
        if not folders:
            raise FileNotFoundError(f"{root} holds no pairs: expected z0.npy and z1.npy in it or in folders inside it")
        self._x0 = [_array(folder / "z0.npy") for folder in folders]
        self._x1 = [_array(folder / "z1.npy") for folder in folders]
        shape = self._x0[0].shape[1:]
        for folder, x0, x1 in zip(folders, self._x0, self._x1, strict=True):
            if x0.shape != x1.shape or x0.shape[1:] != shape:
                raise ValueError(
                    f"{folder}: z0 has shape {x0.shape}, z1 {x1.shape}; expected (N, {', '.join(map(str, shape))})"
                )
        self.folder = root
        self._ends = np.cumsum([len(x) for x in self._x0])
        self.name = root.name
        source = {"name": "normal"} if gaussian else {"name": "samples", "count": len(self)}
        self.header: dict[str, Any] = {
            "kind": "pairs",
            "count": len(self),
            "guidance": 1.0,
            "conditions": [],
            "teacher": "",
            "flow": {"shape": list(shape), "source": source},
        }

    def __len__(self) -> int:
        return int(self._ends[-1])

    def missing(self) -> list[int]:
        """None ever are."""
        return []

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """The pairs at `indices` (B,).

        Raises:
            ValueError: a pair holds NaN or infinity.
        """
        which = np.searchsorted(self._ends, indices.numpy(), side="right")
        out = {}
        for name, arrays in (("x0", self._x0), ("x1", self._x1)):
            rows = [
                arrays[k][i - (self._ends[k - 1] if k else 0)] for k, i in zip(which, indices.tolist(), strict=True)
            ]
            out[name] = torch.from_numpy(np.stack(rows))
            if not bool(out[name].isfinite().all()):
                raise ValueError(f"pairs {self.name}: {name} holds NaN or infinity")
        return out

    def tensors(self, limit: int | None = None) -> dict[str, Tensor]:
        """The first `limit` pairs."""
        return self.fetch(torch.arange(min(len(self), limit or len(self))))

    def describe(self) -> dict[str, Any]:
        """The header."""
        return {"name": self.name, **self.header}


class OnlinePairs:
    """Pairs made when they are asked for: pair i of the seed, each used about once.

    No disk and never the same pair twice, at the price of the teacher's evaluations in every iteration. The published
    online variant takes 20 Euler steps.

    Args:
        flow: the teacher; its averaged weights, as they are now.
        count: how many different pairs there are.
        seed: of noise and conditions.
        solver: how they are made.
        conditions: see `make_pairs`.
        teacher: its name, for the header.
    """

    def __init__(
        self,
        flow: Flow,
        count: int,
        *,
        seed: int = 0,
        solver: Solver | None = None,
        conditions: Conditions | Source | None = None,
        teacher: str = "",
    ):
        self.name = "pairs made online"
        self._flow, self._stream, self._count = flow, pair_stream(seed), count
        self._solver = solver or Solver("euler", 20)
        self._conditions = numbered_conditions(flow, self._stream, conditions)
        self.header = {**pair_header(flow, self._solver, seed, teacher), "count": count}

    def __len__(self) -> int:
        return self._count

    def missing(self) -> list[int]:
        """None ever are."""
        return []

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """Make the pairs at `indices` (B,)."""
        made = numbered_samples(
            self._flow,
            indices.tolist(),
            seed=self._stream,
            conditions=self._conditions,
            batch=len(indices),
            decode=False,
            **self._solver.options(),
        )
        return join(made)

    def tensors(self, limit: int | None = None) -> dict[str, Tensor]:
        """The first `limit` pairs."""
        return self.fetch(torch.arange(min(self._count, limit or self._count)))

    def describe(self) -> dict[str, Any]:
        """The header."""
        return {"name": self.name, **self.header}


def open_pairs(folder: str | Path, *, gaussian: bool = True) -> PairSource:
    """The pairs in a folder: a store of ours, noise states and PNG samples (rectified flow++), or arrays (rectified flow).

    Args:
        folder: where they are.
        gaussian: of arrays, which do not say it: x0 is unit normal noise.

    Raises:
        FileNotFoundError: it is none of these.
        ValueError: a file is damaged, or the files do not belong together.
    """
    if holds_states(folder):
        return StatePairs(folder)
    return ShardStore(folder) if (Path(folder) / HEADER).is_file() else ArrayPairs(folder, gaussian=gaussian)


def find_pairs(flow: Flow, pairs: int | PairSource | str | Path, folder: Path, **made: Any) -> PairSource:
    """Given pairs, those in a given folder, or as many new ones in `folder`.

    Args:
        flow: the teacher.
        pairs: how many, which, or where they are.
        folder: of new ones.
        made: options of `make_pairs`.
    """
    if isinstance(pairs, int):
        return make_pairs(flow, pairs, folder, **made)
    if isinstance(pairs, (str, Path)):
        return open_pairs(pairs, gaussian=bool(getattr(flow.source, "gaussian", False)))
    return pairs


def pair_folder(pairs: PairSource) -> Path:
    """Where pairs are on disk.

    Raises:
        ValueError: they are nowhere.
    """
    folder = getattr(pairs, "folder", None)
    if folder is None:
        raise ValueError(f"pairs: {pairs.name} are not on disk")
    return Path(folder)


def split_pairs(pairs: PairSource) -> tuple[Source, Source | None]:
    """Pairs to train on, and the last twentieth (at most 1,024) to see by whether they are learned by heart.

    Fewer than 200 pairs, and pairs that are made online, are not split.
    """
    own = getattr(pairs, "split", None)
    if own is not None:  # a mixture splits its parts
        kept, apart = own()
        return kept, apart
    held = min(len(pairs) // 20, 1024)
    if len(pairs) < 200 or isinstance(pairs, OnlinePairs):
        return pairs, None
    rows = torch.arange(len(pairs))
    return Subset(pairs, rows[:-held]), Subset(pairs, rows[-held:])


def write_array_pairs(pairs: PairSource, folder: str | Path) -> Path:
    """Write pairs as `z0.npy` and `z1.npy` into a folder; conditions have no place there.

    Raises:
        ValueError: the pairs are conditioned, or not finished.
    """
    if pairs.header["conditions"]:
        raise ValueError(f"pairs: z0.npy and z1.npy cannot hold the conditions {', '.join(pairs.header['conditions'])}")
    if pairs.missing():
        raise ValueError(f"pairs: {pairs.name} is not finished")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape = (len(pairs), *pairs.header["flow"]["shape"])
    names = {"x0": "z0.npy", "x1": "z1.npy"}
    temporary = {key: folder / f".{name}.tmp" for key, name in names.items()}
    arrays = {k: np.lib.format.open_memmap(p, mode="w+", dtype=np.float32, shape=shape) for k, p in temporary.items()}
    for first in range(0, len(pairs), 4096):
        part = pairs.fetch(torch.arange(first, min(first + 4096, len(pairs))))
        for key, array in arrays.items():
            array[first : first + len(part[key])] = part[key].numpy()
    for key, array in arrays.items():
        array.flush()
        temporary[key].replace(folder / names[key])
    return folder


def check_pairs(pairs: PairSource, flow: Flow, *, any_teacher: bool = False) -> None:
    """Refuse pairs that a flow must not be trained on.

    Args:
        pairs: the pairs.
        flow: the teacher, which the student starts from.
        any_teacher: allow pairs that other weights made.

    Raises:
        ValueError: they are not finished, lie in another space, lack a condition, have swapped ends, or come from another
            teacher; the message says what was expected.
    """
    header: Mapping[str, Any] = pairs.header
    if header.get("kind") != "pairs":
        raise ValueError(f"pairs: {pairs.name} holds {header.get('kind', 'something else')}, not pairs")
    if pairs.missing():
        raise ValueError(f"pairs: {pairs.name} is not finished, {len(pairs.missing())} of its shards are missing")
    shape = tuple(header["flow"]["shape"])
    if shape != flow.shape:
        raise ValueError(f"pairs: made for samples of shape {shape}, this flow's are {flow.shape}")
    if sorted(header["conditions"]) != sorted(flow.conditions):
        have, want = (", ".join(names) or "nothing" for names in (header["conditions"], flow.conditions))
        raise ValueError(f"pairs: conditioned on {have}, this flow on {want}")
    made_by, expected = header.get("teacher_weights"), fingerprint(flow.network)
    if made_by is not None and made_by != expected and not any_teacher:
        named = f" ({header['teacher']})" if header.get("teacher") else ""
        raise ValueError(
            f"pairs: made by other weights{named}, {made_by}; expected those of this flow, {expected} "
            "(any_teacher allows it)"
        )
    of, expects = header["flow"]["source"]["name"], flow.source.spec()["name"]
    if of != expects:
        raise ValueError(f"pairs: their x0 is {_described(of)}, this flow starts from {_described(expects)}")
    found = inspect_pairs(pairs)
    if found.swapped:
        raise ValueError(
            f"pairs: x0 and x1 are swapped: expected unit normal noise as x0, got deviation {found.source_std:.3g} "
            f"there and {found.data_std:.3g} in x1"
        )
    if not any_teacher and not isinstance(pairs, OnlinePairs):
        _check_ends(pairs, flow)


@torch.no_grad()
def _check_ends(pairs: PairSource, flow: Flow) -> None:
    """Carry a few x0 with the flow: they must arrive at their x1, and nearer to it than x1 carried arrives at x0."""
    sample = pairs.tensors(16)
    x0, x1 = (sample[name].to(flow.device, flow.dtype) for name in ("x0", "x1"))
    condition = {name: sample[name] for name in flow.conditions} or None
    options = {"condition": condition, "guidance": pairs.header["guidance"], "decode": False, **_solver_of(pairs, flow)}
    ahead = float((flow.sample(x0=x0, **options) - x1).square().mean())
    back = float((flow.sample(x0=x1, **options) - x0).square().mean())
    if ahead > back and ahead > 0.1 * float(x1.var()):
        raise ValueError("pairs: x0 and x1 are swapped: expected the source in x0, but this flow carries x1 to x0")
    if ahead > 0.5 * float(x1.var()):
        raise ValueError(
            f"pairs: not made by this flow: expected x0 to arrive at x1, the relative error is "
            f"{math.sqrt(ahead / float(x1.var())):.2g} (any_teacher allows it)"
        )


def _solver_of(pairs: PairSource, flow: Flow) -> dict[str, Any]:
    """The solver that made pairs; where they do not name it, one that is good enough on the flow's path."""
    header = pairs.header
    if header.get("method") is None:
        straight = flow.path.spec()["name"] in ("linear", "interpolant", "custom")
        return {"method": "heun" if straight else "edm", "steps": 20}
    if header.get("rtol") is not None:
        return {"method": header["method"], "steps": None, "rtol": header["rtol"], "atol": header["rtol"]}
    return {"method": header["method"], "steps": header["steps"]}


def _described(source: str) -> str:
    return "unit normal noise" if source == "normal" else "data of another set"


def _array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"pairs: there is no {path}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: truncated or no array of numbers ({error})") from None
    if array.dtype != np.float32 or array.ndim < 2 or not len(array):
        raise ValueError(f"{path}: expected float32 of shape (N, ...), got {array.dtype} {array.shape}")
    return array


def check_data(teacher: Flow | None, data: Source) -> None:
    """Refuse plain data where the teacher's noise and data belong together.

    Raises:
        ValueError: it was rectified, and the data bring no noise.
    """
    if teacher is None:
        return
    reason = teacher.provenance.why_not_marginal()
    if reason is not None and "x0" not in data.fetch(torch.arange(1)):
        raise ValueError(f"data: {reason}; give pairs of it (straighten.make_pairs) instead of plain data")
