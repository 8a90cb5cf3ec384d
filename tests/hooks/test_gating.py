"""Gates in a model: what they do to the outputs, with and without a cache, and what is refused."""

import copy

import models_zoo
import numpy as np
import pytest
import torch
from attached import FAMILIES, GREEDY, acted_on, encode, hooks_on, ids, language_model, logits, outputs_of, pickled
from torch import nn
from transformers import DynamicCache, StaticCache

import lineas
from lineas.hooks import gating

WIDTH = models_zoo.WIDTH


def scalar(context="token", *, site=None, seed=0, bias=0.1):
    rng = np.random.default_rng(seed)
    return lineas.Gate(rng.normal(0, 1.5, WIDTH).astype(np.float32), bias, context=context, site=site)


def neurons(seed=0):
    parts = np.random.default_rng(seed).normal(0, 1, (3, WIDTH)).astype(np.float32)
    return lineas.NeuronGate(*parts, closed=np.arange(WIDTH) % 3 == 0)


def gated_model(family="llama", kind="token"):
    """A model, and maps each of which has a gate of its own."""
    model, maps = language_model(family)
    made = {"neuron": neurons}.get(kind, lambda seed: scalar(kind, seed=seed))
    return model, maps.gated({name: made(seed=k) for k, name in enumerate(maps)})


def by_hand(gate, z, mask):
    """The values of a gate, token after token, in float64."""
    z = z.double().numpy()
    if isinstance(gate, lineas.NeuronGate):
        logit = gate.quadratic * z**2 + gate.linear * z + gate.constant
        return np.where(gate.closed, 0, 1 / (1 + np.exp(-logit)))
    found = np.zeros((*z.shape[:2], 1))
    for row, real in enumerate(mask.numpy().astype(bool)):
        seen = []
        for t in np.flatnonzero(real):
            seen.append(z[row, t])
            read = np.mean(seen, axis=0) if gate.context == "mean" else seen[-1]
            found[row, t] = 1 / (1 + np.exp(-(read @ gate.weight.astype(np.float64) + gate.bias)))
    return found


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=2e-6, rtol=2e-5)


# --- what a gate does -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("kind", ["token", "mean", "neuron"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_multiplies_the_strength(family, kind, strength):
    model, maps = gated_model(family, kind)
    name, batch = next(iter(maps)), encode()
    plain = outputs_of(model, [name], lambda: model(**batch))[name]
    with maps.attach(model, strength=strength):
        found = outputs_of(model, [name], lambda: model(**batch))[name]
    one, mask = maps[name], batch["attention_mask"]
    value = torch.tensor(by_hand(maps.gates[name], plain, mask))
    expected = plain + strength * value * (torch.tensor(one.weight) * plain + torch.tensor(one.bias) - plain)
    real = mask.bool()
    close(found[real], expected[real])


@pytest.mark.parametrize("kind", ["token", "mean", "neuron"])
def test_the_second_pass_does_what_the_first_did(kind):
    model, maps = gated_model(kind=kind)
    with maps.attach(model):
        first = logits(model)
        assert torch.equal(logits(model), first)
        assert torch.equal(logits(model), first)


def test_an_open_gate_gives_the_map_and_a_closed_one_the_activation_to_the_last_bit():
    model, maps = language_model("llama")
    plain = logits(model)
    with maps.attach(model):
        mapped = logits(model)
    for bias, expected in ((1e4, mapped), (-1e4, plain)):
        gate = lineas.Gate(np.zeros(WIDTH, np.float32), bias)
        with maps.gated(dict.fromkeys(maps, gate)).attach(model):
            assert torch.equal(logits(model), expected)
            assert torch.equal(logits(model), expected)  # now in a few steps


