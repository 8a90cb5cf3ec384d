"""`maps.calibrate`: strengths that meet a budget or have an effect, and what takes them."""

import json

import evaluations as ev
import models_zoo as zoo
import numpy as np
import pytest
import torch
from attached import language_model, logits, random_maps
from evaluations import QUIET, TOKENIZER
from fits import snapshot

import lineas
from lineas.evaluation.judges import JudgeError
from lineas.evaluation.metrics import bootstrap_weights
from lineas.maps.hub import card

pytest.importorskip("anywidget")
pytest.importorskip("huggingface_hub")
pytest.importorskip("peft")

MODEL, MAPS = language_model("llama")
NEUTRAL = zoo.texts(16, seed=31, shortest=4, longest=8)
FIRST, SECOND = NEUTRAL[::2], NEUTRAL[1::2]
PROMPTS = zoo.texts(8, seed=32, shortest=2, longest=4)
BUDGETS = {"max_kl": 0.05, "max_loss_rise": 0.05, "max_perplexity_ratio": 1.05}


def calibrate(maps=MAPS, model=MODEL, **settings):
    settings = {"tokenizer": TOKENIZER, **QUIET, **settings}
    if "neutral" not in settings and any(name in settings for name in BUDGETS):
        settings["neutral"] = NEUTRAL
    return maps.calibrate(model, **settings)


def prices(strength, budget, texts, maps=MAPS, **settings):
    """The price of texts at a strength, and of bootstrap draws of them, by hand."""
    tokens, predicted, loss, unsteered, kl, *_ = ev.price(MODEL, maps, texts, strengths=[strength], **settings)[1].T
    above, below = (kl, tokens) if budget == "max_kl" else (loss - unsteered, predicted)
    draws = bootstrap_weights(len(texts)) @ np.stack([above, below], axis=1)
    found = above.sum() / below.sum(), draws[:, 0] / draws[:, 1]
    return tuple(map(np.exp, found)) if budget == "max_perplexity_ratio" else found


# Maps that raise the loss: a step away from the target's side of a random model may lower it.
WORSE = next(
    one
    for seed in range(20)
    for one in [random_maps({name: one.d for name, one in MAPS.items()}, seed)]
    if prices(0.5, "max_loss_rise", NEUTRAL, one)[0] > 0.02
)


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.95, 0.5])
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_strength_meets_the_budget(budget, confidence):
    most, excess = BUDGETS[budget], BUDGETS[budget] - (budget == "max_perplexity_ratio")
    found = calibrate(WORSE, confidence=confidence, **{budget: most})
    mean, draws = prices(found.strength, budget, FIRST, WORSE)
    bound = mean if confidence == 0.5 else np.quantile(draws, confidence)
    assert most - 0.02 * excess - 1e-6 <= bound <= most + 1e-9
    assert found.budget == {budget: most}
    low, high = found.range
    assert low <= found.strength <= high
    # All that was tried: smaller ones within the budget, the next one not.
    tried, price = found.tried["strength"], found.tried["price"]
    assert (np.diff(tried) > 0).all()
    at = tried.tolist().index(found.strength)
    assert price[at] == pytest.approx(mean, abs=1e-6)
    bounds = [prices(s, budget, FIRST, WORSE) for s in tried[: at + 2]]
    bounds = [m if confidence == 0.5 else np.quantile(d, confidence) for m, d in bounds]
    assert max(bounds[:-1]) <= most + 1e-9 < bounds[-1]
    assert tried[at + 1] <= 1.011 * found.strength


def test_the_range_is_where_other_draws_of_the_texts_meet_the_budget():
    found = calibrate(WORSE, max_kl=BUDGETS["max_kl"])
    for strength, share in zip(found.range, (0.975, 0.025), strict=True):
        _, draws = prices(strength, "max_kl", FIRST, WORSE)
        assert np.quantile(draws, share) == pytest.approx(BUDGETS["max_kl"], rel=0.05)


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_is_measured_is_the_price_of_the_other_half(budget):
    found = calibrate(WORSE, **{budget: BUDGETS[budget]})
    mean, draws = prices(found.strength, budget, SECOND, WORSE)
    low, high = np.quantile(draws, [0.025, 0.975])
    name = budget.removeprefix("max_")
    expected = {name: mean, f"{name}_low": low, f"{name}_high": high}
    assert found.measured == pytest.approx(expected, rel=1e-5)
    settings = {"tokenizer": TOKENIZER, "neutral": SECOND, "strengths": [found.strength], **QUIET}
    row = lineas.evaluate(MODEL, WORSE, **settings).rows()[1]
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_more_confidence_is_a_smaller_strength():
    strengths = [calibrate(max_kl=0.05, confidence=c).strength for c in (0.5, 0.8, 0.99)]
    assert strengths == sorted(strengths, reverse=True) and strengths[0] > strengths[2]


