"""A pipeline of diffusers that draws, as small as it can be."""

import diffusers
import models_zoo as zoo
import torch
from transformers import CLIPTextConfig, CLIPTextModel


def stable_diffusion(vae_channels=(8,)):
    """A Stable Diffusion of tiny parts with random weights; the sides of pictures double with each further channel."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            norm_num_groups=2,
            attention_head_dim=4,
        )
        vae = diffusers.AutoencoderKL(block_out_channels=list(vae_channels), norm_num_groups=2, sample_size=8)
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=16,
                intermediate_size=32,
                num_attention_heads=2,
                num_hidden_layers=1,
                vocab_size=zoo.VOCABULARY,
                max_position_embeddings=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=1,
            )
        )
    tokenizer = zoo.tokenizer(padding_side="right")
    tokenizer.model_max_length = 16
    # No numbers that it would warn of.
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=100, steps_offset=1, clip_sample=False)
    parts = dict(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
    extra = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    made = diffusers.StableDiffusionPipeline(**parts, **extra)
    made.set_progress_bar_config(disable=True)
    return made
