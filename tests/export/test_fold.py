"""Maps in weights: a folded model does without hooks what the model does with them."""

import copy
import re
from pathlib import Path

import fold_cases
import models_zoo
import numpy as np
import pytest
import torch
from fold_cases import CASES, language_model, one_map, random_maps, run, same_state, state, tokens
from torch import nn

import lineas
from lineas.export.readers import DECODER_LAYERS
from lineas.inputs.call import unwrap

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LLAMA_NORMS = ["**.input_layernorm", "**.post_attention_layernorm"]


def skip_without_diffusers(case):
    if case.architecture in ("Flux", "SD-type UNet"):
        pytest.importorskip("diffusers")


def hooks_on(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def by_hook(maps, model, strength=1.0):
    with maps.attach(model, strength=strength):
        return run(model)


def reload(model, folder):
    model.save_pretrained(folder)
    dtype = next(model.parameters()).dtype
    experts = {"experts_implementation": "eager"} if re.match("Mixtral|Qwen3Moe", type(model).__name__) else {}
    again, info = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True, **experts)
    assert not any(info.values()), info
    return again.eval()


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_folded_model_does_what_the_hooks_did_and_survives_the_disk(case, tmp_path):
    skip_without_diffusers(case)
    model = fold_cases.build(case.architecture)
    before, plain = state(model), run(model)
    maps = random_maps(model, case.glob, shift=case.shift)
    hooked = by_hook(maps, model)
    folded = maps.fold(model, convert=case.convert)
    # Gemma's norm rounds to float32 after its gain: equal sums, rounded elsewhere.
    tolerance = 1e-5 if case.architecture.startswith("gemma") else 1e-13
    assert (hooked - plain).abs().max() > 1e-3
    assert (run(folded) - hooked).abs().max() < tolerance
    assert hooks_on(folded) == 0 and not folded.training
    assert same_state(model, before) and torch.equal(run(model), plain)
    if case.architecture not in fold_cases.OTHERS:
        assert type(folded).__name__ == ("LlamaForCausalLM" if case.convert else type(model).__name__)
        assert torch.equal(run(reload(folded, tmp_path)), run(folded))


@pytest.mark.parametrize("case", [case for case in CASES if not case.shift], ids=lambda case: case.name)
def test_a_shift_without_a_home_is_refused_for_each_module(case):
    model = fold_cases.build(case.architecture)
    before, maps = state(model), random_maps(model, case.glob)
    with pytest.raises(ValueError) as error:
        maps.fold(model, inplace=True)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(
        f"{len(maps)} of {len(maps)} maps cannot be folded, and nothing was changed; maps.attach"
    )
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(maps)
    assert all("its shift is not 0" in line for line in lines[1:])
    assert same_state(model, before)


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
def test_gains_of_gemma_are_exact_where_its_norm_does_not_round(kind, monkeypatch):
    model = language_model(kind)
    norm = type(model.model.norm)
    monkeypatch.setattr(norm, "forward", lambda self, x: self._norm(x) * (1.0 + self.weight))
    maps = random_maps(model, "**.input_layernorm")
    assert (run(maps.fold(model)) - by_hook(maps, model)).abs().max() < 1e-13
    maps = random_maps(model, "**.post_attention_layernorm", shift=False)
    assert (run(maps.fold(model)) - by_hook(maps, model)).abs().max() < 1e-13


def test_wrong_folds_are_seen():
    """What the numbers above would be if the shift were forgotten, or went through the scaled weight."""
    model = language_model("llama", initializer_range=0.5)
    maps = random_maps(model, LLAMA_NORMS)
    hooked = by_hook(maps, model)
    forgotten = maps.fold(model)
    for name, parameter in forgotten.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    scaled = copy.deepcopy(model)
    for name, one in maps.items():
        scaled.get_submodule(name).weight.data *= torch.tensor(one.weight)
        shift = torch.tensor(one.weight * one.bias)  # w * b, not b
        layer = scaled.get_submodule(name.rpartition(".")[0])
        linears = ["q_proj", "k_proj", "v_proj"] if name.endswith("input_layernorm") else ["gate_proj", "up_proj"]
        for linear in linears:
            module = getattr(layer.self_attn if linear[0] in "qkv" else layer.mlp, linear)
            module.bias = nn.Parameter(module.weight.data @ shift)
    assert (run(forgotten) - hooked).abs().max() > 10
    assert (run(scaled) - hooked).abs().max() > 5
    assert (run(maps.fold(model)) - hooked).abs().max() < 1e-13


