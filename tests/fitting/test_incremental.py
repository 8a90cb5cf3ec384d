"""Incremental fits: each module with the earlier maps on."""

import models_zoo
import numpy as np
import pytest
import torch

import lineas

FAMILIES = list(models_zoo.LANGUAGE_MODELS)
SOURCE, TARGET = models_zoo.texts(8), models_zoo.texts(11, seed=1)


def settings_of(family, **more):
    return {"layers": models_zoo.NORMS[family], "tokenizer": models_zoo.tokenizer()} | more


def batches(texts, size):
    tokenizer = models_zoo.tokenizer()
    return [
        dict(tokenizer(texts[start : start + size], padding=True, return_tensors="pt"))
        for start in range(0, len(texts), size)
    ]


def naive_walk(model, source, target, layers, method, shrinkage=None, **settings):
    """One pass a module: collect under the maps so far, fit the next one."""
    wanted = lineas.collect(model, target, layers=layers, **settings)
    maps = {}
    for name, values in wanted.items():
        if not maps:
            found = lineas.collect(model, source, layers=name, **settings)[name]
        else:
            with lineas.SteeringMaps(maps).attach(model):
                found = lineas.collect(model, source, layers=name, **settings)[name]
        maps[name] = lineas.fit(found, values, method=method, shrinkage=shrinkage)
    return lineas.SteeringMaps(maps)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_allclose(found[name].weight, expected[name].weight, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[name].bias, expected[name].bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["linear", "gaussian", "mean"])
def test_it_equals_the_naive_walk_of_one_pass_a_module(family, method):
    model = models_zoo.LANGUAGE_MODELS[family]()
    settings = settings_of(family)
    found = lineas.fit_incremental(model, SOURCE, TARGET, method=method, progress=False, **settings)
    assert_same(found, naive_walk(model, SOURCE, TARGET, method=method, **settings))
    # It is not the fit of all modules at once.
    at_once = lineas.fit(
        lineas.collect(model, SOURCE, **settings), lineas.collect(model, TARGET, **settings), method=method
    )
    last = list(found)[-1]
    assert found[next(iter(found))] == at_once[next(iter(found))]
    assert np.abs(found[last].bias - at_once[last].bias).max() > 1e-3


@pytest.mark.parametrize("shrinkage", ["auto", 0.25])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_each_module_is_fitted_with_the_shrunk_maps_of_the_earlier_ones_on(shrinkage, batch_size):
    model, settings = models_zoo.llama(), settings_of("llama")
    found = lineas.fit_incremental(
        model, SOURCE, TARGET, shrinkage=shrinkage, batch_size=batch_size, progress=False, **settings
    )
    assert_same(found, naive_walk(model, SOURCE, TARGET, method="linear", shrinkage=shrinkage, **settings))
    assert found.metadata["settings"]["shrinkage"] == shrinkage


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "all"])
def test_several_batches_equal_one(pooling):
    model = models_zoo.llama()
    settings = {"layers": models_zoo.NORMS["llama"], "pooling": pooling, "progress": False}
    one = lineas.fit_incremental(model, batches(SOURCE, 8), batches(TARGET, 11), **settings)
    several = lineas.fit_incremental(model, batches(SOURCE, 3), batches(TARGET, 4), **settings)
    assert_same(several, one)


def test_texts_are_taken_apart():
    model = models_zoo.llama()
    lengths = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: lengths.append(len(output)))
    one = lineas.fit_incremental(model, SOURCE, TARGET, progress=False, **settings_of("llama"))
    assert lengths == [11, 8]
    several = lineas.fit_incremental(model, SOURCE, TARGET, progress=False, batch_size=5, **settings_of("llama"))
    assert lengths == [11, 8] + [5, 5, 1] + models_zoo.LAYERS * [5, 3]
    assert_same(several, one)


def test_forward_passes_are_one_of_a_single_source_batch_and_else_one_a_module():
    model = models_zoo.llama()
    calls = []
    model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    head = []
    model.lm_head.register_forward_hook(lambda *_: head.append(1))
    settings = {"layers": models_zoo.NORMS["llama"], "progress": False}
    lineas.fit_incremental(model, batches(SOURCE, 8), batches(TARGET, 4), **settings)
    assert len(calls) == 1 + 3
    del calls[:]
    lineas.fit_incremental(model, batches(SOURCE, 4), batches(TARGET, 11), **settings)
    assert len(calls) == 2 * models_zoo.LAYERS + 1
    assert head == []