@pytest.mark.parametrize("budget", [1e-5, 1e-3, 0.4])
def test_small_and_large_budgets(budget):
    found = calibrate(max_kl=budget)
    bound = np.quantile(prices(found.strength, "max_kl", FIRST)[1], 0.95)
    assert 0.97 * budget <= bound <= budget * (1 + 1e-6)


def test_the_scale_of_maps_does_not_matter():
    plain = calibrate(max_kl=0.05).strength
    for factor in (0.03, 30):
        assert factor * calibrate(MAPS.scaled(factor), max_kl=0.05).strength == pytest.approx(plain, rel=0.015)


def test_calibration_repeats_itself():
    first, second = calibrate(max_kl=0.05), calibrate(max_kl=0.05)
    assert first.maps == second.maps and first.maps.metadata == second.maps.metadata
    np.testing.assert_array_equal(first.tried["price"], second.tried["price"])
    torch.manual_seed(3)
    assert calibrate(max_kl=0.05).measured == first.measured


def test_a_strength_beyond_max_strength_is_not_looked_for():
    with pytest.warns(UserWarning, match="max_kl=5 is not reached at max_strength=0.3, which is taken") as record:
        found = calibrate(max_kl=5, max_strength=0.3)
    assert found.strength == 0.3 and record[0].filename == __file__
    assert found.tried["strength"].tolist() == [0.0625, 0.125, 0.25, 0.3]
    with pytest.warns(UserWarning, match="max_strength=0.01"):
        assert calibrate(max_kl=5, max_strength=0.01).tried["strength"].tolist() == [0.01]


def test_strengths_at_which_a_model_breaks_are_above_any_budget():
    model = zoo.llama()

    def breaks(module, args, output):
        if any(handle.strength > 1.7 for handle in lineas.attached(model)):
            output.logits[0, -1, 3] = float("inf")

    model.register_forward_hook(breaks)
    found = calibrate(model=model, max_kl=50)
    assert 1.7 * 0.99 < found.strength <= 1.7
    assert np.isinf(found.tried["price"]).sum() > 1 and np.isfinite(found.range).all()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"max_kl=50 cannot be met: at strength .*, the smallest tried, the kl is inf"):
        calibrate(model=model, max_kl=50)


@pytest.mark.parametrize(
    ("maps", "settings"),
    [
        (lineas.SteeringMaps({name: lineas.AffineMap.identity(one.d) for name, one in MAPS.items()}), {}),
        (MAPS, {"tokens": slice(40, None)}),
    ],
)
def test_maps_that_change_nothing(maps, settings):
    with pytest.raises(ValueError, match="the maps change nothing on the neutral texts: there, they act on no token"):
        calibrate(maps, max_kl=0.1, **settings)


def test_one_pass_of_the_unsteered_model_serves_several_strengths():
    calls = []
    handle = MODEL.register_forward_pre_hook(lambda *args: calls.append(len(lineas.attached(MODEL))))
    found = calibrate(max_kl=0.05)
    handle.remove()
    assert calls.count(1) == len(found.tried["strength"]) + 1  # and once on the other half
    assert calls.count(0) < calls.count(1)


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["generated", slice(-2, None)])
def test_a_strength_is_for_the_tokens_that_it_was_found_for(tokens):
    found = calibrate(max_kl=0.05, tokens=tokens)
    assert found.strength != calibrate(max_kl=0.05).strength
    bound = np.quantile(prices(found.strength, "max_kl", FIRST, tokens=tokens)[1], 0.95)
    assert 0.048 <= bound <= 0.05 + 1e-7
    with found.maps.attach(MODEL, "calibrated") as handle:
        assert (handle.strength, handle.tokens) == (found.strength, tokens)
    fitted = lineas.SteeringMaps(MAPS, {"tokens": "generated"})
    assert calibrate(fitted, max_kl=0.05).strength == calibrate(max_kl=0.05, tokens="generated").strength
    assert "tokens" not in calibrate(max_kl=0.05).maps.metadata


