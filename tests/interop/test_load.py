"""Opening runs and saved flows."""

import pytest
import torch
from torch import nn

import pantarhei as pr
from pantarhei.interop import load
from pantarhei.networks import MLP, MLPConfig

QUIET = {"progress": False, "tensorboard": False}


class Own(nn.Module):
    """A user's network."""

    def __init__(self, width=8):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t[:, None]], dim=1))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(0)
    task = pr.FlowTask(
        pr.Flow(MLP(MLPConfig(width=8)), shape=(2,)), data=torch.randn(64, 2), held_out=torch.randn(64, 2)
    )
    pr.train(task, folder, iterations=12, batch=16, checkpoint_every=4, keep=3, **QUIET)
    return folder, task


def test_a_run_opens_with_its_average_or_its_raw_weights(run):
    folder, task = run
    x, t = torch.randn(5, 2), torch.tensor(0.4)
    with torch.no_grad():
        assert torch.equal(load(folder).velocity(x, t), task.result().velocity(x, t))
        assert torch.equal(load(folder, averaged=False).velocity(x, t), task.flow.velocity(x, t))
    assert load(folder).spec() == task.result().spec()
    assert pr.load is load


def test_checkpoints_are_chosen_by_name_or_number(run):
    folder, _ = run
    x, t = torch.randn(5, 2), torch.tensor(0.4)
    values = {which: load(folder, checkpoint=which).velocity(x, t).detach() for which in ("newest", "best", 4, 8, 12)}
    assert torch.equal(values["newest"], values[12])
    assert not torch.equal(values[4], values[12])
    assert any(torch.equal(values["best"], values[k]) for k in (4, 8, 12))
    with pytest.raises(FileNotFoundError, match="no checkpoint 7; there are 4, 8, 12"):
        load(folder, checkpoint=7)


def test_saved_flows_round_trip(tmp_path):
    flow = pr.Flow(MLP(MLPConfig(width=8, classes=3)), path="vp", predicts="noise", shape=(2,), null={"label": 3})
    folder = flow.save_pretrained(tmp_path / "saved")
    x, t, label = torch.randn(4, 2), torch.tensor(0.5), torch.tensor([0, 1, 2, 3])
    for again in (load(folder), pr.Flow.from_pretrained(folder)):
        assert again.spec() == flow.spec()
        assert torch.equal(again.velocity(x, t, label), flow.velocity(x, t, label))


def test_a_users_network_must_be_given(tmp_path):
    torch.manual_seed(0)
    flow = pr.Flow(Own(), shape=(2,))
    folder = flow.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="pass network=YourModule"):
        load(folder)
    x, t = torch.randn(4, 2), torch.tensor(0.5)
    assert torch.equal(load(folder, network=Own()).velocity(x, t), flow.velocity(x, t))
    with pytest.raises(ValueError, match=r"layers.0.weight has shape \(8, 3\), the network \(4, 3\)"):
        load(folder, network=Own(4))
    with pytest.raises(ValueError, match="missing"):
        load(folder, network=nn.Linear(2, 2))


def test_what_is_not_there_or_damaged_is_named(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="neither a run folder"):
        load(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text((run[0] / "config.yaml").read_text())
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        load(empty)
    (empty / "config.yaml").write_text("version: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load(empty)
    (empty / "config.yaml").write_text("version: 99")
    with pytest.raises(ValueError, match="version 99"):
        load(empty)
