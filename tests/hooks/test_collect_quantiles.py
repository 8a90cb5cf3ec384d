"""Pooled activations out of a model into streaming quantiles: those of the arrays, in bounded memory."""

import gc
import re
import warnings

import models_zoo as zoo
import numpy as np
import pytest
import torch

import lineas
from lineas.arrays.quantiles import LEAST_SIZE
from lineas.hooks import collect as script

NORMS = zoo.NORMS["llama"]
TEXTS = zoo.texts(40)
LEAST = 4 * 3 * zoo.WIDTH * LEAST_SIZE  # bytes that three norms take


def how(**more):
    return {"layers": NORMS, "tokenizer": zoo.tokenizer(), "batch_size": 4, "progress": False} | more


def long_texts(count, *, seed=0):
    """Enough tokens that 512 values of a neuron leave most of them out."""
    return zoo.texts(count, seed=seed, shortest=30, longest=50)


def same_state(one, other):
    assert one.size == other.size and one._state.seen == other._state.seen
    for a, b in zip(one._state[1:], other._state[1:], strict=True):
        np.testing.assert_array_equal(a, b)


def batch_arrays(model, texts, size, **settings):
    """What `collect` gives, batch by batch."""
    return [lineas.collect(model, texts[k : k + size], **settings) for k in range(0, len(texts), size)]


@pytest.mark.parametrize("tokens", ["all", "last", slice(2, None), lambda here: here.positions % 2 == 0])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_same_bits_as_quantiles_of_the_collected_rows(tokens, side):
    model, texts = zoo.llama(), zoo.texts(150, longest=20)
    settings = how(pooling="all", tokens=tokens, tokenizer=zoo.tokenizer(padding_side=side))
    found = lineas.collect_quantiles(model, texts, memory=LEAST, **settings)
    parts = batch_arrays(model, texts, 4, **settings)
    assert list(found) == list(parts[0]) and found.metadata == parts[0].metadata
    assert found["model.layers.0.post_attention_layernorm"].exact is (tokens == "last")
    for name, one in found.items():
        expected = lineas.Quantiles(512)
        for part in parts:
            expected.update(part[name])
        same_state(one, expected)


@pytest.mark.parametrize("pooling", ["mean", "max", "all"])
@pytest.mark.parametrize("family", zoo.LANGUAGE_MODELS)
def test_while_all_rows_fit_maps_are_those_of_the_arrays(family, pooling):
    model = zoo.LANGUAGE_MODELS[family]()
    settings = how(layers=zoo.NORMS[family], pooling=pooling)
    sides = TEXTS, zoo.texts(30, seed=1)
    arrays = [lineas.collect(model, texts, **settings) for texts in sides]
    found = [lineas.collect_quantiles(model, texts, **settings) for texts in sides]
    assert all(one.exact and one.rank_error == 0 for one in found)
    for name, one in found[0].items():
        assert one.count == len(arrays[0][name])
        np.testing.assert_array_equal(one.sample(one.count), np.sort(arrays[0][name], axis=0))
    for penalties in ({}, {"method": "gaussian"}, {"method": "mean"}, {"l1": 0.01, "group": 0.01}):
        maps, expected = lineas.fit(*found, **penalties), lineas.fit(*arrays, **penalties)
        assert maps.metadata == expected.metadata and list(maps) == list(expected)
        for name in maps:
            np.testing.assert_allclose(maps[name].weight, expected[name].weight, rtol=2e-5, atol=2e-5)
            np.testing.assert_allclose(maps[name].bias, expected[name].bias, rtol=2e-4, atol=2e-5)


