"""Images in table rows: parquet files and data sets of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pantarhei.images.collection import SPLITS, Collection, no_split, number_labels

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")


@dataclass(frozen=True)
class ParquetContents:
    """Image files in a column of parquet files, held in memory as they are (not decoded).

    Attributes:
        column: Arrow column of the contents: bytes.
        paths: Arrow column of the original paths, or None.
        files: the parquet files, each with the number of its first row.
    """

    column: Any
    paths: Any
    files: tuple[tuple[Path, int], ...]

    def __len__(self) -> int:
        return len(self.column)

    def name(self, index: int) -> str:
        """Return the parquet file, the row in it, and the path that the image had."""
        file, start = [entry for entry in self.files if entry[1] <= index][-1]
        path = None if self.paths is None else self.paths[index].as_py()
        return f"{file}: row {index - start}" + (f" ({path})" if path else "")

    def read(self, index: int) -> bytes:
        """Return the content of an image file."""
        content = self.column[index].as_py()
        if content is None:
            raise ValueError(f"{self.name(index)} holds no bytes of an image")
        return content


@dataclass(frozen=True)
class HubContents:
    """Image files in a column of a ``datasets.Dataset`` that leaves them undecoded."""

    dataset: Any
    column: str
    origin: str

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """Return the data set and the row."""
        return f"{self.origin}: row {index}"

    def read(self, index: int) -> bytes:
        """Return the content of an image file."""
        entry = self.dataset[index][self.column]
        if entry is None or (entry["bytes"] is None and entry["path"] is None):
            raise ValueError(f"{self.name(index)} holds no bytes of an image")
        return Path(entry["path"]).read_bytes() if entry["bytes"] is None else entry["bytes"]


def parquet_files(path: Path, split: str) -> list[Path]:
    """Return the parquet files that make up a split; empty if ``path`` is a folder without any.

    In a folder (searched with all below it), files whose names begin with the name of a split (``train.parquet``,
    ``test-00000-of-00002.parquet``) belong to it; files without such names are one set. A path to a file means this
    file.

    Raises:
        ValueError: there are parquet files, but none of this split.
    """
    if path.is_file():
        own = _split_of(path)
        if split not in ("train", own):
            raise no_split(str(path), split, [own] if own else [])
        return [path]
    found = sorted(path.rglob("*.parquet"))
    known = {own for own in map(_split_of, found) if own}
    if known:
        if split not in known:
            raise no_split(str(path), split, list(known))
        return [file for file in found if _split_of(file) == split]
    if found and split != "train":
        raise no_split(str(path), split, [])
    return found


def parquet(path: Path, files: Sequence[Path]) -> Collection:
    """Read image and label columns of parquet files.

    The column ``image`` (or ``img``) holds image files as bytes or as records with the fields ``bytes`` and ``path``;
    ``label`` (or ``labels``), where there is one, integers or names. Class names come from the metadata that Hugging
    Face writes, else from the folders of the paths if folders and labels go together one to one.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: a file is no parquet file, or has no column of images.
    """
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError('parquet files need pyarrow: pip install "pantarhei[images]"') from None

    tables, starts, count = [], [], 0
    for file in files:
        try:
            opened = pq.ParquetFile(file)
            image, label = _columns(opened.schema_arrow.names, str(file))
            tables.append(opened.read(columns=[image] if label is None else [image, label]))
        except (pa.ArrowException, OSError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"cannot read {file}: not a parquet file, or cut short ({reason})") from None
        starts.append((file, count))
        count += len(tables[-1])
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowException:
        raise ValueError(f"the parquet files of {path} differ in their columns; give one file") from None
    if count == 0:
        raise ValueError(f"no images in {path}: its tables have no rows")
    column, paths = table[image], None
    if pa.types.is_struct(column.type):
        fields = [column.type.field(number).name for number in range(column.type.num_fields)]
        paths = pc.struct_field(column, "path") if "path" in fields else None
        column = pc.struct_field(column, "bytes") if "bytes" in fields else column
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise ValueError(f"column {image!r} of {path} holds {column.type}; bytes of image files are wanted")
    labels = classes = None
    if label is not None:
        raw = table[label].to_pylist()
        names = _named_in_metadata(table.schema.metadata, label) or _named_by_folders(raw, paths)
        labels, classes = number_labels(raw, f"column {label!r} of {path}", names)
    name = path.stem if path.is_file() else path.resolve().name
    return Collection(name, "parquet", ParquetContents(column, paths, tuple(starts)), labels, classes)


def hub(name: str, split: str) -> Collection:
    """Open a data set of the Hugging Face hub, or of its local cache, through ``datasets``.

    Raises:
        ImportError: ``datasets`` is not installed.
        FileNotFoundError: the hub has no such data set.
        ValueError: the data set has no such split, needs a configuration, or has no column of images.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError(f'hf:{name} needs datasets: pip install "pantarhei[images]"') from None

    try:
        dataset = datasets.load_dataset(name, split=split)
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"cannot open hf:{name}, split {split!r}: {str(error).splitlines()[0]}") from None
    return hub_collection(dataset, name, split)


def hub_collection(dataset: Any, name: str, split: str) -> Collection:
    """Take the image and label columns of a ``datasets.Dataset``."""
    import datasets

    image, label = _columns(dataset.column_names, f"hf:{name}")
    if not isinstance(dataset.features[image], datasets.Image):
        raise ValueError(f"column {image!r} of hf:{name} holds {dataset.features[image]}; images are wanted")
    labels = classes = None
    if label is not None:
        names = getattr(dataset.features[label], "names", None)
        labels, classes = number_labels(list(dataset[label]), f"column {label!r} of hf:{name}", names)
    undecoded = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return Collection(name, "hub", HubContents(undecoded, image, f"hf:{name}:{split}"), labels, classes)


def _columns(names: Sequence[str], where: str) -> tuple[str, str | None]:
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    if image is None:
        raise ValueError(f"{where} has the columns {', '.join(names)}; a column 'image' is wanted")
    return image, next((name for name in LABEL_COLUMNS if name in names), None)


def _split_of(file: Path) -> str | None:
    return next((split for split in SPLITS if file.name.startswith((f"{split}.", f"{split}-", f"{split}_"))), None)


def _named_in_metadata(metadata: dict[bytes, bytes] | None, label: str) -> list[str] | None:
    # datasets keeps its features as JSON in the schema's metadata.
    try:
        return json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None


def _named_by_folders(labels: Sequence[Any], paths: Any) -> list[str] | None:
    if paths is None or not all(isinstance(label, int) and label >= 0 for label in labels):
        return None
    folders = [PurePosixPath(path).parent.name if path else "" for path in paths.to_pylist()]
    pairs = dict(sorted(set(zip(labels, folders, strict=True))))
    one_to_one = len(set(zip(labels, folders, strict=True))) == len(pairs) == len(set(pairs.values()))
    if not one_to_one or "" in pairs.values() or list(pairs) != list(range(len(pairs))):
        return None
    return list(pairs.values())
