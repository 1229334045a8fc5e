"""The loss of Rectified Diffusion's training on a UNet of diffusers, and its gradients, against the reference."""

import pytest

from pantarhei.flow import Flow, FlowMatching, Term
from pantarhei.flow.couplings import Pairs
from pantarhei.flow.metrics import PseudoHuber
from parity import Golden

pytestmark = pytest.mark.parity
pytest.importorskip("diffusers")

NOT_OF_THE_MODEL = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "huber_c")


def test_state_prediction_loss_and_gradients():
    from pantarhei.interop.diffusers_schedulers import path_of
    from pantarhei.networks import DiffusersConfig, DiffusersNetwork
    from pantarhei.networks.diffusers_models import MODELS

    golden = Golden("rectified-diffusion", "unet_loss")
    config = golden.config
    model = next(name for name in MODELS if config["library"].endswith(name))
    texts = ("convention", "loss_space", "huber_reduction", "library")
    settings = {name: value for name, value in config.items() if name not in (*NOT_OF_THE_MODEL, *texts)}
    scheduler = {"_class_name": "DDIMScheduler", **{name: config[name] for name in NOT_OF_THE_MODEL[:-1]}}
    network = DiffusersNetwork(DiffusersConfig(model, settings, scheduler=scheduler))
    network.model.load_state_dict({name[2:]: golden[name] for name in golden.names("w.")})
    path, prediction = path_of(scheduler)
    flow = Flow(network, path=path, predicts=prediction, conditions=["text"])
    assert config["loss_space"] == "x0"  # the data, in our letters
    objective = FlowMatching(terms=(Term("data", PseudoHuber(config["huber_c"], elementwise=True)),), coupling=Pairs())
    batch = {
        "x0": golden["in.noise"],
        "x1": golden["in.latent"],
        "text": golden["in.emb"],
        "t": path.time_of(golden["in.timesteps"]),
    }
    draw = objective.draw(flow, batch, None)
    golden.check("out.x_t", draw.x_t)
    output = flow.output(draw.x_t, draw.t, draw.condition)
    golden.check("out.eps", output)
    golden.check("out.pred_x0", flow.denoise(draw.x_t, draw.t, draw.condition))
    loss, _ = objective(flow, batch, None)
    golden.check("out.loss", loss)
    loss.backward()
    gradients = dict(network.model.named_parameters())
    for name in golden.names("out.grad."):
        golden.check(name, gradients[name.removeprefix("out.grad.")].grad)
    golden.assert_all_compared()
