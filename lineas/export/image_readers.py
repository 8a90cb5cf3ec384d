"""Which Linears and convolutions of image models read the output of a norm: for blocks of diffusers.

As `lineas.export.readers` has it for decoder layers of transformers. Read in the forward of each class (diffusers
0.42.1).
"""

from collections import Counter
from typing import Any

from torch import nn

from .readers import Readers, is_from, name_readers
from .refusal import Refusal

_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def find_image_readers(model: nn.Module, name: str, given: Readers, uses: Counter[int]) -> list[str]:
    """`name_readers` for blocks of diffusers.

    Refusal also where the output goes through something else before it comes to weights.
    """
    return name_readers(model, name, given, uses, _found, "Linears or convolutions")


def _found(layer: Any, last: str) -> tuple[str, ...]:
    """What reads the norm `last` of a block; empty where it is not known."""
    if not is_from(layer, "diffusers.models"):
        return ()
    kind = type(layer).__name__
    if kind.startswith("ResnetBlock") or last == "conv_norm_out":
        raise Refusal(
            "its output goes through a nonlinearity before any weight, so that no LoRA can hold the map; "
            "maps.fold can, and so can LoRA one of the convolution before it"
        )
    if last in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        raise Refusal("no weight reads its output: queries and keys are multiplied with each other")
    if kind == "BasicTransformerBlock":
        return _in_basic_block(layer, last)
    if kind == "Transformer2DModel" and last == "norm":
        return ("proj_in",)
    if kind in ("FluxTransformerBlock", "JointTransformerBlock"):
        which = {"norm1": _QKV, "norm1_context": _ADDED_QKV}.get(last, ())
        return _in_attention(layer.attn, "attn", which)
    if kind == "FluxSingleTransformerBlock" and last == "norm":
        return *_in_attention(layer.attn, "attn", _QKV), "proj_mlp"
    if kind in ("FluxTransformer2DModel", "SD3Transformer2DModel") and last == "norm_out":
        return ("proj_out",)
    return ()


def _in_basic_block(layer: Any, last: str) -> tuple[str, ...]:
    if layer.norm_type != "layer_norm" or layer.pos_embed is not None:
        raise Refusal(
            f"a modulation that the blocks of this {type(layer).__name__} share (norm_type {layer.norm_type!r}) or a "
            "position embedding comes between it and what reads it"
        )
    if last == "norm3":
        return ("ff.net.0.proj",)
    attention = {"norm1": layer.attn1, "norm2": layer.attn2}.get(last)
    if attention is None:
        return ()
    # Keys and values of a cross-attention are made of the text.
    return _in_attention(attention, f"attn{last[-1]}", ("to_q",) if attention.is_cross_attention else _QKV)


def _in_attention(attention: Any, name: str, which: tuple[str, ...]) -> tuple[str, ...]:
    if getattr(attention, "fused_projections", False):
        raise Refusal(f"the projections of {name!r} are fused: call unfuse_qkv_projections() of the model first")
    if getattr(attention, "group_norm", None) is not None or getattr(attention, "spatial_norm", None) is not None:
        raise Refusal(f"{name!r} has a norm of its own before its projections")
    return tuple(f"{name}.{one}" for one in which)
