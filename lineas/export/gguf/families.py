"""What a GGUF file of a model family has: its norms, what reads each of them, and where llama.cpp takes a bias.

Read in llama.cpp's ``src/models/*.cpp`` of October 2026, ``load_arch_tensors`` for what is taken and the graph for
what is used, and in its converter for what stands in the files. Attention biases are taken by every family whose loader
calls ``create_tensor_qkv``; builds of llama.cpp without a place for a bias refuse a file that brings it. The gain of a
norm stands in a file as what activations are multiplied by: the converter adds the 1 of Gemma's 1 + weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..._names import hint

_QKV = ("attn_q", "attn_k", "attn_v")
_FUSED = ("attn_qkv",)


@dataclass(frozen=True)
class Norm:
    """A norm of a block.

    Attributes
    ----------
    tensor : str
        Its name in files, without the block.
    readers : tuple of str
        The matrices that read its output, and that nothing else does. Empty where something else reads it.
    adds_to : str
        For a norm of an output, what its own output is added to: "block" for the residual stream at the end of the
        block, "middle" for that between attention and MLP; else "".
    """

    tensor: str
    readers: tuple[str, ...] = ()
    adds_to: str = ""


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    Attributes
    ----------
    block : str
        How transformers calls a block, with {} for its number.
    norms : Mapping[str, Norm]
        By their names in a block of transformers.
    final : str
        The norm before the output matrix.
    linears : Mapping[str, str]
        Tensors of matrices whose outputs may get a shift, by names in a block of transformers.
    biases : frozenset of str
        Matrices whose bias the loader takes, whether a file has it or not.
    """

    block: str
    norms: Mapping[str, Norm]
    final: str
    linears: Mapping[str, str] = field(default_factory=dict)
    biases: frozenset[str] = frozenset()


_ATTENTION_NORM = Norm("attn_norm", _QKV)
_MLP_NORM = Norm("ffn_norm", ("ffn_gate", "ffn_up"))
_ATTENTION_BIASES = frozenset((*_QKV, *_FUSED))
_MLP_BIASES = frozenset(("ffn_gate", "ffn_up", "ffn_down"))
_QK_NORMS = {"self_attn.q_norm": Norm("attn_q_norm"), "self_attn.k_norm": Norm("attn_k_norm")}
_OUTPUT_NORMS = {
    "post_attention_layernorm": Norm("post_attention_norm", adds_to="middle"),
    "post_feedforward_layernorm": Norm("post_ffw_norm", adds_to="block"),
}
_PRE_NORMS = {"input_layernorm": _ATTENTION_NORM, "post_attention_layernorm": _MLP_NORM}
_GATED_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp": "ffn_down"}
_ATTENTION_OUTPUT = {"self_attn.o_proj": "attn_output", "self_attn": "attn_output"}
_LLAMA_LINEARS = _ATTENTION_OUTPUT | _GATED_MLP


def _llama(
    biases: frozenset[str], norms: Mapping[str, Norm] = _PRE_NORMS, linears: Mapping[str, str] = _LLAMA_LINEARS
) -> Architecture:
    """A family whose modules are called as Llama's."""
    return Architecture("model.layers.{}", norms, "model.norm", linears, biases)


_WITH_BIASES = _llama(_ATTENTION_BIASES | _MLP_BIASES | {"attn_output"})
_ATTENTION_ONLY = _llama(_ATTENTION_BIASES)
_GEMMA2 = {
    "input_layernorm": _ATTENTION_NORM,
    "pre_feedforward_layernorm": _MLP_NORM,
    **_OUTPUT_NORMS,
}

