"""The autoencoder of SD3 against its reference implementation."""

import pytest
import torch

from pantarhei.networks.autoencoder import LOGVAR, Autoencoder, AutoencoderConfig
from parity import Golden

pytestmark = pytest.mark.parity


def test_encoder_and_decoder():
    golden = Golden("mmdit", "vae16")
    c = golden.config
    assert tuple(c["logvar_clamp"]) == LOGVAR
    config = AutoencoderConfig(
        image_channels=golden["in.image"].shape[1],
        channels=c["z_channels"],
        width=c["ch"],
        multipliers=tuple(c["ch_mult"]),
        blocks=c["num_res_blocks"],
        groups=c["groups"],
    )
    network = Autoencoder(config).eval()
    network.load_state_dict({name.removeprefix("w."): golden[name] for name in golden.names("w.")})
    with torch.no_grad():
        golden.check("out.moments", network.encoder(golden["in.image"]))
        latents = network.latents(golden["in.image"])
        golden.check("out.mean", latents.mean)
        golden.check("out.logvar_clamped", latents.logvar)
        golden.check("out.decoded", network.decoder(golden["in.latent"]))
    golden.assert_all_compared()