@pytest.mark.parametrize("kind", ["token", "mean", "neuron"])
@pytest.mark.parametrize("strength", [[0.0, 0.5, 1.0, 2.0], lambda tokens: 0.8**tokens.positions, "array"])
def test_arrays_and_schedules_are_multiplied_as_well(kind, strength):
    model, maps = gated_model(kind=kind)
    name, batch = next(iter(maps)), encode()
    shape = batch["input_ids"].shape
    if strength == "array":
        strength = np.linspace(0, 1, shape[0] * shape[1]).reshape(shape)
    gates = outputs_of(model, [name], lambda: model(**batch))[name]
    value = torch.tensor(by_hand(maps.gates[name], gates, batch["attention_mask"]))
    with maps.gated(None).attach(model, strength=strength):
        whole = outputs_of(model, [name], lambda: model(**batch))[name]
    with maps.attach(model, strength=strength):
        found = outputs_of(model, [name], lambda: model(**batch))[name]
    real = batch["attention_mask"].bool()
    close(found[real], (gates + value * (whole - gates))[real])


@pytest.mark.parametrize("kind", ["token", "mean", "neuron"])
def test_a_selection_says_where_a_gate_acts_and_not_what_it_reads(kind):
    model, maps = gated_model(kind=kind)
    name, batch = next(iter(maps)), encode()
    with maps.attach(model):
        whole = outputs_of(model, [name], lambda: model(**batch))[name]
    plain = outputs_of(model, [name], lambda: model(**batch))[name]
    with maps.attach(model, tokens="last"):
        found = outputs_of(model, [name], lambda: model(**batch))[name]
    assert torch.equal(found[:, -1], whole[:, -1])  # the padding is on the left
    assert torch.equal(found[:, :-1], plain[:, :-1])


@pytest.mark.parametrize("kind", ["token", "mean", "neuron"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_is_gated_alone_as_in_a_batch(kind, side):
    model, maps = gated_model(kind=kind)
    batch = ids([5, 3, 7], side)
    with maps.attach(model) as handle, handle.recorded_gates() as gates:
        logits(model, batch)
        together = dict(gates)
        for row, mask in enumerate(batch["attention_mask"].bool()):
            logits(model, {"input_ids": batch["input_ids"][row : row + 1, mask]})
            for name in maps:
                torch.testing.assert_close(gates[name][0], together[name][row, mask], atol=1e-5, rtol=1e-5)


def test_padding_may_hold_anything():
    class Norm(nn.Module):
        def forward(self, x):
            return x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Norm()

        def forward(self, input_ids, inputs_embeds, attention_mask):
            return self.norm(inputs_embeds)

    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(1, 4, 3)).astype(np.float32))
    broken = torch.cat([torch.full((1, 2, 3), torch.nan), x], dim=1)
    maps = lineas.SteeringMaps({"norm": lineas.AffineMap(np.ones(3, np.float32), np.ones(3, np.float32))})
    maps = maps.gated({"norm": lineas.Gate(rng.normal(size=3).astype(np.float32), 0.0, context="mean")})
    model = Model()
    with maps.attach(model):
        alone = model(torch.zeros(1, 4, dtype=torch.int64), x, torch.ones(1, 4))
        padded = model(torch.zeros(1, 6, dtype=torch.int64), broken, torch.tensor([[0, 0, 1, 1, 1, 1]]))
    close(padded[:, 2:], alone)


def test_bfloat16_is_rounded_once():
    model, maps = gated_model()
    name = next(iter(maps))
    model = model.to(torch.bfloat16)
    plain = outputs_of(model, [name], lambda: model(**encode()))[name]
    with maps.attach(model, strength=0.7):
        found = outputs_of(model, [name], lambda: model(**encode()))[name]
    assert found.dtype == torch.bfloat16
    expected = maps.transform({name: plain.float()}, 0.7)[name]
    torch.testing.assert_close(found, expected.to(torch.bfloat16), atol=0, rtol=0.01)


