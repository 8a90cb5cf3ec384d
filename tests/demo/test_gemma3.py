"""A second real language model, whose norms multiply by 1 + weight and whose windows slide."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

import lineas
from lineas.demo import sentences
from lineas.demo.model import GEMMA3, load_gemma3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(None in map(find_spec, GEMMA3.packages), reason=f"a package is missing: {GEMMA3.install}"),
]

LAYERS, WIDTH = 18, 640
SUGGESTED = ["model.layers.*.post_attention_layernorm", "model.layers.*.post_feedforward_layernorm"]
# Without <bos>: at some of these norms its activations are thirty times as large as those of any word, so that with it
# the mean over a text tells above all how long the text is.
WORDS = {"tokens": slice(1, None), "max_length": 12}


@pytest.fixture(scope="module")
def gemma3():
    return load_gemma3()


@pytest.fixture(scope="module")
def prompt(gemma3):
    _, tokenizer = gemma3
    return tokenizer(["My day at work today was"], return_tensors="pt")


def logits(model, prompt):
    with torch.inference_mode():
        return model(**prompt).logits


def distance(found, expected):
    """Of logits, relative to their size."""
    return float((found - expected).norm() / expected.norm())


def random_maps(*norms, shift=False, changed=WIDTH):
    """Maps of these norms in every layer, which change that many neurons each."""
    rng = np.random.default_rng(0)
    maps = {}
    for name in (f"model.layers.{k}.{norm}" for k in range(LAYERS) for norm in norms):
        chosen = rng.permutation(WIDTH)[:changed]
        weight, bias = np.ones(WIDTH), np.zeros(WIDTH)
        weight[chosen] = rng.uniform(0.7, 1.3, changed)
        if shift:
            bias[chosen] = rng.normal(0.0, 0.1, changed)
        maps[name] = lineas.AffineMap(weight, bias)
    return lineas.SteeringMaps(maps)


def test_the_file_is_assembled_in_the_given_folder_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = GEMMA3.gguf_file(GEMMA3, tmp_path)
    assert path.parent == tmp_path and path.open("rb").read(4) == b"GGUF"
    assert list(tmp_path.iterdir()) == [path]


def test_settings_weights_and_tokenizer_of_the_decoded_model(gemma3, prompt):
    model, tokenizer = gemma3
    settings = model.config
    assert type(model).__name__ == "Gemma3ForCausalLM" and settings.name_or_path == "gemma-3-270m"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not hasattr(settings, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # Most of these are no part of the GGUF file.
    assert settings.sliding_window == 512
    assert settings.layer_types == (["sliding_attention"] * 5 + ["full_attention"]) * 3
    thetas = {kind: rope["rope_theta"] for kind, rope in settings.rope_parameters.items()}
    assert thetas == {"sliding_attention": 10_000.0, "full_attention": 1_000_000.0}
    assert settings.query_pre_attn_scalar == 256
    # The file has 1 + weight, which for this norm is between 0.19 and 301.
    weight = model.model.norm.weight.detach()
    assert -1 < weight.min() < -0.5 and weight.max() > 100

    assert tokenizer.padding_side == "left" and tokenizer.chat_template is None
    assert prompt["input_ids"][0, 0] == tokenizer.bos_token_id and len(prompt["input_ids"][0]) == 7
    question = tokenizer("Question: What is the capital of France?\nAnswer:", return_tensors="pt")
    answer = model.generate(**question, max_new_tokens=2, do_sample=False)[0, question["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_the_loss_on_neutral_text_is_that_of_a_trained_model(gemma3):
    model, tokenizer = gemma3
    size = bits = 0.0
    for text in sentences("neutral_text.txt")[:5]:
        batch = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            loss = model(**batch, labels=batch["input_ids"]).loss
        size += len(text.encode())
        bits += float(loss) * (batch["input_ids"].shape[1] - 1) / np.log(2)
    # With the weight of every norm off by one it is 5.5 bits a byte.
    assert 0.8 < bits / size < 1.2


def test_a_fit_carries_over_to_held_out_prompts(gemma3, prompt, tmp_path):
    model, tokenizer = gemma3
    assert list(lineas.sites(model).suggested) == SUGGESTED
    plain = logits(model, prompt)
    result = lineas.fit_end_to_end(
        model,
        sentences("negative.txt")[:8],
        sentences("positive.txt")[:8],
        held_out=(sentences("negative.txt")[40:48], sentences("positive.txt")[40:48]),
        tokenizer=tokenizer,
        steps=3,
        l1=0.1,
        progress=False,
        **WORDS,
    )
    loss, held_out_loss = result.history["loss"], result.history["held_out_loss"]
    assert len(result.maps) == 2 * LAYERS and all(found.d == WIDTH for found in result.maps.values())
    assert loss[-1] < 0.9 * loss[0] and result.held_out_loss < 0.95 * held_out_loss[0]
    assert 0 < result.maps.support < 2 * LAYERS * WIDTH  # sparse, and not empty

    result.maps.save(tmp_path / "maps.safetensors")
    maps = lineas.load(tmp_path / "maps.safetensors")
    assert maps == result.maps and maps.metadata["model"] == "gemma-3-270m"
    with maps.attach(model) as handle:
        assert distance(logits(model, prompt), plain) > 0.01
        handle.strength = 0.0
        assert torch.equal(logits(model, prompt), plain)
    assert torch.equal(logits(model, prompt), plain)


@pytest.mark.parametrize("tokens", ["all", "generated"])
def test_generation_under_maps_is_the_same_with_and_without_a_cache(gemma3, tokens):
    model, tokenizer = gemma3
    prompts = tokenizer(["My day at work today was", "The film"], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**prompts, **settings)
    with random_maps("post_attention_layernorm", "post_feedforward_layernorm", shift=True).attach(model, tokens=tokens):
        cached = model.generate(**prompts, **settings)
        whole = model.generate(**prompts, **settings, use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    difference = [distance(a, b) for a, b in zip(cached.logits, whole.logits, strict=True)]
    assert max(difference) < 1e-5
    change = distance(cached.logits[0], plain.logits[0])
    assert change == 0 if tokens == "generated" else change > 0.01
    assert distance(cached.logits[1], plain.logits[1]) > 0.01


@pytest.mark.parametrize(
    ("norms", "shift"),
    [
        (("post_attention_layernorm", "post_feedforward_layernorm", "pre_feedforward_layernorm"), False),
        (("input_layernorm",), True),
    ],
)
def test_maps_fold_into_norms_that_multiply_by_one_plus_weight(gemma3, prompt, norms, shift):
    model, _ = gemma3
    maps = random_maps(*norms, shift=shift)
    plain = logits(model, prompt)
    with maps.attach(model):
        hooked = logits(model, prompt)
    folded = maps.fold(model)
    assert distance(hooked, plain) > 0.05
    assert distance(logits(folded, prompt), hooked) < 1e-5
    assert folded.config.attention_bias == shift
    assert folded.lm_head.weight is folded.model.embed_tokens.weight


def test_shifts_of_norms_before_the_residual_sum_are_refused(gemma3, tmp_path):
    model, _ = gemma3
    maps = random_maps("post_attention_layernorm", shift=True)
    with pytest.raises(ValueError, match=r"(?s)18 of 18 maps cannot be folded.*Gemma3RMSNorm has no bias"):
        maps.fold(model)
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"(?s)18 of 18 maps cannot be written as LoRA.*'post_attention_layernorm' in"):
        random_maps("post_attention_layernorm").to_peft_lora(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
def test_sparse_maps_of_norms_before_linears_are_adapters(gemma3, prompt, tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = gemma3
    maps = random_maps("input_layernorm", "pre_feedforward_layernorm", shift=True, changed=20)
    plain = logits(model, prompt)
    with maps.attach(model, strength=0.7):
        hooked = logits(model, prompt)
    maps.to_peft_lora(model, tmp_path, strength=0.7)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path)
    try:
        found = logits(adapted, prompt)
    finally:
        adapted.unload()
    assert distance(hooked, plain) > 0.01 and distance(found, hooked) < 1e-5
    assert torch.equal(logits(model, prompt), plain)


def test_closed_form_maps_of_collected_activations(gemma3):
    model, tokenizer = gemma3

    def collect(name, which):
        return lineas.collect(model, sentences(name)[which], tokenizer=tokenizer, **WORDS)

    fitted, held_out = slice(0, 20), slice(40, 60)
    maps = lineas.fit(collect("negative.txt", fitted), collect("positive.txt", fitted), method="mean")
    source, target = collect("negative.txt", held_out), collect("positive.txt", held_out)
    assert list(maps) == list(source) and len(maps) == 2 * LAYERS

    def distances(activations):
        return np.array([lineas.wasserstein(activations[name], target[name]).mean() for name in maps])

    assert np.median(distances(maps.transform(source)) / distances(source)) < 0.8
    first = next(iter(maps))  # before it, nothing is mapped
    with maps.attach(model):
        steered = collect("negative.txt", held_out)
    np.testing.assert_allclose(steered[first], maps[first].transform(source[first]), rtol=1e-5, atol=1e-4)
    assert np.abs(steered[first] - source[first]).max() > 1
