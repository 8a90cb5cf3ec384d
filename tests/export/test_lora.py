"""Sparse maps as LoRA adapters: what PEFT makes of the files is what the hooks do."""

import json
import sys
import warnings

import fold_cases
import numpy as np
import pytest
import torch
from fold_cases import language_model, run
from safetensors import safe_open
from torch import nn

import lineas
from lineas.hooks import modules

peft = pytest.importorskip("peft")
BOTH = ["**.input_layernorm", "**.post_attention_layernorm"]


def sparse_maps(model, glob, *, changed=3, shift=True, seed=0):
    """Maps that scale some neurons, and shift these and one more."""
    rng = np.random.default_rng(seed)
    maps = {}
    for name, d in fold_cases.widths(model, modules.resolve(model, glob)).items():
        weight, bias = np.ones(d), np.zeros(d)
        chosen = rng.permutation(d)[: changed + 1]
        weight[chosen[:changed]] = rng.uniform(0.2, 2.0, changed)
        if shift:
            bias[chosen] = rng.normal(0.0, 0.5, changed + 1)
        maps[name] = lineas.AffineMap(weight, bias)
    return lineas.SteeringMaps(maps)


def adapted(kind, folder, **settings):
    """The model with the adapter of `folder`, loaded by PEFT, as the model that can be run like others."""
    model = peft.PeftModel.from_pretrained(language_model(kind, **settings), folder)
    return model.get_base_model()


