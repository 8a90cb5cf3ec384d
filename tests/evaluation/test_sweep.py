"""`lineas.evaluate` as a whole: points, controls, judges, files, and what it refuses."""

import evaluations as ev
import models_zoo as zoo
import numpy as np
import pytest
import torch
from attached import hooks_on, language_model, random_maps
from evaluations import NEUTRAL, PROMPTS, QUIET, TOKENIZER
from fits import same_maps, short_fit, snapshot

import lineas
from lineas.arrays import baselines
from lineas.evaluation.controls import CONTROLS, make_controls, name_controls
from lineas.evaluation.controls import random_maps as randomized
from lineas.evaluation.judges import JudgeError

SOURCE, TARGET = zoo.texts(6, seed=21), zoo.texts(7, seed=22)
MODEL, MAPS = language_model("llama")
OTHER = random_maps({name: one.d for name, one in MAPS.items()}, seed=5)


def evaluate(maps=MAPS, model=MODEL, **settings):
    settings = {"tokenizer": TOKENIZER, "prompts": PROMPTS, "max_new_tokens": 2, "strengths": [1], **QUIET, **settings}
    return lineas.evaluate(model, maps, **settings)


def words(texts):
    return [len(text.split()) for text in texts]


def share(texts):
    return [text.count("a") / (len(text) + 1) for text in texts]


def points(found):
    return list(zip(found.methods, found.strengths, strict=True))


# --- points -----------------------------------------------------------------------------------------------------------


def test_what_an_evaluation_holds():
    found = evaluate({"one": MAPS, "two": OTHER}, neutral=NEUTRAL, judges=[words, share], strengths=[0.5, 2], samples=3)
    assert points(found) == [("unsteered", 0), ("one", 0.5), ("one", 2), ("two", 0.5), ("two", 2)]
    assert found.strengths.dtype == np.float64
    assert found.prompts == PROMPTS and found.neutral == NEUTRAL
    assert np.shape(found.continuations) == (5, 5, 3)
    assert found.statistics.shape == (5, 5, 3, 6) and found.price.shape == (5, 6, 7)
    assert list(found.scores) == ["words", "share"]
    texts = np.array(found.continuations).reshape(-1).tolist()
    np.testing.assert_array_equal(found.scores["words"], np.reshape(words(texts), (5, 5, 3)))
    np.testing.assert_array_equal(found.scores["share"], np.reshape(share(texts), (5, 5, 3)))
    assert found.stopped == "finished" and len(found) == 5
    assert found.metadata["samples"] == 3 and found.metadata["seed"] == 0
    assert found.metadata["support"] == {"one": [MAPS.support, MAPS.d], "two": [OTHER.support, OTHER.d]}
    assert found.metadata["sampling"] == {"do_sample": True, "top_p": 0.9, "top_k": 0, "temperature": 1.0}
    assert repr(found) == ("Evaluation(5 points of 3 methods, 5 prompts, 6 neutral texts, judges words, share)")


def test_price_or_effect_alone():
    price, effect = evaluate(prompts=None, neutral=NEUTRAL), evaluate(judges=words)
    assert price.prompts == [] and price.statistics.shape == (2, 0, 0, 6) and price.continuations == [[], []]
    assert effect.neutral == [] and effect.price.shape == (2, 0, 7)
    assert "words" not in price.rows()[0] and "kl" not in effect.rows()[0]
    both = evaluate(neutral=NEUTRAL, judges=words)
    np.testing.assert_array_equal(both.price, price.price)
    assert both.continuations == effect.continuations


def test_strengths_are_measured_once_and_0_is_the_unsteered_model():
    found = evaluate(strengths=np.array([0.0, 1.0, 0.5, 1.0, -0.0]))
    assert points(found) == [("unsteered", 0), ("maps", 1), ("maps", 0.5)]
    assert points(evaluate(strengths=2)) == [("unsteered", 0), ("maps", 2)]
    assert points(evaluate(strengths=np.float32(0.5))) == [("unsteered", 0), ("maps", 0.5)]
    assert points(evaluate(strengths=0)) == [("unsteered", 0)]


def test_strengths_by_method():
    strengths = {"two": [3], "one": np.array([-1, 1]), "random (two)": [4]}
    found = evaluate({"one": MAPS, "two": OTHER}, strengths=strengths, controls=["random"])
    expected = [("one", -1), ("one", 1), ("two", 3), ("random (one)", -1), ("random (one)", 1), ("random (two)", 4)]
    assert points(found)[1:] == expected