@pytest.mark.parametrize("family", FAMILIES)
def test_steered_activations_match_the_target_better_at_every_module(family):
    model = models_zoo.LANGUAGE_MODELS[family]()
    settings = settings_of(family)
    maps = lineas.fit_incremental(model, SOURCE, TARGET, progress=False, **settings)
    wanted = lineas.collect(model, TARGET, **settings)
    before = lineas.collect(model, SOURCE, **settings)
    with maps.attach(model):
        after = lineas.collect(model, SOURCE, **settings)
    for name in maps:
        far, near = (lineas.wasserstein(acts[name], wanted[name]).sum() for acts in (before, after))
        assert near < 0.7 * far
        # Means are matched exactly by the fit, so also in the steered model.
        np.testing.assert_allclose(after[name].mean(axis=0), wanted[name].mean(axis=0), atol=1e-4)


def test_a_cnn_is_mapped_channel_by_channel():
    model = models_zoo.cnn()
    source, target = models_zoo.images(12), 0.5 + 2 * models_zoo.images(9, seed=1)
    maps = lineas.fit_incremental(model, source, target, layers=["bn", "gn"], progress=False)
    assert {name: one.d for name, one in maps.items()} == {"bn": 6, "gn": 8}
    assert_same(maps, naive_walk(model, source, target, ["bn", "gn"], "linear"))


def test_a_module_called_twice_is_fitted_at_its_first_call_and_mapped_at_both():
    torch.manual_seed(0)
    model, source, target = models_zoo.Twice(), torch.randn(6, 2), torch.randn(6, 2) + 1
    layers = ["shared", "end"]
    assert_same(
        lineas.fit_incremental(model, source, target, layers=layers, progress=False),
        naive_walk(model, source, target, layers, "linear"),
    )


def test_bfloat16_models_get_float32_maps():
    model = models_zoo.llama().to(torch.bfloat16)
    maps = lineas.fit_incremental(model, SOURCE, TARGET, progress=False, **settings_of("llama"))
    assert all(one.dtype == np.float32 for one in maps.values())
    assert_same(maps, naive_walk(model, SOURCE, TARGET, method="linear", **settings_of("llama")))


def test_metadata_says_where_the_maps_come_from():
    model = models_zoo.llama()
    model.config._name_or_path = "tiny/llama"
    maps = lineas.fit_incremental(
        model, SOURCE, TARGET, method="gaussian", max_length=5, progress=False, **settings_of("llama")
    )
    assert maps.metadata == {
        "method": "incremental",
        "version": lineas.__version__,
        "model": "tiny/llama",
        "layers": models_zoo.NORMS["llama"],
        "pooling": "mean",
        "tokens": "all",
        "settings": {"method": "gaussian", "shrinkage": None, "max_length": 5, "batch_size": None},
    }


def test_the_model_is_left_as_it_was_also_after_errors():
    model = models_zoo.gpt2(training=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    lineas.fit_incremental(model, SOURCE, TARGET, progress=False, **settings_of("gpt2"))
    with pytest.raises(ValueError, match=r"^source\['transformer.h.0.ln_2'\] must have"):
        lineas.fit_incremental(model, SOURCE[:1], TARGET, progress=False, **settings_of("gpt2"))
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("method", "sparse", "^method must be one of 'mean', 'gaussian', 'linear', got 'sparse'"),
        ("shrinkage", "some", "^shrinkage must be None, 'auto' or a number from 0 to 1, got 'some'"),
        ("shrinkage", 1.5, "^shrinkage must be from 0 to 1, got 1.5"),
        ("pooling", "median", "^pooling must be one of .*, got 'median'"),
        ("tokenizer", None, "^source holds texts: pass tokenizer="),
        ("batch_size", 0, "^batch_size must be at least 1, got 0"),
        ("layers", "layers.*", "^layers: no module matches 'layers.*'"),
    ],
)
def test_bad_settings_are_refused(argument, value, message):
    with pytest.raises(ValueError, match=message):
        lineas.fit_incremental(models_zoo.llama(), SOURCE, TARGET, **settings_of("llama", **{argument: value}))


