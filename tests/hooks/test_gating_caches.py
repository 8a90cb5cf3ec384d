"""Gates on texts that come in several passes: sums of what was read belong to the cache."""

import copy

import models_zoo
import numpy as np
import pytest
import torch
from attached import FAMILIES, GREEDY, ids, logits
from caches import cache_of, cached
from gates import WIDTH, close, gated_model, in_steps, ones, scalar
from torch import nn
from transformers import DynamicCache, StaticCache

import lineas
from lineas.hooks import gating


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
        last = model(input_ids=batch["input_ids"][turned, 5:], attention_mask=ones(2, 6), **cached(cache)).logits
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
        last = model(input_ids=batch["input_ids"][rows, 5:], attention_mask=mask, **cached(cache)).logits
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
            found = model(input_ids=other["input_ids"], attention_mask=ones(1, 12), **cached(cache)).logits
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
                found = model(input_ids=end.repeat(2, 1), **cached(one)).logits
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
                    found[k].append(model(input_ids=piece, **cached(caches[k])).logits)
        for k, batch in enumerate(texts):
            torch.testing.assert_close(torch.cat(found[k], dim=1), logits(model, batch), atol=2e-4, rtol=2e-4)


def test_a_cache_that_the_model_makes_is_known():
    model, maps = gated_model(kind="mean")
    batch = ids([6])
    with maps.attach(model), torch.no_grad():
        out = model(input_ids=batch["input_ids"][:, :5], use_cache=True)
        last = model(input_ids=batch["input_ids"][:, 5:], **cached(cache_of(out))).logits
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
            model(input_ids=batch["input_ids"][:, 6:], **cached(cache))
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