def test_a_fit_and_the_points_of_a_path_are_methods():
    fit = short_fit(zoo.llama(), steps=1)
    assert evaluate(fit).methods == ("unsteered", "end-to-end")
    arrays = lineas.collect(MODEL, SOURCE, layers=list(MAPS), tokenizer=TOKENIZER, progress=False)
    others = lineas.collect(MODEL, TARGET, layers=list(MAPS), tokenizer=TOKENIZER, progress=False)
    path = lineas.sparse_path(arrays, others, penalties=[0.1, 0.01, 0.0099999])
    assert path.support[1] == path.support[2]
    found = evaluate({"sparse": path, "fit": fit}, prompts=None, neutral=NEUTRAL)
    names = [f"sparse[{k}], support {support}" for k, support in enumerate(path.support)]
    assert found.methods == ("unsteered", *names, "fit")
    np.testing.assert_array_equal(found.price[2], evaluate({"x": path[1]}, prompts=None, neutral=NEUTRAL).price[1])
    assert evaluate(path).methods[1:] == tuple(name.replace("sparse", path.metadata["method"], 1) for name in names)


def test_methods_of_the_same_maps_are_the_same():
    found = evaluate({"a": MAPS, "b": MAPS}, neutral=NEUTRAL)
    assert found.continuations[1] == found.continuations[2]
    np.testing.assert_array_equal(found.price[1], found.price[2])


def test_iterators_and_arrays_of_texts():
    expected = evaluate(neutral=NEUTRAL, strengths=[0.5, 1], controls=["random"])
    found = evaluate(
        prompts=(text for text in PROMPTS),
        neutral=np.array(NEUTRAL),
        strengths=(s for s in (0.5, 1)),
        controls=(name for name in ["random"]),
    )
    assert found == expected
    settings = {"prompts": None, "neutral": NEUTRAL, "controls": ["mean", "aura", "incremental"]}
    found = evaluate(source=iter(SOURCE), target=np.array(TARGET), **settings)
    assert found == evaluate(source=SOURCE, target=TARGET, **settings)


def test_a_bar_shows_how_far_it_is(capsys):
    evaluate(progress=True, neutral=NEUTRAL)
    assert "evaluate: 100%" in capsys.readouterr().err
    evaluate()
    assert capsys.readouterr().err == ""


# --- instructions and controls ----------------------------------------------------------------------------------------


def test_instructions_are_points_of_their_own():
    found = evaluate(instruction={"kind": "be nice", "brief": "be short"}, neutral=NEUTRAL)
    assert points(found) == [("unsteered", 0), ("kind", 0), ("brief", 0), ("maps", 1)]
    assert found.metadata["instructions"] == {"kind": "be nice", "brief": "be short"}
    alone = evaluate(instruction="be short", neutral=NEUTRAL)
    assert points(alone)[1] == ("instruction", 0)
    np.testing.assert_array_equal(alone.price[1], found.price[2])
    assert alone.continuations[1] == found.continuations[2] != found.continuations[1]


def test_random_maps_have_the_norms_and_supports_of_maps():
    sparse = lineas.SteeringMaps(
        {
            name: lineas.AffineMap(
                np.where(np.arange(one.d) % 3, 1, one.weight), np.where(np.arange(one.d) % 2, 0, one.bias)
            )
            for name, one in MAPS.items()
        },
        {"method": "x", "tokens": "last"},
    )
    found = randomized(sparse, seed=3)
    assert list(found) == list(sparse) and found != sparse and found != randomized(sparse, seed=4)
    assert found == randomized(sparse, seed=3)
    for name, one in sparse.items():
        assert found[name].support == one.support
        assert found[name].weight.dtype == one.weight.dtype
        for part in (lambda x: x.weight - 1, lambda x: x.bias):
            mine, theirs = part(found[name]), part(one)
            np.testing.assert_allclose(np.sort(np.abs(mine)), np.sort(np.abs(theirs)), rtol=1e-5, atol=1e-7)
            assert (np.sign(mine) != np.sign(theirs)).any()
        # Slopes and shifts of a neuron stay together, and take one sign.
        mine, theirs = (np.stack([x.weight - 1, x.bias])[:, np.argsort(np.abs(x.bias))] for x in (found[name], one))
        signs = np.sign(mine[1]) * np.sign(theirs[1])
        changed = signs != 0
        np.testing.assert_allclose((mine * signs)[:, changed], theirs[:, changed], rtol=1e-5, atol=1e-6)
        assert set(signs[changed]) == {-1, 1}
    assert found.metadata["parts"] == [sparse.metadata]
    with found.attach(MODEL) as handle:
        assert handle.tokens == "last"


