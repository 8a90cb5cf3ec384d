"""Stand-ins for a rehearsal of the protocol of images: a tiny random SDXL, CLIP and DINOv2, in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _paper_rehearsal import tokenizer
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

WIDTH, PIXELS = 16, 28


def stand_ins(folder: Path) -> dict[str, Any]:
    """Make all stand-ins in a folder; what the options of the script are to be for them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _generator(folder)
        _scores(folder)
    return {name: str(folder / name) for name in ("base", "clip", "dino")} | {"unet": str(folder / "unet.bin")}


def _text(vocabulary: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=32,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def _generator(folder: Path) -> None:
    made = tokenizer(folder / "tokenizer")
    made.model_max_length = 64
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=4,
        cross_attention_dim=2 * WIDTH,  # of both text encoders
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )
    # The stand-in of DMD2: other weights for the same UNet, in the form in which its own come.
    torch.save({name: 1.5 * weight for name, weight in unet.state_dict().items()}, folder / "unet.bin")
    StableDiffusionXLPipeline(
        vae=AutoencoderKL(block_out_channels=[8], norm_num_groups=2, sample_size=8),
        text_encoder=CLIPTextModel(_text(len(made))),
        text_encoder_2=CLIPTextModelWithProjection(_text(len(made))),
        tokenizer=made,
        tokenizer_2=made,
        unet=unet,
        scheduler=LCMScheduler(),
        add_watermarker=False,
    ).save_pretrained(folder / "base")


def _scores(folder: Path) -> None:
    made = tokenizer(folder / "clip")
    layers = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": PIXELS, "patch_size": 14}
    config = CLIPConfig(text_config=_text(len(made)).to_dict(), vision_config={**layers, **sizes}, projection_dim=WIDTH)
    CLIPModel(config).save_pretrained(folder / "clip")
    size = {"height": PIXELS, "width": PIXELS}
    CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size).save_pretrained(folder / "clip")
    del layers["intermediate_size"]
    Dinov2Model(Dinov2Config(**layers, **sizes)).save_pretrained(folder / "dino")
    BitImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size).save_pretrained(folder / "dino")
