"""Flows against exact solutions: sampling, inversion, score, likelihood, guidance, refusals."""

import math

import pytest
import torch
from torch import nn

from pantarhei.data.seeds import mix
from pantarhei.flow import (
    Condition,
    Flow,
    FlowMatching,
    GaussianMixture,
    Guidance,
    MixtureField,
    Perceptual,
    Provenance,
    PseudoHuber,
    Term,
    squared,
)
from pantarhei.flow.couplings import MinibatchOT, Pairs, build_coupling
from pantarhei.flow.numbered import numbered_noise
from pantarhei.flow.paths import PATHS, build_path
from pantarhei.flow.sources import Samples
from pantarhei.flow.times import LogitNormal, Uniform


def mixture(dimension=2):
    means = torch.tensor([[1.5, 0.5, 0.0, -1.0], [-1.0, -1.2, 0.3, 0.5], [0.2, 1.6, -0.4, 0.0]], dtype=torch.float64)
    variances = torch.tensor([0.1, 0.3, 0.05], dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), means[:, :dimension], variances)


def exact_flow(path="linear", dimension=2):
    path = build_path(path)
    return Flow(MixtureField(mixture(dimension), path=path), path=path, shape=(dimension,))


class Exact(nn.Module):
    """The exact field under another prediction."""

    def __init__(self, field, what, path):
        super().__init__()
        self.inner, self.what, self.path = field, what, path

    def forward(self, x, t):
        if self.what == "data":
            return self.inner.denoise(x, t)
        score = self.inner.score(x, t)
        return score if self.what == "score" else -score * self.path.sigma(t)[:, None]


@pytest.mark.parametrize("name", [n for n in PATHS if n != "custom"])
def test_exact_fields_carry_the_source_to_the_mixture(name):
    flow, generator = exact_flow(name), torch.Generator().manual_seed(0)
    x = flow.sample(4000, steps=60, method="heun", generator=generator)
    truth = mixture().sample(4000, torch.Generator().manual_seed(1))
    assert torch.allclose(x.mean(0), truth.mean(0), atol=0.08)
    assert torch.allclose(x.T.cov(), truth.T.cov(), atol=0.1)
    # Points of the right density: the mean log-likelihood equals the negative entropy of the mixture.
    assert float(mixture().log_prob(x).mean()) == pytest.approx(float(mixture().log_prob(truth).mean()), abs=0.1)


@pytest.mark.parametrize("what", ["data", "noise", "score"])
@pytest.mark.parametrize("name", ["linear", "vp", "cosine", "ve"])
def test_every_prediction_samples_alike(what, name):
    path, exact = build_path(name), exact_flow(name)
    flow = Flow(Exact(exact.network, what, path), path=path, predicts=what, shape=(2,))
    x0 = torch.randn(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"method": "heun", "steps": 200}
    difference = (flow.sample(x0=x0, **options) - exact.sample(x0=x0, **options)).norm(dim=1)
    assert float(difference.median()) < 2e-2


@pytest.mark.parametrize("name", ["linear", "vp", "sub-vp", "cosine", "ve"])
def test_fields_agree_with_the_closed_form(name):
    flow = exact_flow(name)
    t = torch.full((50,), 0.6, dtype=torch.float64)
    x, _ = flow.path.sample(torch.randn(50, 2, dtype=torch.float64), mixture().sample(50), None, t)
    assert torch.allclose(flow.denoise(x, t), flow.network.denoise(x, t))
    assert torch.allclose(flow.score(x, t), flow.network.score(x, t), rtol=1e-6)
    density = torch.func.grad(lambda y: flow.network.log_prob(y, t).sum())(x)
    assert torch.allclose(density, flow.network.score(x, t), rtol=1e-6)


def test_invert_undoes_sample():
    for name in ("linear", "vp", "ve"):
        flow = exact_flow(name)
        x0 = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        x = flow.sample(x0=x0, steps=None, method="dopri5", rtol=1e-9, atol=1e-9, final="state")
        assert torch.allclose(flow.invert(x, steps=None, method="dopri5", rtol=1e-9, atol=1e-9), x0, atol=1e-5)