def test_tokens_that_a_callable_selects_are_given_again():
    def late(tokens):
        return tokens.positions > 2

    found = calibrate(max_kl=0.05, tokens=late)
    with pytest.raises(ValueError, match="fitted for the tokens that late selects"):
        found.maps.attach(MODEL, "calibrated")
    with found.maps.attach(MODEL, "calibrated", tokens=late) as handle:
        assert handle.strength == found.strength


# --- effects ----------------------------------------------------------------------------------------------------------

EFFECT = {"prompts": PROMPTS, "max_new_tokens": 4, "sampling": {"suppress_tokens": [0, 1, 2]}}


def letters(texts):
    return [text.count("a") for text in texts]


def fewer(texts):
    return [-text.count("a") for text in texts]


def score(strength, judge=letters, **settings):
    settings = {"tokenizer": TOKENIZER, "judges": {"x": judge}, "strengths": [strength], **settings}
    return float(lineas.evaluate(MODEL, MAPS, **settings, **EFFECT, **QUIET).scores["x"][-1].mean())


@pytest.mark.parametrize("judge", [letters, fewer])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_smallest_strength_that_has_an_effect(judge, samples):
    before, far = (score(s, judge, samples=samples) for s in (0, 1))
    assert abs(far - before) > 0.1
    effect = (before + far) / 2
    found = calibrate(judge={"x": judge}, effect=effect, samples=samples, **EFFECT)
    sign = 1 if effect > before else -1
    reached = [sign * (value - effect) >= 0 for value in found.tried["effect"]]
    at = found.tried["strength"].tolist().index(found.strength)
    assert reached[at] and not reached[at - 1] and found.tried["strength"][0] == 0
    assert found.strength - found.tried["strength"][at - 1] <= max(0.04 * found.strength, 1e-3) + 1e-9
    assert found.measured["x"] == pytest.approx(score(found.strength, judge, samples=samples))
    assert found.measured["x_unsteered"] == pytest.approx(before)
    assert found.measured["x_low"] <= found.measured["x"] <= found.measured["x_high"]
    assert found.tried["effect"][at] == found.measured["x"]
    assert found.range[0] <= found.range[1] <= found.tried["strength"][-1]
    assert found.budget == {"effect": effect}


def test_an_effect_within_a_budget():
    settings = {"judge": letters, "effect": (score(0, samples=3) + score(0.4, samples=3)) / 2, "samples": 3, **EFFECT}
    alone, found = calibrate(**settings), calibrate(max_kl=0.15, **settings)
    assert found.strength == pytest.approx(alone.strength, rel=0.05)
    assert found.budget == {"max_kl": 0.15, "effect": settings["effect"]}
    assert found.measured["kl"] == pytest.approx(prices(found.strength, "max_kl", SECOND)[0], rel=1e-5)
    assert {"kl_low", "kl_high", "letters", "letters_unsteered"} < found.measured.keys()
    again = calibrate(neutral=(text for text in NEUTRAL), max_kl=0.15, **{**settings, "prompts": iter(PROMPTS)})
    assert again.measured == found.measured and again.strength == found.strength
    with pytest.raises(ValueError, match=r"effect=.* by letters is not reached within the budget: at strength 0\.\d+ "):
        calibrate(max_kl=1e-4, **settings)


def test_effects_that_are_not_reached():
    with pytest.raises(ValueError, match="effect=99 by letters is not reached up to max_strength: at strength 2 it is"):
        calibrate(judge=letters, effect=99, max_strength=2, **EFFECT)
    with pytest.raises(ValueError, match=r"effect: letters gives the unsteered model .* already"):
        calibrate(judge=letters, effect=score(0), **EFFECT)


@pytest.mark.parametrize(
    ("judge", "kind", "message"),
    [
        (lambda texts: [], JudgeError, "judge 'judge' must return one score a text: expected 2, got 0"),
        ([letters, letters], ValueError, "judge must be one, got 2: letters, letters_2"),
        ({"kl": letters}, ValueError, "judges: 'kl' would name 'kl'"),
        (3, TypeError, "judges must be a callable or a string, got int"),
    ],
)
def test_bad_judges_fail_before_anything_runs(judge, kind, message):
    calls = []
    handle = MODEL.register_forward_pre_hook(lambda *args: calls.append(1))
    with pytest.raises(kind, match=message):
        calibrate(judge=judge, effect=1, max_kl=0.1, **EFFECT)
    handle.remove()
    assert not calls


