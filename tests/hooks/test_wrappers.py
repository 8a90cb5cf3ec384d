"""Names through wrappers: maps of a plain model in its wrapped self and back, and what is listed and collected."""

import contextlib

import models_zoo as zoo
import numpy as np
import pytest
import torch
from attached import encode, hooks_on, language_model, logits
from fits import prompts, same_maps, short_fit
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

import lineas
from lineas.hooks import modules

LAYERS = zoo.NORMS["llama"]


@contextlib.contextmanager
def as_it_is(model):
    yield model


@contextlib.contextmanager
def compiled(model):
    torch.compiler.reset()
    yield torch.compile(model, backend="eager")
    torch.compiler.reset()


@contextlib.contextmanager
def compiled_by_layer(model):
    torch.compiler.reset()
    for k, layer in enumerate(model.model.layers):
        model.model.layers[k] = torch.compile(layer, backend="eager")
    yield model
    torch.compiler.reset()


@contextlib.contextmanager
def parallel(model):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield DistributedDataParallel(model)
    finally:
        distributed.destroy_process_group()


@contextlib.contextmanager
def with_adapters(model, kind="LoraConfig", **settings):
    peft = pytest.importorskip("peft")
    yield peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **settings)).eval()


@contextlib.contextmanager
def checkpointed(model):
    for k, layer in enumerate(model.model.layers):
        model.model.layers[k] = checkpoint_wrapper(layer)
    yield model


@contextlib.contextmanager
def everything(model):
    with parallel(model), compiled_by_layer(model), with_adapters(model, target_modules=["q_proj"]) as adapted:
        yield torch.compile(DistributedDataParallel(adapted), backend="eager")


def lora(model):
    return with_adapters(model, target_modules=["q_proj", "down_proj"])


def several_loras(model):
    peft = pytest.importorskip("peft")
    mixed = peft.PeftMixedModel(model, peft.LoraConfig(target_modules=["q_proj"]), "default")
    return as_it_is(mixed)


# The way to wrap, and what the wrapper puts into the name of a module of layer 0.
WRAPPERS = {
    "PEFT": (lora, "base_model.model.{}"),
    "PEFT, mixed": (several_loras, "base_model.model.{}"),
    "compiled": (compiled, "_orig_mod.{}"),
    "compiled by layer": (compiled_by_layer, "model.layers.0._orig_mod.{}"),
    "DistributedDataParallel": (parallel, "module.{}"),
    "DataParallel": (lambda model: as_it_is(nn.DataParallel(model)), "module.{}"),
    "checkpoint_wrapper": (checkpointed, "model.layers.0._checkpoint_wrapped_module.{}"),
    "all of them": (everything, "_orig_mod.module.base_model.model.model.layers.0._orig_mod.{}"),
}
COMPILES = ("compiled", "compiled by layer", "all of them")
WAYS = [pytest.param(way, marks=pytest.mark.slow) if way in COMPILES else way for way in WRAPPERS]
# A layer that an adapter or a compiler may take, one within, and one that nothing touches.
WATCHED = ["model.layers.0", "model.layers.0.self_attn.q_proj", *(f"model.layers.{k}.mlp" for k in range(zoo.LAYERS))]


@pytest.fixture(scope="module")
def known():
    """A plain model: its maps and what it gives with and without them, its activations, and a fit."""
    model, maps = language_model("llama")
    with maps.attach(model):
        steered = logits(model)
    acts = lineas.collect(model, prompts(6, 1), layers=[LAYERS, *WATCHED])
    return maps, logits(model), steered, acts, short_fit(zoo.llama(), steps=2).maps


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_maps_of_a_plain_model_steer_it_wrapped_and_back(way, known):
    maps, plain, steered, acts, fitted = known
    wrap, _ = WRAPPERS[way]
    with wrap(zoo.llama()) as model:
        with maps.attach(model, strength=0.5) as handle:
            assert handle.maps is maps and not torch.allclose(logits(model), steered, atol=1e-3)
            handle.strength = 1.0
            close(logits(model), steered)
        assert hooks_on(model) == 0
        close(logits(model), plain)
        found = lineas.collect(model, prompts(6, 1), layers=[LAYERS, *WATCHED])
        assert list(found) == list(acts)
        for name, rows in acts.items():
            np.testing.assert_allclose(found[name], rows, atol=1e-5)
        same_maps(short_fit(model, steps=2).maps, fitted, atol=1e-4)
        assert lineas.sites(model).suggested == lineas.sites(zoo.llama()).suggested
        assert str(lineas.sites(model)).startswith("LlamaForCausalLM: ")


