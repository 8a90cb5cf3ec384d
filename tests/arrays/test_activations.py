"""Activations: a dict with metadata, and what the maps that are fitted to them take over of it."""

import copy
import pickle
import re

import numpy as np
import pytest

import lineas
from lineas import Activations

COLLECTED = {"model": "some/model", "layers": ["a.*"], "pooling": "mean", "tokens": slice(-2, None), "texts": 3}
TAKEN_OVER = {"model": "some/model", "layers": ["a.*"], "pooling": "mean", "tokens": {"slice": [-2, None, None]}}


def activations(rng, **metadata):
    return Activations({"a.0": rng.normal(size=(6, 3)), "a.1": rng.normal(size=(6, 2))}, {**COLLECTED, **metadata})


def iti_c(source, target):
    pytest.importorskip("sklearn")
    return lineas.baselines.iti_c(source, target)


FITS = {
    "fit": lineas.fit,
    "sparse fit": lambda u, v: lineas.fit(u, v, l1=0.1),
    "mean": lineas.baselines.mean,
    "aura": lineas.baselines.aura,
    "iti_c": iti_c,
    "sparse_path": lambda u, v: lineas.sparse_path(u, v, n_penalties=2)[1],
}


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_maps_take_over_what_activations_tell(rng, fit):
    source, target = activations(rng), activations(rng)
    for pair in ((source, target), (source, dict(target)), (dict(source), target)):
        metadata = fit(*pair).metadata
        assert {name: metadata.get(name) for name in TAKEN_OVER} == TAKEN_OVER
        assert metadata["version"] == lineas.__version__ and "method" in metadata and "texts" not in metadata
    bare = fit(dict(source), dict(target))
    assert not set(TAKEN_OVER) & set(bare.metadata) and bare == fit(source, target)


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"tokens": "last"}, "tokens {'slice': [-2, None, None]} and 'last'"),
        ({"pooling": "max"}, "pooling 'mean' and 'max'"),
        ({"model": "other"}, "model 'some/model' and 'other'"),
    ],
)
def test_samples_that_were_not_collected_alike(rng, fit, metadata, text):
    with pytest.raises(ValueError, match="source and target must be collected alike, got " + re.escape(text)):
        fit(activations(rng), activations(rng, **metadata))


def test_what_one_side_does_not_know_does_not_differ(rng):
    source, target = activations(rng, model=None), activations(rng, layers="a.**")
    target.metadata.pop("pooling")
    assert lineas.fit(source, target).metadata["model"] == "some/model"
    assert lineas.fit(source, target).metadata["layers"] == ["a.*"]  # of the source; the modules are the same
    spelled = Activations(target, {"tokens": {"slice": [-2, None, None]}})
    assert lineas.fit(source, spelled).metadata["tokens"] == TAKEN_OVER["tokens"]


def test_held_out_samples_are_collected_alike(rng):
    source, target = activations(rng), activations(rng)
    with pytest.raises(ValueError, match="source and held_out target must be collected alike, got pooling"):
        lineas.sparse_path(source, target, held_out=(source, activations(rng, pooling="last")))
    path = lineas.sparse_path(source, target, held_out=(target, source))
    assert path.metadata["pooling"] == path.at(best=True).metadata["pooling"] == "mean"


def test_a_dict_with_metadata(rng):
    one = activations(rng)
    assert isinstance(one, dict) and list(one) == ["a.0", "a.1"] and one.metadata == COLLECTED
    for twin in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert isinstance(twin, Activations) and twin.metadata == COLLECTED
        assert np.array_equal(twin["a.0"], one["a.0"])
    assert (
        repr(Activations({"a": np.ones((2, 3))}, {"tokens": "all"})) == "Activations({'a': [2, 3]}, {'tokens': 'all'})"
    )


@pytest.mark.parametrize("tokens", ["lsat", 5, ["x"], {"a": 1}, slice(0, 2, -1), slice("a", None)])
def test_tokens_that_are_no_selection(rng, tokens):
    with pytest.raises(ValueError, match="^metadata name the tokens " + re.escape(repr(tokens))):
        activations(rng, tokens=tokens)
    source = activations(rng)
    source.metadata["tokens"] = tokens
    with pytest.raises(ValueError, match="metadata name the tokens"):
        lineas.fit(source, activations(rng))


