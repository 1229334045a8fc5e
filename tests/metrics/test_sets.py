import pytest
import torch

from pantarhei.metrics import density_coverage, evaluate_sets, frechet_distance, kernel_distance, precision_recall


def test_the_scores_are_those_of_the_single_measures():
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(60, 6, generator=g), torch.randn(40, 6, generator=g) * 1.3
    scores = evaluate_sets(real, fake, resamples=50, generator=torch.Generator().manual_seed(1))
    assert scores.frechet.value == frechet_distance(real, fake)
    assert scores.frechet.low < scores.frechet.value < scores.frechet.high
    assert (scores.precision, scores.recall) == precision_recall(real, fake)
    assert (scores.density, scores.coverage) == density_coverage(real, fake)
    assert (scores.real, scores.fake) == (60, 40)
    plain = evaluate_sets(real, fake, generator=torch.Generator().manual_seed(1))
    assert plain.frechet.low == plain.frechet.high == plain.frechet.value
    assert plain.kernel == kernel_distance(real, fake, generator=torch.Generator().manual_seed(1))


def test_bad_input_names_the_argument():
    with pytest.raises(ValueError, match="fake has 3 row"):
        evaluate_sets(torch.zeros(9, 2), torch.zeros(3, 2))