def test_fits_to_streams_that_left_rows_out_are_close_and_say_so():
    model, settings = zoo.llama(), how(pooling="all", batch_size=16)
    sides = long_texts(60), long_texts(50, seed=1)
    arrays = [lineas.collect(model, texts, **settings) for texts in sides]
    found = [lineas.collect_quantiles(model, texts, memory=4 * LEAST, **settings) for texts in sides]
    maps, expected = lineas.fit(*found), lineas.fit(*arrays)
    assert not found[0].exact and maps.metadata["rank_error"] == max(one.rank_error for one in found)
    assert {name: maps.metadata[name] for name in expected.metadata} == expected.metadata
    for name, one in found[0].items():
        rows = arrays[0][name]
        for share in (0.01, 0.2, 0.5, 0.9):
            told = one.quantile(share)
            below, upto = (rows < told).mean(axis=0), (rows <= told).mean(axis=0)
            assert (below <= share + one.rank_error + 1e-9).all() and (upto >= share - one.rank_error - 1e-9).all()
        np.testing.assert_allclose(one.moments.mean, rows.mean(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(maps[name].weight, expected[name].weight, rtol=5e-3)
        distances = [lineas.wasserstein(side[0][name], side[1][name]) for side in (found, arrays)]
        assert (np.abs(distances[0] - distances[1]) < 2e-3 * rows.var(axis=0)).all()
    path, wanted = lineas.sparse_path(*found, n_penalties=5), lineas.sparse_path(*arrays, n_penalties=5)
    assert path.metadata["rank_error"] > 0 and path.metadata["pooling"] == "all"
    spread = sum(rows.var(axis=0).sum() for rows in arrays[0].values())
    np.testing.assert_allclose(path.loss, wanted.loss, atol=2e-3 * spread)


def test_what_is_kept_stays_within_memory():
    model, memory = zoo.llama(), 2 * LEAST + 1000
    found = lineas.collect_quantiles(model, long_texts(60), **how(pooling="all", memory=memory))
    kept = sum(one._state.keys.nbytes for one in found.values())
    assert not found.exact and 0.9 * memory < kept <= memory


def test_no_rows_are_kept_beside_the_quantiles(monkeypatch):
    model, most = zoo.llama(), []

    class Watched(lineas.Quantiles):
        def _update(self, x, name):
            gc.collect()
            rows = [thing for thing in gc.get_objects() if type(thing) is list and any(one is x for one in thing)]
            most.append(len(rows))
            return super()._update(x, name)

    monkeypatch.setattr(script, "Quantiles", Watched)
    lineas.collect_quantiles(model, TEXTS[:8], **how(pooling="all"))
    assert len(most) == 2 * zoo.LAYERS and not any(most)


def test_memory_that_holds_too_few_values():
    text = rf"^memory must be at least {LEAST} bytes, for 512 values of each of 48 neurons, got {LEAST - 1}$"
    model = zoo.llama()
    with pytest.raises(ValueError, match=text):
        lineas.collect_quantiles(model, TEXTS, **how(memory=LEAST - 1))
    assert lineas.collect_quantiles(model, TEXTS, **how(memory=LEAST))[f"{NORMS.replace('*', '0')}"].size == 512
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("memory", "error", "text"),
    [
        (0, ValueError, "^memory must be at least 1, got 0"),
        (1e9, TypeError, "^memory must be an int, got float"),
        (None, TypeError, "^memory must be an int, got NoneType"),
    ],
)
def test_bad_memory(memory, error, text):
    with pytest.raises(error, match=text):
        lineas.collect_quantiles(zoo.llama(), TEXTS, **how(memory=memory))


def test_bfloat16_models_give_float32():
    model = zoo.llama().to(torch.bfloat16)
    found = lineas.collect_quantiles(model, TEXTS, **how(pooling="all"))
    rows = lineas.collect(model, TEXTS, **how(pooling="all"))
    for name, one in found.items():
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one.sample(one.count), np.sort(rows[name], axis=0))


def test_channels_of_images():
    model, images = zoo.cnn(), zoo.images(9)
    settings = {"layers": ["bn", "gn", "head"], "progress": False, "batch_size": 4}
    found = lineas.collect_quantiles(model, images, **settings)
    rows = lineas.collect(model, images, **settings)
    assert {name: one.d for name, one in found.items()} == {"bn": 6, "gn": 8, "head": 5}
    for name, one in found.items():
        np.testing.assert_array_equal(one.sample(9), np.sort(rows[name], axis=0))


