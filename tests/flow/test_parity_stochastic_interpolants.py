"""Coefficients, exact mixture fields, losses and samplers against the references of stochastic interpolants and SiT."""

import pytest
import torch
from torch import nn

import pantarhei as pr
from pantarhei.flow import Fields, GaussianMixture, Interpolation, MixtureField, StiffNoise, noise_amount, transport_sde
from pantarhei.flow import interpolants as si
from pantarhei.flow.gammas import Brownian, Foellmer, NoLatent, Quadratic, Sigmoid, SineSquared
from pantarhei.flow.paths import VP, Cosine, Linear
from pantarhei.flow.predictions import convert
from pantarhei.networks import SiT, SiTConfig
from pantarhei.solve import sde
from pantarhei.solve.steps import RungeKutta, Tableau
from parity import Golden

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::pantarhei.flow.StiffNoise")]
SYSTEM = "stochastic-interpolants"


def gamma_of(golden, name):
    kinds = {
        "brownian": lambda: Brownian(golden.config["gamma_brownian_a"]),
        "bsquared": Quadratic,
        "sinesquared": SineSquared,
        "sigmoid": lambda: Sigmoid(golden.config["gamma_sigmoid_f"]),
        "zero": NoLatent,
        None: NoLatent,
    }
    return kinds[name]()


def path_of(golden, name, gamma):
    """The reference's path by name; one-sided ones have no latent but x0."""
    latent = gamma_of(golden, gamma)
    return {
        "linear": lambda: si.Interpolant(Linear(), latent),
        "trig": lambda: si.Interpolant(si.Shrunk(Cosine(), latent), latent),
        "encoding-decoding": lambda: si.Interpolant(si.EncodingDecoding(), latent),
        "mirror": lambda: si.Interpolant(si.Mirror(), latent),
        "one-sided-linear": Linear,
        "one-sided-trig": Cosine,
    }[name]()


def test_coefficients():
    golden = Golden(SYSTEM, "schedules")
    t = golden["in.t"].double()
    for name in golden.config["paths"]:
        kind, _, gamma = name.partition("_")
        path = path_of(golden, kind, gamma or None)
        ends = path.ends if isinstance(path, si.Interpolant) else path
        values = {"x0coef": ends.sigma(t), "x0coef_dot": ends.sigma_dot(t)}
        values |= {"x1coef": ends.alpha(t), "x1coef_dot": ends.alpha_dot(t)}
        for key, value in values.items():
            golden.check(f"out.{name}.{key}", value)
    for name in golden.config["gammas"]:
        gamma = gamma_of(golden, name)
        golden.check(f"out.gamma.{name}", gamma.value(t))
        golden.check(f"out.gamma_dot.{name}", gamma.derivative(t))
        golden.check(f"out.gamma_gammadot.{name}", gamma.product(t))
    _check_foellmer(golden, t)
    golden.assert_all_compared()


def _check_foellmer(golden, t):
    c = golden.config["follmer_sigma_coef"]
    path = si.Interpolant(si.LateData(), Foellmer(c))
    values = {"at": path.sigma(t), "bt": path.alpha(t), "adot": path.ends.sigma_dot(t), "bdot": path.ends.alpha_dot(t)}
    values |= {"gamma_t": path.gamma.value(t), "root_t": t.sqrt()}
    # s_c and its derivative, which their latent s_c(t) W_t shows.
    values |= {"st": path.gamma.value(t) / t.sqrt(), "sdot": torch.full_like(t, -c)}
    for key, value in values.items():
        golden.check(f"out.follmer.{key}", value)
    x0, x1, z, drift = (golden[f"in.follmer.{name}"].double() for name in ("z0", "z1", "noise", "drift"))
    x_t, _ = path.sample(x0, x1, z, t)
    golden.check("out.follmer.zt", x_t)
    fields = Fields(names=("drift",), epsilon="foellmer", start="context")
    golden.check("out.follmer.target", fields.targets(path, x0, x1, z, t)["drift"])
    latent = fields.latent(path, x_t, t, drift, x0)
    golden.check("out.follmer.score_from_drift", -latent / path.at(t, latent).gamma)


