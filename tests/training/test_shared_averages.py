"""Averages share what does not learn with the network that they follow: in memory, in copies and in checkpoints."""

import copy
import json

import pytest
import torch
from torch import nn

from pantarhei.data import TensorSource
from pantarhei.files import read_tensors, write_tensors
from pantarhei.flow import Flow
from pantarhei.interop import load
from pantarhei.networks import MLP, MLPConfig
from pantarhei.networks.lora import add_lora, merge_lora
from pantarhei.training import Average, FlowTask, Optimization, train

QUIET = {"progress": False, "tensorboard": False}


def network(seed=0):
    torch.manual_seed(seed)
    return add_lora(MLP(MLPConfig(width=16, layers=2)), 2)


def task_of(seed=0, model=None):
    data = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    flow = Flow(model or network(seed), shape=(2,))
    return FlowTask(flow, data=TensorSource({"x1": data}, "points"), average=0.5, optimization=Optimization(lr=1e-2))


def is_shared(task):
    """For each parameter, whether student and average hold the same one; it must be the frozen ones, and no other."""
    followed, average = dict(task.flow.network.named_parameters()), dict(task.average.network.named_parameters())
    assert followed.keys() == average.keys()
    assert not any(p.requires_grad for p in average.values())
    found = {name: p is average[name] for name, p in followed.items()}
    assert found == {name: not p.requires_grad for name, p in followed.items()}
    return found


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_does_not_learn_is_shared_and_the_rest_is_averaged():
    model = network()
    average, expected = Average(model, 0.9), {}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    for n in range(1, 6):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    before = expected.get(name, p.detach().clone())
                    p.add_(torch.randn(p.shape))
                    expected[name] = before.lerp(p, 1 - min(0.9, (1 + n) / (10 + n)))
        average.update(model)
    own = dict(average.network.named_parameters())
    assert all(torch.allclose(own[name], value) for name, value in expected.items())
    for name, p in model.named_parameters():
        assert (own[name] is p) == (name in frozen)
    assert all(torch.equal(own[name], value) for name, value in frozen.items())
    assert len(frozen) + len(expected) == len(own)


def test_a_network_that_learns_shares_nothing():
    plain = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = Average(plain)
    theirs = {t.data_ptr() for t in plain.state_dict().values()}
    assert theirs.isdisjoint(t.data_ptr() for t in average.state_dict().values())
    assert not list(average.shared(plain))


def test_what_begins_to_learn_later_is_refused():
    model = network()
    average = Average(model)
    merged = model.requires_grad_(True)
    with pytest.raises(ValueError, match="unfrozen after its average was made"):
        average.update(merged)


def test_copies_share_as_the_originals_do():
    task = task_of()
    twin = copy.deepcopy(task)
    assert any(is_shared(task).values())
    is_shared(twin)
    mine = {id(p) for p in task.parameters()}
    assert mine.isdisjoint(id(p) for p in twin.parameters())
    alone = copy.deepcopy(task.average)  # without its network it holds all of its own, and goes on following
    with torch.no_grad():
        for p in task.flow.network.parameters():
            p.add_(p.requires_grad)
    for average in (alone, task.average):
        average.update(task.flow.network)
    assert_equal(alone.state_dict(), task.average.state_dict())
    is_shared(task.double())
    assert {p.dtype for p in task.average.parameters()} == {torch.float64}


def test_merging_one_of_them_leaves_the_other():
    task = task_of()
    with torch.no_grad():
        for name, p in [*task.flow.network.named_parameters(), *task.average.network.named_parameters()]:
            if name.endswith(("up", "down")):
                p.add_(0.1 * torch.randn(p.shape))
    x, t = torch.randn(4, 2), torch.rand(4)
    student, averaged = task.flow.network(x, t), task.average.network(x, t)
    before = {name: value.clone() for name, value in task.flow.network.state_dict().items()}
    merged = merge_lora(task.average.network)
    assert torch.allclose(merged(x, t), averaged, atol=1e-6)
    assert_equal(task.flow.network.state_dict(), before)
    assert torch.equal(task.flow.network(x, t), student)
    assert {p.requires_grad for p in task.flow.network.parameters()} == {True, False}
    assert {id(p) for p in merged.parameters()}.isdisjoint(id(p) for p in task.flow.network.parameters())


def test_checkpoints_hold_shared_weights_once_and_resume_bit_for_bit(tmp_path):
    whole, first, second = task_of(), task_of(), task_of(seed=9)
    options = {"batch": 16, "seed": 3, **QUIET}
    train(whole, tmp_path / "whole", iterations=8, **options)
    train(first, tmp_path / "parts", iterations=5, **options)
    written = read_tensors(tmp_path / "parts/checkpoints/00000005/model.safetensors")
    shared = {name for name, same in is_shared(first).items() if same}
    for name in first.average.network.state_dict():
        assert (f"average.network.{name}" in written) == (name not in shared)
        assert f"flow.network.{name}" in written
    train(second, tmp_path / "parts", iterations=8, resume=True, **options)
    is_shared(second)
    assert_equal(whole.flow.network.state_dict(), second.flow.network.state_dict())
    assert_equal(whole.average.state_dict(), second.average.state_dict())
    for averaged, expected in ((True, whole.average.network), (False, whole.flow.network)):
        assert_equal(load(tmp_path / "parts", averaged=averaged).network.state_dict(), expected.state_dict())


def test_checkpoints_with_both_copies_still_load(tmp_path):
    task = task_of()
    train(task, tmp_path / "run", iterations=4, batch=16, **QUIET)
    checkpoint = tmp_path / "run/checkpoints/00000004"
    both = {f"flow.network.{k}": v for k, v in task.flow.network.state_dict().items()}
    both |= {f"average.{k}": v for k, v in task.average.state_dict().items()}
    write_tensors(checkpoint / "model.safetensors", both)
    state = json.loads((checkpoint / "state.json").read_text())
    assert state.pop("shared")
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert_equal(load(tmp_path / "run").network.state_dict(), task.average.network.state_dict())
    again = task_of(seed=5)
    train(again, tmp_path / "run", iterations=4, batch=16, resume=True, **QUIET)
    assert_equal(again.average.state_dict(), task.average.state_dict())
    is_shared(again)


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    train(task_of(), tmp_path / "run", iterations=2, batch=16, **QUIET)
    file = tmp_path / "run/checkpoints/00000002/model.safetensors"
    tensors = read_tensors(file)
    name = next(name for name in tensors if name.endswith("original"))
    del tensors[name]
    write_tensors(file, tensors)
    with pytest.raises(ValueError, match="is missing"):
        train(task_of(), tmp_path / "run", iterations=3, batch=16, resume=True, **QUIET)
    with pytest.raises(ValueError, match="is missing"):
        load(tmp_path / "run")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_runs_and_saved_flows_are_opened_in_their_type_without_drawing_weights(tmp_path, dtype):
    task = task_of(model=network().to(dtype))
    task.result().save_pretrained(tmp_path / "saved")
    train(task, tmp_path / "run", iterations=1, batch=16, **QUIET) if dtype == torch.float32 else None
    state = torch.get_rng_state()
    flows = [load(tmp_path / name) for name in ("saved", "run") if (tmp_path / name).is_dir()]
    assert torch.equal(torch.get_rng_state(), state)
    for flow in flows:
        assert {p.dtype for p in flow.network.parameters()} == {dtype}
        assert not any(p.is_meta for p in flow.network.parameters())
        names = {name for name, p in flow.network.named_parameters() if p.requires_grad}
        assert names == {name for name, p in task.flow.network.named_parameters() if p.requires_grad}
