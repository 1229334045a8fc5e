"""Data: sources, toy sets, splits, and safe readers of foreign files."""

from pantarhei.data.pickles import load_weights, restricted_load
from pantarhei.data.sources import DatasetSource, Source, Subset, TensorSource, as_source, read_points
from pantarhei.data.splits import labels_of, split
from pantarhei.data.toys import TOYS, toy_source

__all__ = [
    "TOYS",
    "DatasetSource",
    "Source",
    "Subset",
    "TensorSource",
    "as_source",
    "labels_of",
    "load_weights",
    "read_points",
    "restricted_load",
    "split",
    "toy_source",
]