# --- arguments, errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({}, ValueError, "give one of max_kl=, max_loss_rise= and max_perplexity_ratio=, or effect=, got none of them"),
        ({"max_kl": 1, "max_loss_rise": 1}, ValueError, "give one of max_kl=.*, got max_kl, max_loss_rise"),
        ({"max_kl": 0}, ValueError, "max_kl must be above 0, got 0"),
        ({"max_loss_rise": float("nan")}, ValueError, "max_loss_rise must be finite, got nan"),
        ({"max_perplexity_ratio": 1.0}, ValueError, "max_perplexity_ratio must be above 1, got 1"),
        ({"max_kl": "0.1"}, TypeError, "max_kl must be a real number, got str"),
        ({"max_kl": 1, "neutral": None}, ValueError, "neutral: a budget is for neutral texts: give both or neither"),
        ({"effect": 1, "neutral": NEUTRAL, **EFFECT, "judge": letters}, ValueError, "neutral: a budget is for neutral"),
        ({"effect": 1}, ValueError, "effect, prompts and judge belong together, prompts and judge missing"),
        ({"max_kl": 1, "judge": letters}, ValueError, "belong together, effect and prompts missing"),
        ({"effect": float("inf"), "judge": letters, **EFFECT}, ValueError, "effect must be finite, got inf"),
        ({"max_kl": 1, "neutral": NEUTRAL[:3]}, ValueError, "neutral must hold at least 4 texts, .*, got 3"),
        ({"max_kl": 1, "confidence": 0.4}, ValueError, "confidence must be from 0.5 to below 1, got 0.4"),
        ({"max_kl": 1, "confidence": 1}, ValueError, "confidence must be from 0.5 to below 1, got 1"),
        ({"max_kl": 1, "max_strength": 0}, ValueError, "max_strength must be above 0, got 0"),
        ({"max_kl": 1, "tokens": "first"}, ValueError, "tokens must be 'all', .*, got 'first'"),
        ({"max_kl": 1, "max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"max_kl": 1, "samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"max_kl": 1, "progress": None}, TypeError, "progress must be True or False, got None"),
        ({"max_kl": 1, "sampling": [1]}, TypeError, "sampling must be a mapping of arguments for generate, got list"),
        ({"max_kl": 1, "tokenizer": "gpt2"}, TypeError, "tokenizer must be a loaded tokenizer"),
        ({"max_kl": 1, "tokenizer": None}, ValueError, "neutral holds texts: pass tokenizer="),
        ({"max_kl": 1, "maps": MAPS.rename(prefix="no.")}, ValueError, "has no module 'no.model"),
    ],
)
def test_arguments_that_are_wrong(settings, kind, message):
    calls, before = [], snapshot(MODEL)
    handle = MODEL.register_forward_pre_hook(lambda *args: calls.append(1))
    with pytest.raises(kind, match=message):
        calibrate(**settings)
    handle.remove()
    assert not calls and snapshot(MODEL) == before


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=str)
@pytest.mark.parametrize("at", [1, 2, 9])
def test_nothing_is_left_on_the_model_after_an_error(at, error):
    model, calls = zoo.gpt2(training=True), []
    maps = language_model("gpt2")[1]

    def act(module, args):
        calls.append(1)
        if len(calls) == at:
            raise error

    handle = model.register_forward_pre_hook(act)
    before = snapshot(model)
    with pytest.raises(type(error)):
        calibrate(maps, model, max_kl=0.05)
    assert snapshot(model) == before and not lineas.attached(model)
    handle.remove()


# --- what takes the strength ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    return calibrate(lineas.SteeringMaps(MAPS, {"method": "random", "note": 3}), max_kl=0.05)


def test_the_calibration_stands_in_the_metadata(found):
    record = found.maps.metadata["calibration"]
    assert json.loads(json.dumps(record)) == record
    assert record["strength"] == found.strength and tuple(record["range"]) == found.range
    assert record["budget"] == {"max_kl": 0.05} and record["measured"] == found.measured
    assert record["tokens"] == "all" and record["confidence"] == 0.95 and record["neutral"]["texts"] == 16
    assert len(record["neutral"]["sha256"]) == 64
    assert {key: found.maps.metadata[key] for key in ("method", "note")} == {"method": "random", "note": 3}
    assert found.maps == MAPS
    low, high = found.range
    assert repr(found).startswith(
        f"Calibration(strength={found.strength:.4g} [{low:.4g}, {high:.4g}] for max_kl=0.05; "
    )