def mixtures(golden):
    return [GaussianMixture(*(golden[f"in.{name}{end}"].double() for name in ("p", "mu", "C"))) for end in (0, 1)]


def test_exact_mixture_fields():
    golden = Golden(SYSTEM, "gmm")
    source, target = mixtures(golden)
    x, t = golden["in.x"].double(), golden["in.t"].double()
    for case in golden.config["cases"]:
        field = MixtureField(target, source, path_of(golden, case["path"], case["gamma"]))
        name = f"out.{case['name']}"
        golden.check(f"{name}.b", field(x, t))
        golden.check(f"{name}.s", field.score(x, t))
        golden.check(f"{name}.log_rho", field.log_prob(x, t))
    golden.assert_all_compared()


class Perceptron(nn.Module):
    """The golden's network, of t and x side by side; `sign` turns their eta, which is minus E[z | x], into ours."""

    def __init__(self, golden, sign=1.0):
        super().__init__()
        weights = [golden[name].double() for name in golden.names("w.v.")]
        numbers = sorted({int(name.split(".")[2]) for name in golden.names("w.v.")})
        self.layers = [(golden[f"w.v.{i}.weight"].double(), golden[f"w.v.{i}.bias"].double()) for i in numbers]
        self.activation = {"silu": nn.functional.silu, "relu": nn.functional.relu}[golden.config["act"]]
        self.sign = sign
        assert len(weights) == 2 * len(self.layers)

    def forward(self, x, t):
        h = torch.cat([t[:, None], x], dim=1)
        for i, (weight, bias) in enumerate(self.layers):
            h = nn.functional.linear(h if i == 0 else self.activation(h), weight, bias)
        return self.sign * h


def test_losses():
    golden = Golden(SYSTEM, "losses")
    x0, x1, z, t = (golden[f"in.{name}"].double() for name in ("x0", "x1", "z", "t"))
    golden.check("out.net", Perceptron(golden)(x0, t))
    kinds = {"b": "velocity", "s": "score", "eta": "latent", "v": "deterministic"}
    for case in golden.config["cases"]:
        one_sided, mirrored = case["loss"].startswith("one-sided-"), case["loss"] == "mirror"
        loss = case["loss"].removeprefix("one-sided-")
        sign = float(golden.config["eta_sign"]) if loss == "eta" else 1.0
        predicts = kinds.get(loss, "score")
        if one_sided:
            predicts = {"deterministic": "velocity", "latent": "noise"}.get(predicts, predicts)
        path = path_of(golden, case["path"], case["gamma"])
        fields = predicts if one_sided else Single(names=("velocity",), only=predicts)
        flow = pr.Flow(Perceptron(golden, sign), path=path, predicts=fields, shape=x1.shape[1:])
        pairs = case["loss"] in golden.config["antithetic"]
        latent = x0 if mirrored else z
        batch = {"x0": x0, "x1": x1, "t": t, **({} if one_sided else {"z": latent})}
        ((_, rows),) = Interpolation(antithetic=pairs).rows(flow, batch, None)
        # Theirs are sums over the dimensions and over the antithetic pair, ours are means.
        count = golden.config["d"] * (2 if pairs and not golden.config["antithetic_halved"] else 1)
        golden.check(case["name"], rows * count)
    golden.assert_all_compared()


class Single(Fields):
    """One field alone, which the losses have but no sampler could use."""

    def __init__(self, names, only):
        super().__init__(names=names)
        object.__setattr__(self, "names", (only,))

    def check(self, path):
        pass


def reference_heun(drift, amplitude, x, t, end, draw):
    """The reference's Heun step: the noise first, and both stages at the end time."""
    x = x + amplitude(x, t) * abs(end - t) ** 0.5 * draw
    slope = drift(x, end)
    return x + 0.5 * (end - t) * (slope + drift(x + (end - t) * slope, end))


