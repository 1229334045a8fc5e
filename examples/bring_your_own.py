"""Your own network, your own torch Dataset, your own vector condition: trained, straightened, sampled."""

import tempfile

import torch
from torch import nn

import pantarhei as pr


class Network(nn.Module):
    """Any module `network(x, t, **conditions)`: x (B, ...), t (B,) in [0, 1], output like x."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x, t, wind):
        """The velocity at (x, t) under the condition `wind` (B, 2)."""
        return self.layers(torch.cat([x, t[:, None], wind], dim=1))


class Leaves(torch.utils.data.Dataset):
    """Where leaves land: blown by the wind. Items are dicts: `x1` is the data, every other key a condition."""

    def __len__(self):
        return 2000

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        wind = torch.randn(2, generator=g)
        return {"x1": 2 * wind + 0.3 * torch.randn(2, generator=g), "wind": wind}


def main():
    """Train, straighten, sample in one step."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as runs:
        flow = pr.Flow(Network(), shape=(2,), null={"wind": 0.0})
        data = pr.data.as_source(Leaves())
        task = pr.FlowTask(flow, data=data, optimization=pr.Optimization(lr=3e-3), average=0.99)
        pr.train(task, f"{runs}/flow", iterations=400, batch=64, progress=False)
        fast = pr.straighten.reflow(
            task.result(), pairs=2000, to=f"{runs}/fast", iterations=300, batch=64, conditions=data, progress=False
        )
    east = torch.tensor([[1.0, 0.0]])
    landed = fast.sample(1000, steps=1, condition={"wind": east}, generator=torch.Generator().manual_seed(0))
    mean = [round(v, 2) for v in landed.mean(0).tolist()]
    print(f"one step, wind from the west: leaves land around {mean}, expected [2.0, 0.0]")
    return landed


if __name__ == "__main__":
    main()
