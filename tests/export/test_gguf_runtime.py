"""llama.cpp itself: what it makes of folded files, adapters and control vectors is what the hooks make of transformers.

Tiny models of every family, in float32, so that both give the same numbers but for rounding.
"""

import gguf_cases
import gguf_files
import numpy as np
import pytest
import torch
from gguf_cases import CASES, IN, MIDDLE
from llama_cpp import LlamaCpp, with_control_vector

import lineas
from lineas.export import gguf
from lineas.export.gguf.container import GGUFFile, write_copy

pytest.importorskip("xllamacpp")

BOTH = (IN, MIDDLE)

TOKENS = [5, 9, 17, 33, 4, 40]
SIZE = 50
# ggml looks GELU up in a table of float16 numbers.
GELU = ("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi", "starcoder2")


def by_transformers(model):
    """Log-probabilities of the token after each of some beginnings."""
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0].double()
    return torch.log_softmax(logits, -1).numpy()[[0, 2, 5]]


def by_llama_cpp(path, **settings):
    with LlamaCpp(path, **settings) as runtime:
        return np.stack([runtime.log_probabilities(TOKENS[:count], SIZE) for count in (1, 3, 6)])


def difference(found, expected):
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_llama_cpp_does_with_a_folded_file_what_the_hooks_do(case, tmp_path):
    model = gguf_files.model(case.kind)
    path = gguf_files.convert(model, tmp_path / "model.gguf")
    maps = gguf_cases.maps_of(model, case.whole, case.slopes, case.shifts)
    strength = 0.6
    plain = by_transformers(model)
    with maps.attach(model, strength=strength):
        hooked = by_transformers(model)
    folded = maps.fold_gguf(path, tmp_path / "steered.gguf", strength)
    tolerance = 1e-2 if case.kind in GELU else 1e-4
    assert difference(by_llama_cpp(path), plain) < tolerance
    assert difference(by_llama_cpp(folded), hooked) < tolerance
    assert difference(hooked, plain) > 20 * tolerance


def test_rows_of_q_and_k_are_permuted_and_their_biases_as_well(tmp_path):
    """Shifts alone, before the attention alone: nothing else moves, so a wrong order would be all of the difference."""
    model = gguf_files.model("llama")
    path = gguf_files.convert(model, tmp_path / "model.gguf")
    maps = gguf_cases.maps_of(model, shifts=(IN,), size=3)
    with maps.attach(model):
        hooked = by_transformers(model)
    folded = maps.fold_gguf(path, tmp_path / "steered.gguf")
    assert difference(by_llama_cpp(folded), hooked) < 1e-4
    made = gguf_files.read(folded)
    weight = gguf_files.tensors(model)["blk.0.attn_q.weight"]
    shift = maps["model.layers.0.input_layernorm"].bias
    np.testing.assert_allclose(made["blk.0.attn_q.bias"], weight @ shift, rtol=1e-5, atol=1e-6)
    unpermuted = model.get_submodule("model.layers.0.self_attn.q_proj").weight.detach().numpy() @ shift
    assert np.abs(made["blk.0.attn_q.bias"] - unpermuted).max() > 0.1
    assert difference(hooked, by_transformers(model)) > 1e-2


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_shift_of_a_final_norm_reaches_the_tokens(kind, tmp_path):
    """Qwen2's goes into a bias of the output matrix, here the embedding; GPT-2's into the norm's own."""
    model = gguf_files.model(kind, tie_word_embeddings=True)
    path = gguf_files.convert(model, tmp_path / "model.gguf")
    maps = gguf_cases.maps_of(model, ("model.norm" if kind == "qwen2" else "transformer.ln_f",), size=2)
    with maps.attach(model):
        hooked = by_transformers(model)
    folded = maps.fold_gguf(path, tmp_path / "steered.gguf")
    assert ("output.bias" in gguf_files.read(folded)) == (kind == "qwen2")
    assert difference(by_llama_cpp(folded), hooked) < (1e-4 if kind == "qwen2" else 1e-2)


def test_fused_attention_gets_a_fused_bias(tmp_path):
    model = gguf_files.model("phi3")
    path = gguf_files.convert(model, tmp_path / "model.gguf")
    maps = gguf_cases.maps_of(model, (IN,))
    found = gguf_files.read(maps.fold_gguf(path, tmp_path / "steered.gguf"))
    assert {name for name in found if name.endswith(".bias")} == {f"blk.{k}.attn_qkv.bias" for k in (0, 1)}


def test_a_bias_without_a_place_is_an_error_of_llama_cpp_and_not_silence(tmp_path):
    """What the fold relies on: files with tensors that a build does not take are not loaded."""
    path = gguf_files.convert(gguf_files.model("qwen3"), tmp_path / "model.gguf")
    with GGUFFile(path) as file:
        write_copy(file, str(tmp_path / "more.gguf"), {"blk.0.ffn_up.bias": np.zeros(64, np.float32)}, {})
    with pytest.raises(RuntimeError, match="Failed to init server"):
        LlamaCpp(tmp_path / "more.gguf")


@pytest.mark.parametrize(("kind", "globs"), [("llama", BOTH), ("phi3", BOTH), ("gpt2", ("**.ln_[12]",))])
def test_llama_cpp_does_with_an_adapter_what_the_hooks_do(kind, globs, tmp_path):
    model = gguf_files.model(kind)
    path = gguf_files.convert(model, tmp_path / "model.gguf")
    maps = gguf_cases.maps_of(model, slopes=globs)
    plain = by_transformers(model)
    adapter = gguf.lora(maps, path, tmp_path / "adapter.gguf", strength=0.8)
    tolerance = 1e-2 if kind in GELU else 1e-4
    for scale in (1.0, 0.5, 0.0):
        with maps.attach(model, strength=0.8 * scale):
            hooked = by_transformers(model)
        assert difference(by_llama_cpp(path, loras={adapter: scale}), hooked) < tolerance
        assert scale == 0 or difference(hooked, plain) > 0.1


@pytest.mark.parametrize(("kind", "name"), [("llama", "{}"), ("gemma3_text", "{}.post_feedforward_layernorm")])
def test_llama_cpp_does_with_a_control_vector_what_the_hooks_do(kind, name, tmp_path):
    """Its C functions, called by ctypes: xllamacpp hands no control vectors to the server."""
    model = gguf_files.model(kind)
    path = gguf_files.convert(model, tmp_path / "model.gguf")
    rng = np.random.default_rng(0)
    maps = lineas.SteeringMaps.from_vector({f"model.layers.1{name[2:]}": rng.normal(size=32)})
    vector = gguf.control_vector(maps, tmp_path / "vector.gguf", strength=0.7)
    plain = by_transformers(model)
    with maps.attach(model, strength=0.7):
        hooked = by_transformers(model)
    try:
        found = with_control_vector(path, gguf_files.read(vector), TOKENS, SIZE)
    except AttributeError as error:
        pytest.skip(f"this build of xllamacpp does not export llama.cpp's functions: {error}")
    # Keys and values are float16 here.
    assert difference(found, hooked[-1]) < 2e-2 < 0.1 * difference(hooked[-1], plain[-1])
