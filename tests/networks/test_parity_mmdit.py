"""MM-DiT against both reference implementations: every stream, the output, loss and gradients, both layouts."""

import pytest
import torch
from torch.nn import functional as F

from pantarhei.networks import mmdit_keys
from pantarhei.networks.mmdit import LEVELS, MMDiT, MMDiTConfig
from parity import Golden

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=["sd3_plain", "sd35_qknorm_dual"])
def golden(request):
    return Golden("mmdit", request.param)


def config_of(c):
    return MMDiTConfig(
        channels=c["in_channels"],
        patch=c["patch_size"],
        width=c["hidden"],
        depth=c["depth"],
        heads=c["num_heads"],
        mlp=c["mlp_ratio"],
        text_width=c["context_dim"],
        pooled_width=c["pooled_dim"],
        side=c["pos_embed_max_size"],
        qk_norm=c["qk_norm"] is not None,
        dual=tuple(c["dual_attention_layers"]),
    )


def weights_of(golden, prefix="w."):
    return {name.removeprefix(prefix): golden[name] for name in golden.names(prefix)}


@pytest.fixture
def network(golden):
    network = MMDiT(config_of(golden.config))
    network.load_state_dict(weights_of(golden))
    return network.eval()


def inputs(golden):
    assert golden.config["num_train_timesteps"] == LEVELS
    return golden["in.x"], 1 - golden["in.t"] / LEVELS, golden["in.context"], golden["in.y_pooled"]


def test_every_stream_and_the_output(golden, network):
    x, t, text, pooled = inputs(golden)
    with torch.no_grad():
        golden.check("out.patch_tokens", network.x_embedder(x))
        rows, columns = (side // network.config.patch for side in x.shape[2:])
        golden.check("out.pos_crop", network.cropped(rows, columns))
        golden.check("out.cond_vector", network.t_embedder(golden["in.t"]) + network.y_embedder(pooled))
        h, words, activated = network.entered(x, golden["in.t"], text, pooled)
        for number, block in enumerate(network.joint_blocks):
            h, words = block(h, words, activated)
            golden.check(f"out.block{number}.image", h)
            if words is not None:
                golden.check(f"out.block{number}.context", words)
        golden.check("out.velocity", -network(x, t, text, pooled))
        skipped = golden.config.get("skip_layers")
        if skipped:
            golden.check("out.velocity_skip_layers", -network(x, t, text, pooled, skip=skipped))


def test_the_loss_and_its_gradients(golden, network):
    _, t, text, pooled = inputs(golden)
    data, noise = golden["in.train_data"], golden["in.train_noise"]
    rows = t[:, None, None, None]
    velocity = network(rows * data + (1 - rows) * noise, t, text, pooled)
    loss = F.mse_loss(velocity, data - noise)
    golden.check("out.train_loss", loss[None])
    loss.backward()
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    for name in golden.names("out.grad."):
        golden.check(name, grads[name.removeprefix("out.grad.")])
    if "out.grad_norm_total" in golden.tensors:
        total = torch.stack([g.double().square().sum() for g in grads.values()]).sum().sqrt()
        golden.check("out.grad_norm_total", total[None])


def test_both_layouts(golden, network):
    ours, theirs = weights_of(golden), weights_of(golden, "wd.")
    depth = golden.config["depth"]
    made = mmdit_keys.to_diffusers(ours, depth)
    assert made.keys() == theirs.keys()
    assert all(torch.equal(made[name], theirs[name]) for name in theirs)
    back = mmdit_keys.from_diffusers(theirs, ours.keys(), depth)
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    shapes = {name: tuple(value.shape) for name, value in ours.items()}
    assert mmdit_keys.infer_config(shapes, "golden", heads=golden.config["num_heads"]) == network.config
    assert mmdit_keys.expected(network.config) == shapes
