"""Conventions of foreign models: exact ones pass, each wrong one is refused, with the cause where it can be told."""

import pytest
import torch
from torch import nn

import pantarhei as pr
from pantarhei.flow import Flow, GaussianMixture
from pantarhei.flow.denoising import denoising_steps
from pantarhei.flow.paths import VP, Numbered
from pantarhei.straighten import WrongConvention, check_convention
from straighten.exact_flows import MixtureEnds, mixture_flow, ring, small_mlp

DDPM = Numbered("linear", 1e-4, 0.02)
SCHEDULES = {"linear": Numbered("linear"), "scaled-linear": Numbered("scaled-linear"), "cosine": Numbered("cosine")}


def times(target, factor):
    return GaussianMixture(target.weights, factor * target.means, factor**2 * target.covariances)


def image_like(size=16):
    """A Gaussian whose variances fall like those of images, which tells schedules apart better than a few points do."""
    variances = 0.5 * torch.arange(1, size + 1, dtype=torch.float64) ** -2.0
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(one, torch.zeros(1, size, dtype=torch.float64), torch.diag(variances)[None])


@pytest.fixture(scope="module")
def points():
    return ring().sample(128, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def spectrum():
    return image_like().sample(64, torch.Generator().manual_seed(1))


class Changed(nn.Module):
    """A network of another convention than its description."""

    def __init__(self, network, time=lambda t: t, sign=1.0):
        super().__init__()
        self.network, self.time, self.sign = network, time, sign

    def forward(self, x, t, **conditions):
        return self.sign * self.network(x, self.time(t), **conditions)


def refused(flow, data, *said):
    with pytest.raises(WrongConvention) as error:
        check_convention(flow, data)
    message = str(error.value)
    assert "\n" not in message
    assert all(words in message for words in said), message
    return message


EXACT = [
    ("linear", "velocity"),
    ("linear", "data"),
    ("vp", "noise"),
    (DDPM, "noise"),
    (SCHEDULES["scaled-linear"], "v"),
    ("edm", "edm"),
    ("cosine", "velocity"),
    ("ve", "noise"),
    ("linear", "noise"),
]


@pytest.mark.parametrize(("path", "predicts"), EXACT)
def test_exact_models_pass(points, path, predicts):
    found = check_convention(mixture_flow(path, predicts), points)
    assert found.denoises
    assert found.sampler is None
    assert list(found.errors) == sorted(found.errors, reverse=True)
    # The error is what the exact posterior leaves: the same in every form, and below the linear estimate's.
    again = check_convention(mixture_flow(), points)
    assert found.errors == pytest.approx(again.errors, rel=0.05)
    assert found.levels == pytest.approx((0.9, 0.75, 0.5, 0.25, 0.1), abs=0.02)
    assert all(error <= 1.05 * bound for error, bound in zip(found.errors, found.linear, strict=True))


def test_a_trained_model_passes(tmp_path):
    data = ring(dtype=torch.float32).sample(4000, torch.Generator().manual_seed(0))
    flow = Flow(small_mlp(width=48), path="edm", predicts={"name": "edm", "sigma_data": 0.7}, shape=(2,))
    task = pr.FlowTask(flow, data=data, optimization=pr.Optimization(lr=3e-3, decay="cosine"), average=0.98)
    pr.train(task, tmp_path, iterations=200, batch=128, progress=False, tensorboard=False)
    assert check_convention(task.result(), {"x1": data[:256]}).denoises
    # An untrained one denoises nothing.
    refused(Flow(small_mlp(1), path="vp", predicts="noise", shape=(2,)), data[:256], "does not denoise as described")


CONVENTIONS = {
    "the time runs the other way": {"time": lambda t: 1 - t},
    "the output has the other sign": {"sign": -1.0},
    "time and sign are both reversed": {"time": lambda t: 1 - t, "sign": -1.0},
    "the network wants 1000 t": {"time": lambda t: t / 1000},
}


@pytest.mark.parametrize("cause", CONVENTIONS)
@pytest.mark.parametrize(("path", "predicts"), [("linear", "velocity"), ("vp", "noise")])
def test_time_and_sign(points, path, predicts, cause):
    flow = mixture_flow(path, predicts)
    network = Changed(flow.network, **CONVENTIONS[cause])
    both = cause == "time and sign are both reversed" and predicts == "noise"
    message = refused(flow.like(network), points, "does not denoise as described", "" if both else cause)
    assert f"({flow.path.spec()['name']}, {predicts})" in message


@pytest.mark.parametrize("true", ["velocity", "noise", "data", "v"])
@pytest.mark.parametrize("described", ["velocity", "noise", "data", "v"])
def test_the_kind_of_prediction(points, true, described):
    if true != described:
        flow = Flow(MixtureEnds(ring(), DDPM, true), path=DDPM, predicts=described, shape=(2,))
        refused(flow, points, f"(numbered, {described})", f"Most likely it predicts {true}")


def test_an_edm_network_taken_for_another(points):
    flow = Flow(MixtureEnds(ring(), "edm", "edm"), path="edm", predicts="noise", shape=(2,))
    refused(flow, points, "Most likely it predicts edm")


@pytest.mark.parametrize("true", SCHEDULES)
@pytest.mark.parametrize("described", SCHEDULES)
def test_the_schedule(spectrum, true, described):
    network = MixtureEnds(image_like(), SCHEDULES[true], "noise")
    flow = Flow(network, path=SCHEDULES[described], predicts="noise", shape=(16,))
    if true == described:
        assert check_convention(flow, spectrum).denoises
    else:
        refused(flow, spectrum, f"another schedule (name numbered, schedule {true})")


def test_a_discrete_model_taken_for_the_score_sde(spectrum):
    # Ho et al.'s schedule is the score SDE's to one part in a thousand: either description is right.
    assert check_convention(
        Flow(MixtureEnds(image_like(), DDPM, "noise"), path=VP(), predicts="noise", shape=(16,)), spectrum
    ).denoises
    other = Flow(MixtureEnds(image_like(), VP(), "noise"), path=SCHEDULES["linear"], predicts="noise", shape=(16,))
    refused(other, spectrum, "another schedule (name numbered, schedule linear)")


@pytest.mark.parametrize("true", [0.25, 0.66, 1.0])
def test_the_deviation_of_the_data_in_edms_scaling(points, true):
    network = MixtureEnds(times(ring(), 0.6), "edm", "edm", sigma_data=true)
    flow = Flow(network, path="edm", predicts="edm", shape=(2,))
    refused(flow, 0.6 * points, f"sigma_data = {true:g}")


@pytest.mark.parametrize("factor", [0.5, 2.0, 0.18215, 1 / 0.18215])
@pytest.mark.parametrize(("path", "predicts"), [("vp", "noise"), ("linear", "velocity")])
def test_the_scale_of_the_data(points, path, predicts, factor):
    flow = mixture_flow(path, predicts, times(ring(), factor))
    refused(flow, points, f"the scale of the data (it was trained on {factor:.4g} times these)")


def test_the_range_of_the_data():
    unit = GaussianMixture(
        torch.ones(1).double(), torch.full((1, 16), 0.5).double(), 0.02 * torch.eye(16)[None].double()
    )
    items = 2 * unit.sample(64, torch.Generator().manual_seed(0)) - 1  # of a network that was trained on [0, 1]
    flow = mixture_flow("vp", "noise", unit)
    flow = Flow(flow.network, path="vp", predicts="noise", shape=(16,))
    refused(flow, items, "the range of the data (it was trained on [0, 1], these lie in [-1, 1])")


def test_other_data_are_refused_without_a_cause(points):
    refused(mixture_flow(), 3 + 0.3 * points, "No usual confusion explains it", "scaled to [-1, 1]")


# Conditions


class Labelled(nn.Module):
    """The velocity of one Gaussian a label; the null label is all of them."""

    def __init__(self, target):
        super().__init__()
        parts = [GaussianMixture(torch.ones(1), m[None], c[None]) for m, c in zip(*parts_of(target), strict=True)]
        self.fields = nn.ModuleList([MixtureEnds(p, "linear", "data") for p in [*parts, target]])

    def forward(self, x, t, label):
        return torch.stack([f(x, t) for f in self.fields], 1)[torch.arange(len(x)), label]


def parts_of(target):
    return target.means, target.covariances


def test_labels_are_used_where_the_batch_has_them():
    target = ring(0.3)
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(256) % 8
    x1 = target.means[label] + 0.3 * torch.randn(256, 2, generator=generator, dtype=torch.float64)
    flow = Flow(Labelled(target), predicts="data", shape=(2,), null={"label": 8})
    with_labels = check_convention(flow, {"x1": x1, "label": label})
    without = check_convention(flow, {"x1": x1})
    assert with_labels.errors[0] < 0.3 * without.errors[0]
    # Without a value that stands for none they must be there.
    strict = Flow(Labelled(target), predicts="data", shape=(2,), conditions=("label",))
    with pytest.raises(ValueError, match="conditioned on label, which the batch lacks"):
        check_convention(strict, {"x1": x1})


# The model's own sampler


class WithSampler(nn.Module):
    """A network that brings a sampler: ours, times `factor`."""

    def __init__(self, flow, factor=1.0):
        super().__init__()
        self.network, self.flow, self.factor = flow.network, [flow], factor

    def forward(self, x, t):
        return self.network(x, t)

    def own_times(self, steps):
        low, high = self.flow[0].interval
        return tuple(low + (high - low) * i / steps for i in range(steps + 1))

    def own_sample(self, x0, steps, condition=None):
        return self.factor * denoising_steps(self.flow[0], x0, self.own_times(steps))


def test_another_sampler_is_refused(points):
    flow = mixture_flow("vp", "noise")
    good = check_convention(flow.like(WithSampler(flow)), points)
    assert good.sampler < 1e-6
    refused(flow.like(WithSampler(flow, 1.02)), points, "own sampler and ours differ by 0.02", "another scheduler")
    assert check_convention(flow.like(WithSampler(flow, 1.02)), points, tolerance=0.05).sampler == pytest.approx(
        0.02, rel=0.1
    )
    # A sampler that gives no numbers is no agreement.
    refused(flow.like(WithSampler(flow, float("nan"))), points, "differ by nan")


def test_without_data_the_sampler_alone_is_compared():
    flow = mixture_flow("vp", "noise")
    refused(flow.like(WithSampler(flow, 1.02)), None, "own sampler and ours differ")
    assert check_convention(flow.like(WithSampler(flow)), None).errors == ()
    assert check_convention(flow, None).sampler is None


@pytest.mark.parametrize("name", ["ddpm", "sd", "xl", "sd3"])
def test_tiny_pipelines_agree_with_their_own_samplers(tmp_path, name):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from interop import tiny_pipelines as tiny

    makers = {
        "ddpm": tiny.ddpm,
        "sd": tiny.stable_diffusion,
        "xl": tiny.stable_diffusion_xl,
        "sd3": tiny.stable_diffusion_3,
    }
    flow = pr.load(makers[name](tmp_path))
    found = check_convention(flow, None, steps=10)
    assert found.sampler < 1e-4
    if name == "sd":
        # A schedule that the network's own scheduler does not have.
        with pytest.raises(WrongConvention, match="another scheduler"):
            check_convention(flow.like(flow.network, path=SCHEDULES["linear"]), None, steps=10)