def test_gradients_go_through_the_gate():
    model, maps = gated_model(kind="mean")
    z = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for gate in (scalar(), scalar("mean"), neurons()):
        assert torch.autograd.gradcheck(lambda x, gate=gate: gating.values(gate, x, mask), z)
    with maps.attach(model):
        for _ in range(2):
            x = model.get_input_embeddings()(encode()["input_ids"]).detach().requires_grad_()
            model(inputs_embeds=x, attention_mask=encode()["attention_mask"]).logits.sum().backward()
            assert x.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["token", "mean"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model, maps = gated_model(kind=kind)
    model.train()
    found = []
    with maps.attach(model):
        for on in (False, True):
            if on:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            x = model.get_input_embeddings()(encode()["input_ids"]).detach().requires_grad_()
            model(inputs_embeds=x, attention_mask=encode()["attention_mask"], use_cache=False).logits.sum().backward()
            found.append(x.grad)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_values_on_convolutions():
    z = torch.randn(2, 4, 3, 5)
    gate = lineas.Gate(np.arange(4.0, dtype=np.float32), 0.5)
    expected = torch.sigmoid(torch.einsum("bchw,c->bhw", z, torch.arange(4.0)) + 0.5)[:, None]
    close(gating.values(gate, z, axis=1), expected)
    close(torch.tensor(gate.values(z.numpy(), axis=1)), expected)
    model = nn.Conv2d(3, 4, 3)
    maps = lineas.SteeringMaps({"part": lineas.AffineMap(np.ones(4), np.ones(4))})
    one = lineas.NeuronGate(*np.random.default_rng(0).normal(size=(3, 4)))
    wrapped = nn.Module()
    wrapped.part, wrapped.forward = model, lambda x: model(x)
    x = torch.randn(1, 3, 6, 6)
    for some in (gate, one):
        plain = wrapped(x)
        with maps.gated({"part": some}).attach(wrapped):
            close(wrapped(x), plain + torch.tensor(some.values(plain.detach().numpy(), axis=1)))


# --- texts that come in several passes --------------------------------------------------------------------------------


def ones(rows, columns):
    return torch.ones(rows, columns, dtype=torch.int64)


def in_steps(model, batch, sizes, cache=None):
    """The logits of a text that comes in pieces of these sizes."""
    cache, start, found = DynamicCache(config=model.config) if cache is None else cache, 0, []
    for size in sizes:
        piece = {"input_ids": batch["input_ids"][:, start : start + size]}
        with torch.no_grad():
            mask = batch["attention_mask"][:, : start + size]
            found.append(model(**piece, attention_mask=mask, past_key_values=cache).logits)
        start += size
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 1, 1, 3], [2, 7]], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["token", "mean", "neuron"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_text_is_gated_as_the_whole_one(family, kind, side, sizes):
    model, maps = gated_model(family, kind)
    batch = ids([9, 5], side)
    with maps.attach(model):
        whole = logits(model, batch)
        pieces = in_steps(model, batch, sizes)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(pieces[real], whole[real], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("window", [3, 8])
def test_a_sliding_window_forgets_keys_and_not_the_mean(window):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = models_zoo.gemma2().config
        config.sliding_window = window
        model = type(models_zoo.gemma2())(config).eval()
    names = lineas.hooks.modules.resolve(model, models_zoo.NORMS["gemma2"])
    maps = {name: lineas.AffineMap(np.full(WIDTH, 1.5), np.full(WIDTH, 0.5)) for name in names}
    maps = lineas.SteeringMaps(maps).gated({name: scalar("mean", seed=k) for k, name in enumerate(names)})
    batch = ids([12, 12])
    with maps.attach(model):
        whole = logits(model, batch)
        close_enough = in_steps(model, batch, [6, *[1] * 6])
    torch.testing.assert_close(close_enough, whole, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", ["token", "mean", "neuron"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generation_is_the_same_without_a_cache(kind, settings):
    model, maps = gated_model(kind=kind)
    batch = ids([5, 3, 7])
    with maps.attach(model, strength=2.0):
        cached, whole = (model.generate(**batch, use_cache=use, **GREEDY, **settings) for use in (True, False))
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, model.generate(**batch, **GREEDY, **settings))


def test_sampled_sequences_of_a_prompt_have_their_own_means():
    model, maps = gated_model(kind="mean")
    batch = ids([5, 3])
    found = []
    with maps.attach(model, strength=2.0):
        for use in (True, False):
            torch.manual_seed(0)
            settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6, "use_cache": use}
            found.append(model.generate(**batch, **settings))
    assert torch.equal(*found)


def test_rows_of_a_cache_that_change_places_take_their_sums_along():
    model, maps = gated_model(kind="mean")
    batch = ids([6, 6])
    turned = torch.tensor([1, 0])
    with maps.attach(model):
        cache = DynamicCache(config=model.config)
        in_steps(model, {key: x[:, :5] for key, x in batch.items()}, [5], cache)
        cache.reorder_cache(turned)
        last = model(input_ids=batch["input_ids"][turned, 5:], attention_mask=ones(2, 6), past_key_values=cache).logits
        whole = logits(model, {"input_ids": batch["input_ids"][turned]})
    torch.testing.assert_close(last[:, 0], whole[:, -1], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("how", ["batch_repeat_interleave", "batch_select_indices"])
def test_other_changes_of_rows_are_followed(how):
    model, maps = gated_model(kind="mean")
    batch = ids([6, 6])
    argument, rows = (2, [0, 0, 1, 1]) if how == "batch_repeat_interleave" else (torch.tensor([1, 1]), [1, 1])
    with maps.attach(model):
        cache = DynamicCache(config=model.config)
        in_steps(model, {key: x[:, :5] for key, x in batch.items()}, [5], cache)
        getattr(cache, how)(argument)
        mask = ones(len(rows), 6)
        last = model(input_ids=batch["input_ids"][rows, 5:], attention_mask=mask, past_key_values=cache).logits
        whole = logits(model, {"input_ids": batch["input_ids"][rows]})
    torch.testing.assert_close(last[:, 0], whole[:, -1], atol=2e-4, rtol=2e-4)


def test_a_cropped_cache_goes_back_to_the_sums_of_its_columns():
    model, maps = gated_model(kind="mean")
    first, other = ids([8], seed=1), ids([8], seed=2)
    both = {"input_ids": torch.cat([first["input_ids"][:, :4], other["input_ids"]], dim=1)}
    with maps.attach(model):
        cache = DynamicCache(config=model.config)
        in_steps(model, first, [5, 1, 1, 1], cache)
        cache.crop(-4)
        with torch.no_grad():
            found = model(input_ids=other["input_ids"], attention_mask=ones(1, 12), past_key_values=cache).logits
        whole = logits(model, both)
    torch.testing.assert_close(found, whole[:, 4:], atol=2e-4, rtol=2e-4)


def test_copies_of_a_filled_cache_go_on_by_themselves():
    model, maps = gated_model(kind="mean")
    prefix, ends = ids([5]), [ids([4], seed=seed)["input_ids"] for seed in (1, 2)]
    with maps.attach(model):
        cache = DynamicCache(config=model.config)
        in_steps(model, prefix, [5], cache)
        copies = [copy.deepcopy(cache) for _ in ends]
        del cache
        for one, end in zip(copies, ends, strict=True):
            both = torch.cat([prefix["input_ids"], end], dim=1).repeat(2, 1)
            one.batch_repeat_interleave(2)
            with torch.no_grad():
                found = model(input_ids=end.repeat(2, 1), past_key_values=one).logits
            torch.testing.assert_close(found, logits(model, {"input_ids": both})[:, 5:], atol=2e-4, rtol=2e-4)


def test_two_texts_in_turn_keep_their_own_sums():
    model, maps = gated_model(kind="mean")
    texts = [ids([8], seed=seed) for seed in (1, 2)]
    with maps.attach(model):
        caches, found = [DynamicCache(config=model.config) for _ in texts], [[], []]
        for start, size in ((0, 4), (4, 1), (5, 2), (7, 1)):
            for k, batch in enumerate(texts):
                with torch.no_grad():
                    piece = batch["input_ids"][:, start : start + size]
                    found[k].append(model(input_ids=piece, past_key_values=caches[k]).logits)
        for k, batch in enumerate(texts):
            torch.testing.assert_close(torch.cat(found[k], dim=1), logits(model, batch), atol=2e-4, rtol=2e-4)


def test_a_cache_that_the_model_makes_is_known():
    model, maps = gated_model(kind="mean")
    batch = ids([6])
    with maps.attach(model), torch.no_grad():
        out = model(input_ids=batch["input_ids"][:, :5], use_cache=True)
        last = model(input_ids=batch["input_ids"][:, 5:], past_key_values=out.past_key_values).logits
        torch.testing.assert_close(last[:, 0], logits(model, batch)[:, -1], atol=2e-4, rtol=2e-4)


def test_a_static_cache_works_and_may_be_used_again():
    model, maps = gated_model(kind="mean")
    with maps.attach(model):
        cache = StaticCache(config=model.config, max_cache_len=16)
        for seed in (1, 2):
            batch = ids([6], seed=seed)
            found = in_steps(model, batch, [4, 1, 1], cache)
            torch.testing.assert_close(found, logits(model, batch), atol=2e-4, rtol=2e-4)
            cache.reset()


def test_means_go_on_where_the_maps_do_not_act():
    model, maps = gated_model(kind="mean")
    batch = ids([8])
    with maps.attach(model, tokens="generated") as handle, handle.recorded_gates() as gates:
        in_steps(model, batch, [6, 1, 1])
        late = {name: x[0, -1] for name, x in gates.items()}
    first = next(iter(maps))
    with maps.attach(model, strength=0) as handle, handle.recorded_gates() as gates:
        logits(model, batch)
    close(late[first], gates[first][0, -1])  # what it reads is not changed by maps before it
    with maps.attach(model, strength=0) as handle, handle.recorded_gates() as gates:
        cache = DynamicCache(config=model.config)
        in_steps(model, batch, [6], cache)
        handle.strength = 1.0
        with torch.no_grad():
            model(input_ids=batch["input_ids"][:, 6:], past_key_values=cache)
    close(gates[first][0, -1], late[first])


def test_a_cache_is_freed_as_soon_as_it_is_let_go():
    import gc
    import weakref

    model, maps = gated_model(kind="mean")
    with maps.attach(model):
        gc.disable()
        try:
            cache = DynamicCache(config=model.config)
            in_steps(model, ids([4]), [3, 1], cache)
            known = weakref.ref(cache)
            del cache
            assert known() is None
        finally:
            gc.enable()


def test_assisted_generation_is_the_plain_one():
    model, maps = gated_model(kind="mean")
    batch = ids([6])
    with maps.attach(model, strength=2.0):
        plain = model.generate(**batch, **GREEDY)
        assert torch.equal(model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=2), plain)


class Counted:
    """The least that a cache can be."""

    def __init__(self):
        self.columns = 0

    def get_seq_length(self):
        return self.columns


class Twice(nn.Module):
    """Runs a part as often as it is told, for a text that is in a cache."""

    def __init__(self):
        super().__init__()
        self.embed, self.part = nn.Embedding(60, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, past_key_values=None, times=1):
        x = self.embed(input_ids)
        for _ in range(times):
            x = self.part(x)
        if past_key_values is not None:
            past_key_values.columns += input_ids.shape[1]
        return x


def test_a_part_that_runs_twice_is_refused_only_where_the_text_is_in_a_cache():
    model, cache = Twice(), Counted()
    maps = lineas.SteeringMaps({"part": lineas.AffineMap(np.ones(WIDTH), np.ones(WIDTH))})
    with maps.gated({"part": scalar("mean")}).attach(model), torch.no_grad():
        text = torch.arange(5)[None]
        model(text, times=2)
        for size in (2, 1, 1):
            model(text[:, :size], past_key_values=cache)
        for _ in range(2):  # also by the few steps that one token takes
            with pytest.raises(ValueError, match="part: the module runs more than once in a pass"):
                model(text[:, :1], past_key_values=cache, times=2)
        whole = model(text[:, [0, 1, 0, 0, 3]])
        torch.testing.assert_close(model(text[:, 3:4], past_key_values=cache), whole[:, -1:])
        assert cache.columns == 5


def test_several_pieces_become_one():
    sums, gate, key = gating.GateSums(), scalar("mean"), (0, "a", 1)
    values = torch.arange(200.0)[None]
    for k in range(200):
        sums.put(key, gate, k, values[:, k : k + 1])
    assert sums.before(key, gate, 200, 1) == 199
    assert sums.before(key, gate, 130, 1) == 129
    assert sums.before(key, gate, 131, 1) is None
    assert sums.before(key, scalar("mean"), 130, 1) is None


# --- one gate for all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["token", "mean"])
@pytest.mark.parametrize("site", ["model.layers.0.post_attention_layernorm", "model.layers.0.input_layernorm"])
def test_one_gate_reads_an_early_module_for_all(context, site):
    model, maps = language_model("llama")
    gate, batch = scalar(context, site=site), encode()
    read = outputs_of(model, [site], lambda: model(**batch))[site]
    with maps.gated(gate).attach(model) as handle, handle.recorded_gates() as gates:
        for _ in range(2):
            logits(model, batch)
            assert list(gates) == list(maps)
            real = batch["attention_mask"].bool()
            for name in maps:
                close(gates[name][real], by_hand(gate, read, batch["attention_mask"])[..., 0][real])
        whole = logits(model, ids([8, 8]))
        torch.testing.assert_close(in_steps(model, ids([8, 8]), [5, 1, 1, 1]), whole, atol=2e-4, rtol=2e-4)
    assert hooks_on(model) == 0


def test_a_gate_that_reads_a_later_module_is_an_error_that_names_both():
    model, maps = language_model("llama")
    first, *_, last = maps
    with maps.gated(scalar(site=last)).attach(model):
        with pytest.raises(ValueError, match=rf"{first}: its gate reads the output of '{last}', which has not run yet"):
            logits(model)
    logits(model)


def test_a_shared_gate_under_checkpointing_is_refused():
    model, maps = language_model("llama")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    gate = scalar(site="model.layers.0.input_layernorm")
    with maps.gated(gate).attach(model), pytest.raises(RuntimeError, match="gradient checkpointing"):
        model(**encode(), use_cache=False)


# --- handles ----------------------------------------------------------------------------------------------------------


def test_maps_with_and_without_gates_can_be_set_while_they_are_on():
    model, maps = language_model("llama")
    sited = scalar(site="model.layers.0.input_layernorm")
    others = [maps, maps.gated({name: scalar("mean", seed=3) for name in maps}), maps.gated(sited), maps]
    expected = []
    for one in others:
        with one.attach(model):
            expected.append(logits(model))
    plain = logits(model)
    with maps.attach(model) as handle:
        for one, wanted in zip(others, expected, strict=True):
            handle.maps = one
            for _ in range(2):
                assert torch.equal(logits(model), wanted)
        handle.strength = 0
        assert torch.equal(logits(model), plain)
    assert hooks_on(model) == 0


def test_a_gate_for_another_width_changes_nothing():
    model, maps = language_model("llama")
    site = "model.layers.0.mlp.gate_proj"
    with pytest.raises(ValueError, match=f"{site}: the gate is for 16 neurons, the module has 32"):
        maps.gated(scalar(site=site)).attach(model)
    assert hooks_on(model) == 0
    with maps.attach(model) as handle:
        before = hooks_on(model)
        for bad, text in ((site, "the module has 32"), ("model.nowhere", "no module")):
            with pytest.raises(ValueError, match=text):
                handle.maps = maps.gated(scalar(site=bad))
        assert handle.maps is maps
        assert hooks_on(model) == before


def test_a_new_gate_does_not_know_what_is_in_a_cache():
    model, maps = gated_model(kind="mean")
    batch = ids([6])
    with maps.attach(model) as handle:
        cache = DynamicCache(config=model.config)
        in_steps(model, batch, [5], cache)
        handle.maps = maps.gated({name: scalar("mean", seed=9) for name in maps})
        with pytest.raises(ValueError, match="has 5 columns of it in a cache that this gate has not seen"):
            model(input_ids=batch["input_ids"][:, 5:], past_key_values=cache)


def test_a_cache_that_was_filled_without_the_maps_is_refused():
    model, maps = gated_model(kind="mean")
    batch = ids([6])
    cache = DynamicCache(config=model.config)
    in_steps(model, batch, [5], cache)
    with maps.attach(model), pytest.raises(ValueError, match="fill the cache with the maps on, at strength 0"):
        model(input_ids=batch["input_ids"][:, 5:], past_key_values=cache)


def test_copies_and_pickles_of_a_model_bring_their_gates():
    model, maps = gated_model(kind="mean")
    with maps.attach(model):
        expected = logits(model)
        for other in (copy.deepcopy(model), pickled(model)):
            assert torch.equal(logits(other), expected)
            (handle,) = lineas.attached(other)
            assert handle.maps == maps
            handle.remove()
            assert hooks_on(other) == 0
    with maps.gated(scalar(site="model.layers.0.input_layernorm")).attach(model):
        expected, other = logits(model), copy.deepcopy(model)
        assert torch.equal(logits(other), expected)
        assert lineas.detach(other) == 1
        assert hooks_on(other) == 0


def test_two_handles_have_their_own_gates_one_after_the_other():
    model, maps = gated_model(kind="mean")
    with maps.attach(model), maps.scaled(0.5).attach(model):
        whole = logits(model, ids([8]))
        torch.testing.assert_close(in_steps(model, ids([8]), [5, 1, 1, 1]), whole, atol=2e-4, rtol=2e-4)


def test_a_strength_for_one_thread_is_multiplied():
    model, maps = gated_model()
    with maps.attach(model, strength=0.3) as handle:
        expected = logits(model)
    with maps.attach(model) as handle:
        logits(model)
        with handle.at(strength=0.3):
            assert torch.equal(logits(model), expected)
            assert torch.equal(logits(model), expected)


def test_acted_knows_gated_modules():
    model, maps = gated_model()
    with maps.attach(model) as handle:
        logits(model)
        assert handle.acted == set(maps)


def test_recording_is_for_maps_that_are_on():
    model, maps = gated_model()
    handle = maps.attach(model)
    handle.remove()
    with pytest.raises(RuntimeError, match="attach them again"), handle.recorded_gates():
        pass


class Small(nn.Module):
    """The least that a model of texts can be."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(60, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, input_ids, attention_mask=None):
        return self.last(self.first(self.embed(input_ids)))


@pytest.mark.parametrize(("kind", "tokens"), [("token", "all"), ("neuron", "last"), ("mean", "all"), ("shared", "all")])
def test_compiled_models_have_gates(kind, tokens):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Small()
    maps = lineas.SteeringMaps({"last": lineas.AffineMap(np.full(WIDTH, 1.5), np.ones(WIDTH))})
    made = {"neuron": neurons(), "shared": scalar(site="first")}
    maps = maps.gated({"last": made.get(kind) or scalar(kind if kind == "mean" else "token")})
    batch = ids([6, 4])
    compiled = torch.compile(model, backend="eager", fullgraph=kind == "token")
    compiled(**batch)
    with torch.no_grad(), maps.attach(model, strength=0.7, tokens=tokens) as handle:
        assert (model(**batch) - compiled(**batch)).abs().max() < 1e-5
        for strength, one in ((0.2, maps), (0.0, maps), (1.0, maps.gated(None)), (1.0, maps)):
            handle.strength, handle.maps = strength, one
            torch.testing.assert_close(compiled(**batch), model(**batch), atol=1e-5, rtol=1e-5)
        handle.strength = 0.9
        whole = compiled(**batch)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch), model(**batch))
        assert (whole - model(**batch)).abs().max() > 0.1


# --- what is refused --------------------------------------------------------------------------------------------------


def test_encoders_and_decoders_have_no_mean():
    from families import FAMILIES as ALL

    family = next(family for family in ALL if family.name.startswith("T5"))
    model = family.model
    name = "encoder.block.0.layer.0.layer_norm"
    maps = lineas.SteeringMaps({name: lineas.AffineMap(np.ones(WIDTH), np.ones(WIDTH))})
    with pytest.raises(ValueError, match="a gate of context 'mean' needs a model with one text"):
        maps.gated({name: scalar("mean")}).attach(model)
    assert hooks_on(model) == 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: gating.values(scalar(), torch.ones(2, 3)), "the gate needs 16 channels on axis -1, got shape"),
        (lambda: gating.values(scalar("mean"), torch.ones(2, WIDTH)), r"needs activations \[batch, tokens, 16\]"),
        (
            lambda: gating.values(scalar("mean"), torch.ones(2, 3, WIDTH), torch.ones(2, 4)),
            r"real_mask must have the shape \[2, 3\], got \[2, 4\]",
        ),
        (lambda: gating.values(scalar(), torch.ones(WIDTH, dtype=torch.int64)), "activations must be float16"),
    ],
)
def test_bad_inputs_of_values(call, text):
    with pytest.raises((TypeError, ValueError), match=text):
        call()


def test_nothing_of_a_text_is_left_after_generation():
    model, maps = gated_model(kind="mean")
    with maps.attach(model):
        assert acted_on(model, maps.gated(None), lambda: None) == []
        model.generate(**ids([5]), **GREEDY)
        assert not lineas.attached(model)[0]._tracker._of_cache
