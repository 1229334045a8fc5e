"""Optimising noise, conditions and weights; audits of classifiers."""

import copy

import pytest
import torch
from torch import nn

from pantarhei.flow import Condition, Flow, GaussianMixture, differentiable_sample
from pantarhei.flow.closed_form import MixtureField
from pantarhei.networks import MLP, MLPConfig, UNet, UNetConfig
from pantarhei.networks.embeddings import ClassEmbedding
from pantarhei.recipes.auditing import audit, rounded
from pantarhei.recipes.optimization import (
    Search,
    class_row,
    optimize_condition,
    optimize_noise,
    optimize_weights,
)
from pantarhei.straighten import LowRank

SAMPLING = {"steps": 8, "method": "heun"}


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def modes():
    law = GaussianMixture(
        torch.tensor([0.5, 0.5]), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.05 * torch.eye(2).expand(2, 2, 2)
    )
    return Flow(MixtureField(law), shape=(2,))


def network_flow(classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MLP(MLPConfig(width=16, layers=2, classes=classes))
        nn.init.normal_(network.outputs.weight, std=0.3)
    return Flow(network, shape=(2,), null={"label": classes})


def right(x):
    """-log of the chance of the right mode."""
    return nn.functional.softplus(-4 * x[:, 0])


def test_noise_is_led_to_the_wanted_mode():
    x0 = noise(64, 2)
    said = []
    found = optimize_noise(
        modes(), right, x0, search=Search(80, 0.05, sampling=SAMPLING, batch=24), watch=lambda i, v: said.append((i, v))
    )
    share = [float((x[:, 0] > 0).float().mean()) for x in (found.before, found.after)]
    assert share[0] < 0.7
    assert share[1] > 0.95
    assert len(found.losses) == 81 == len(said)
    assert found.losses[-1] < 0.5 * found.losses[0]
    assert torch.allclose(found.value.norm(dim=1), x0.norm(dim=1), rtol=1e-5)
    assert torch.allclose(found.after, differentiable_sample(modes(), found.value, **SAMPLING))
    # Rows do not depend on each other.
    alone = optimize_noise(modes(), right, x0[5:6], search=Search(80, 0.05, sampling=SAMPLING))
    assert torch.allclose(alone.value, found.value[5:6], atol=1e-2)


@pytest.mark.parametrize("by", ["adamw", "sign", "normalised"])
def test_a_bound_is_kept_around_the_start(by):
    x0 = noise(16, 2)
    kept = x0.clone()
    found = optimize_noise(
        modes(), right, x0, keep="free", bound=0.1, steps_by=by, search=Search(10, 0.05, sampling=SAMPLING)
    )
    moved = (found.value - x0).abs()
    assert float(moved.max()) <= 0.1 + 1e-6
    assert float(moved.max()) > 0.05
    assert torch.equal(x0, kept)
    assert float(right(found.after).mean()) < float(right(found.before).mean())


def test_an_embedding_from_one_example():
    flow, x0 = network_flow(), noise(32, 2)
    hidden = 0.7 * noise(16, seed=4)
    wanted = differentiable_sample(flow, x0, condition={"label": hidden.expand(32, 16)}, **SAMPLING)
    found = optimize_condition(
        flow,
        lambda x: (x - wanted[: len(x)]).square().mean(dim=1),
        x0[:8],
        class_row(flow.network),
        search=Search(250, 0.05, sampling=SAMPLING),
    )
    assert found.losses[found.best] < 1e-2 * found.losses[0]
    others = [
        differentiable_sample(flow, x0, condition={"label": row.expand(32, 16)}, **SAMPLING)
        for row in (class_row(flow.network), found.value)
    ]
    errors = [float((x - wanted).square().mean()) for x in others]
    assert errors[1] < 0.2 * errors[0]


def test_what_is_not_free_stays_and_batches_do_not_matter():
    flow, x0 = network_flow(), noise(12, 2)
    start, free = class_row(flow.network), torch.arange(16) < 4
    found = [
        optimize_condition(
            flow,
            lambda x: x[:, 0] ** 2,
            x0,
            start,
            free=free,
            search=Search(5, 0.1, 0.1, sampling=SAMPLING, batch=batch),
        ).value
        for batch in (12, 5)
    ]
    assert torch.allclose(*found, atol=1e-5)
    assert torch.equal(found[0][4:], start[4:])
    assert not torch.equal(found[0][:4], start[:4])
    with pytest.raises(ValueError, match="free: nothing"):
        optimize_condition(flow, lambda x: x[:, 0], x0, start, free=torch.zeros(16))
    with pytest.raises(ValueError, match="start: a floating-point row"):
        optimize_condition(flow, lambda x: x[:, 0], x0, torch.tensor(1))
    with pytest.raises(ValueError, match="name: which condition"):
        optimize_condition(modes(), lambda x: x[:, 0], x0, start)


def test_guidance_with_rows_of_ones_own():
    flow, x0 = network_flow(), noise(6, 2)
    null = flow.network.classes.weight[-1].detach()
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    rows = flow.network.classes.weight[label].detach()
    ours = flow.sample(x0=x0, condition=Condition({"label": rows}, {"label": null}), guidance=2.0, **SAMPLING)
    assert torch.allclose(ours, flow.sample(x0=x0, condition=label, guidance=2.0, **SAMPLING), atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"low_rank": LowRank(2)}, {"only": ("outputs",)}])
