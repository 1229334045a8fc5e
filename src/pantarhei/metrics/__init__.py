"""Distances between sets, scores of ensembles, features, fidelity, diversity, memorisation, and intervals for all."""

from pantarhei.metrics.classifier import ClassifierFeatures, SmallClassifier, train_classifier
from pantarhei.metrics.ensembles import crps, energy_score, rank_histogram, spread_skill
from pantarhei.metrics.features import FeatureExtractor, extract
from pantarhei.metrics.frechet import frechet_distance, moments
from pantarhei.metrics.inception import InceptionFeatures, InceptionV3
from pantarhei.metrics.inception_score import InceptionScore, inception_score
from pantarhei.metrics.intervals import Interval, bootstrap, mean_and_deviation, spread
from pantarhei.metrics.kernel import KernelDistance, kernel_distance
from pantarhei.metrics.manifold import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from pantarhei.metrics.memorisation import MemorisationReport, memorisation_report, nearest_neighbours
from pantarhei.metrics.sets import SetScores, evaluate_sets
from pantarhei.metrics.transport import energy_distance, sliced_wasserstein, wasserstein
from pantarhei.metrics.two_sample import c2st, permutation_test

__all__ = [
    "ClassifierFeatures",
    "DensityCoverage",
    "FeatureExtractor",
    "InceptionFeatures",
    "InceptionScore",
    "InceptionV3",
    "Interval",
    "KernelDistance",
    "MemorisationReport",
    "PrecisionRecall",
    "SetScores",
    "SmallClassifier",
    "bootstrap",
    "c2st",
    "crps",
    "density_coverage",
    "energy_distance",
    "energy_score",
    "evaluate_sets",
    "extract",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "mean_and_deviation",
    "memorisation_report",
    "moments",
    "nearest_neighbours",
    "permutation_test",
    "precision_recall",
    "rank_histogram",
    "sliced_wasserstein",
    "spread",
    "spread_skill",
    "train_classifier",
    "wasserstein",
]
