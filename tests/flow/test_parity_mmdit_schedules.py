"""Grids, laws of the training time and samplers of SD3 against its reference implementations."""

import math
import re

import pytest
import torch

from pantarhei.flow import Flow, GaussianMixture
from pantarhei.flow.closed_form import MixtureField
from pantarhei.flow.grids import make_grid, shift_for
from pantarhei.flow.times import CosMap, LogitNormal, Mode
from pantarhei.networks.dit_parts import positions, waves
from parity import Golden

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def golden():
    return Golden("mmdit", "schedules_samplers")


def levels(grid):
    return 1 - torch.tensor(grid, dtype=torch.float64)


def test_grids(golden):
    for name in golden.names("out.sigmas.shift"):
        shift, steps = (float(text) for text in re.search(r"shift(.+)\.n(\d+)$", name).groups())
        golden.check(name, levels(make_grid(int(steps), kind="reference", shift=shift)))
    for name in golden.names("out.sigmas_from_linspace_1_to_1overn."):
        shift, steps = (float(text) for text in re.search(r"shift(.+)\.n(\d+)$", name).groups())
        golden.check(name, levels(make_grid(int(steps), shift=shift)))
    c = golden.config
    ends = {
        "few": (c["dynamic_base_seq_len"], c["dynamic_base_shift"]),
        "many": (c["dynamic_max_seq_len"], c["dynamic_max_shift"]),
    }
    tokens = golden["in.dyn_seq_len"].tolist()
    golden.check("out.dyn_mu", torch.tensor([shift_for(int(n), **ends, exponential=False) for n in tokens]))
    for case in c["dynamic"]:
        grid = make_grid(case["n"], shift=math.exp(case["mu"]))
        golden.check(f"out.sigmas_dynamic.mu{case['mu']}.n{case['n']}", levels(grid))


def test_laws_of_the_training_time(golden):
    # Theirs are laws of the noise level, 1 - t.
    u, z, level = golden["f64.in.u"], golden["f64.in.z"], golden["f64.in.t"]
    for mean, std in golden.config["lognorm"]:
        law, name = LogitNormal(-mean, std), f"m{mean}.s{std}"
        golden.check(f"f64.out.lognorm_sample.{name}", 1 - law.quantile(torch.special.ndtr(-z)))
        golden.check(f"f64.out.lognorm_pdf.{name}", law.pdf(1 - level))
    for scale in golden.config["mode_scales"]:
        law = Mode(scale)
        golden.check(f"f64.out.mode_sample.s{scale}", law.quantile(1 - u))
        golden.check(f"f64.out.mode_pdf.s{scale}", law.pdf(1 - level))
    golden.check("f64.out.cosmap_sample", CosMap().quantile(u))
    golden.check("f64.out.cosmap_pdf", CosMap().pdf(1 - level))


def test_embeddings(golden):
    golden.check("out.timestep_embedding_256", waves(golden["in.t_embed"], golden.config["timestep_embedding_dim"]))
    for case in golden.config["pos_embed"]:
        if "base_size" in case:
            table = positions(case["grid"], case["dim"], scale=case["grid"] / case["base_size"])
        else:
            table = positions(case["grid"], case["dim"], scale=case["scale"], offset=case["offset"])
        golden.check(case["name"], table)


def test_samplers(golden):
    law = GaussianMixture(
        golden["in.gmm_weight"].double(),
        golden["in.gmm_means"].double(),
        golden["in.gmm_std"].double()[:, None, None].square() * torch.eye(2).double(),
    )
    flow = Flow(MixtureField(law), shape=(2,))
    x0 = golden["in.noise"].double()
    for name in golden.names("out."):
        match = re.fullmatch(r"out\.(euler|dpmpp2m|heun)\.shift(.+)\.n(\d+)", name)
        if match is None:
            continue
        method = {"dpmpp2m": "dpm-solver-sd3", "heun": "heun-euler"}.get(match[1], match[1])
        grid = tuple((1 - golden[f"out.sigmas.shift{match[2]}.n{match[3]}"].double()).tolist())
        golden.check(name, flow.sample(x0=x0, steps=grid, method=method))