def controls(names, maps=MAPS, tokens=None, **settings):
    named = name_controls(names, {"maps": maps}, fitted=True)
    return make_controls(
        named,
        {"maps": maps},
        MODEL,
        SOURCE,
        TARGET,
        **{"tokenizer": TOKENIZER, "tokens": tokens, "max_length": None, "seed": 0, "progress": False, **settings},
    )


@pytest.mark.parametrize("facts", [{}, {"pooling": "max", "tokens": "last"}, {"pooling": "all"}])
def test_controls_are_the_baselines_on_the_same_modules_and_tokens(facts):
    maps = lineas.SteeringMaps(MAPS, facts).select(["model.layers.0.*", "model.layers.2.*"])
    found = controls([name for name in CONTROLS if name != "random"], maps, max_length=5)
    reading = {"layers": list(maps), "tokenizer": TOKENIZER, "max_length": 5, "progress": False}
    reading["tokens"] = facts.get("tokens", "all")
    pooling = facts.get("pooling", "mean")
    usual, largest = (
        [lineas.collect(MODEL, texts, pooling=how, **reading) for texts in (SOURCE, TARGET)] for how in (pooling, "max")
    )
    same_maps(found["mean"], baselines.mean(*usual))
    same_maps(found["iti_c"], baselines.iti_c(*usual))
    same_maps(found["aura"], baselines.aura(*largest))
    same_maps(found["gaussian"], lineas.fit(*usual, method="gaussian"))
    same_maps(found["linear"], lineas.fit(*usual, method="linear"))
    same_maps(found["incremental"], lineas.fit_incremental(MODEL, SOURCE, TARGET, pooling=pooling, **reading))
    assert all(one.metadata.get("tokens", "all") == reading["tokens"] for one in found.values())


def test_controls_of_maps_that_a_callable_selects_tokens_for():
    maps = lineas.SteeringMaps(MAPS, {"tokens": {"callable": "late"}})
    with pytest.raises(ValueError, match="fitted for the tokens that late selects"):
        controls(["mean"], maps)
    found = controls(["mean"], maps, tokens="last")["mean"]
    same_maps(found, controls(["mean"], lineas.SteeringMaps(MAPS, {"tokens": "last"}))["mean"])


def test_controls_are_points_at_the_same_strengths():
    found = evaluate(
        {"one": MAPS, "two": OTHER}, prompts=None, neutral=NEUTRAL, controls=["random", "mean"], strengths=[0.5, 1],
        source=SOURCE, target=TARGET,
    )  # fmt: skip
    assert points(found)[5:] == [(name, s) for name in ("random (one)", "random (two)", "mean") for s in (0.5, 1)]
    expected = evaluate({"x": controls(["mean"])["mean"]}, prompts=None, neutral=NEUTRAL)
    np.testing.assert_array_equal(found.price[-1], expected.price[1])
    assert found.metadata["methods"]["mean"]["method"] == "mean"
    assert points(evaluate(controls="random"))[2:] == [("random", 1)]


# --- judges -----------------------------------------------------------------------------------------------------------


def test_judges_see_the_prompts_of_the_texts():
    def longer(texts, prompts):
        return [len(text) > len(prompt) for text, prompt in zip(texts, prompts, strict=True)]

    found = evaluate(judges=longer, samples=2, max_new_tokens=6)
    for k, prompt in enumerate(PROMPTS):
        for point in range(2):
            expected = [float(len(text) > len(prompt)) for text in found.continuations[point][k]]
            assert found.scores["longer"][point, k].tolist() == expected
    assert 0 < found.scores["longer"].mean() < 1


def test_a_judge_that_fails_in_the_end_keeps_everything():
    def fails(texts):
        if len(texts) > 2:
            raise RuntimeError("out of words")
        return [0.0] * len(texts)

    expected = evaluate(neutral=NEUTRAL, judges=[words])
    with pytest.raises(JudgeError, match="judge 'fails' failed: RuntimeError: out of words") as error:
        evaluate(neutral=NEUTRAL, judges=[words, fails])
    assert error.value.evaluation == expected
    assert "attribute `evaluation`" in error.value.__notes__[0]
    assert error.value.evaluation.judge({"fails": words}).scores.keys() == {"words", "fails"}


