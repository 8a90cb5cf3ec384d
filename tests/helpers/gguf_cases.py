"""Which maps go into which GGUF files, for the tests and for the table in docs/gguf.md."""

import re
from dataclasses import dataclass

import gguf_files
import numpy as np

import lineas
from lineas.hooks import modules

IN, MIDDLE = "model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm"
PRE = "model.layers.*.pre_feedforward_layernorm"
POST = ("model.layers.*.post_attention_layernorm", "model.layers.*.post_feedforward_layernorm")
QK = "model.layers.*.self_attn.[qk]_norm"
LLAMA_LINEARS = ("model.layers.*.self_attn.o_proj", "model.layers.*.mlp.*_proj")


@dataclass(frozen=True)
class Case:
    """A family, by its model_type in transformers.

    Attributes
    ----------
    whole : tuple of str
        Globs of norms whose slopes and shifts go into a file.
    slopes : tuple of str
        Globs of norms whose slopes do, and whose shifts have to be refused.
    shifts : tuple of str
        Globs of Linears whose shifts do, and whose slopes have to be refused.
    """

    kind: str
    whole: tuple[str, ...] = ()
    slopes: tuple[str, ...] = ()
    shifts: tuple[str, ...] = ()


CASES = (
    Case("llama", (IN, MIDDLE), ("model.norm",), LLAMA_LINEARS),
    Case("mistral", (IN, MIDDLE), ("model.norm",), LLAMA_LINEARS),
    Case("mixtral", (IN,), (MIDDLE, "model.norm"), ("model.layers.*.self_attn.o_proj",)),
    Case("granite", (IN, MIDDLE), ("model.norm",), LLAMA_LINEARS),
    Case("smollm3", (IN,), (MIDDLE, "model.norm")),
    Case("qwen2", (IN, "model.norm"), (MIDDLE,)),
    Case("qwen3", (IN,), (MIDDLE, QK, "model.norm")),
    Case("qwen3_moe", (IN,), (MIDDLE, QK, "model.norm")),
    Case("phi3", (IN,), (MIDDLE, "model.norm")),
    Case("gemma", (IN,), (MIDDLE, "model.norm")),
    Case("gemma2", (IN,), (PRE, *POST, "model.norm")),
    Case("gemma3_text", (IN,), (PRE, *POST, QK, "model.norm")),
    Case("olmo2", (), (*POST, QK, "model.norm")),
    Case(
        "gpt2",
        ("transformer.h.*.ln_[12]", "transformer.ln_f"),
        (),
        ("transformer.h.*.attn.c_proj", "transformer.h.*.mlp.c_*"),
    ),
    Case(
        "gpt_neox",
        ("gpt_neox.layers.*.*_layernorm", "gpt_neox.final_layer_norm"),
        (),
        ("gpt_neox.layers.*.attention.dense", "gpt_neox.layers.*.mlp.dense_*"),
    ),
    Case("phi", (IN, "model.final_layernorm"), (), ("model.layers.*.self_attn.dense", "model.layers.*.mlp.fc[12]")),
    Case("starcoder2", (IN, MIDDLE, "model.norm"), (), ("model.layers.*.self_attn.o_proj", "model.layers.*.mlp.c_*")),
)


HEADER = ("architecture", "models of transformers", "slopes and shifts", "slopes alone", "shifts alone")


def table() -> list[str]:
    """The rows of docs/gguf.md: architectures, and the modules of their cases without what is the same in all names."""
    lines = [f"| {' | '.join(HEADER)} |", "| --- | --- | --- | --- | --- |"]
    for case in sorted(CASES, key=lambda case: gguf_files.ARCHITECTURES[case.kind]):
        shown = [
            ", ".join(f"`{re.sub(r'^.*?[*][.]', '', glob)}`" for glob in globs) or "-"
            for globs in (case.whole, case.slopes, case.shifts)
        ]
        lines.append(f"| {gguf_files.ARCHITECTURES[case.kind]} | {case.kind} | {' | '.join(shown)} |")
    return lines


def width(model, name):
    """The neurons of a norm or a Linear of transformers."""
    module = model.get_submodule(name)
    return modules.output_width(module) or module.weight.shape[0]


def maps_of(model, whole=(), slopes=(), shifts=(), *, size=1.0, seed=0):
    """Dense maps of the modules that match: slopes from 0.5 to 1.5, shifts of size 0.3, times `size`."""
    rng = np.random.default_rng(seed)
    found = {}
    for globs, scaled, shifted in ((whole, True, True), (slopes, True, False), (shifts, False, True)):
        for name in modules.resolve(model, list(globs)) if globs else []:
            d = width(model, name)
            weight = 1 + size * rng.uniform(-0.5, 0.5, d) if scaled else np.ones(d)
            bias = size * rng.normal(0.0, 0.3, d) if shifted else np.zeros(d)
            found[name] = lineas.AffineMap(weight, bias)
    return lineas.SteeringMaps(found)