def test_samplers():
    golden = Golden(SYSTEM, "integrators")
    c = golden.config
    source, target = mixtures(golden)
    path = path_of(golden, c["path"], c["gamma"])
    field = MixtureField(target, source, path, predicts="velocity+latent")
    flow = pr.Flow(field, path=path, predicts="velocity+latent", source=source, shape=(source.dimension,))
    (low, high), eps = c["t_range"], c["eps"]
    grid = torch.linspace(low, high, c["n_grid_points"], dtype=torch.float64).tolist()
    x0, noise = golden["in.x0"].double(), golden["in.noise"].double()

    def heun(x, nodes, sign):
        def drift(x, t):
            return flow.velocity(x, t) + sign * eps * flow.score(x, t)

        return sde(drift, (2 * eps) ** 0.5, x, (nodes[0], nodes[-1]), steps=nodes, method=reference_heun, noise=noise).x

    def maruyama(x, nodes):
        return transport_sde(flow, x, (nodes[0], nodes[-1]), eps, steps=nodes, noise=noise, cap=None).x

    golden.check("out.sde_forward_heun", heun(x0, grid, 1))
    golden.check("out.sde_forward_em", maruyama(x0, grid))
    back = golden[c["reverse_start"]].double()
    golden.check("out.sde_reverse_heun", heun(back, grid[::-1], -1))
    golden.check("out.sde_reverse_em", maruyama(back, grid[::-1]))

    def augmented(state, t):
        x = state[0].detach().requires_grad_(True)
        with torch.enable_grad():
            v = flow.velocity(x, t)
            trace = sum(torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(x.shape[1]))
        return v.detach(), -trace[:, None]

    start = (x0, x0.new_zeros(len(x0), 1))
    assert c["rk4_variant"] == "three_eighths"
    fixed = pr.solve.ode(augmented, start, (low, high), method=RungeKutta("three eighths", THREE_EIGHTHS), steps=grid).x
    exact = pr.solve.ode(augmented, start, (low, high), method="dopri5", rtol=c["dopri5_rtol"], atol=c["dopri5_atol"]).x
    for name, (x, change) in {"rk4": fixed, "dopri5": exact}.items():
        golden.check(f"out.ode_{name}", x)
        golden.check(f"out.ode_{name}_dlogp", change[:, 0])
    times = torch.tensor([low, high], dtype=torch.float64)
    golden.check("out.logrho_start", field.log_prob(x0, times[0]))
    golden.check("out.logrho_end_at_ode", field.log_prob(exact[0], times[1]))
    golden.assert_all_compared()


THREE_EIGHTHS = Tableau(
    a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
    c=(0.0, 1 / 3, 2 / 3, 1.0),
    order=4,
)
FORMS = {
    "SBDM": "diffusion",
    "inccreasing-decreasing": "bump",
    **{name: name for name in ("constant", "sigma", "linear", "decreasing")},
}


def sit_flow(golden):
    c = golden.config
    sizes = {"size": "input_size", "patch": "patch_size", "channels": "in_channels", "width": "hidden_size"}
    sizes |= {"depth": "depth", "heads": "num_heads", "classes": "num_classes", "learn_sigma": "learn_sigma"}
    network = SiT(SiTConfig(**{ours: c[theirs] for ours, theirs in sizes.items()}))
    network.load_state_dict({name.removeprefix("w."): golden[name] for name in golden.names("w.")})
    shape = tuple(golden["in.x"].shape[1:])
    return pr.Flow(network.eval(), shape=shape, null={"label": c["null_class"]})


