"""Sources: where the items of a data set come from.

A source has a length and hands out batches by index; order, shuffling and resuming are the business of whoever asks.
A batch is a ``dict`` of CPU tensors that share their first axis: ``x1`` is the data, every other key a condition by
its name (``label`` is int64 of shape (B,)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from pantarhei.data.items import batch_of_items, check_data, first_bad_item, item_tensors
from pantarhei.files import read_tensors


@runtime_checkable
class Source(Protocol):
    """What a data set must answer. No base class: any object with these four members is a source.

    A source may also carry ``labels`` (int64 tensor (N,) or None) and ``classes`` (list of names or None), which spare
    `split` from fetching every item and let tables name the classes.
    """

    name: str

    def __len__(self) -> int:
        """Return the number of items N."""
        ...

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the items at ``indices`` (int64 (B,), each in [0, N)) as one batch of CPU tensors (B, ...)."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what the source is as JSON-able data: ``name``, ``count``, ``shape`` of one ``x1``, ..."""
        ...


class TensorSource:
    """Items that lie in memory, one row of each tensor per item.

    Args:
        tensors: ``x1`` of shape (N, ...), floating or complex, and any conditions of shape (N, ...). Integer ``label``
            becomes int64; all tensors are detached and moved to the CPU, their dtypes stay.
        name: what tables and model cards call the set.
        classes: names of the classes that ``label`` counts, if there are any.

    Raises:
        TypeError: an entry is no tensor, or ``x1`` is neither floating nor complex.
        ValueError: ``x1`` is missing, lengths differ, there is no item, or an item holds NaN or infinity.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], name: str = "tensors", classes: Sequence[str] | None = None
    ) -> None:
        for key, value in tensors.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"tensors[{key!r}] of source {name!r} is a {type(value).__name__}; give a torch.Tensor")
            if value.ndim == 0:
                raise ValueError(f"tensors[{key!r}] of source {name!r} is a single number; the first axis counts items")
        check_data(tensors, f"source {name!r}")
        lengths = {key: len(value) for key, value in tensors.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{key}: {length}" for key, length in lengths.items())
            raise ValueError(f"the tensors of source {name!r} differ in length ({listed}); one row per item is needed")
        if lengths["x1"] == 0:
            raise ValueError(f"source {name!r} is empty; at least one item is needed")
        for key, value in tensors.items():
            bad = first_bad_item(value)
            if bad is not None:
                count, first = bad
                raise ValueError(
                    f"{count} of {len(value)} items of {key!r} in source {name!r} hold NaN or infinity "
                    f"(first: item {first}); drop or repair them"
                )
        self.name = name
        self.classes = None if classes is None else list(classes)
        self.tensors = {
            key: _as_label(value) if key == "label" else value.detach().cpu() for key, value in tensors.items()
        }

    @property
    def labels(self) -> Tensor | None:
        """Labels of all items, int64 (N,), or None."""
        return self.tensors.get("label")

    def __len__(self) -> int:
        return len(self.tensors["x1"])

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the rows at ``indices`` (int64 (B,))."""
        return {key: value[indices] for key, value in self.tensors.items()}

    def describe(self) -> dict[str, Any]:
        """Return name, count, shape and dtype of an item, and the conditions."""
        return _description(self, "tensors", {key: value[0] for key, value in self.tensors.items()})


class DatasetSource:
    """A map-style torch ``Dataset`` (anything with ``__getitem__`` and ``__len__``) as a source.

    An item may be a tensor (``x1``), a pair ``(x1, y)`` where an integer ``y`` becomes ``label`` and any other
    ``condition``, a tuple ``(x1,)``, or a dict with ``x1`` (or ``x`` or ``image``, renamed) whose other keys stay.
    Integers become int64, floats float32; numpy arrays and plain numbers are accepted beside tensors.

    Args:
        dataset: the data set; items are read one by one when they are asked for.
        name: what tables call the set; the class name of ``dataset`` if left out.

    Raises:
        TypeError: the data set has no length or no index, or an item is of another form.
        ValueError: the data set is empty; on `fetch`: items differ in keys or shapes, or hold NaN or infinity.
    """

    def __init__(self, dataset: Any, name: str | None = None) -> None:
        kind = type(dataset).__name__
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        ):
            raise TypeError(
                f"{kind} cannot be read by index; materialise it (a dict of tensors, or list(dataset)) "
                "or use a map-style Dataset with __getitem__ and __len__"
            )
        self.dataset = dataset
        self.name = name or kind
        self.classes = None
        self._count = len(dataset)
        if self._count == 0:
            raise ValueError(f"data set {self.name!r} is empty; at least one item is needed")
        self._first = item_tensors(dataset[0], f"item 0 of {self.name!r}")

    def __len__(self) -> int:
        return self._count

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """Read, convert and stack the items at ``indices`` (int64 (B,))."""
        numbers = indices.tolist()
        items = [item_tensors(self.dataset[number], f"item {number} of {self.name!r}") for number in numbers]
        return batch_of_items(items, numbers, self._first, self.name)

    def describe(self) -> dict[str, Any]:
        """Return name, count, shape and dtype of an item, and the conditions."""
        return _description(self, "dataset", self._first)


