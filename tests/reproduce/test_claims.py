"""Verdicts, and that experiments depend on their seed only."""

from pantarhei.reproduce import EXPERIMENTS, Claim, Experiment, Settings, reproduce
from pantarhei.reproduce.rectified_flow import points


def test_verdicts():
    claim = Claim("it is small", "x", "x", "at most", 1.0)
    assert claim.verdict([0.2, 1.0]) == "holds"
    assert claim.verdict([0.2, 1.1]) == "undecided"
    assert claim.verdict([2.0, 1.1]) == "does not hold"
    assert Claim("it is large", "x", "x", "at least", 1.0).verdict([1.0, 3.0]) == "holds"


def test_names_are_unique_and_quantities_measured():
    for experiments in EXPERIMENTS.values():
        names = [e.name for e in experiments]
        assert len(set(names)) == len(names)
        assert all(e.seeds >= 3 for e in experiments)


def test_an_experiment_is_a_function_of_its_seed():
    first = points.marginals(Settings(3, quick=True))
    assert first == points.marginals(Settings(3, quick=True))
    assert first != points.marginals(Settings(4, quick=True))


def test_what_failed_is_told(tmp_path):
    claim = Claim("never", "value", "a value", "at least", 5.0, paper="7")
    told = []
    experiment = Experiment("example", "An example.", lambda s: {"value": float(s.seed)}, (claim,))
    (outcome,) = reproduce([experiment], tmp_path, title="T", say=told.append)
    assert outcome.values("value") == [0.0, 1.0, 2.0]
    assert any("does not hold" in line for line in told)
    assert "| does not hold |" in (tmp_path / "README.md").read_text()