@pytest.mark.parametrize("plan", ["linear", "gvp", "vp"])
def test_transport_coefficients_and_losses_of_sit(plan):
    golden = Golden(SYSTEM, "sit")
    c = golden.config
    assert plan in c["plans"]
    path = {"linear": Linear(), "gvp": Cosine(), "vp": VP(c["vp_beta_min"], c["vp_beta_max"])}[plan]
    t, x, v = (golden[name].double() for name in ("in.t", "in.x", "out.forward"))
    at = path.at(t, x)
    name = f"out.{plan}"
    golden.check(f"{name}.alpha", path.alpha(t))
    golden.check(f"{name}.d_alpha", path.alpha_dot(t))
    golden.check(f"{name}.sigma", path.sigma(t))
    golden.check(f"{name}.d_sigma", path.sigma_dot(t))
    # Their split of the probability flow, v = -drift_mean + drift_var score.
    split = torch.tensor([noise_amount("diffusion", 1.0, path)(float(s)) for s in t], dtype=torch.float64)
    golden.check(f"{name}.drift_var", split)
    golden.check(f"{name}.drift_mean", -at.alpha_dot / at.alpha * x)
    golden.check(f"{name}.score_from_velocity", convert(path, x, t, v, "velocity", "score"))
    golden.check(f"{name}.noise_from_velocity", convert(path, x, t, v, "velocity", "noise"))
    for form in c["diffusion_forms"]:
        amount = noise_amount(FORMS[form], c["diffusion_norm"], path)
        golden.check(f"{name}.diffusion.{form}", torch.tensor([amount(float(s)) for s in t]))
    network = sit_flow(golden).network.double()
    x0, x1 = golden[f"in.{plan}.x0"].double(), golden[f"in.{plan}.x1"].double()
    x_t, u_t = path.sample(x0, x1, None, t)
    golden.check(f"{name}.xt", x_t)
    golden.check(f"{name}.ut", u_t)
    sigma = path.sigma(t)
    weights = {"none": torch.ones_like(t), "velocity": (split / sigma) ** 2, "likelihood": split / sigma**2}
    batch = {"x0": x0, "x1": x1, "t": t, "label": golden["in.y"]}
    for loss in (key for key in c["losses"]):
        kind, _, weighting = loss.removeprefix("loss_").partition("_")
        # Their score loss is the noise's: |sigma s + x0|^2 = sigma^2 |s - target|^2.
        factor = weights[weighting or "none"] * (sigma**2 if kind == "score" else 1.0)
        term = pr.flow.Term(weight=lambda _, factor=factor: factor)
        flow = pr.Flow(network, path=path, predicts=kind, shape=x.shape[1:], null={"label": c["null_class"]})
        ((_, rows),) = pr.FlowMatching(terms=(term,)).rows(flow, batch, None)
        golden.check(f"{name}.{loss}", rows)


def test_stochastic_samplers_of_sit():
    golden = Golden(SYSTEM, "sit")
    about = golden.config["sde"]
    flow = sit_flow(golden)
    epsilon = noise_amount(FORMS[about["diffusion_form"]], about["diffusion_norm"], flow.path)
    start, stop = about["t_start"], about["t_end"]
    grid = torch.linspace(start, stop, about["num_steps"], dtype=torch.float64).tolist()
    nodes = [*grid, stop + about["last_step_size"]]
    for theirs in about["samplers"]:
        method = {"Euler": "euler_maruyama", "Heun": "noised_heun"}[theirs]
        for ending in about["last_steps"]:
            last = {"Mean": "mean", "Tweedie": "denoise", "Euler": "euler"}[ending]
            options = {"method": method, "last": last, "cap": None, "noise": golden["in.noise"]}
            with torch.no_grad():
                found = transport_sde(
                    flow, golden["in.x"], (start, nodes[-1]), epsilon, steps=nodes, condition=golden["in.y"], **options
                )
            golden.check(f"out.sde.{theirs}.{ending}", found.x)


def test_the_warning_of_stiff_noise_is_computed():
    golden = Golden(SYSTEM, "sit")
    flow = sit_flow(golden)
    with torch.no_grad(), pytest.warns(StiffNoise, match=r"reaches 20 at t = 0.95"):
        transport_sde(
            flow, golden["in.x"], (0.0, 1.0), 1.0, steps=20, cap=None, condition=golden["in.y"], method="heun"
        )