def test_empty_sets_are_named():
    with pytest.raises(ValueError, match=r"^target is empty"):
        lineas.fit_incremental(models_zoo.llama(), SOURCE, [], **settings_of("llama"))


def test_progress_counts_modules(capfd):
    lineas.fit_incremental(models_zoo.llama(), SOURCE, TARGET, **settings_of("llama"))
    assert "3/3" in capfd.readouterr().err
    lineas.fit_incremental(models_zoo.llama(), SOURCE, TARGET, progress=False, **settings_of("llama"))
    assert capfd.readouterr().err == ""


LONG = models_zoo.texts(40, shortest=30, longest=50), models_zoo.texts(30, seed=1, shortest=30, longest=50)
LEAST = 4 * (models_zoo.LAYERS + 1) * models_zoo.WIDTH * 512  # bytes: the target of all modules, the source of one


@pytest.mark.parametrize("batch_size", [40, 8])
@pytest.mark.parametrize("pooling", ["mean", "all"])
def test_within_memory_maps_are_the_same_while_all_rows_fit(pooling, batch_size):
    model, settings = models_zoo.llama(), settings_of("llama", pooling=pooling, batch_size=batch_size, progress=False)
    found = lineas.fit_incremental(model, *LONG, memory=1 << 20, **settings)
    assert_same(found, lineas.fit_incremental(model, *LONG, **settings))
    assert "rank_error" not in found.metadata and "memory" not in found.metadata["settings"]


@pytest.mark.parametrize("batch_size", [40, 8])
def test_tokens_of_more_than_memory_holds_are_fitted_from_what_is_kept(batch_size):
    model = models_zoo.llama()
    settings = settings_of("llama", pooling="all", batch_size=batch_size, progress=False)
    found = lineas.fit_incremental(model, *LONG, memory=LEAST, **settings)
    assert 0 < found.metadata["rank_error"] < 0.1
    expected = lineas.fit_incremental(model, *LONG, **settings)
    for name, one in expected.items():
        np.testing.assert_allclose(found[name].weight, one.weight, rtol=0.02)
        np.testing.assert_allclose(found[name].bias, one.bias, atol=0.02)
    # What the steps by hand give.
    first, last = (name for k, name in enumerate(found) if k != 1)
    sides = [lineas.collect(model, texts, **settings)[first] for texts in LONG]
    source = lineas.quantiles([sides[0]], size=512) if batch_size == 8 else sides[0]
    by_hand = lineas.fit(source, lineas.quantiles([sides[1]], size=512))
    np.testing.assert_allclose(found[first].weight, by_hand.weight, rtol=1e-5)
    with found.select(list(found)[:2]).attach(model):
        rows = lineas.collect(model, LONG[0], **settings)[last]
    target = lineas.quantiles([lineas.collect(model, LONG[1], **settings)[last]], size=512)
    by_hand = lineas.fit(lineas.quantiles([rows], size=512) if batch_size == 8 else rows, target)
    np.testing.assert_allclose(found[last].weight, by_hand.weight, rtol=1e-4)


def test_no_rows_of_all_modules_are_kept_within_memory(monkeypatch):
    def refused(*_):
        raise AssertionError("all rows are kept")

    monkeypatch.setattr("lineas.fitting.incremental.collect_batches", refused)
    monkeypatch.setattr("lineas.fitting.walk.np.concatenate", refused)
    settings = settings_of("llama", pooling="all", batch_size=8, progress=False)
    lineas.fit_incremental(models_zoo.llama(), *LONG, memory=LEAST, **settings)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"memory": LEAST - 1}, f"^memory must be at least {LEAST} bytes, for 512 values of each of 64 neurons, got "),
        ({"memory": 0}, "^memory must be at least 1, got 0"),
        (
            {"memory": LEAST, "shrinkage": "auto"},
            f"^shrinkage needs every row, got shrinkage='auto' and memory={LEAST}",
        ),
    ],
)
def test_memory_that_is_refused(more, text):
    model = models_zoo.llama()
    with pytest.raises(ValueError, match=text):
        lineas.fit_incremental(model, *LONG, **settings_of("llama", progress=False, **more))
    assert not any(module._forward_hooks for module in model.modules())