@pytest.mark.parametrize(
    ("judges", "kind", "message"),
    [
        (lambda texts: 1 / 0, JudgeError, "judge 'judge' failed: ZeroDivisionError"),
        ([words, lambda texts: [0.0]], JudgeError, "judge 'judge' must return one score a text: expected 2, got 1"),
        (lambda texts: [float("nan")] * len(texts), JudgeError, "must return finite scores, got nan for text 0"),
        (lambda texts: texts, TypeError, "must return an array of real numbers, got list"),
        ([], ValueError, "judges is empty"),
        (3, TypeError, "judges must be a callable or a string, got int"),
        ({"kl": words}, ValueError, r"judges: 'kl' would name 'kl', which rows\(\) has already; give it another name"),
        ({"length": words}, ValueError, "judges: 'length' would name 'length'"),
        ({"a": words, "a_change": words}, ValueError, "judges: 'a_change' would name 'a_change'"),
    ],
)
def test_bad_judges_fail_before_anything_runs(judges, kind, message):
    model, calls = zoo.llama(), []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    with pytest.raises(kind, match=message):
        evaluate(model=model, judges=judges, neutral=NEUTRAL, controls=["mean"], source=SOURCE, target=TARGET)
    assert not calls and hooks_on(model) == 0


def test_judges_are_tried_on_prompts_of_any_kind():
    seen = []

    def judge(texts):
        seen.append(list(texts))
        return [0.0] * len(texts)

    evaluate(judges=judge)
    evaluate(judges=judge, prompts=[[5, 6], [7]])
    evaluate(judges=judge, prompts=ev.talks(3, 2, answered=False), tokenizer=ev.chat_tokenizer())
    talks = [talk[0]["content"] for talk in ev.talks(3, 2)]
    assert seen[::2] == [PROMPTS[:2], ["", ""], talks[:2]]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"neutral": NEUTRAL, "judges": [words, share], "instruction": "be nice", "samples": 2},
        {"prompts": None, "neutral": NEUTRAL},
        {"prompts": [np.array([5, 6]), np.array([7])], "judges": words, "max_new_tokens": np.int64(3)},
        {"prompts": ev.talks(2, 2, answered=False), "tokenizer": ev.chat_tokenizer(), "samples": np.int64(2)},
        {"generate": lambda model, prompts: ["\u2028 \x85 \ud800 \u00e9"] * len(prompts), "tokenizer": None},
    ],
)
def test_an_evaluation_is_saved_and_loaded(settings, tmp_path):
    found = evaluate(strengths=[0.5, 1], **settings)
    found.save(tmp_path / "found.safetensors")
    loaded = lineas.load(tmp_path / "found.safetensors")
    assert isinstance(loaded, lineas.Evaluation) and loaded == found
    assert loaded.table() == found.table() and loaded.methods == found.methods
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "found.safetensors").read_bytes()


# --- what is refused --------------------------------------------------------------------------------------------------

NARROW = lineas.SteeringMaps({next(iter(MAPS)): lineas.AffineMap.identity(8)})


