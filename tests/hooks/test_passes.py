"""What a forward pass is under, who is told of it, and what is left of one that was interrupted."""

import contextvars
import gc
import threading
import weakref

import models_zoo as zoo
import numpy as np
import pytest
import torch
from attached import acted_on, hooks_on, ids, language_model, logits, outputs_of, pickled, random_maps
from torch import nn
from transformers import DynamicCache

import lineas

NORMS = [f"model.layers.{k}.post_attention_layernorm" for k in range(zoo.LAYERS)]


def strengths_of(model, maps, run):
    """The strength at which every module acted when `run` was called, from what it got and what it gave."""
    got, given, watches = {}, {}, []
    for name in maps:
        module = model.get_submodule(name)
        for seen, first in ((got, True), (given, False)):
            keep = lambda module, args, output, name=name, seen=seen: seen.update({name: output.double().numpy()})  # noqa: E731
            watches.append(module.register_forward_hook(keep, prepend=first))
    with torch.no_grad():
        run()
    for watch in watches:
        watch.remove()
    return [
        np.median((given[name] - got[name]) / ((one.weight - 1.0) * got[name] + one.bias)) for name, one in maps.items()
    ]


# --- what is set within a pass ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["all", "prompt"])
def test_a_strength_set_within_a_pass_holds_from_the_next_one_for_all_modules(tokens):
    model, maps = language_model("llama")
    batch = ids([5])
    with maps.attach(model, strength=0.5, tokens=tokens) as handle:

        def change(module, args):
            handle.strength = 2.0

        watch = model.model.layers[1].register_forward_pre_hook(change)
        found = strengths_of(model, maps, lambda: model(**batch))
        np.testing.assert_allclose(found, [0.5] * 3, rtol=1e-3)
        watch.remove()
        np.testing.assert_allclose(strengths_of(model, maps, lambda: model(**batch)), [2.0] * 3, rtol=1e-3)


@pytest.mark.parametrize("tokens", ["all", "prompt"])
def test_maps_exchanged_within_a_pass_act_from_the_next_one(tokens):
    model, first = language_model("llama")
    second, batch = random_maps({name: one.d for name, one in first.items()}, seed=1), ids([5])
    with first.attach(model, tokens=tokens) as handle:
        before = logits(model, batch)

        def change(module, args):
            handle.maps = second

        watch = model.model.layers[1].register_forward_pre_hook(change)
        assert torch.equal(logits(model, batch), before)
        watch.remove()
        after = logits(model, batch)
    with second.attach(model, tokens=tokens):
        assert torch.equal(logits(model, batch), after) and not torch.equal(before, after)


def test_a_block_entered_within_a_pass_holds_from_the_next_one():
    model, maps = language_model("llama")
    batch, blocks = ids([5]), []
    with maps.attach(model, strength=0.5) as handle:
        expected = logits(model, batch)

        def change(module, args):
            blocks.append(handle.at(strength=2.0))
            blocks[-1].__enter__()

        watch = model.model.layers[1].register_forward_pre_hook(change)
        assert torch.equal(logits(model, batch), expected)
        watch.remove()
        assert not torch.equal(logits(model, batch), expected)
        blocks[0].__exit__(None, None, None)
        assert torch.equal(logits(model, batch), expected)


# --- blocks, threads and contexts -------------------------------------------------------------------------------------


def test_a_generator_that_goes_on_in_another_context_has_its_block_where_it_began():
    model, maps, x = zoo.mlp(), random_maps({"0": 7}), torch.randn(3, 5)
    with maps.attach(model, strength=0.0) as handle, torch.no_grad():
        off = model(x)
        with handle.at(strength=1.0):
            on = model(x)

        def passes():
            with handle.at(strength=1.0):
                while True:
                    yield model(x)

        generator = passes()
        here, there = contextvars.copy_context(), contextvars.copy_context()
        assert torch.equal(here.run(next, generator), on)
        assert torch.equal(there.run(next, generator), off)
        assert torch.equal(here.run(next, generator), on)
        there.run(generator.close)  # ends the block everywhere
        assert torch.equal(here.run(model, x), off)
        assert torch.equal(model(x), off)