def test_weights_learn_a_style(how):
    flow, x0 = network_flow(), noise(64, 2)
    before = copy.deepcopy(flow.network.state_dict())
    label = torch.arange(64) % 3

    def style(x):
        return (x.mean(dim=0) - 1).square().sum()

    search = Search(40, 0.02, sampling={"steps": 4, "method": "euler", "truncate": 3} if not how else SAMPLING)
    found = optimize_weights(flow, style, x0, condition=label, search=search, **how)
    assert float(style(found.after)) < 0.2 * float(style(found.before))
    assert all(torch.equal(value, before[name]) for name, value in flow.network.state_dict().items())
    changed = {
        name
        for name, value in found.value.network.state_dict().items()
        if name in before and not torch.equal(value, before[name])
    }
    assert changed == set() if "low_rank" in how else changed
    if "only" in how:
        assert all("outputs" in name for name in changed)
    with pytest.raises(ValueError, match="only: no weight is named like nothing"):
        optimize_weights(flow, style, x0, condition=label, only=("nothing",))


def test_an_audit_beats_chance():
    flow, x0 = modes(), noise(200, 2)
    labels = (flow.sample(x0=x0, **SAMPLING)[:, 0] > 0).long()

    def classifier(x):
        return torch.stack([-6 * x[:, 0], 6 * x[:, 0]], dim=1)

    found = audit(flow, classifier, x0, labels, bound=0.2, search=Search(15, 0.05, sampling=SAMPLING, batch=64))
    assert found.rate > 2 * found.control
    assert float((found.found.value - x0).abs().max()) <= 0.2 + 1e-6
    assert found.rate == pytest.approx(float(found.fooled.sum()) / float(found.correct.sum()))
    again = classifier(differentiable_sample(flow, found.found.value, **SAMPLING)).argmax(dim=1)
    assert torch.equal(found.fooled, found.correct & (again != labels))  # of the very samples that are kept
    with pytest.raises(ValueError, match="none of the samples right"):
        audit(flow, lambda x: -classifier(x), x0, labels)


def test_bad_metrics_and_settings():
    x0 = noise(4, 2)
    with pytest.raises(FloatingPointError, match="metric: not finite"):
        optimize_noise(modes(), lambda x: x[:, 0] / 0, x0, search=Search(2, sampling=SAMPLING))
    with pytest.raises(ValueError, match="metric: one number a sample"):
        optimize_noise(modes(), lambda x: x, x0, search=Search(2, sampling=SAMPLING))
    with pytest.raises(ValueError, match="search: iterations"):
        Search(0)
    with pytest.raises(ValueError, match="bound: must be positive"):
        optimize_noise(modes(), right, x0, bound=0.0)
    with pytest.raises(ValueError, match="label: must lie in"):
        class_row(network_flow().network, 9)
    with pytest.raises(ValueError, match="no embedding of classes"):
        class_row(nn.Linear(2, 2))


def test_rows_for_classes():
    table = ClassEmbedding(4, 6)
    assert torch.equal(table(torch.tensor([1, 3])), table.weight[[1, 3]])
    rows = noise(2, 6)
    assert torch.equal(table(rows), rows)
    with pytest.raises(ValueError, match=r"rows \(B, 6\) are needed"):
        table(noise(2, 5))
    with torch.random.fork_rng():
        network = UNet(UNetConfig(channels=1, width=8, multipliers=(1, 2), blocks=(1, 1), classes=3)).eval()
    x, t = noise(2, 1, 8, 8), torch.rand(2)
    assert torch.equal(network(x, t, label=torch.tensor([0, 2])), network(x, t, label=network.classes.weight[[0, 2]]))


def test_saved_images():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.5, 3.0])
    assert torch.equal((rounded(x) + 1) * 127.5, ((rounded(x) + 1) * 127.5).round())
    assert rounded(x)[[0, -1]].tolist() == [-1.0, 1.0]


def test_metrics_keep_their_own_gradients_and_have_to_be_differentiable():
    judge = nn.Linear(2, 1)
    optimize_noise(modes(), lambda x: judge(x)[:, 0], noise(4, 2), search=Search(2, sampling=SAMPLING))
    assert judge.weight.grad is None
    with pytest.raises(ValueError, match="metric: it does not depend differentiably"):
        optimize_noise(modes(), lambda x: (x > 0).float().sum(dim=1), noise(4, 2), search=Search(2, sampling=SAMPLING))


def test_searches_in_half_precision():
    flow = network_flow()
    half = flow.like(copy.deepcopy(flow.network).half())
    x0, small = noise(8, 2), lambda x: 1e-6 * right(x.float())
    for keep, lr in (("norm", 0.1), ("free", 0.1)):
        found = [
            optimize_noise(f, small, x0.to(f.dtype), search=Search(8, lr, sampling=SAMPLING), keep=keep)
            for f in (flow, half)
        ]
        assert found[1].value.dtype == torch.float16
        assert float((found[0].value - found[1].value.float()).abs().max()) < 0.05
    tuned = optimize_weights(half, small, x0.half(), search=Search(2, 1e-3, sampling=SAMPLING))
    assert tuned.value.dtype == torch.float32
    assert tuned.value.provenance.why_not_marginal() is not None


def test_noise_on_the_way_is_the_same_at_each_update():
    flow = network_flow()
    search = Search(3, 0.1, sampling={**SAMPLING, "method": "auto", "epsilon": 0.3}, batch=3)
    found = [optimize_noise(flow, right, noise(8, 2), search=search) for _ in range(2)]
    assert torch.equal(found[0].after, found[1].after)
    assert found[0].measure == pytest.approx(float(right(found[0].after).mean()), rel=1e-5)