@pytest.mark.parametrize("strength", [0.35, 0.0, -0.5, 2.0])
def test_a_fold_is_at_a_strength(strength):
    model = language_model("llama")
    maps = random_maps(model, LLAMA_NORMS)
    assert (run(maps.fold(model, strength)) - by_hook(maps, model, strength)).abs().max() < 1e-13
    if strength == 0:
        assert same_state(maps.fold(model, strength), state(model))


@pytest.mark.parametrize("reverse", [False, True])
def test_maps_of_a_norm_and_of_the_linear_behind_it_go_together(reverse):
    model = language_model("llama")
    maps = random_maps(model, ["**.input_layernorm", "**.q_proj", "**.v_proj"])
    folded = lineas.SteeringMaps(dict(list(maps.items())[::-1])) if reverse else maps
    assert (run(folded.fold(model)) - by_hook(maps, model)).abs().max() < 1e-13


def test_all_maps_of_flux_at_once():
    pytest.importorskip("diffusers")
    model = fold_cases.flux()
    globs = [case.glob for case in CASES if case.architecture == "Flux"]
    maps = random_maps(model, globs)
    assert (run(maps.fold(model)) - by_hook(maps, model)).abs().max() < 1e-13


@pytest.mark.parametrize("norm", ["norm1", "norm2"])
def test_neurons_that_a_map_leaves_alone_keep_the_bits_of_their_modulation(norm):
    pytest.importorskip("diffusers")
    model, name = fold_cases.flux(), "transformer_blocks.0.norm1.linear.bias"
    model.get_parameter(name).data /= 3  # numbers that use all bits of float64
    maps = lineas.SteeringMaps(
        {f"transformer_blocks.0.{norm}": lineas.AffineMap(np.r_[1.5, np.ones(15)], np.zeros(16))}
    )
    before, after = model.get_parameter(name).view(6, 16), maps.fold(model).get_parameter(name).view(6, 16)
    assert torch.equal(after[:, 1:], before[:, 1:]) and not torch.equal(after, before)


def test_in_place_the_model_itself_is_changed():
    model = language_model("llama")
    maps = random_maps(model, LLAMA_NORMS)
    copied = maps.fold(model)
    weights = {name: parameter for name, parameter in model.named_parameters()}
    assert maps.fold(model, inplace=True) is model
    assert same_state(model, state(copied)) and model.config.to_dict() == copied.config.to_dict()
    assert model.config.attention_bias and model.config.mlp_bias
    assert all(model.get_parameter(name) is parameter for name, parameter in weights.items())


def test_a_copy_shares_nothing_and_a_config_is_changed_only_in_the_copy():
    model = language_model("llama")
    folded = random_maps(model, LLAMA_NORMS).fold(model)
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in folded.parameters()}
    assert not model.config.attention_bias and folded.config.attention_bias
    assert folded.model.layers[0].mlp.config is folded.config


def test_new_biases_are_trained_as_their_weights_are():
    model = language_model("llama").requires_grad_(False)
    folded = random_maps(model, "**.input_layernorm").fold(model)
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert (
        random_maps(model, "**.input_layernorm")
        .fold(model.requires_grad_(True))
        .model.layers[0]
        .self_attn.o_proj.bias.requires_grad
    )


def test_generation_gives_the_same_tokens():
    model = language_model("llama", dtype=torch.float32)
    maps = random_maps(model, LLAMA_NORMS)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(2, 10)}
    with maps.attach(model):
        hooked = model.generate(tokens(), **settings)
    assert torch.equal(maps.fold(model).generate(tokens(), **settings), hooked)
    assert not torch.equal(model.generate(tokens(), **settings), hooked)


