"""SongUNet and ADM, under the exact EDM-to-flow form, against the reference networks and wrapper of rectified flow++."""

import pytest
import torch

import pantarhei as pr
from pantarhei.interop import edm
from pantarhei.networks import ADM, ADMConfig, SongUNet, SongUNetConfig
from parity import Golden

pytestmark = pytest.mark.parity


def described(golden: Golden) -> SongUNetConfig | ADMConfig:
    """The network that the golden's configuration describes."""
    c = golden.config
    common = {
        "size": c["img_resolution"],
        "channels": c["in_channels"],
        "width": c["model_channels"],
        "multipliers": tuple(c["channel_mult"]),
        "blocks": c["num_blocks"],
        "attention": tuple(c["attn_resolutions"]),
        "embedding_multiplier": c["channel_mult_emb"],
        "dropout": c["dropout"],
        "classes": c["label_dim"],
        "label_dropout": c["label_dropout"],
        "augment_dim": c["augment_dim"],
    }
    if "encoder_type" not in c:
        return ADMConfig(**common)
    assert c["decoder_type"] == "standard"
    return SongUNetConfig(
        **common,
        embedding=c["embedding_type"],
        encoder=c["encoder_type"],
        filter=tuple(c["resample_filter"]),
        noise_multiplier=c["channel_mult_noise"],
    )


@pytest.mark.parametrize("name", ["songunet_ve", "adm_cond"])
def test_velocity_of_the_linear_path(name, tmp_path):
    golden = Golden("rectified-flow-plus-plus", name)
    config = described(golden)
    network = SongUNet(config) if isinstance(config, SongUNetConfig) else ADM(config)
    weights = {name.removeprefix("w."): golden[name] for name in golden.names("w.")}
    network.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    flow = pr.Flow(network.eval(), path="linear", predicts="edm")
    # Their u is our 1 - t; both ends of the interval are single precision's nearest to them, so t is taken in double.
    t = 1 - golden["in.t_rfpp"].double()
    label = golden.config["label_input"]
    condition = {"label": golden[label]} if label else None
    with torch.no_grad():
        golden.check("out.v_rfpp", -flow.velocity(golden["in.x"], t, condition))
    golden.assert_all_compared()
    # The same file, opened as users do: all that decides the output is read off names and shapes.
    torch.save(weights, tmp_path / "student.pth")
    told = {"dropout": config.dropout, "label_dropout": config.label_dropout}
    opened = pr.load(tmp_path / "student.pth", rectified=1, **told)
    assert edm.infer_config(network.state_dict(), name, **told) == opened.network.config
    with torch.no_grad():
        assert torch.equal(opened.velocity(golden["in.x"], t, condition), flow.velocity(golden["in.x"], t, condition))