@pytest.mark.parametrize("way", WAYS)
def test_maps_with_the_names_of_a_wrapper_steer_any_other(way, known):
    maps, _, steered, _, _ = known
    marked = WRAPPERS[way][1]

    def old(name):
        """As the name was in the wrapper."""
        head, _, tail = marked.partition("{}")[0].rpartition("model.layers.0")
        return name.replace("model.layers.", head + "model.layers.", 1).replace(".post", f"{tail}post", 1)

    saved = maps.rename(old if "layers.0" in marked else lambda name: marked.format(name))
    assert not set(saved) & set(maps)
    for other in ("PEFT", "compiled by layer", "DataParallel", None):
        with WRAPPERS[other][0](zoo.llama()) if other else as_it_is(zoo.llama()) as model:
            with saved.attach(model) as handle:
                close(logits(model), steered)
                handle.maps = saved.scaled(0)
                assert not torch.allclose(logits(model), steered, atol=1e-3)
            for name in saved:
                assert modules.find(model, name)[0] in maps


def test_globs_with_the_prefix_of_a_wrapper_find_the_modules():
    model, expected = zoo.llama(), modules.resolve(zoo.llama(), LAYERS)
    for prefix in ("module.", "base_model.model.", "_orig_mod.", "module._orig_mod."):
        assert modules.resolve(model, prefix + LAYERS) == expected
    with pytest.raises(ValueError, match=r"^layers: no module matches 'modules\.model"):
        modules.resolve(model, "modules." + LAYERS)


def test_a_module_that_has_such_a_name_of_its_own_keeps_it():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.model = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.model(self.module(x))

    outer = nn.Sequential(Inner())
    outer.base_model = Inner()
    assert list(modules.named_modules(outer)) == [name for name, _ in outer.named_modules() if name]
    assert modules.get_module(outer, "base_model.model") is outer.base_model.model
    assert modules.get_module(outer, "base_model.module") is outer.base_model.module
    assert modules.find(outer[0], "module.module") == ("module", outer[0].module)


def test_layers_with_adapters_keep_their_names():
    with lora(zoo.llama()) as model:
        names = modules.named_modules(model)
        layer = names["model.layers.0.self_attn.q_proj"]
        assert type(layer).__module__.startswith("peft.") and "model.layers.0.self_attn.q_proj.base_layer" in names
        assert modules.get_module(model, "model.layers.0.self_attn.q_proj") is layer
        plain = list(modules.named_modules(zoo.llama()))
        assert [name for name in names if name in plain] == plain


def test_learnt_prompts_leave_the_names_of_the_model():
    model, maps = language_model("llama")
    expected = list(modules.named_modules(model))
    with with_adapters(model, "PromptTuningConfig", num_virtual_tokens=2) as wrapped:
        assert list(modules.named_modules(wrapped)) == expected
        before = wrapped(**encode()).logits
        # One step in from the wrapper, where it has no "model" in between.
        with maps.rename(prefix="base_model.").attach(wrapped):
            assert not torch.allclose(wrapped(**encode()).logits, before, atol=1e-3)


def test_fully_sharded_models():
    """FSDP needs an accelerator: here is how it names what it wraps."""

    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self._fsdp_wrapped_module = module

        def forward(self, *args, **kwargs):
            return self._fsdp_wrapped_module(*args, **kwargs)

    model, maps = language_model("llama")
    expected = lineas.collect(model, prompts(3, 1), layers=LAYERS)
    for k, layer in enumerate(model.model.layers):
        model.model.layers[k] = FullyShardedDataParallel(layer)
    model = FullyShardedDataParallel(model)
    found = lineas.collect(model, prompts(3, 1), layers=LAYERS)
    assert list(found) == list(expected) == list(maps)
    for name, rows in expected.items():
        np.testing.assert_array_equal(found[name], rows)
    with maps.attach(model, tokens="last"):
        logits(model)


def test_the_name_of_a_wrapped_model_is_that_of_the_one_inside():
    model = zoo.llama()
    model.config._name_or_path = "some/model"
    assert modules.model_name(nn.DataParallel(model)) == "some/model"
    with lora(model) as adapted:
        assert modules.model_name(adapted) == "some/model"
        with pytest.raises(
            ValueError, match=r"^LlamaForCausalLM has no module 'model\.norms'; similar names: model\.nor"
        ):
            modules.get_module(adapted, "model.norms")


def test_parts_of_graphs_are_refused_inside_wrappers_too():
    with torch.no_grad():
        traced = torch.jit.trace(zoo.mlp(), torch.randn(3, 5))
    exported = torch.export.export(zoo.mlp(), (torch.randn(3, 5),)).module()
    for graph in (traced, exported):
        with pytest.raises(ValueError, match=r"^module 'module\.0' would not call hooks: it is a part of a"):
            modules.get_module(nn.DataParallel(graph), "module.0")