@pytest.mark.parametrize(
    ("maps", "settings", "kind", "message"),
    [
        (MAPS, {"prompts": None}, ValueError, "give prompts=, for the effect, or neutral=, for the price, or both"),
        (MAPS, {"prompts": []}, ValueError, "prompts is empty"),
        (MAPS, {"neutral": []}, ValueError, "neutral is empty"),
        (MAPS, {"prompts": "the day"}, TypeError, "prompts is one string: give a list of texts"),
        (
            MAPS,
            {"prompts": None, "neutral": NEUTRAL, "judges": words},
            ValueError,
            "judges: there are no continuations",
        ),
        (MAPS, {"controls": ["none"]}, ValueError, "controls must be one of 'random', 'mean', .*, got 'none'"),
        (MAPS, {"controls": None}, TypeError, "controls must be a sequence of names, got NoneType"),
        (MAPS, {"controls": ["mean"]}, ValueError, "controls: 'mean' is fitted to source= and target=, give both"),
        (
            MAPS,
            {"controls": "aura", "source": SOURCE},
            ValueError,
            "controls: 'aura' is fitted to source= and target=, give both",
        ),
        ({"random": MAPS}, {"controls": ["random"]}, ValueError, "controls: 'random' is the name of one of the maps"),
        (MAPS, {"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        (MAPS, {"samples": 1.5}, TypeError, "samples must be an int, got float"),
        (MAPS, {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        (MAPS, {"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        (MAPS, {"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        (MAPS, {"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        (MAPS, {"progress": 1}, TypeError, "progress must be True or False, got 1"),
        (MAPS, {"strengths": [1, float("nan")]}, ValueError, r"strengths\[1\] must be finite, got nan"),
        (MAPS, {"strengths": "1"}, TypeError, "strengths must be a real number, got str"),
        (MAPS, {"strengths": []}, ValueError, "strengths is empty"),
        (MAPS, {"strengths": {"maps": []}}, ValueError, r"strengths\['maps'\] is empty"),
        (MAPS, {"strengths": {"mops": [1]}}, ValueError, "strengths: there is no method 'mops' among 'maps'"),
        ({"a": MAPS, "b": OTHER}, {"strengths": {"a": [1]}}, ValueError, "strengths: the method 'b' has none"),
        (MAPS, {"tokens": "first"}, ValueError, "tokens must be 'all', .*, got 'first'"),
        (MAPS, {"tokenizer": "gpt2"}, TypeError, "tokenizer must be a loaded tokenizer, .*, got str"),
        (MAPS, {"instruction": ["be nice"]}, TypeError, "instruction must be a text or a mapping .*, got list"),
        (MAPS, {"instruction": {"a": 3}}, TypeError, "instruction must be a text or a mapping .*, got 'a': 3"),
        (MAPS, {"instruction": ""}, ValueError, "instruction: 'instruction' is empty"),
        (MAPS, {"instruction": {"maps": "be nice"}}, ValueError, "instruction: 'maps' is the name of another method"),
        (MAPS, {"instruction": {"unsteered": "a"}}, ValueError, "instruction: 'unsteered' is the name of another"),
        (
            MAPS,
            {"instruction": {"random": "be nice"}, "controls": ["random"]},
            ValueError,
            "instruction: 'random' is the name of another method",
        ),
        ({}, {}, ValueError, "maps is empty"),
        (None, {}, TypeError, "maps must be SteeringMaps, a FitResult, a SparsePath or a mapping .*, got NoneType"),
        ([MAPS], {}, TypeError, "maps must be SteeringMaps, .* got list"),
        (dict(MAPS), {}, TypeError, r"maps\['model.layers.0.*'\] must be SteeringMaps, .* got AffineMap"),
        ({3: MAPS}, {}, TypeError, "maps: the name of a method must be a string that is not empty, got 3"),
        ({"": MAPS}, {}, TypeError, "maps: the name of a method must be a string that is not empty, got ''"),
        ({"unsteered": MAPS}, {}, ValueError, "maps: 'unsteered' is the name of another method, or of the model"),
        (NARROW, {}, ValueError, "model.layers.0.*: the map is for 8 neurons, the module has 16"),
        ({"a": MAPS, "b": NARROW}, {}, ValueError, "maps 'b': model.layers.0.*: the map is for 8 neurons"),
        (MAPS.rename(prefix="no."), {}, ValueError, "has no module 'no.model.layers.0"),
        (
            lineas.SteeringMaps(MAPS, {"tokens": {"callable": "late"}}),
            {},
            ValueError,
            "these maps were fitted for the tokens that late selects, .*: pass it",
        ),
    ],
)
def test_arguments_that_are_wrong(maps, settings, kind, message):
    model, calls = zoo.llama(), []
    before = snapshot(model)
    handle = model.register_forward_pre_hook(lambda *args: calls.append(1))
    with pytest.raises(kind, match=message):
        evaluate(maps, model, **settings)
    handle.remove()
    assert snapshot(model) == before and not calls


@pytest.mark.parametrize("model", [None, "gpt2"])
def test_a_model_must_be_one(model):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
        evaluate(model=model)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = zoo.llama()
    with pytest.raises(ValueError, match="model: its weights are on the meta device"):
        evaluate(model=model)


def test_all_bad_input_is_found_before_controls_are_fitted():
    model, calls = zoo.llama(), []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    fitted = {"controls": ["mean"], "source": SOURCE, "target": TARGET}
    for settings in (
        {"strengths": [float("inf")]},
        {"strengths": {"maps": [1], "aura": [1]}},
        {"prompts": ["a", 3]},
        {"instruction": "a", "prompts": [[5, 6]]},
        {"maps": NARROW},
        {"checkpoint": "/"},
    ):
        with pytest.raises((TypeError, ValueError, OSError)):
            evaluate(model=model, **{**fitted, **settings})
    assert not calls
