"""Samplers and training terms of trajectory models against the reference implementation."""

import pytest
import torch
from torch import Tensor, nn

from pantarhei.flow import Churn, Flow, FlowMatching, TrajectoryModel, churned_sample, gamma_moves, make_grid
from pantarhei.flow.objectives import Draw, Term
from pantarhei.flow.paths import EDM
from pantarhei.straighten import TrajectoryMatching, jump_times
from pantarhei.straighten.adversarial import discriminator_loss, generator_loss
from pantarhei.straighten.trajectory_task import adaptive_weight, slope_norm
from parity import Golden

pytestmark = pytest.mark.parity
SYSTEM = "consistency-trajectory-models"
# Names of row weights there and here.
WEIGHTS = {"uniform_g": "length", "karras_weight": "karras", "sq-t-inverse": "root"}


class Toy(nn.Module):
    """tanh(x A + t b + s c) B; t and s are labels ln(sigma) / 4."""

    def __init__(self, golden: Golden, who: str):
        super().__init__()
        for name in "ABbc":
            setattr(self, name, nn.Parameter(golden[f"w.{who}.{name}"].clone()))
        self.scale = 1000 * golden.config["toy_time_scale"] / 250  # of the labels, to the golden's rt / 1000

    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        h = x @ self.A + self.scale * t[:, None] * self.b
        return torch.tanh(h if s is None else h + self.scale * s[:, None] * self.c) @ self.B


def model(golden: Golden, who: str) -> TrajectoryModel:
    config = golden.config
    path = EDM(config["sigma_min"], config["sigma_max"], config["rho"])
    predicts = {"name": "edm", "sigma_data": config["sigma_data"]}
    return TrajectoryModel(Toy(golden, who), path=path, predicts=predicts, shape=(config["d"],))


def levels(flow: Flow, times: Tensor) -> Tensor:
    return flow.path.sigma(times.double())


def test_samplers() -> None:
    golden = Golden(SYSTEM, "samplers")
    config, own = golden.config, model(golden, "model")
    x, noise = golden["in.x_T"], golden["in.noise"]

    def draw(number: int, like: Tensor) -> Tensor:
        return noise[number]

    def grid(steps: int) -> tuple[float, ...]:
        return make_grid(steps, own.interval, kind="edm", path=own.path)

    for k in config["exact_steps"]:
        level = levels(own, torch.tensor(grid(k)))
        golden.check(f"out.sigmas_{k}", torch.cat([level, torch.zeros(1)]))
        golden.check(f"out.exact_{k}", own.jumps(x, gamma_moves(own.path, grid(k))))
        golden.check(f"out.exact_{k}", own.sample(x0=x / config["sigma_max"], steps=k))
    for k in config["gamma_steps"]:
        for gamma in config["gammas"]:
            moves = gamma_moves(own.path, grid(k), gamma)
            golden.check(f"out.gamma{gamma:g}_{k}", own.jumps(x, moves, noise=draw))
    for k in config["gamma1_cm_steps"]:
        golden.check(f"out.gamma1_cm_{k}", own.jumps(x, gamma_moves(own.path, grid(k), 1.0), noise=draw))
    fine = grid(config["N"] - 1)
    times = [fine[i] for i in config["exact_ts_indices"]]
    golden.check("out.exact_ts", own.jumps(x, gamma_moves(own.path, times)))
    x0, steps = x / config["sigma_max"], config["heun_steps"] - 1
    assert config["heun_final_euler_to_zero"]
    golden.check("out.heun_score", own.sample(x0=x0, steps=steps, method="edm", grid="edm"))
    churn = config["churn"]
    how = Churn(churn["s_churn"], churn["s_tmin"], churn["s_tmax"], churn["s_noise"])
    golden.check("out.heun_score_churn", churned_sample(own, x0, churn=how, steps=steps, noise=draw))
    golden.assert_all_compared()


def test_training_terms() -> None:
    golden = Golden(SYSTEM, "training_terms")
    config = golden.config
    student, average, taught = (model(golden, who) for who in ("model", "target", "teacher"))
    average.network.requires_grad_(False)
    settings = taught.settings() | {"head": None}
    settings.pop("head")
    teacher = Flow(taught.network, **settings)
    law = jump_times(student, config["N"])
    golden.check("out.t_grid", levels(student, torch.tensor(law.grid)))
    first, landing = golden["in.index_t"], golden["in.index_s"]
    x0, x1 = golden["in.noise"], golden["in.x_clean"]

    def drawn(k: int):
        return law.at(first, torch.full_like(first, k), landing)

    draw = drawn(config["u_steps"])
    for name in "tus":
        golden.check(f"out.{name}", levels(student, getattr(draw, name)))
    x = student.path.sample(x0, x1, None, draw.t)[0]
    golden.check("out.x_t", x)
    matching = TrajectoryMatching(teacher=teacher)
    for k in config["heun_steps"]:
        golden.check(f"out.heun_{k}", matching.at_u(average, drawn(k), x, x0, x1, None))
    steps = drawn(config["self_teacher_steps"])
    for waypoint, name in (("self", "one_jump"), ("self-steps", "iterative")):
        own = TrajectoryMatching(waypoint=waypoint).at_u(average, steps, x, x0, x1, None)
        golden.check(f"out.self_teacher_{name}", own)
    compared = matching.compare(student, average, drawn(config["target_heun_steps"]), x0, x1)
    golden.check("out.estimate", compared.estimate)
    golden.check("out.target_inner_model_sg", compared.target)
    other = TrajectoryMatching(teacher=teacher, follower="average").compare(student, average, draw, x0, x1)
    golden.check("out.target_inner_target_sg", other.target)
    rows = matching.loss(student, draw, compared)
    golden.check("out.l2_loss", rows)
    layer = getattr(student.network, config["adaptive_layer"])
    golden.check(
        f"out.grad_{config['adaptive_layer']}_of_l2", torch.autograd.grad(rows.mean(), layer, retain_graph=True)[0]
    )
    for name in config["weightings"]:
        weighted = TrajectoryMatching(teacher=teacher, weight=WEIGHTS.get(name, name))
        golden.check(f"out.weight.{name}", weighted.row_weights(student, draw))
    # The denoising term is the native squared error of flow matching at s = t.
    sigma = golden["in.dsm_sigma"]
    t = student.path.time_at(1 / sigma.double()).float()
    noisy, direction = student.path.sample(golden["in.dsm_noise"], x1, None, t)
    golden.check("out.dsm_denoised", student.denoise(noisy, t))
    golden.check("out.dsm_weight", 1 / sigma**2 + 1 / config["sigma_data"] ** 2)
    point = Draw(golden["in.dsm_noise"], x1, t, noisy, direction, None, {})
    (term,) = FlowMatching().terms
    assert isinstance(term, Term)
    denoising = term(student, point, student.output(noisy, t))
    golden.check("out.dsm_loss", denoising)
    norms = (slope_norm(loss.mean(), layer) for loss in (rows, denoising))
    golden.check("out.adaptive_weight_dsm", adaptive_weight(*norms, tuple(config["adaptive_clamp"])).reshape(1))
    fake, real = golden["in.logits_fake"], golden["in.logits_real"]
    golden.check("out.g_loss", generator_loss(fake).reshape(1))
    golden.check("out.d_loss", discriminator_loss(fake, real).reshape(1))
    golden.assert_all_compared()
