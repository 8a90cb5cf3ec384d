"""Image models, pipelines and sparse maps for the tests of LoRA sliders."""

import copy
import inspect

import diffusers
import fold_cases
import numpy as np
import torch
from tiny_diffusion import stable_diffusion
from torch import nn

import lineas
from lineas.hooks import modules

UNET = [
    "**.transformer_blocks.*.norm[123]",
    "**.attentions.*.norm",
    "**.conv[12]",
    "**.attn?.to_out.0",
    "**.time_emb_proj",
    "**.downsamplers.*.conv",
    "**.conv_shortcut",
    "**.proj_out",
    "time_embedding.linear_1",
    "conv_in",
    "conv_out",
]
# Their maps without shifts need no bias.
READ_WITHOUT_BIAS = ["**.transformer_blocks.*.norm[123]", "**.attentions.*.norm"]
TRANSFORMER = [
    "**.norm1",
    "**.norm1_context",
    "**.norm2",
    "**.norm2_context",
    "norm_out",
    "**.ff.net.2",
    "**.attn.to_out.0",
]
FLUX = [*TRANSFORMER, "single_transformer_blocks.*.norm", "single_transformer_blocks.*.proj_out", "x_embedder"]
GLOBS = {"UNet": UNET, "Flux": FLUX, "SD3": TRANSFORMER, "SD3.5": TRANSFORMER}


def sd3(dual: bool = False) -> nn.Module:
    """The transformer of a small Stable Diffusion 3, or with two attentions in its first block, 3.5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = diffusers.SD3Transformer2DModel(
            sample_size=4,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            out_channels=4,
            pos_embed_max_size=4,
            dual_attention_layers=(0,) if dual else (),
        )
    return fold_cases.shake(model, 0).double()


_BUILT = {
    "UNet": fold_cases.unet(),
    "Flux": fold_cases.flux(),
    "SD3": sd3(),
    "SD3.5": sd3(dual=True),
}


def build(kind: str) -> nn.Module:
    """A model of its own with weights that are always the same.

    They are frozen: loading a LoRA freezes them, and torch rounds a little differently then.
    """
    return copy.deepcopy(_BUILT[kind]).requires_grad_(False)


def prefix(kind: str) -> str:
    return "unet" if kind == "UNet" else "transformer"


def run(model: nn.Module) -> torch.Tensor:
    """What the model makes of fixed inputs."""
    if type(model).__name__ != "SD3Transformer2DModel":
        return fold_cases.run(model)
    generator = torch.Generator().manual_seed(1)
    image, text, pooled = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 4, 4, 4), (2, 5, 8), (2, 8))
    )
    with torch.no_grad():
        return model(image, text, pooled, torch.tensor([3.0, 7.0], dtype=torch.float64)).sample


def hooked(model: nn.Module, maps: lineas.SteeringMaps, strength: float = 1.0) -> torch.Tensor:
    with maps.attach(model, strength=strength):
        return run(model)


def sparse_maps(model: nn.Module, globs, *, shift: bool = True, seed: int = 0, most: int = 3) -> lineas.SteeringMaps:
    """Maps that scale from 1 to `most` neurons of each module, and shift these and one more."""
    rng = np.random.default_rng(seed)
    maps = {}
    for number, (name, d) in enumerate(fold_cases.widths(model, modules.resolve(model, globs)).items()):
        weight, bias = np.ones(d), np.zeros(d)
        chosen = rng.permutation(d)[: 2 + number % most]
        weight[chosen[:-1]] = rng.uniform(0.2, 1.8, len(chosen) - 1)
        if shift:
            bias[chosen] = rng.normal(0.0, 0.5, len(chosen))
        maps[name] = lineas.AffineMap(weight, bias)
    return lineas.SteeringMaps(maps)


def pipeline(kind: str):
    """A pipeline with the model alone in it: enough to load a LoRA."""
    names = {"UNet": "StableDiffusionPipeline", "Flux": "FluxPipeline"}.get(kind, "StableDiffusion3Pipeline")
    made = getattr(diffusers, names)
    parts = dict.fromkeys(set(inspect.signature(made.__init__).parameters) - {"self"}) | {prefix(kind): build(kind)}
    return made(**parts | ({"requires_safety_checker": False} if kind == "UNet" else {}))


def painter():
    """A tiny Stable Diffusion that takes prompts and gives pictures twice as large as its latents."""
    made = stable_diffusion(vae_channels=(8, 8))
    with torch.no_grad():
        for name, weight in made.unet.named_parameters():
            if "attn2" in name and name.endswith("weight"):
                weight *= 8  # so that prompts matter
    fold_cases.shake(made.unet, 0).requires_grad_(False)
    return made
