"""Rectified diffusion against the reference: schedules, trailing DDIM, the whole phased step."""

import pytest
import torch

from pantarhei.flow import Flow, PseudoHuber, denoising_steps, squared
from pantarhei.flow.paths import Numbered
from pantarhei.flow.predictions import build_prediction
from pantarhei.straighten.phased import PhasedObjective, Phases
from parity import Golden

pytestmark = pytest.mark.parity
SYSTEM = "rectified-diffusion"
OURS = {"epsilon": "noise", "v_prediction": "v", "sample": "data"}


class AnalyticNoise(torch.nn.Module):
    """eps = x (k + a cos(n / tc)) + e sin(n / ts) of the number n."""

    def __init__(self, config, path, k):
        super().__init__()
        self.config, self.path = config, path
        self.k = torch.nn.Parameter(torch.as_tensor(k))

    def forward(self, x, t, e):
        c = self.config
        number = torch.round(self.path.number_of(t.double())).to(x.dtype).reshape(-1, 1, 1, 1)
        first = x * (self.k + c["eps_a"] * torch.cos(number / c["eps_tc"]))
        return first + e.reshape(-1, 1, 1, 1) * torch.sin(number / c["eps_ts"])


def path_of(config, schedule):
    return Numbered(schedule.replace("_", "-"), config["beta_start"], config["beta_end"], config["num_train_timesteps"])


def noise_flow(config, path, k, shape):
    return Flow(AnalyticNoise(config, path, k), path=path, predicts="noise", shape=shape, null={"e": 0.0})


def test_schedules_predictions_and_trailing_ddim():
    g = Golden(SYSTEM, "schedules_sampling")
    c = g.config
    x, output = g["in.x"], g["in.model_out"]
    for schedule in c["beta_schedules"]:
        path = path_of(c, schedule)
        g.check(f"out.{schedule}.alphas_cumprod", path.alphas_cumprod())
        t = path.time_of(g["in.timesteps"].double())
        for kind in c["pred_x0_types"]:
            data = build_prediction(OURS[kind]).ends(path, x, t, output).data
            g.check(f"out.{schedule}.pred_x0.{kind}", data)
        count = c["num_train_timesteps"]
        stride = count // c["ddim_steps"]
        numbers = stride * torch.arange(1, c["ddim_steps"] + 1) - 1
        g.check(f"out.{schedule}.ddim40_timesteps", numbers)
        g.check(f"out.{schedule}.ddim40_prev", torch.cat([torch.zeros(1, dtype=torch.long), numbers[:-1]]))
        flow = noise_flow(c, path, g["in.k"], x.shape[1:])
        condition = {"e": g["in.emb_mean"].expand(len(x))}
        for steps in c["trailing_steps"]:
            # Phases of even numbers are the trailing grid; a step to a negative number ends at 0.
            bounds = Phases.of(flow, steps).bounds
            found = torch.tensor([round(float(path.number_of(torch.tensor(b)))) for b in bounds[:-1]])
            g.check(f"out.{schedule}.trailing_n{steps}.timesteps", found)
            g.check(f"out.{schedule}.trailing_n{steps}.final", denoising_steps(flow, x, bounds, condition))
    g.assert_all_compared()


def test_the_whole_phased_step():
    g = Golden(SYSTEM, "phased_step")
    c = g.config
    path = path_of(c, c["beta_schedule"])
    latents, noise = g["in.latents"], g["in.noise"]
    teacher = noise_flow(c, path, g["in.teacher_k"], latents.shape[1:])
    student = noise_flow(c, path, g["in.student_k"], latents.shape[1:])
    phases = Phases.of(teacher, c["num_phases"])
    starts = torch.tensor([round(float(path.number_of(torch.tensor(b)))) for b in phases.bounds])
    phase = (g["in.start_timesteps"][:, None] == starts[None, :-1]).int().argmax(dim=1)
    assert torch.equal(starts[phase], g["in.start_timesteps"])
    objective = PhasedObjective(teacher, phases, c["ddim_substeps"], 1 + c["guidance_w"])
    from pantarhei.flow import Condition

    condition = Condition({"e": g["in.emb_mean"]}, {"e": float(c["uncond_emb"])})
    segment = objective.segment(latents, noise, phase, condition)
    g.check("out.end_timesteps", torch.round(path.number_of(segment.end.double())))
    g.check("out.x_start", segment.x_start)
    g.check("out.x_end", segment.x_end)
    g.check("out.first_order_eps", segment.noise)
    t = path.time_of(g["in.sampled_timesteps"].double())
    x = objective.at(segment, t)
    g.check("out.x_sampled", x)
    for name, metric in (("huber", PseudoHuber(c["huber_c"], elementwise=True)), ("l2", squared)):
        arrived = objective.arrival(student, segment, x, t, condition)
        loss = metric(arrived, segment.x_end).mean()
        (gradient,) = torch.autograd.grad(loss, student.network.k)
        g.check(f"out.loss_{name}", loss)
        g.check(f"out.dloss_dk_{name}", gradient)
    g.check("out.student_pred_end", arrived)
    g.assert_all_compared()
