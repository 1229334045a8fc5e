"""Tiny pipelines of diffusers with random weights, saved as their own `save_pretrained` does; nothing is downloaded."""

import json
from pathlib import Path

import torch

WORDS = [
    "<|startoftext|>",
    "<|endoftext|>",
    "!",
    *"abcdefghijklmnopqrstuvwxyz",
    *(f"{c}</w>" for c in "abcdefghijklmnopqrst"),
]
LENGTH = 9
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def tokenizer(pad: str = "<|endoftext|>"):
    from transformers import CLIPTokenizer

    vocab = {word: i for i, word in enumerate(WORDS)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad, model_max_length=LENGTH)


def text_encoder(width: int = 12, projected: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def autoencoder(channels: int = 4, **settings):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        **settings,
    ).eval()


def ddpm(folder: Path, *, classes: int | None = None, scheduler: str = "DDPMScheduler", **settings) -> Path:
    """A UNet2DModel of 8x8 grey images, with the scheduler of Ho et al."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=classes,
    )
    own = getattr(diffusers, scheduler)(num_train_timesteps=1000, **settings)
    diffusers.DDPMPipeline(unet.eval(), own).save_pretrained(folder)
    return folder


def stable_diffusion(folder: Path, **settings) -> Path:
    """Like Stable Diffusion 1.5: PNDM, scaled linear betas, one CLIP."""
    import diffusers

    torch.manual_seed(1)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=diffusers.UNet2DConditionModel(**UNET).eval(),
        scheduler=diffusers.PNDMScheduler(**SCALED, skip_prk_steps=True, steps_offset=1, **settings),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n# tiny\n")
    return folder


def stable_diffusion_xl(folder: Path) -> Path:
    """Like SDXL: two text encoders, the pooled embedding and six numbers of the picture's size."""
    import diffusers

    torch.manual_seed(2)
    unet = {
        **UNET,
        "cross_attention_dim": 20,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 8 + 6 * 4,
    }
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(8, projected=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer("!"),
        unet=diffusers.UNet2DConditionModel(**unet).eval(),
        scheduler=diffusers.EulerDiscreteScheduler(**SCALED),
        force_zeros_for_empty_prompt=True,
    )
    pipeline.save_pretrained(folder)
    return folder


def t5():
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -2.0) for c in "\u2581abcdefghijklmnopqrstuvwxyz")]
    reader = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = T5Config(vocab_size=len(pieces), d_model=24, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return reader, T5EncoderModel(config).eval()


def stable_diffusion_3(folder: Path, *, with_t5: bool = False) -> Path:
    """Like Stable Diffusion 3: flow matching, two CLIPs, T5 or not."""
    import diffusers

    torch.manual_seed(3)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    reader, encoder = t5() if with_t5 else (None, None)
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=text_encoder(projected=True),
        text_encoder_2=text_encoder(8, projected=True),
        text_encoder_3=encoder,
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer("!"),
        tokenizer_3=reader,
    )
    pipeline.save_pretrained(folder)
    return folder


def change(path: Path, **settings) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