def test_parts_of_a_model_and_models_with_other_heads():
    from transformers import LlamaForSequenceClassification, LlamaModel

    config = language_model("llama").config
    for kind in (LlamaModel, LlamaForSequenceClassification):
        model = fold_cases.shake(kind(config), 0).double()
        maps = random_maps(model, ["**.*input_layernorm", "**.*post_attention_layernorm"])
        with torch.no_grad(), maps.attach(model):
            hooked = model(tokens())[0]
        with torch.no_grad():
            assert (maps.fold(model)(tokens())[0] - hooked).abs().max() < 1e-6  # the final norm rounds


def test_subclasses_of_models_have_homes_too(tmp_path):
    from transformers import LlamaForCausalLM

    class Mine(LlamaForCausalLM):
        pass

    model = fold_cases.shake(Mine(language_model("llama").config), 0).double()
    folded = random_maps(model, LLAMA_NORMS).fold(model)
    assert type(folded) is Mine and torch.equal(run(reload(folded, tmp_path)), run(folded))


def test_the_setting_of_a_language_model_inside_another_model(tmp_path):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(**fold_cases._COMMON)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=4, patch_size=2
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=49)
    model = fold_cases.shake(LlavaForConditionalGeneration(config), 0)
    maps = random_maps(model, ["**language_model**input_layernorm", "**language_model**post_attention_layernorm"])
    with torch.no_grad(), maps.attach(model):
        hooked = model(tokens()).logits
    folded = maps.fold(model)
    with torch.no_grad():
        torch.testing.assert_close(folded(tokens()).logits, hooked, atol=1e-5, rtol=1e-4)
        again = reload(folded, tmp_path)
        assert torch.equal(again(tokens()).logits, folded(tokens()).logits)
    assert again.config.text_config.attention_bias and again.config.text_config.mlp_bias


@pytest.mark.parametrize("wrapper", ["peft", "compile"])
def test_a_wrapped_model_is_folded_in_its_wrapper(wrapper):
    plain = language_model("llama")
    # The Linears of an adapter are none whose biases a configuration could tell.
    maps = random_maps(plain, "**.input_layernorm", shift=wrapper != "peft")
    if wrapper == "peft":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["down_proj"], r=2))
    else:
        model = torch.compile(plain)
    before = state(plain)
    folded = maps.fold(model, check={"input_ids": torch.tensor([[1, 2, 3]])})
    assert type(folded) is type(model) and same_state(plain, before)
    assert unwrap(folded).config.attention_bias == (wrapper != "peft")
    assert maps.fold(model, inplace=True) is model and not same_state(plain, before)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    model = language_model("llama", dtype=dtype)
    maps = random_maps(model, LLAMA_NORMS)
    folded = maps.fold(model)
    for name, one in maps.items():
        gain = model.get_submodule(name).weight.double()
        assert torch.equal(folded.get_submodule(name).weight, (gain * torch.tensor(one.weight)).to(dtype))
    first = next(iter(maps))
    query = model.model.layers[0].self_attn.q_proj.weight.double()
    expected = (query @ torch.tensor(maps[first].bias)).to(dtype)
    assert torch.equal(folded.model.layers[0].self_attn.q_proj.bias, expected)


def test_bfloat16_is_as_near_to_the_truth_folded_as_hooked():
    errors = {"hook": [], "fold": []}
    for seed in range(3):
        exact = language_model("llama", seed).to(torch.bfloat16).double()
        maps = random_maps(exact, LLAMA_NORMS, seed=seed)
        truth = by_hook(maps, exact)
        short = copy.deepcopy(exact).to(torch.bfloat16)
        for way, found in (("hook", by_hook(maps, short)), ("fold", run(maps.fold(short)))):
            errors[way].append(float((found.double() - truth).norm() / truth.norm()))
    assert max(errors["hook"]) < 0.05
    assert np.mean(errors["fold"]) < 1.25 * np.mean(errors["hook"])


def test_what_is_too_large_for_float16_is_refused():
    model = nn.Sequential(nn.LayerNorm(4)).half()
    with pytest.raises(ValueError, match=r"nothing was changed: weight of '0' would be too large for torch.float16"):
        one_map("0", 4, weight=1e5).fold(model, inplace=True)
    assert (model[0].weight == 1).all()