@pytest.mark.parametrize("dimension", [1, 3])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_log_prob_is_exact(name, dimension):
    flow = exact_flow(name, dimension)
    x = mixture(dimension).sample(40, torch.Generator().manual_seed(0))
    found = flow.log_prob(x, rtol=1e-7, atol=1e-7)
    assert torch.allclose(found, mixture(dimension).log_prob(x), atol=1e-3)


def test_hutchinson_is_unbiased_and_its_error_is_right():
    flow = exact_flow("linear", 4)
    x = mixture(4).sample(60, torch.Generator().manual_seed(0))
    result = flow.log_prob(
        x, divergence="hutchinson", probes=24, generator=torch.Generator().manual_seed(1), details=True
    )
    z = (result.value - mixture(4).log_prob(x)) / result.error
    assert abs(float(z.mean())) < 0.45
    assert 0.7 < float(z.std()) < 1.5


def test_a_mixture_to_mixture_flow_is_exact():
    source = GaussianMixture(
        torch.ones(2, dtype=torch.float64),
        torch.tensor([[-4.0], [4.0]], dtype=torch.float64),
        torch.tensor([0.5, 0.2], dtype=torch.float64),
    )
    field = MixtureField(mixture(1), source)
    x0 = source.sample(8000, torch.Generator().manual_seed(0))
    flow = Flow(field, shape=(1,), source=Samples(x0))
    x = flow.sample(x0=x0, steps=100, method="rk4").sort(dim=0).values
    truth = mixture(1).sample(8000, torch.Generator().manual_seed(1)).sort(dim=0).values
    assert float((x - truth).abs().mean()) < 0.06