# By general.architecture. Mistral and Mixtral are "llama"; the norm before experts is known by its tensors.
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "gemma": _ATTENTION_ONLY,
        "gemma2": _llama(_ATTENTION_BIASES, _GEMMA2),
        "gemma3": _llama(_ATTENTION_BIASES, _GEMMA2 | _QK_NORMS),
        "gpt2": Architecture(
            "transformer.h.{}",
            {"ln_1": Norm("attn_norm", _FUSED), "ln_2": Norm("ffn_norm", ("ffn_up",))},
            "transformer.ln_f",
            {"attn.c_proj": "attn_output", "attn": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
            frozenset(("attn_output", "ffn_up", "ffn_down")),
        ),
        "gptneox": Architecture(
            "gpt_neox.layers.{}",
            {
                "input_layernorm": Norm("attn_norm", _FUSED),
                "post_attention_layernorm": Norm("ffn_norm", ("ffn_up",)),
            },
            "gpt_neox.final_layer_norm",
            {
                "attention.dense": "attn_output",
                "attention": "attn_output",
                "mlp.dense_h_to_4h": "ffn_up",
                "mlp.dense_4h_to_h": "ffn_down",
                "mlp": "ffn_down",
            },
            frozenset(("attn_output", "ffn_up", "ffn_down")),
        ),
        "granite": _WITH_BIASES,
        "llama": _WITH_BIASES,
        "olmo2": _llama(frozenset(), _OUTPUT_NORMS | _QK_NORMS),
        "phi2": Architecture(
            "model.layers.{}",
            {"input_layernorm": Norm("attn_norm", (*_QKV, "ffn_up"))},
            "model.final_layernorm",
            {"self_attn.dense": "attn_output", "self_attn": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
            frozenset(("attn_output", "ffn_up", "ffn_down")),
        ),
        "phi3": _llama(
            _ATTENTION_BIASES,
            _PRE_NORMS | {"post_attention_layernorm": Norm("ffn_norm", ("ffn_up",))},
            {"self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
        ),
        "qwen2": _llama(_ATTENTION_BIASES | {"output"}),
        "qwen3": _llama(_ATTENTION_BIASES, _PRE_NORMS | _QK_NORMS),
        "qwen3moe": _llama(_ATTENTION_BIASES, _PRE_NORMS | _QK_NORMS, _ATTENTION_OUTPUT),
        "smollm3": _ATTENTION_ONLY,
        "starcoder2": Architecture(
            "model.layers.{}",
            {"input_layernorm": _ATTENTION_NORM, "post_attention_layernorm": Norm("ffn_norm", ("ffn_up",))},
            "model.norm",
            {
                "self_attn.o_proj": "attn_output",
                "self_attn": "attn_output",
                "mlp.c_fc": "ffn_up",
                "mlp.c_proj": "ffn_down",
                "mlp": "ffn_down",
            },
            frozenset(("attn_output", "ffn_up", "ffn_down")),
        ),
    }
)


@dataclass(frozen=True)
class Site:
    """What a module is in a file: the tensor's name without ".weight", and its block, None for the final norm."""

    tensor: str
    block: int | None
    norm: Norm | None  # None for a matrix

    def beside(self, tensor: str) -> str:
        """The full name of another tensor of the same block; that of the output matrix is its own."""
        return tensor if self.block is None or tensor == "output" else f"blk.{self.block}.{tensor}"


def architectures() -> list[str]:
    """The families, as ``general.architecture`` of a GGUF file calls them, that maps can be folded into."""
    return sorted(ARCHITECTURES)


def find(architecture: str) -> Architecture:
    """The family of this name; a ValueError that lists those that are known."""
    if architecture not in ARCHITECTURES:
        known = ", ".join(architectures())
        raise ValueError(f"the architecture {architecture!r} is not known: maps can go into files of {known}")
    return ARCHITECTURES[architecture]


def site(module: str, architecture: str) -> Site:
    """Where a module of transformers is in a file of a family; ValueError where it is not known."""
    family = find(architecture)
    # The language model of models of texts and images: files have it alone.
    name = module.replace("language_model.", "", 1)
    if name == family.final:
        return Site("output_norm", None, Norm("output_norm", ("output",)))
    start, end = map(re.escape, family.block.split("{}"))
    found = re.fullmatch(rf"(?:model\.)?{start}(\d+){end}\.(.+)", name)
    if found:
        block, last = int(found[1]), found[2]
        if last in family.norms:
            norm = family.norms[last]
            return Site(f"blk.{block}.{norm.tensor}", block, norm)
        if last in family.linears:
            return Site(f"blk.{block}.{family.linears[last]}", block, None)
    known = [family.final, *(family.block.format("*") + f".{last}" for last in [*family.norms, *family.linears])]
    raise ValueError(
        f"it is not known where {module!r} is in a file of {architecture}, only where these are: {', '.join(known)}"
        + hint(name, known, "this")
    )


def tensor_name(module: str, architecture: str) -> str:
    """The name that a module of transformers has in GGUF files.

    Parameters
    ----------
    module : str
        Such as "model.layers.3.post_attention_layernorm".
    architecture : str
        What the file calls its family, ``general.architecture``: one of `architectures`.

    Returns
    -------
    str
        The name of its tensors without ".weight" and ".bias", such as "blk.3.ffn_norm".

    Raises
    ------
    ValueError
        If the family or the module is not known.

    Examples
    --------
    >>> tensor_name("model.layers.3.post_attention_layernorm", "llama")
    'blk.3.ffn_norm'
    >>> tensor_name("model.layers.3.post_attention_layernorm", "gemma3")
    'blk.3.post_attention_norm'
    """
    return site(module, architecture).tensor


def module_name(tensor: str, architecture: str) -> str:
    """The name that transformers has for the module of a tensor in GGUF files.

    Parameters
    ----------
    tensor : str
        Such as "blk.3.ffn_norm", with or without ".weight" or ".bias".
    architecture : str
        One of `architectures`.

    Returns
    -------
    str
        Such as "model.layers.3.post_attention_layernorm".

    Raises
    ------
    ValueError
        If the family is not known, or has no module of this kind that can carry a map.

    Examples
    --------
    >>> module_name("blk.3.ffn_norm.weight", "gemma3")
    'model.layers.3.pre_feedforward_layernorm'
    """
    family = find(architecture)
    base = re.sub(r"\.(weight|bias)$", "", tensor)
    if base == "output_norm":
        return family.final
    found = re.fullmatch(r"blk\.(\d+)\.(.+)", base)
    if found:
        names = {norm.tensor: last for last, norm in family.norms.items()}
        for last, name in family.linears.items():
            names.setdefault(name, last)
        if found[2] in names:
            return f"{family.block.format(found[1])}.{names[found[2]]}"
    raise ValueError(f"it is not known which module of transformers the tensor {tensor!r} of {architecture} is")
