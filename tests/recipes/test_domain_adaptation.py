"""Domain adaptation: CORAL's moments, a shift undone by a flow, files that are refused, the whole on toys."""

import json
import re

import numpy as np
import pytest
import torch

from pantarhei.cli.adapt import adapt as adapt_command
from pantarhei.data.seeds import generator as seeded
from pantarhei.files import read_tensors, write_tensors
from pantarhei.recipes.domain_adaptation import Transport, TransportConfig, adapt, coral, learn_transport
from pantarhei.recipes.domain_features import Features, LinearHead, linear_head, read_features, read_head

QUICK = TransportConfig(iterations=5, batch=16, width=8, layers=1)


def classes_in(dimension, count, seed, scale=1.0, shift=0.0):
    """Two Gaussian classes that differ along the first axis, seen through a shift and a scale."""
    draws = seeded(seed)
    labels = torch.randint(2, (count,), generator=draws)
    x = torch.randn(count, dimension, generator=draws)
    x[:, 0] += 8.0 * labels - 4.0
    return scale * x + shift, labels


def test_coral_gives_the_moments_of_the_train_domain():
    draws = seeded(1)
    mixing = torch.randn(2, 6, 6, generator=draws, dtype=torch.float64)
    test = torch.randn(500, 6, generator=draws, dtype=torch.float64) @ mixing[0] + 3
    train = torch.randn(400, 6, generator=draws, dtype=torch.float64) @ mixing[1] - 1
    carried = coral(test, train, regularisation=1e-10)(test)
    torch.testing.assert_close(carried.mean(0), train.mean(0))
    torch.testing.assert_close(carried.T.cov(), train.T.cov(), rtol=1e-6, atol=1e-6)
    # With strong regularisation only the means are aligned; a domain is carried to itself as it is.
    shift = train.mean(0) - test.mean(0)
    torch.testing.assert_close(coral(test, train, regularisation=1e10)(test), test + shift, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(coral(test, test)(test), test)


def test_coral_takes_fewer_items_than_dimensions_and_keeps_the_dtype():
    draws = seeded(2)
    test, train = torch.randn(5, 20, generator=draws), torch.randn(7, 20, generator=draws)
    carried = coral(test, train)(test)
    assert carried.dtype == torch.float32
    assert bool(carried.isfinite().all())
    with pytest.raises(ValueError, match="regularisation: must be positive, got 0"):
        coral(test, train, regularisation=0)
    with pytest.raises(ValueError, match=r"20 features an item, train has 19"):
        coral(test, train[:, 1:])


@pytest.mark.parametrize("smoothing", [0.0, 2.0])
def test_a_flow_undoes_a_shift_and_a_scale(smoothing, tmp_path):
    train, labels = classes_in(4, 600, seed=3)
    test, truth = classes_in(4, 600, seed=4, scale=1.6, shift=9.0)
    head = linear_head(train, labels)
    before = float((head(test).argmax(1) == truth).double().mean())
    config = TransportConfig(iterations=400, batch=128, smoothing=smoothing)
    transport = learn_transport(test, train, config, seed=0)
    carried = transport(test)
    assert before < 0.6  # nearly all of it lies on one side
    assert float((head(carried).argmax(1) == truth).double().mean()) > 0.97
    # New items of the same domain are carried too, by a transport that was saved.
    again = Transport.load(transport.save(tmp_path / "transport"))
    new, new_truth = classes_in(4, 600, seed=5, scale=1.6, shift=9.0)
    assert float((head(again(new)).argmax(1) == new_truth).double().mean()) > 0.97
    torch.testing.assert_close(again(test), carried)


def test_a_transport_repeats_with_its_seed_and_stands_constant_features():
    train, _ = classes_in(3, 40, seed=6)
    test, _ = classes_in(3, 50, seed=7, shift=2.0)
    train[:, 2] = test[:, 2] = 0  # a unit that is always off
    first, again, other = (learn_transport(test, train, QUICK, seed=seed)(test) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert bool(first.isfinite().all())
    with pytest.raises(ValueError, match=r"shape \(N, 3\) is needed"):
        learn_transport(test, train, QUICK)(test[:, :2])


def test_the_head_is_a_logistic_regression_in_the_features_own_units():
    x, y = classes_in(3, 300, seed=8, scale=100.0, shift=-7.0)
    assert float((linear_head(x, y)(x).argmax(1) == y).double().mean()) > 0.99
    # A class without a label is never predicted.
    head = linear_head(x, 2 * y, classes=4)
    assert head.weight.shape == (4, 3)
    assert set(head(x).argmax(1).tolist()) == {0, 2}
    many = torch.arange(300) % 3
    assert linear_head(x, many)(x).shape == (300, 3)
    for labels in (torch.zeros(300, dtype=torch.int64), y - 1):
        with pytest.raises(ValueError, match="at least two classes"):
            linear_head(x, labels)


def test_adapting_gives_a_table_and_files(tmp_path):
    train = Features(*classes_in(3, 60, seed=9), name="clean")
    test = Features(*classes_in(3, 50, seed=10, shift=9.0), name="shifted")
    result = adapt(train, test, seeds=(3, 4), config=QUICK, steps=3)
    assert [(r.method, r.seed) for r in result.results] == [
        ("no adaptation", None),
        ("CORAL", None),
        ("rectified flow", 3),
        ("rectified flow", 4),
    ]
    none, aligned = result.results[:2]
    assert none.accuracy < 0.7 < 0.95 < aligned.accuracy
    assert aligned.distance < none.distance
    text = result.table().text()
    assert re.search(r"rectified flow +mean +\d+\.\d ± \d+\.\d %", text)
    assert "50 items of shifted" in text
    result.save(tmp_path)
    saved = json.loads((tmp_path / "adaptation.json").read_text())
    assert saved["results"][1]["accuracy"] == aligned.accuracy
    assert saved["settings"]["iterations"] == 5
    for row, found in zip(saved["results"], result.results, strict=True):
        tensors = read_tensors(tmp_path / row["file"])
        assert torch.equal(tensors["features"], found.features)
        assert torch.equal(tensors["labels"], test.labels)
    assert torch.equal(read_features(tmp_path / "coral.safetensors").features, aligned.features)


def test_without_labels_there_is_no_accuracy_and_without_a_head_no_prediction():
    x, y = classes_in(3, 30, seed=11)
    test = Features(x + 1)
    unlabelled = adapt(Features(x, y), test, seeds=(0,), config=QUICK, steps=1)
    assert all(r.accuracy is None and r.predictions.shape == (30,) for r in unlabelled.results)
    headless = adapt(Features(x), Features(x + 1, y), seeds=(0,), config=QUICK, steps=1)
    assert all(r.accuracy is None and r.predictions is None for r in headless.results)
    assert "%" not in headless.table().text()
    own = adapt(Features(x), Features(x, y), head=torch.nn.Linear(3, 2), seeds=(0,), config=QUICK, steps=1)
    assert 0 <= own.results[0].accuracy <= 1
    assert not own.results[0].predictions.requires_grad
    wrong = (
        ({"seeds": ()}, "seeds: at least one"),
        ({"seeds": (1, 1)}, "each once"),
        ({"steps": 0}, "steps: must be at least 1"),
        ({"head": lambda z: z[:, 0]}, r"head: must give logits \(N, C\)"),
        ({"head": LinearHead(torch.zeros(2, 4), torch.zeros(2))}, "head: made for 4 features, got 3"),
    )
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            adapt(Features(x, y), test, **{"seeds": (0,), "config": QUICK, **options})
    with pytest.raises(ValueError, match=r"has 3 features an item, features 2"):
        adapt(Features(x, y), Features(x[:, :2]))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_features_are_read_as_they_were_written(suffix, tmp_path):
    x, y = classes_in(3, 10, seed=12)
    path = tmp_path / f"domain{suffix}"
    write(path, features=x.double(), labels=y.int())
    found = read_features(path)
    torch.testing.assert_close(found.features, x)
    assert torch.equal(found.labels, y)
    assert found.labels.dtype == torch.int64
    write(path, features=x.half())
    assert read_features(path).labels is None
    write(path, weight=x.T[:2], bias=x[:2, 0])
    assert torch.equal(read_head(path).bias, x[:2, 0])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_bad_files_are_refused_in_one_line(suffix, tmp_path):
    x, y = classes_in(3, 10, seed=13)
    holed = x.clone()
    holed[4, 1] = float("nan")
    cases = (
        ({"x": x}, "has no key 'features'"),
        ({"features": holed}, "1 of 10 features hold NaN"),
        ({"features": x[0]}, r"shape \(N, D\) with N >= 2, got \(3,\)"),
        ({"features": x[:1]}, "N >= 2"),
        ({"features": y[:, None]}, "real floating point numbers, got torch.int64"),
        ({"features": x, "labels": y[:9]}, r"labels must have shape \(10,\), one a row, got \(9,\)"),
        ({"features": x, "labels": y.float()}, "whole numbers, got torch.float32"),
        ({"features": x, "labels": y - 1}, "from 0, the smallest is -1"),
    )
    path = tmp_path / f"domain{suffix}"
    for arrays, message in cases:
        write(path, **arrays)
        with pytest.raises((ValueError, TypeError), match=message) as refused:
            read_features(path)
        assert "\n" not in str(refused.value)
        assert path.name in str(refused.value)
    with pytest.raises(ValueError, match=r"has no key 'weight'|weight and bias must have shapes"):
        read_head(path)
    write(path, features=x)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"damaged|truncated"):
        read_features(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_features(tmp_path / f"absent{suffix}")


def test_objects_in_a_file_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "domain.npz", features=np.array([{"a": 1}, None], dtype=object))
    with pytest.raises(ValueError, match=r"not a \.npz file of plain numbers"):
        read_features(tmp_path / "domain.npz")
    np.save(tmp_path / "domain.npy", np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"\.npz or \.safetensors files, got \.npy"):
        read_features(tmp_path / "domain.npy")
    (tmp_path / "domain.npy").rename(tmp_path / "renamed.npz")
    with pytest.raises(ValueError, match=r"not a \.npz file"):
        read_features(tmp_path / "renamed.npz")


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    (x, y), (z, truth) = classes_in(3, 40, seed=14), classes_in(3, 30, seed=15, shift=5.0)
    write(tmp_path / "train.npz", features=x, labels=y)
    write(tmp_path / "test.safetensors", features=z, labels=truth)
    files = (tmp_path / "train.npz", tmp_path / "test.safetensors")
    out = tmp_path / "out"
    assert adapt_command(*files, out, seeds=(0, 1), transport=QUICK, steps=2, progress=False) == 0
    printed = capsys.readouterr().out
    assert "CORAL" in printed
    assert str(out / "adaptation.json") in printed
    assert {p.name for p in out.iterdir()} == {
        "adaptation.json",
        "no-adaptation.safetensors",
        "coral.safetensors",
        "rectified-flow-0.safetensors",
        "rectified-flow-1.safetensors",
    }
    with pytest.raises(ValueError, match=r"--out: .* is a file"):
        adapt_command(*files, files[0])


def write(path, **tensors):
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        write_tensors(path, tensors)