class Subset:
    """Some items of another source.

    Args:
        source: where the items come from.
        indices: which ones, int64 (M,), each in [0, N); order and repeats are kept.
        name: defaults to the name of ``source``.

    Raises:
        ValueError: no index, or one outside of the source.
    """

    def __init__(self, source: Source, indices: Tensor | Sequence[int], name: str | None = None) -> None:
        picked = torch.as_tensor(indices, dtype=torch.int64)
        if picked.ndim != 1 or len(picked) == 0:
            raise ValueError(
                f"indices of a subset of {source.name!r} have shape {tuple(picked.shape)}; give (M,), M > 0"
            )
        low, high = int(picked.min()), int(picked.max())
        if low < 0 or high >= len(source):
            raise ValueError(
                f"indices of a subset of {source.name!r} span {low}..{high}; they must lie in 0..{len(source) - 1}"
            )
        self.source = source
        self.indices = picked
        self.name = name or source.name
        self.classes: list[str] | None = getattr(source, "classes", None)

    @property
    def labels(self) -> Tensor | None:
        """Labels of the chosen items, int64 (M,), or None where the source does not keep them at hand."""
        labels = getattr(self.source, "labels", None)
        return None if labels is None else labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the items at ``indices`` (int64 (B,)) of the subset."""
        return self.source.fetch(self.indices[indices])

    def describe(self) -> dict[str, Any]:
        """Return the source's description with the name and count of the subset."""
        return {**self.source.describe(), "name": self.name, "count": len(self), "of": len(self.source)}


def read_points(path: str | Path) -> TensorSource:
    """A table of numbers as a source: a .npy file (N, ...), or `x1` and conditions in a .safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, holds objects or no `x1`, or its numbers are not finite.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return TensorSource(read_tensors(path), path.stem)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        array = np.load(path, allow_pickle=False)
        return TensorSource({"x1": torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))}, path.stem)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: expected an array of finite numbers (N, ...): {error}") from None


def as_source(data: Any, name: str | None = None) -> Source:
    """Take whatever holds data and return a source.

    Args:
        data: a `Source` (returned as it is), a tensor or numpy array ``x1`` (N, ...), a dict of them with the key
            ``x1``, or a map-style torch ``Dataset`` (see `DatasetSource`). Tensors keep their dtype; numpy arrays,
            which are float64 unless told otherwise, become float32 or int64.
        name: what tables call the set.

    Raises:
        TypeError: ``data`` is none of these (an iterable-style data set, a string, ...).
        ValueError: the data are empty, ragged or not finite.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, (Tensor, np.ndarray)):
        data = {"x1": data}
    if isinstance(data, Mapping):
        return TensorSource({key: _from_numpy(value) for key, value in data.items()}, name or "tensors")
    if isinstance(data, (str, bytes)):
        raise TypeError(f"as_source got the string {data!r}; open files with pantarhei.images.open_images(...)")
    if isinstance(data, Dataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return DatasetSource(data, name)
    if hasattr(data, "__iter__"):
        raise TypeError(
            f"{type(data).__name__} can only be iterated; materialise it (a dict of tensors, or list(...)) "
            "or use a map-style Dataset with __getitem__ and __len__"
        )
    raise TypeError(f"as_source got a {type(data).__name__}; give a Source, a tensor, a dict of tensors or a Dataset")


def _from_numpy(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    tensor = torch.from_numpy(np.array(value))
    if tensor.dtype == torch.float64:
        return tensor.float()
    return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.long()


def _as_label(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return value if value.is_floating_point() or value.is_complex() else value.long()


def _description(source: Source, kind: str, item: Mapping[str, Tensor]) -> dict[str, Any]:
    x1 = item["x1"]
    return {
        "name": source.name,
        "kind": kind,
        "count": len(source),
        "shape": list(x1.shape),
        "dtype": str(x1.dtype).removeprefix("torch."),
        "conditions": {
            key: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            for key, value in item.items()
            if key != "x1"
        },
        "classes": getattr(source, "classes", None),
    }
