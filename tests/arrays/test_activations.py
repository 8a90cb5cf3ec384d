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