# --- one's own models -------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A norm without a bias before two Linears and, if asked for, something else that reads it."""

    def __init__(self, norm=None, bias=True, third=False):
        super().__init__()
        self.norm = nn.RMSNorm(4) if norm is None else norm
        self.left, self.right = nn.Linear(4, 3, bias=bias), nn.Linear(4, 3, bias=bias)
        self.third = third

    def forward(self, x):
        x = self.norm(x)
        return self.left(x) * torch.tanh(self.right(x)) + (x.sum(-1, keepdim=True) if self.third else 0)


def own(seed=0, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fold_cases.shake(Own(**settings), seed).double()


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(3)).double()
READERS = {"norm": ["left", "right"]}


def difference(maps, model, **settings):
    with torch.no_grad():
        with maps.attach(model):
            hooked = model(X)
        return float((maps.fold(model, **settings)(X) - hooked).abs().max())


def test_readers_tell_what_reads_a_norm_of_ones_own():
    maps = one_map("norm", 4)
    assert difference(maps, own(), readers=READERS) < 1e-14
    message = (
        "  norm: its shift is not 0, RMSNorm has no bias, and it is not known which Linears alone read the output of "
        "'norm' in Own (readers= can say it, where there are such)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        maps.fold(own())


def test_a_check_works_where_the_first_parameter_holds_integers():
    model = language_model("llama")
    model.model.embed_tokens.codes = torch.nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    order = dict(model.model.embed_tokens._parameters)
    model.model.embed_tokens._parameters = {"codes": order.pop("codes"), **order}
    assert next(model.parameters()).dtype == torch.int8
    maps = random_maps(model, "**.input_layernorm", shift=False)
    maps.fold(model, check={"input_ids": tokens()})


def test_a_check_finds_readers_that_are_not_all():
    model, maps = own(third=True), one_map("norm", 4)
    assert difference(maps, model, readers=READERS) > 0.5
    before = state(model)
    for settings in ({"inplace": True}, {}):
        with pytest.raises(ValueError, match=r"check: the folded model gives something else .* nothing was changed"):
            maps.fold(model, readers=READERS, check=X, **settings)
        assert same_state(model, before) and hooks_on(model) == 0
    assert maps.fold(own(), readers=READERS, check=[X, (X[:2],)], inplace=True).norm.weight is not None
    with pytest.raises(ValueError, match="check: the folded model"):
        maps.fold(own(), readers={"norm": ["left"]}, check=X)


def test_a_norm_without_a_gain_can_shift_what_reads_it():
    for norm in (nn.LayerNorm(4, elementwise_affine=False), nn.LayerNorm(4, bias=False)):
        assert difference(one_map("norm", 4, weight=1.0), own(norm=norm), readers=READERS) < 1e-14


def test_a_failed_check_takes_new_biases_off_again():
    model = language_model("llama")
    maps = random_maps(model, LLAMA_NORMS)
    before = state(model)
    wrong = {name: ["model.layers.0.self_attn.q_proj"] for name in maps}
    with pytest.raises(ValueError, match="check: the folded model"):
        maps.fold(model, inplace=True, readers=wrong, check={"input_ids": tokens()})
    assert same_state(model, before) and not model.config.attention_bias
    assert maps.fold(model, check={"input_ids": tokens()}) is not model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_check_lets_rounding_pass(dtype):
    model = language_model("llama", dtype=dtype)
    texts = models_zoo.texts(2)
    maps = random_maps(model, LLAMA_NORMS)
    maps.fold(model, check=tokens())
    maps.fold(model, check=texts, tokenizer=lambda texts, **k: {"input_ids": [[2, 3, 4]] * len(texts)})
    maps.fold(model, check=tokens(), forward=lambda model, batch: model(input_ids=batch).logits)
    with pytest.raises(ValueError, match="no floating-point tensor to compare"):
        maps.fold(model, check=tokens(), forward=lambda model, batch: None)


def test_a_norm_called_twice_is_exact_and_one_with_readers_is_refused():
    class Twice(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.a, self.b, self.linear = norm, norm, nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.linear(self.a(x)))

    torch.manual_seed(0)
    model = fold_cases.shake(Twice(nn.LayerNorm(4)), 0).double()
    assert difference(one_map("b", 4), model) < 1e-14
    model = Twice(nn.RMSNorm(4)).double()
    with pytest.raises(ValueError, match="'a' is used in 2 places of the model"):
        one_map("a", 4).fold(model, readers={"a": ["linear"]})


class OddNorm(nn.Module):
    """A norm whose output is gain ** power * x, with or without 1 added to the gain."""

    def __init__(self, plus=0.0, power=1):
        super().__init__()
        self.weight, self.plus, self.power = nn.Parameter(torch.rand(4) + 0.5), plus, power

    def forward(self, x):
        return nn.functional.rms_norm(x, (4,)) * (self.weight + self.plus) ** self.power


def test_norms_of_any_class_are_tried_out():
    for plus in (0.0, 1.0):
        assert difference(one_map("norm", 4), own(norm=OddNorm(plus)), readers=READERS) < 1e-14
    for settings in ({"plus": 0.5}, {"power": 2}):
        with pytest.raises(ValueError, match="the output of OddNorm is not weight"):
            one_map("norm", 4).fold(own(norm=OddNorm(**settings)), readers=READERS)


def test_a_reader_without_a_place_for_a_bias_is_refused():
    with pytest.raises(ValueError, match="'left' has no bias, and Own is no transformers model"):
        one_map("norm", 4).fold(own(bias=False), readers=READERS)


def test_a_norm_that_fails_by_itself_is_refused():
    class Needy(OddNorm):
        def forward(self, x, y):
            return x

    with pytest.raises(ValueError, match=r"Needy could not be tried out by itself: TypeError: .* argument: 'y'"):
        one_map("norm", 4).fold(own(norm=Needy()), readers=READERS)


# --- conversion -------------------------------------------------------------------------------------------------------


def test_conversion_keeps_what_belongs_to_the_model():
    model = language_model("qwen2", dtype=torch.float32, tie_word_embeddings=True).train()
    model.generation_config.max_new_tokens = 3
    folded = random_maps(model, LLAMA_NORMS).fold(model, convert=True)
    assert folded.training and folded.generation_config.max_new_tokens == 3
    assert folded.lm_head.weight is folded.model.embed_tokens.weight
    assert folded.config.rope_parameters == model.config.rope_parameters
    assert (folded.model.layers[0].self_attn.o_proj.bias == 0).all()
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in folded.parameters()}