def tensors(folder):
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("kind", "glob"),
    [
        ("llama", BOTH),
        ("granite", BOTH),
        ("mistral", BOTH),
        ("qwen2", BOTH),
        ("qwen3", BOTH),
        ("phi3", BOTH),
        ("gemma2", ["**.input_layernorm", "**.pre_feedforward_layernorm"]),
        ("gemma3_text", ["**.input_layernorm", "**.pre_feedforward_layernorm"]),
        ("gpt2", "**.ln_[12]"),
        ("gpt_neox", ["**.input_layernorm", "**.post_attention_layernorm"]),
        ("phi", "**.input_layernorm"),
        ("mixtral", "**.input_layernorm"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
def test_peft_does_from_the_files_what_the_hooks_do(kind, glob, tmp_path):
    strength = 1.0 if kind in ("llama", "gpt2") else 0.35
    model = language_model(kind)
    plain, maps = run(model), sparse_maps(model, glob)
    with maps.attach(model, strength=strength):
        hooked = run(model)
    assert maps.to_peft_lora(model, tmp_path / "adapter", strength) == tmp_path / "adapter"
    assert torch.equal(run(model), plain) and not any(m._forward_hooks for m in model.modules())
    found = run(adapted(kind, tmp_path / "adapter"))
    assert (hooked - plain).abs().max() > 0.05
    # Gemma's norm rounds to float32 after the gain that a hook changes.
    assert (found - hooked).abs().max() < (1e-5 if kind.startswith("gemma") else 1e-13)
    assert config(tmp_path / "adapter")["r"] == 3


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
def test_the_scale_of_a_loaded_adapter_is_the_strength(tmp_path):
    model = language_model("llama")
    maps = sparse_maps(model, BOTH)
    maps.to_peft_lora(model, tmp_path)
    loaded = adapted("llama", tmp_path)
    with peft.helpers.rescale_adapter_scale(loaded, 0.35), maps.attach(model, strength=0.35):
        assert (run(loaded) - run(model)).abs().max() < 1e-13


def test_the_files(tmp_path):
    model = language_model("llama", dtype=torch.float32)
    maps = sparse_maps(model, ["model.layers.0.input_layernorm", "model.layers.1.post_attention_layernorm"])
    maps.to_peft_lora(model, tmp_path, strength=0.5)
    settings = config(tmp_path)
    assert settings["peft_type"] == "LORA" and settings["task_type"] == "CAUSAL_LM" and settings["lora_bias"] is True
    assert settings["r"] == 3 and settings["lora_alpha"] == 1.5
    linears = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    linears += [f"model.layers.1.mlp.{x}_proj" for x in ("gate", "up")]
    # In the same order every time; q_proj alone would also pick the other layer's.
    assert settings["target_modules"] == sorted(linears)
    found = tensors(tmp_path)
    parts = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
    assert set(found) == {f"base_model.model.{name}.{part}" for name in linears for part in parts}
    one = maps["model.layers.0.input_layernorm"]
    a, b, shift = (found[f"base_model.model.{linears[0]}.{part}"] for part in parts)
    weight = model.get_submodule(linears[0]).weight.detach()
    assert a.dtype == torch.float32 and (a.sum(dim=1) == 1).all() and ((a == 0) | (a == 1)).all()
    change = torch.tensor(one.weight - 1).float()
    torch.testing.assert_close(b @ a, weight * change)
    torch.testing.assert_close(shift, weight @ torch.tensor(one.bias).float())


def test_where_last_names_say_it_all_they_are_the_targets(tmp_path):
    model = language_model("llama")
    sparse_maps(model, BOTH).to_peft_lora(model, tmp_path)
    assert config(tmp_path)["target_modules"] == ["gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]


def test_without_shifts_there_is_no_bias_and_an_adapter_can_be_merged(tmp_path):
    model = language_model("llama")
    maps = sparse_maps(model, BOTH, shift=False)
    maps.to_peft_lora(model, tmp_path / "plain", rank=8, bias=False)
    assert config(tmp_path / "plain")["lora_bias"] is False and config(tmp_path / "plain")["r"] == 8
    assert not any(name.endswith("bias") for name in tensors(tmp_path / "plain"))
    merged = peft.PeftModel.from_pretrained(language_model("llama"), tmp_path / "plain").merge_and_unload()
    with maps.attach(model):
        assert (run(merged) - run(model)).abs().max() < 1e-13
    maps.to_peft_lora(model, tmp_path / "zeros", bias=True)
    assert config(tmp_path / "zeros")["lora_bias"] is True
    assert any(name.endswith("bias") for name in tensors(tmp_path / "zeros"))


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
def test_peft_merges_shifts_only_where_there_are_biases(tmp_path):
    """The trap that the description warns of: where it is gone from PEFT, the description is to change."""
    for kind, glob in (("llama", BOTH), ("qwen2", "**.input_layernorm")):
        model = language_model(kind)
        maps = sparse_maps(model, glob)
        maps.to_peft_lora(model, tmp_path / kind)
        loaded = peft.PeftModel.from_pretrained(language_model(kind), tmp_path / kind)
        if kind == "llama":
            with pytest.raises(RuntimeError, match="base layer has no bias"):
                loaded.merge_and_unload()
        else:
            with maps.attach(model):
                assert (run(loaded.merge_and_unload()) - run(model)).abs().max() < 1e-13


def test_a_map_that_only_shifts_and_one_that_does_nothing(tmp_path):
    model = language_model("qwen2")
    names = [f"model.layers.{i}.input_layernorm" for i in range(2)]
    shift = lineas.AffineMap(np.ones(16), np.full(16, 0.3))
    maps = lineas.SteeringMaps({names[0]: shift, names[1]: lineas.AffineMap.identity(16, np.float64)})
    maps.to_peft_lora(model, tmp_path)
    assert config(tmp_path)["r"] == 1 and not any("layers.1" in name for name in tensors(tmp_path))
    with maps.attach(model):
        assert (run(adapted("qwen2", tmp_path)) - run(model)).abs().max() < 1e-13


def test_files_that_are_there_are_replaced_and_others_stay(tmp_path):
    (tmp_path / "adapter_config.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    model = language_model("llama")
    sparse_maps(model, BOTH).to_peft_lora(model, str(tmp_path))
    assert config(tmp_path)["r"] == 3
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "notes.txt"}


def test_models_of_ones_own(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 3)).double()
    maps = lineas.SteeringMaps({"0": lineas.AffineMap(np.array([1.0, 2.0, 1.0, 0.5]), np.ones(4))})
    maps.to_peft_lora(model, tmp_path, readers={"0": ["1"]})
    x = torch.randn(2, 4, dtype=torch.float64)
    with maps.attach(model), torch.no_grad():
        hooked = model(x)
    assert torch.allclose(peft.PeftModel.from_pretrained(model, tmp_path)(x), hooked, atol=1e-14)


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(kind, glob, message, tmp_path, **settings):
    model = language_model(kind)
    with pytest.raises(ValueError, match=message):
        sparse_maps(model, glob).to_peft_lora(model, tmp_path / "adapter", **settings)
    assert not list(tmp_path.iterdir())


def test_what_no_adapter_can_do_is_refused(tmp_path):
    experts = (
        r"2 of 2 maps cannot be written as LoRA, and nothing was changed; maps.attach\(model\) applies all of them, "
        r"and maps.select\(\[...\]\) picks others:\n  model.layers.0.post_attention_layernorm: it is not known which "
        "Linears alone read the output of 'post_attention_layernorm' in MixtralDecoderLayer"
    )
    refused("mixtral", "**.post_attention_layernorm", experts, tmp_path)
    refused("gemma2", "**.post_feedforward_layernorm", "'post_feedforward_layernorm' in Gemma2DecoderLayer", tmp_path)
    refused("llama", BOTH, "bias=False, but the maps have shifts", tmp_path, bias=False)
    refused("llama", BOTH, "rank must be at least 3, the most neurons that one map scales, got 2", tmp_path, rank=2)
    refused("llama", BOTH, "rank must be at least 1, got 0", tmp_path, rank=0)


def test_wrong_arguments_and_maps(tmp_path):
    model = language_model("llama")
    maps = sparse_maps(model, BOTH)
    for settings, message in (
        ({"bias": "lora_only"}, "bias must be True, False or None, got 'lora_only'"),
        ({"rank": 2.0}, "rank must be an int"),
        ({"strength": None}, "strength must be a real number"),
    ):
        with pytest.raises(TypeError, match=message):
            maps.to_peft_lora(model, tmp_path, **settings)
    nothing = lineas.SteeringMaps({name: lineas.AffineMap.identity(16) for name in maps})
    with pytest.raises(ValueError, match="these maps change nothing"):
        nothing.to_peft_lora(model, tmp_path)
    with pytest.raises(ValueError, match=r"for the tokens 'last'.*an adapter would change the others"):
        lineas.SteeringMaps(dict(maps), {"tokens": "last"}).to_peft_lora(model, tmp_path)
    with maps.attach(model), pytest.raises(ValueError, match="maps are attached to"):
        maps.to_peft_lora(model, tmp_path)
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(
        torch.zeros(16, 16, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"weight of 'model.layers.0.self_attn.q_proj' is torch.uint8 .* quantised"):
        maps.to_peft_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_peft_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = language_model("llama")
    with pytest.raises(ImportError, match=r'pip install "lineas\[peft\]"'):
        sparse_maps(model, BOTH).to_peft_lora(model, tmp_path)


@pytest.mark.parametrize("use", ["fold", "check", "lora"])
def test_maps_of_another_model_are_warned_of_once(tmp_path, use):
    model = language_model("llama")
    model.config.name_or_path = "here/llama"
    maps = lineas.SteeringMaps(dict(sparse_maps(model, BOTH)), {"model": "there/other"})
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UserWarning)
        if use == "lora":
            maps.to_peft_lora(model, tmp_path)
        else:
            maps.fold(model, check=batch if use == "check" else None)
    texts = [str(one.message) for one in seen if one.category is UserWarning]
    assert [text[:65] for text in texts] == ["these maps were fitted to 'there/other', not to 'here/llama': its"]
