"""Data: sources, toy sets, simulated series, splits, and safe readers of foreign files."""

from pantarhei.data.pickles import load_weights, restricted_load
from pantarhei.data.series import SERIES, read_series, series_pairs, split_series, split_trajectories
from pantarhei.data.simulations import double_well, kolmogorov_flow, velocity_of
from pantarhei.data.sources import DatasetSource, Source, Subset, TensorSource, as_source, read_points
from pantarhei.data.splits import labels_of, split
from pantarhei.data.toys import TOYS, toy_source

__all__ = [
    "SERIES",
    "TOYS",
    "DatasetSource",
    "Source",
    "Subset",
    "TensorSource",
    "as_source",
    "double_well",
    "kolmogorov_flow",
    "labels_of",
    "load_weights",
    "read_points",
    "read_series",
    "restricted_load",
    "series_pairs",
    "split",
    "split_series",
    "split_trajectories",
    "toy_source",
    "velocity_of",
]