class Toy(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.table = nn.Embedding(classes + 1, 2)
        self.linear = nn.Linear(3, 2)

    def forward(self, x, t, label=None):
        value = self.linear(torch.cat([x, t[:, None]], dim=1))
        return value if label is None else value + self.table(label)


def conditional():
    torch.manual_seed(0)
    return Flow(Toy(), shape=(2,), null={"label": 3})


def test_guidance_is_the_formula_and_one_is_none():
    flow, x, t = conditional(), torch.randn(4, 2), torch.tensor(0.3)
    label = torch.tensor([0, 1, 2, 0])
    condition = Condition({"label": label}, flow.null)
    v, null = flow.velocity(x, t, label), flow.velocity(x, t, torch.full((4,), 3))
    for batched in (True, False):
        guided = flow.field(Guidance(2.5, batched=batched))(x, t, condition)
        assert torch.allclose(guided, null + 2.5 * (v - null), atol=1e-6)
    assert torch.allclose(flow.field(Guidance(2.5, interval=(0.5, 1.0)))(x, t, condition), v)
    x0 = torch.randn(4, 2)
    assert torch.equal(flow.sample(x0=x0, condition=label, guidance=1.0), flow.sample(x0=x0, condition=label))
    one_row = flow.sample(x0=x0, condition=torch.tensor([2]), guidance=2.0, steps=3)
    assert torch.allclose(one_row, flow.sample(x0=x0, condition=torch.full((4,), 2), guidance=2.0, steps=3))
    with pytest.raises(ValueError, match="no condition"):
        flow.sample(4, guidance=2.0)


def test_field_transforms_see_the_step_and_hooks_change_the_state():
    flow, seen = exact_flow(), []

    def halve(field, x, t, condition, step):
        seen.append(step)
        return field(x, t, condition) / 2

    x0 = torch.randn(3, 2, dtype=torch.float64)
    flow.sample(x0=x0, steps=3, transforms=[halve])
    assert seen == [0, 1, 2]
    pinned = flow.sample(x0=x0, steps=3, after_step=lambda x, t, i: torch.zeros_like(x))
    assert torch.equal(pinned, torch.zeros_like(x0))


def test_conditions_drop_index_and_join():
    condition = Condition({"label": torch.tensor([0, 1]), "past": torch.ones(2, 5)}, {"label": 3})
    assert condition.null()["label"].tolist() == [3, 3]
    assert torch.equal(condition.null()["past"], torch.ones(2, 5))  # cannot be dropped
    assert condition.drop(torch.tensor([True, False]))["label"].tolist() == [3, 1]
    assert condition.cat(condition).rows == 4
    assert condition.index(torch.tensor([1]))["label"].tolist() == [1]
    with pytest.raises(ValueError, match="null"):
        Condition({"past": torch.ones(2, 5)}).null()
    with pytest.raises(ValueError, match="rows"):
        Condition({"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(ValueError, match="3 rows are needed"):
        conditional().velocity(torch.zeros(3, 2), torch.tensor(0.5), torch.tensor([0, 1]))


def test_provenance_refuses_what_is_not_known():
    flow = exact_flow()
    rectified = flow.like(flow.network, rectified=1)
    x, t = torch.zeros(1, 2, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    flow.score(x, t)
    with pytest.raises(ValueError, match="rectified 1x"):
        rectified.score(x, t)
    with pytest.raises(ValueError, match="of='samples'"):
        rectified.log_prob(x)
    assert torch.allclose(rectified.log_prob(x, of="samples"), flow.log_prob(x))
    coupled = flow.like(flow.network, coupling="minibatch-ot")
    with pytest.raises(ValueError, match="minibatch-ot"):
        coupled.score(x, t)
    transfer = Flow(flow.network, source=Samples(torch.zeros(5, 2)), shape=(2,))
    with pytest.raises(ValueError, match="not Gaussian"):
        transfer.score(x, t)
    with pytest.raises(ValueError, match="without a density"):
        transfer.log_prob(x)


def test_a_flow_rebuilds_from_its_spec():
    flow = Flow(
        Toy(), path="vp", predicts="edm", shape=(2,), null={"label": 3}, provenance=Provenance(data="toys", rectified=2)
    )
    again = Flow.from_spec(flow.spec(), flow.network)
    assert again.spec() == flow.spec()
    with pytest.raises(ValueError, match="source="):
        Flow.from_spec(Flow(Toy(), source=torch.zeros(3, 2), shape=(2,)).spec(), Toy()).sample(3)


def test_sample_refuses_bad_input():
    flow = exact_flow()
    for options, message in (
        ({"count": 0}, "at least one"),
        ({"count": 3, "x0": torch.zeros(2, 2)}, "3 samples"),
        ({"count": 3, "steps": 0}, "steps"),
        ({"count": 3, "method": "hein"}, "did you mean 'heun'"),
        ({"count": 3, "steps": None}, "no error control"),
    ):
        with pytest.raises(ValueError, match=message):
            flow.sample(**options)
    with pytest.raises(ValueError, match="shape"):
        Flow(Toy()).sample(2)


def test_the_objective_is_minimised_by_the_exact_field():
    generator = torch.Generator().manual_seed(0)
    exact = exact_flow()
    batch = {"x1": mixture().sample(20_000, generator)}
    best, _ = FlowMatching()(exact, batch, torch.Generator().manual_seed(1))

    class Wrong(nn.Module):
        def forward(self, x, t):
            return exact.network(x, t) + 0.1

    worse, _ = FlowMatching()(Flow(Wrong(), shape=(2,)), batch, torch.Generator().manual_seed(1))
    assert float(worse - best) == pytest.approx(0.01, abs=0.003)  # E|v + d - target|^2 = min + d^2


def test_objective_uses_given_pairs_times_and_terms():
    flow, batch = conditional(), {"x1": torch.randn(8, 2), "label": torch.zeros(8, dtype=torch.long)}
    batch |= {"x0": torch.randn(8, 2), "t": torch.rand(8)}
    terms = (
        Term(name="a"),
        Term("data", PseudoHuber(), lambda t: t, name="b"),
        Term("noise", PseudoHuber(0.1, elementwise=True), name="c"),
    )
    objective = FlowMatching(terms=terms, coupling=Pairs(), times=LogitNormal())
    loss, log = objective(flow, batch, None)
    x_t = batch["t"][:, None] * batch["x1"] + (1 - batch["t"][:, None]) * batch["x0"]
    expected = squared(flow.velocity(x_t, batch["t"], batch["label"]), batch["x1"] - batch["x0"]).mean()
    assert torch.allclose(log["a"], expected)
    assert torch.allclose(loss.detach(), log["a"] + log["b"] + log["c"])
    with pytest.raises(ValueError, match="x0"):
        objective(flow, {"x1": batch["x1"], "label": batch["label"]}, None)
    with pytest.raises(ValueError, match="conditioned on label"):
        FlowMatching()(flow, {"x1": batch["x1"]}, None)


def test_dropout_trains_the_null_condition():
    flow = conditional()
    batch = {"x1": torch.randn(4000, 2), "label": torch.zeros(4000, dtype=torch.long)}
    draw = FlowMatching(dropout=0.2).draw(flow, batch, torch.Generator().manual_seed(0))
    assert float((draw.condition["label"] == 3).float().mean()) == pytest.approx(0.2, abs=0.02)


def test_perceptual_premetric_is_zero_only_for_equal_features():
    torch.manual_seed(0)
    network = nn.Conv2d(3, 8, 3).requires_grad_(False)
    metric, a = Perceptual(network), torch.randn(2, 3, 8, 8)
    assert metric.name == "perceptual (Conv2d)"
    assert float(metric(a, a).sum()) == 0
    b = torch.randn(2, 3, 8, 8, requires_grad=True)
    metric(b, a).sum().backward()
    assert float(b.grad.abs().sum()) > 0


@pytest.mark.parametrize("method", ["exact", "sinkhorn"])
def test_minibatch_transport_shortens_the_pairs(method):
    x1 = mixture().sample(128, torch.Generator().manual_seed(0)).float()
    source = build_coupling("independent")
    flow = exact_flow()
    generator = torch.Generator().manual_seed(1)
    independent = source({"x1": x1}, flow.source, None, generator)
    coupled = MinibatchOT(method)({"x1": x1, "x0": independent}, flow.source, None, generator)
    assert float((x1 - coupled).square().sum(1).mean()) < 0.5 * float((x1 - independent).square().sum(1).mean())
    if method == "exact":
        assert torch.equal(coupled.sort(dim=0).values, independent.sort(dim=0).values)  # a permutation


def test_numbered_noise_depends_on_seed_and_number_only():
    whole = numbered_noise(3, range(10), (2, 4))
    parts = torch.cat([numbered_noise(3, range(7), (2, 4)), numbered_noise(3, [7, 8, 9], (2, 4))])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, numbered_noise(4, range(10), (2, 4)))
    many = numbered_noise(0, range(2000), (16,))
    assert abs(float(many.mean())) < 0.03
    assert float(many.std()) == pytest.approx(1, abs=0.02)
    assert len({mix(a, b) for a in range(50) for b in range(50)}) == 2500


def test_a_fixed_step_sampler_compiles_to_one_graph():
    flow = conditional().eval()
    x0, label = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])

    def run(x0):
        return flow.sample(x0=x0, steps=3, method="heun", condition=label, guidance=1.5)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x0), run(x0), atol=1e-6)


def test_float64_and_times_reach_the_network():
    class Check(nn.Module):
        def forward(self, x, t):
            assert x.dtype == t.dtype == torch.float64
            assert t.shape == (x.shape[0],)
            return -x

    flow = Flow(Check(), shape=(2,))
    x = flow.sample(x0=torch.ones(3, 2, dtype=torch.float64), steps=None, method="tsit5", rtol=1e-8)
    assert torch.allclose(x, torch.full_like(x, math.exp(-1)), rtol=1e-5)
    assert Uniform().sample(5).dtype == torch.float32
