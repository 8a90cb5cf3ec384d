"""Two real models, quantised, in llama.cpp: steered files differ from hooks in transformers no more than without maps.

llama.cpp rounds activations to 8 bits before quantised matrices, so that neither agrees to the last digits.
"""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from llama_cpp import LlamaCpp

import lineas
from lineas.demo.model import GEMMA3, SMOLLM2, load_gemma3, load_smollm2
from lineas.export import gguf
from lineas.export.gguf.container import GGUFFile

pytest.importorskip("xllamacpp")


def missing(source):
    return pytest.mark.skipif(None in map(find_spec, source.packages), reason=f"a package is missing: {source.install}")


pytestmark = pytest.mark.slow
PROMPTS = ("My day at work today was", "The children walked along the river until", "He opened the letter and")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    model, tokenizer = load_smollm2()
    return model, tokenizer, SMOLLM2.gguf_file(SMOLLM2, tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    model, tokenizer = load_gemma3()
    return model, tokenizer, GEMMA3.gguf_file(GEMMA3, tmp_path_factory.mktemp("gemma3"))


def random_maps(model, *norms, shift, sparse=False):
    rng = np.random.default_rng(0)
    maps, d = {}, model.config.hidden_size
    for name in (f"model.layers.{k}.{norm}" for k in range(model.config.num_hidden_layers) for norm in norms):
        weight = 1 + rng.uniform(-0.3, 0.3, d) * (3 * (rng.random(d) < 0.2) if sparse else 1)
        maps[name] = lineas.AffineMap(weight, rng.normal(0, shift, d) if shift else np.zeros(d))
    return lineas.SteeringMaps(maps)


def by_transformers(model, tokenizer):
    with torch.inference_mode():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0, -1] for text in PROMPTS]
    return torch.log_softmax(torch.stack(logits).double(), -1).numpy()


def by_llama_cpp(path, tokenizer, size, **settings):
    with LlamaCpp(path, **settings) as runtime:
        found = [runtime.log_probabilities(tokenizer(text)["input_ids"], size, count=2000) for text in PROMPTS]
    return np.stack(found)


def difference(found, expected):
    """Mean over the twenty likeliest tokens of each prompt."""
    likeliest = np.argsort(expected, axis=1)[:, -20:]
    return float(np.abs(np.take_along_axis(found - expected, likeliest, 1)).mean())


def agree(made, maps, path, **settings):
    """llama.cpp is with maps nearly as close to transformers as without, and the maps change much more."""
    model, tokenizer, plain_path = made
    size = model.config.vocab_size
    plain = by_transformers(model, tokenizer)
    with maps.attach(model):
        hooked = by_transformers(model, tokenizer)
    unsteered = difference(by_llama_cpp(plain_path, tokenizer, size), plain)
    steered = difference(by_llama_cpp(path, tokenizer, size, **settings), hooked)
    assert 0 < unsteered < 0.2 and steered < 2 * unsteered
    assert difference(plain, hooked) > 5 * steered


@missing(SMOLLM2)
def test_smollm2_with_maps_folded_in(smollm2, tmp_path):
    model, _, path = smollm2
    maps = random_maps(model, "input_layernorm", "post_attention_layernorm", shift=0.05)
    steered = maps.fold_gguf(path, tmp_path / "steered.gguf")
    agree(smollm2, maps, steered)
    with GGUFFile(path) as before, GGUFFile(steered) as after:
        same = [
            name
            for name, tensor in before.tensors.items()
            if all(a == b for a, b in zip(before.chunks(tensor), after.chunks(after.tensors[name]), strict=True))
        ]
        changed = {f"blk.{k}.{norm}_norm.weight" for k in range(30) for norm in ("attn", "ffn")}
        assert set(before.tensors) - set(same) == changed
        assert after.entries.startswith(before.entries)


@missing(SMOLLM2)
def test_smollm2_with_an_adapter(smollm2, tmp_path):
    model, _, path = smollm2
    maps = random_maps(model, "post_attention_layernorm", shift=0, sparse=True)
    agree(smollm2, maps, path, loras={gguf.lora(maps, path, tmp_path / "adapter.gguf"): 1.0})


@missing(GEMMA3)
def test_gemma_with_maps_folded_in(gemma3, tmp_path):
    model, _, path = gemma3
    name = "model.layers.3.pre_feedforward_layernorm"
    with GGUFFile(path) as file:
        gain = file.vector("blk.3.ffn_norm.weight")
    np.testing.assert_allclose(gain, 1 + model.get_submodule(name).weight.detach().numpy(), rtol=1e-6)
    slopes = ("pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")
    maps = random_maps(model, "input_layernorm", shift=0.1) + random_maps(model, *slopes, shift=0)
    agree(gemma3, maps, maps.fold_gguf(path, tmp_path / "steered.gguf"))