def test_a_thread_is_under_the_block_if_it_is_given_the_context():
    model, maps, x = zoo.mlp(), random_maps({"0": 7}), torch.randn(3, 5)
    found = {}
    with maps.attach(model, strength=0.0) as handle, torch.no_grad():
        off = model(x)

        def serve(name):
            with torch.no_grad():
                found[name] = model(x)

        with handle.at(strength=1.0):
            on = model(x)
            plain = threading.Thread(target=contextvars.Context().run, args=(serve, "empty"))
            given = threading.Thread(target=contextvars.copy_context().run, args=(serve, "copied"))
            for thread in (plain, given):
                thread.start()
                thread.join()
    assert torch.equal(found["empty"], off) and torch.equal(found["copied"], on) and not torch.equal(on, off)


# --- interrupts -------------------------------------------------------------------------------------------------------


class Interrupt(nn.Module):
    """Raises KeyboardInterrupt in a pass when it is told to."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.now = layer, False

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, *args, **kwargs):
        if self.now:
            raise KeyboardInterrupt
        return self.layer(*args, **kwargs)


def interruptible():
    model, maps = language_model("llama")
    model.model.layers[1] = stop = Interrupt(model.model.layers[1])
    return model, maps.rename({name: name.replace("layers.1.", "layers.1.layer.") for name in maps}), stop


def test_after_an_interrupt_nothing_is_kept_once_the_maps_are_off():
    model, maps, stop = interruptible()
    handle = maps.attach(model, tokens="last")
    cache = DynamicCache(config=model.config)
    ghost = weakref.ref(cache)
    with torch.no_grad():
        model(**ids([5]), cache=cache)
        stop.now = True
        with pytest.raises(KeyboardInterrupt):
            model(torch.tensor([[7]]), cache=cache)
    del cache
    handle.remove()
    gc.collect()
    assert ghost() is None


@pytest.mark.parametrize("strength", [1.0, [0.3]])
def test_after_an_interrupt_a_part_of_the_model_is_in_no_pass(strength):
    model, maps, stop = interruptible()
    name, x = next(iter(maps)), torch.randn(1, 4, zoo.WIDTH)
    norm = model.get_submodule(name)
    plain = norm(x).detach()
    with maps.attach(model, strength=strength) as handle, torch.no_grad():
        stop.now = True
        with pytest.raises(KeyboardInterrupt):
            model(**ids([5]))
        handle.strength = 0.0
        assert torch.equal(norm(x), plain)
    with maps.attach(model, tokens="last"), torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            model(**ids([5]))
        with pytest.raises(RuntimeError, match=f"^{name} was run without LlamaForCausalLM"):
            norm(x)
        stop.now = False
        assert acted_on(model, maps, lambda: model(**ids([5]))) == [[[0, 0, 0, 0, 1]]]


# --- modules that are not called --------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Uses the weights of `out_proj` without calling it, as torch does."""

    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.attention(x, x, x)[0])


IDLE = r"^module 'attention.out_proj' was not called when the model ran, so its map does nothing"


def test_a_module_that_is_not_called_is_named_after_the_first_whole_pass(recwarn):
    model, x = Attention().eval(), torch.randn(2, 3, 8)
    maps = random_maps({"norm": 8, "attention.out_proj": 8})
    with maps.attach(model) as handle:
        assert handle.acted == frozenset()
        with pytest.raises(AttributeError):  # no whole pass
            model(None)
        assert not recwarn.list
        with pytest.warns(UserWarning, match=IDLE):
            model(x)
        assert handle.acted == {"norm"}
        model(x)
        assert not recwarn.list
    with random_maps({"norm": 8}).attach(model) as handle:
        model(x)
        assert handle.acted == {"norm"} and not recwarn.list