@pytest.mark.parametrize(
    ("tokens", "spelled"),
    [
        ("generated", "generated"),
        (slice(np.int64(1), None), {"slice": [1, None, None]}),
        ({"slice": [-2, None, None]}, {"slice": [-2, None, None]}),
        (len, {"callable": "len"}),
        ({"callable": "third"}, {"callable": "third"}),
    ],
)
def test_tokens_as_given_or_spelled_out(rng, tokens, spelled):
    source = activations(rng, tokens=tokens)
    assert lineas.fit(source, dict(source)).metadata["tokens"] == spelled
    assert "tokens" not in lineas.fit(activations(rng, tokens=None), dict(source)).metadata


def test_copies_are_activations(rng):
    one = activations(rng)
    twin = one.copy()
    assert type(twin) is Activations and twin.metadata == COLLECTED and twin["a.0"] is one["a.0"]
    twin["b"], twin.metadata["tokens"] = one["a.0"], "all"
    assert list(one) == ["a.0", "a.1"] and one.metadata == COLLECTED


def test_modules_are_joined(rng):
    one, more = activations(rng), {"b": np.ones((6, 2))}
    for joined, names in ((one | more, ["a.0", "a.1", "b"]), (more | one, ["b", "a.0", "a.1"])):
        assert type(joined) is Activations and list(joined) == names and joined.metadata == COLLECTED
    other = Activations(more, {"model": None, "layers": re.compile("b"), "tokens": slice(-2, None)})
    assert (one | other).metadata == {**COLLECTED, "layers": ["a.*", "b"]}
    assert (one | activations(rng)).metadata == COLLECTED
    for wrong in (Activations(more, {"tokens": "all"}), Activations(more, {"pooling": "max"})):
        with pytest.raises(ValueError, match="the left side and the right side must be collected alike, got"):
            one | wrong
        with pytest.raises(ValueError, match="must be collected alike"):
            one |= wrong
    assert list(one) == ["a.0", "a.1"]
    one |= other
    one |= [("c", np.ones((6, 1)))]
    assert type(one) is Activations and list(one) == ["a.0", "a.1", "b", "c"] and one.metadata["layers"] == ["a.*", "b"]
    with pytest.raises(TypeError, match="unsupported operand"):
        one | 3


@pytest.mark.parametrize(
    "index", [slice(0, 4), slice(None, None, 2), [0, -1], np.array([5, 0, 0]), np.arange(6) < 3, [True] * 6, 2]
)
def test_rows_of_all_modules(rng, index):
    one = activations(rng)
    some = one.rows(index)
    assert type(some) is Activations and some.metadata == COLLECTED and list(some) == list(one)
    for name, x in some.items():
        np.testing.assert_array_equal(x, one[name][[2] if isinstance(index, int) else index])
    assert lineas.fit(one.rows(slice(0, 3)), one.rows(slice(3, 6))).metadata["tokens"] == TAKEN_OVER["tokens"]


@pytest.mark.parametrize("index", ["a", 1.0, [0.5], None, [[0, 1]], [], (slice(1), 0)])
def test_rows_that_are_none(rng, index):
    with pytest.raises(TypeError, match="index must be a slice, row numbers or booleans, got"):
        activations(rng).rows(index)
    with pytest.raises(IndexError):
        activations(rng).rows([6])


def test_attached_maps_act_on_the_tokens_of_the_activations(rng):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import models_zoo

    model = models_zoo.llama()
    name = "model.layers.1"
    source = Activations({name: rng.normal(size=(4, models_zoo.WIDTH))}, {"tokens": "last"})
    maps = lineas.fit(source, {name: source[name] + 1}, method="mean")
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[2]))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        model(ids)
        with maps.attach(model):
            hook.remove()
            model.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[2]))
            model(ids)
    plain, steered = (out if isinstance(out, torch.Tensor) else out[0] for out in seen)
    moved = (steered - plain).squeeze(0)
    assert not moved[:2].any()
    torch.testing.assert_close(moved[2], torch.ones(models_zoo.WIDTH), rtol=0, atol=1e-5)