def test_it_survives_files_and_other_names(found, tmp_path):
    found.maps.save(tmp_path / "maps.safetensors")
    for maps in (lineas.load(tmp_path / "maps.safetensors"), found.maps.rename(prefix="base_model.model.")):
        with maps.attach(MODEL, "calibrated") as handle:
            assert handle.strength == found.strength
    found.maps.save_pretrained(tmp_path / "folder")
    text = (tmp_path / "folder" / "README.md").read_text()
    assert f"| calibrated strength | `{found.strength:.4g}`, `max_kl = 0.05` |" in text
    assert "calibrated" not in card(MAPS)


def test_maps_made_of_others_have_no_calibrated_strength(found):
    made = [
        found.maps.select("model.layers.0.*"),
        found.maps.scaled(0.5),
        found.maps @ found.maps,
        found.maps + MAPS,
        -found.maps,
    ]
    for maps in made:
        assert "calibration" not in maps.metadata
        with pytest.raises(ValueError, match="strength='calibrated' is for maps that were calibrated: take those that"):
            maps.attach(MODEL, "calibrated")
    assert made[1].metadata["parts"][0]["calibration"]["strength"] == found.strength
    assert not lineas.attached(MODEL)


def test_attached_maps_are_at_the_calibrated_strength(found):
    with found.maps.attach(MODEL, found.strength):
        expected = logits(MODEL)
    with found.maps.attach(MODEL, "calibrated"):
        assert torch.equal(logits(MODEL), expected)
    with found.maps.attach(MODEL, strength="calibrated", replace=True) as handle:
        handle.strength = 0.25
        assert handle.strength == 0.25
        with pytest.raises(TypeError, match="strength must be a real number, got str"):
            handle.strength = "calibrated"


def test_folded_models_have_the_calibrated_strength(found):
    folded, expected = (found.maps.fold(MODEL, strength) for strength in ("calibrated", found.strength))
    assert torch.equal(logits(folded), logits(expected))
    assert not torch.equal(logits(folded), logits(found.maps.fold(MODEL)))


def test_an_adapter_has_the_calibrated_strength(found, tmp_path):
    for folder, strength in (("a", "calibrated"), ("b", found.strength)):
        found.maps.to_peft_lora(MODEL, tmp_path / folder, strength)
    a, b = ((tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in "ab")
    assert a == b


def test_the_explorer_starts_at_the_calibrated_strength(found):
    view = lineas.explore(found.maps, MODEL, TOKENIZER, strength="calibrated")
    try:
        assert view.strength == found.strength == view.handle.strength
        view.strength = 0.5
        view.strength = "calibrated"
        assert view.strength == found.strength == view.handle.strength
        assert view._path_data["calibrated"] == found.strength
        assert view._words().endswith(f"strength {found.strength:g} (calibrated: {found.strength:.3g})")
    finally:
        view.close()
    with lineas.explore(MAPS) as view:
        assert view._path_data["calibrated"] is None
        with pytest.raises(ValueError, match="strength='calibrated' is for maps that were calibrated"):
            view.strength = "calibrated"


@pytest.mark.parametrize("value", ["calibrate", "1", ""])
def test_other_words_are_no_strengths(found, value, tmp_path):
    message = f"strength must be a number or 'calibrated', got {value!r}"
    for take in (
        lambda: found.maps.attach(MODEL, value),
        lambda: found.maps.fold(MODEL, value),
        lambda: found.maps.to_peft_lora(MODEL, tmp_path / "a", value),
        lambda: lineas.explore(found.maps, strength=value),
    ):
        with pytest.raises(ValueError, match=message):
            take()
    assert not lineas.attached(MODEL) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("note", ["by hand", {"strength": "high"}, {"strength": None}, {"budget": {"x": 1}}, [1], 3])
def test_metadata_that_call_something_else_a_calibration(note, tmp_path):
    maps = lineas.SteeringMaps(MAPS, {"calibration": note})
    for take in (
        lambda: maps.attach(MODEL, "calibrated"),
        lambda: maps.fold(MODEL, "calibrated"),
        lambda: maps.to_peft_lora(MODEL, tmp_path / "a", "calibrated"),
        lambda: lineas.explore(maps, strength="calibrated"),
    ):
        with pytest.raises(ValueError, match="strength='calibrated' is for maps that were calibrated"):
            take()
    assert "calibrated" not in card(maps)
    with lineas.explore(maps) as view:
        assert view.strength == 1


def test_a_calibration_without_a_budget_has_a_card():
    text = card(lineas.SteeringMaps(MAPS, {"calibration": {"strength": 0.5}}))
    assert "| calibrated strength | `0.5` |" in text