@pytest.mark.parametrize("part", ["whole", "module"])
def test_in_a_graph_a_module_acts_as_well(part, recwarn):
    model, x = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)), torch.randn(2, 5)
    maps = random_maps({"0": 7, "1": 7})
    with maps.attach(model) as handle, torch.no_grad():
        expected = model(x)
    with maps.attach(model) as handle, torch.no_grad():
        if part == "whole":
            run = torch.compile(model, backend="eager", fullgraph=True)
        else:
            model[0].compile(backend="eager", fullgraph=True)
            run = model
        torch.testing.assert_close(run(x), expected)
        assert handle.acted == {"0", "1"}
    assert not [one for one in recwarn.list if "not called" in str(one.message)]
    torch.compiler.reset()


# --- recorded states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_recorded_states_are_those_that_later_layers_see(family):
    model = zoo.LANGUAGE_MODELS[family]()
    blocks = [name for name, _ in model.named_modules() if name.split(".")[-1].isdigit()]
    maps, batch = random_maps(dict.fromkeys(blocks, zoo.WIDTH)), ids([5, 3])
    with torch.no_grad():
        with maps.attach(model):
            expected = model(**batch, output_hidden_states=True).hidden_states
        model(**batch, output_hidden_states=True)  # from now on the hooks of transformers are on
        with maps.attach(model):
            found = model(**batch, output_hidden_states=True).hidden_states
            given = outputs_of(model, blocks[:-1], lambda: model(**batch))
    for state, other, name in zip(found[1:-1], expected[1:-1], given, strict=True):
        output = given[name][0] if isinstance(given[name], tuple) else given[name]
        assert torch.equal(state, other) and torch.equal(state, output)


# --- what is on a model -----------------------------------------------------------------------------------------------


def test_lost_handles_are_found_and_taken_off():
    model, maps = language_model("qwen2")
    plain = logits(model)
    first, second = maps.attach(model, 0.5), maps.attach(model, 0.25)
    assert lineas.attached(model) == [first, second]
    assert repr(second) == "Handle(3 modules, strength=0.25, one of 2 on the model)"
    first.remove()
    del second
    gc.collect()
    (found,) = lineas.attached(model)
    assert found.strength == 0.25 and found.maps is maps
    assert lineas.detach(model) == 1
    assert torch.equal(logits(model), plain) and hooks_on(model) == 0
    assert lineas.detach(model) == 0 and lineas.attached(model) == []


def test_a_cell_run_twice_replaces_when_asked():
    model, maps = language_model("qwen2")
    with maps.attach(model):
        once = logits(model)
    for _ in range(3):
        handle = maps.attach(model, replace=True)
        assert lineas.attached(model) == [handle] and torch.equal(logits(model), once)
    with pytest.raises(ValueError, match="has no module 'nowhere'"):
        lineas.SteeringMaps({"nowhere": maps[NORMS[0]]}).attach(model, replace=True)
    assert handle.attached  # nothing is lost
    with pytest.raises(TypeError, match="replace must be True or False, got 1"):
        maps.attach(model, replace=1)
    handle.remove()


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_what_a_copy_of_the_model_brought_along_is_found_as_well(tokens):
    model, maps = language_model("qwen2")
    plain = logits(model)
    with maps.attach(model, 0.5, tokens=tokens) as handle:
        other = pickled(model)
        on = logits(model)
    (found,) = lineas.attached(other)
    assert found is not handle and found.strength == 0.5 and found.tokens == tokens
    assert dict(found.maps) == dict(maps) and torch.equal(logits(other), on)
    found.strength = 0.0
    assert torch.equal(logits(other), plain)
    assert lineas.detach(other) == 1 and hooks_on(other) == 0 and not other._forward_pre_hooks


@pytest.mark.parametrize("function", [lineas.attached, lineas.detach])
def test_no_model(function):
    with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got str"):
        function("model")