def test_an_activation_that_is_not_finite_is_named_and_nothing_stays():
    model = zoo.mlp().train()
    data = [torch.randn(3, 5), torch.full((2, 5), torch.inf)]
    with pytest.raises(ValueError, match=r"^2, batch 1: nan at row 0, column 0"):
        lineas.collect_quantiles(model, data, layers="2", progress=False)
    assert all(module.training and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("function", [lineas.collect, lineas.collect_quantiles])
def test_what_stops_it_on_the_way_leaves_the_model_as_it_was(function, error):
    model, calls = zoo.gpt2(training=True), []

    def stop(*_):
        calls.append(1)
        if len(calls) == 4:
            raise error("enough")

    handle = model.transformer.h[1].register_forward_hook(stop)
    with pytest.raises(error, match="enough"):
        function(model, TEXTS, **how(layers=zoo.NORMS["gpt2"]))
    handle.remove()
    assert all(module.training and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("function", [lineas.collect, lineas.collect_quantiles])
def test_texts_of_a_generator_are_read_as_they_are_needed(function):
    model, read, ahead = zoo.llama(), [], []

    def texts():
        for text in TEXTS:
            read.append(text)
            yield text

    model.register_forward_pre_hook(lambda *_: ahead.append(len(read)))
    found = function(model, texts(), **how(pooling="all"))
    assert len(read) == len(TEXTS) and ahead[-10:] == list(range(4, 41, 4))
    assert len(ahead) == 10 + (function is lineas.collect_quantiles)
    expected = function(model, TEXTS, **how(pooling="all"))
    assert found.metadata == expected.metadata and list(found) == list(expected)
    for name, one in found.items():
        if function is lineas.collect:
            np.testing.assert_array_equal(one, expected[name])
        else:
            same_state(one, expected[name])


def test_batches_of_a_data_loader():
    model, images, settings = zoo.cnn(), zoo.images(10), {"layers": "bn", "progress": False}
    loader = torch.utils.data.DataLoader(images, batch_size=4)
    rows = lineas.collect(model, list(images.split(4)), **settings)["bn"]
    np.testing.assert_array_equal(lineas.collect(model, loader, **settings)["bn"], rows)
    found = lineas.collect_quantiles(model, loader, **settings)["bn"]
    np.testing.assert_array_equal(found.sample(10), np.sort(rows, axis=0))


@pytest.mark.parametrize(
    ("entries", "error", "text"),
    [
        ([], ValueError, "^data is empty"),
        ([5], TypeError, r"^data\[0\] must be a mapping, a tensor or a tuple, got int"),
        (["a", "a", "a", "a", "a", 5], TypeError, r"^data\[4:6\]\[1\] must be a text like .*, got int"),
        (["a", "a", "a", "a", torch.ones(2)], TypeError, r"^data\[4\] must be a text like .*, got Tensor"),
        ([torch.ones(1, 2).long(), "a"], TypeError, r"^data\[1\] must be a batch like .*, got str"),
        (["a", ""], ValueError, r"^data\[0:2\]\[1\] has no tokens: ''"),
        ([{"role": "user", "content": "a"}], TypeError, "^data is one conversation: give an iterable of them"),
    ],
)
def test_bad_streams(entries, error, text):
    with pytest.raises(error, match=text):
        lineas.collect_quantiles(zoo.llama(), iter(entries), **how())


def test_a_stream_of_texts_without_a_tokenizer_or_an_answer():
    with pytest.raises(ValueError, match=r"^data\[0:4\] holds texts: pass tokenizer="):
        lineas.collect(zoo.llama(), iter(TEXTS), **how(tokenizer=None))
    with pytest.raises(ValueError, match=r"^tokens='generated' selects nothing of data\[0:4\]"):
        lineas.collect(zoo.llama(), iter(TEXTS), **how(tokens="generated"))


def test_progress_counts_batches(capfd):
    lineas.collect_quantiles(zoo.llama(), TEXTS, **how(progress=True))
    assert "10/10" in capfd.readouterr().err
    lineas.collect_quantiles(zoo.llama(), (text for text in TEXTS), **how(progress=True))
    assert "10it" in capfd.readouterr().err
    lineas.collect_quantiles(zoo.llama(), iter(TEXTS), **how(progress=True))
    assert "10/10" in capfd.readouterr().err
    loader = torch.utils.data.DataLoader(zoo.images(10), batch_size=2)
    lineas.collect(zoo.cnn(), loader, layers="bn")
    assert "5/5" in capfd.readouterr().err
    lineas.collect_quantiles(zoo.llama(), iter(TEXTS), **how())
    assert capfd.readouterr().err == ""


def test_a_second_call_of_a_module_is_warned_of_once():
    model, x = zoo.Twice(), torch.randn(6, 2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = lineas.collect_quantiles(model, list(x.split(2)), layers=["shared", "end"], progress=False)
    assert len(seen) == 1 and re.match("module 'shared' runs more than once", str(seen[0].message))
    np.testing.assert_array_equal(found["shared"].sample(6), np.sort(model.shared(x).detach().numpy(), axis=0))


def test_attached_maps_act_on_the_tokens_of_the_quantiles():
    model, settings = zoo.llama(), how(pooling="all", tokens="last")
    maps = lineas.fit(*(lineas.collect_quantiles(model, texts, **settings) for texts in (TEXTS, zoo.texts(9, seed=1))))
    assert maps.metadata["tokens"] == "last" and maps.metadata["layers"] == NORMS
    with maps.attach(model):
        on = lineas.collect(model, TEXTS[:3], **how(pooling="all"))
    off = lineas.collect(model, TEXTS[:3], **how(pooling="all"))
    first = next(iter(maps))
    assert (on[first] != off[first]).any(axis=1).sum() == 3
    with pytest.raises(ValueError, match=r"^source and target must be collected alike, got tokens 'last' and 'all'"):
        source = lineas.collect_quantiles(model, TEXTS, **settings)
        lineas.fit(source, lineas.collect_quantiles(model, TEXTS, **how(pooling="all")))