def test_what_cannot_be_converted_is_refused():
    maps = random_maps(language_model("mistral"), LLAMA_NORMS)
    window = language_model("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="convert: Llama has no sliding window, and this model has one of 8 tokens"):
        maps.fold(window, convert=True)
    with pytest.raises(ValueError, match=r"convert: model must be a MistralForCausalLM or Qwen2ForCausalLM .* Qwen3"):
        maps.fold(language_model("qwen3"), convert=True)
    with pytest.raises(ValueError, match="cannot be done in place"):
        maps.fold(language_model("mistral"), convert=True, inplace=True)
    with pytest.raises(ValueError, match="convert=True makes a LlamaForCausalLM, which has"):
        maps.fold(language_model("mistral"))


# --- the table of the documentation ----------------------------------------------------------------------------------


def test_every_class_of_the_table_is_in_transformers_and_tested():
    built = {type(module).__name__ for kind in fold_cases._SETTINGS for module in language_model(kind).modules()}
    assert set(DECODER_LAYERS) <= built


def test_the_table_in_the_documentation_is_of_these_cases():
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    part = page.split("<!-- measured: python benchmarks/folding.py --write -->")[1].split("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    assert rows[0] == list(fold_cases.HEADER)
    assert [row[:4] for row in rows[2:]] == [case.cells() for case in CASES]
    # Gemma's norms round to float32; everything else is exact.
    assert all(float(row[5]) < (1e-5 if row[0].startswith("gemma") else 1e-13) for row in rows[2:])
    assert all(float(row[4]) > 1e-3 for row in rows[2:])
