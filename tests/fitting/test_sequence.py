"""Several concepts one after the other: what each fit sees, what is left alone, what comes back, errors."""

import models_zoo as zoo
import numpy as np
import pytest
import torch
from fits import QUIET, Trouble, interrupt, prompts, same_maps, snapshot

import lineas
from lineas import AffineMap, SequenceResult, SteeringMaps, fit_end_to_end, fit_jointly, fit_sequence
from lineas.fitting import checkpoint

TASKS = {"a": (prompts(6, 1), prompts(6, 2)), "b": (prompts(7, 3), prompts(5, 4))}
THREE = {**TASKS, "c": (prompts(5, 9), prompts(6, 10))}
HELD_OUT = {"b": (prompts(6, 5), prompts(6, 6)), "a": (prompts(4, 7), prompts(6, 8))}  # in another order
SETTINGS = {"layers": zoo.NORMS["llama"], "lr": 0.02, "steps": 3, "patience": None, **QUIET}
SPARSE = {"lr": 0.2, "l1": 0.4}
KINDS = {"auto": {"lr": "auto", "l1": 0.05}, "adam": {"optimizer": "adam", "l1": 0.01}, "mini": {"mini_batch": 3}}


@pytest.fixture(scope="module")
def llama():
    return zoo.llama().double()


@pytest.fixture
def fit(llama):
    return lambda tasks=TASKS, **settings: fit_sequence(llama, tasks, **{**SETTINGS, **settings})


@pytest.fixture
def fit_one(llama):
    return lambda *pair, **settings: fit_end_to_end(llama, *pair, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def first(llama):
    """Dense maps of a first concept."""
    return fit_end_to_end(llama, *TASKS["a"], **SETTINGS).maps


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def same_result(a, b):
    assert list(a.results) == list(b.results) and a.stopped == b.stopped
    for name, one in a.results.items():
        other = b.results[name]
        same_maps(one.maps, other.maps)
        np.testing.assert_array_equal(one.history["loss"], other.history["loss"])
        assert (one.best_step, one.stopped, one.held_out_loss) == (other.best_step, other.stopped, other.held_out_loss)


# --- one fit on top of maps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [None, HELD_OUT["b"]], ids=["plain", "held-out"])
def test_a_fit_on_top_of_maps_is_one_with_them_attached(llama, fit_one, first, held_out):
    before = snapshot(llama)
    found = fit_one(*TASKS["b"], on_top_of=first, held_out=held_out)
    assert snapshot(llama) == before
    with first.attach(llama):
        own = fit_one(*TASKS["b"], held_out=held_out)
    same_maps(found.maps, own.maps @ first)
    np.testing.assert_array_equal(found.history["loss"], own.history["loss"])
    assert found.held_out_loss == own.held_out_loss
    assert [part["method"] for part in found.maps.metadata["parts"]] == ["end-to-end", "end-to-end"]

    batch = prompts(3, 11)
    with first.attach(llama), own.maps.attach(llama):
        expected = logits(llama, batch)
    with found.maps.attach(llama):
        torch.testing.assert_close(logits(llama, batch), expected, rtol=1e-9, atol=1e-9)


def test_the_identity_below_changes_nothing(fit_one, first):
    identity = SteeringMaps({name: AffineMap(np.ones(one.d), np.zeros(one.d)) for name, one in first.items()})
    same_maps(fit_one(*TASKS["b"], on_top_of=identity).maps, fit_one(*TASKS["b"]).maps)


def test_maps_below_may_sit_on_other_modules_and_have_the_names_of_a_wrapper(llama, fit_one, first):
    name = next(iter(first))
    below = first.select(name).rename(prefix="_orig_mod.")
    found = fit_one(*TASKS["b"], on_top_of=below, layers=list(first)[1:])
    assert list(found.maps) == list(first)
    same_maps(found.maps.select(name), first.select(name))


def test_a_joint_fit_on_top_of_maps(llama, first):
    found = fit_jointly(llama, TASKS, on_top_of=first, **SETTINGS)
    with first.attach(llama):
        same_maps(found.maps, fit_jointly(llama, TASKS, **SETTINGS).maps @ first)


# --- neurons that are left alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"lr": 0.1}, *KINDS.values()], ids=["sgd", *KINDS])
def test_disjoint_maps_share_no_neuron(fit_one, settings):
    below = fit_one(*TASKS["a"], **SPARSE).maps
    assert 0 < below.support < below.d
    found = fit_one(*TASKS["b"], on_top_of=below, disjoint=True, **settings).maps
    own = fit_one(*TASKS["b"], on_top_of=below, **settings).maps
    moved = 0
    for name, one in below.items():
        taken = (one.weight != 1) | (one.bias != 0)
        # To the bit: composed with the identity they are what they were.
        np.testing.assert_array_equal(found[name].weight[taken], one.weight[taken])
        np.testing.assert_array_equal(found[name].bias[taken], one.bias[taken])
        moved += int(((found[name].weight != 1) | (found[name].bias != 0))[~taken].sum())
        assert not np.array_equal(own[name].bias[taken], one.bias[taken])
    assert moved > 0


def test_a_step_of_a_disjoint_fit_is_that_of_the_free_neurons(fit_one):
    """One plain step moves each neuron by its own gradient, whatever becomes of the others."""
    below = fit_one(*TASKS["a"], **SPARSE).maps
    found, own = (fit_one(*TASKS["b"], on_top_of=below, disjoint=one, steps=1).maps for one in (True, False))
    for name, one in below.items():
        free = (one.weight == 1) & (one.bias == 0)
        np.testing.assert_array_equal(found[name].weight[free], own[name].weight[free])
        np.testing.assert_array_equal(found[name].bias[free], own[name].bias[free])


def test_automatic_rates_are_those_of_the_free_neurons(fit_one):
    """Neurons that cannot move do not make the first step shorter: the rate is loss / |gradient|^2 of the others."""
    below = fit_one(*TASKS["a"], **SPARSE).maps
    found, own = (
        fit_one(*TASKS["b"], on_top_of=below, disjoint=one, steps=1, lr="auto").history["lr"][0]
        for one in (True, False)
    )
    assert found > own


def test_disjoint_needs_free_neurons(llama, fit_one, first):
    before = snapshot(llama)
    with pytest.raises(
        ValueError, match=r"^disjoint leaves no neuron to fit: on_top_of maps all \d+ of them; fit that"
    ):
        fit_one(*TASKS["b"], on_top_of=first, disjoint=True)
    below = fit_one(*TASKS["a"], **SPARSE).maps
    with pytest.raises(ValueError, match=r"^init: the map of module 'model.* has slopes, and none are"):
        fit_one(*TASKS["b"], on_top_of=below, disjoint=True, init=first)
    assert snapshot(llama) == before


# --- a sequence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, *KINDS.values()], ids=["sgd", *KINDS])
def test_each_fit_is_on_top_of_those_before(llama, fit, fit_one, settings):
    before = snapshot(llama)
    found = fit(THREE, held_out={**HELD_OUT, "c": HELD_OUT["a"]}, **settings)
    assert snapshot(llama) == before
    maps = None
    for name, pair in THREE.items():
        held_out = HELD_OUT["a"] if name == "c" else HELD_OUT[name]
        one = fit_one(*pair, held_out=held_out, on_top_of=maps, **settings)
        np.testing.assert_allclose(found.results[name].history["loss"], one.history["loss"], rtol=1e-9)
        assert found.results[name].held_out_loss == pytest.approx(one.held_out_loss, rel=1e-9)
        assert found.results[name].maps.metadata["task"] == name
        maps = one.maps
    same_maps(found.maps, maps, rtol=1e-9, atol=1e-9)
    assert found.stopped == "finished"


def test_the_metadata_name_the_concepts(fit, fit_one):
    below = fit_one(*TASKS["a"]).maps
    found = fit(THREE, on_top_of=below, tokens="all")
    metadata = found.maps.metadata
    assert (metadata["method"], metadata["tasks"]) == ("sequence", ["a", "b", "c"])
    assert [part.get("task") for part in metadata["parts"]] == [None, "a", "b", "c"]
    assert found.results["a"].maps.metadata["settings"]["steps"] == 3
    assert repr(found).startswith("SequenceResult({'a': FitResult(")


def test_a_disjoint_sequence(fit):
    found = fit(THREE, disjoint=True, l1=0.8, lr=0.2)
    supports = [
        {name: (one.weight != 1) | (one.bias != 0) for name, one in result.maps.items()}
        for result in found.results.values()
    ]
    for name in supports[0]:
        assert np.sum([support[name] for support in supports], axis=0).max() <= 1
    assert all(sum(one.sum() for one in support.values()) for support in supports)
    assert found.maps.support == sum(result.maps.support for result in found.results.values())
    assert [one.maps.metadata["settings"]["disjoint"] for one in found.results.values()] == [False, True, True]


def test_what_is_kept_is_the_model_with_the_earlier_concepts(fit, fit_one):
    keep = {"keep_weight": 0.5, "held_out": HELD_OUT}
    found = fit(**keep)
    one = fit_one(*TASKS["b"], on_top_of=found.results["a"].maps, keep_weight=0.5, held_out=HELD_OUT["b"])
    same_maps(found.maps, one.maps, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.results["b"].history["keep"], one.history["keep"], rtol=1e-9, atol=1e-12)
    assert found.results["b"].history["keep"][0] == 0  # before any step of its own


@pytest.mark.parametrize("held_out", [None, HELD_OUT], ids=["plain", "held-out"])
def test_targets_of_earlier_concepts_are_preserved(llama, fit, fit_one, held_out):
    before = snapshot(llama)
    found = fit(preserve=True, keep_weight=0.5, held_out=held_out)
    assert snapshot(llama) == before
    plain = fit(keep_weight=0.5, held_out=held_out)
    same_maps(found.results["a"].maps, plain.results["a"].maps)
    assert not np.array_equal(found.results["b"].history["keep"][1:], plain.results["b"].history["keep"][1:])
    if held_out is None:  # with both targets given it is the same fit
        targets = [TASKS[name][1] for name in "ba"]
        one = fit_one(*TASKS["b"], on_top_of=found.results["a"].maps, keep_weight=0.5, keep=targets)
        same_maps(found.maps, one.maps, rtol=1e-9, atol=1e-9)
        given = fit(preserve=True, keep_weight=0.5, keep=TASKS["b"][1])
        one = fit_one(*TASKS["b"], on_top_of=given.results["a"].maps, keep_weight=0.5, keep=targets)
        same_maps(given.maps, one.maps, rtol=1e-9, atol=1e-9)


def test_starts_by_task(fit, fit_one, first):
    found = fit(init={"b": first})
    same_maps(found.results["a"].maps, fit().results["a"].maps)
    with found.results["a"].maps.attach(zoo.llama().double()):
        pass  # maps of a sequence can be attached by themselves
    expected = fit_one(*TASKS["b"], init=first, on_top_of=found.results["a"].maps).maps
    same_maps(found.maps, expected, rtol=1e-9, atol=1e-9)


def test_gates_stay_apart(llama, fit, fit_one, first):
    gate = lineas.Gate(np.linspace(-1, 1, zoo.WIDTH), 0.2)
    gates = {"a": dict.fromkeys(first, gate)}
    found, batch = fit(gates=gates, on_top_of=first), prompts(3, 11)
    assert found.results["a"].maps.gates and not found.results["b"].maps.gates
    with first.attach(llama):
        expected = fit_one(*TASKS["a"], gates=gates["a"])
        same_maps(found.results["a"].maps, expected.maps)
        with found.results["a"].maps.attach(llama):
            same_maps(found.results["b"].maps, fit_one(*TASKS["b"]).maps)
            with found.results["b"].maps.attach(llama):
                seen = logits(llama, batch)
    with found.attach(llama):
        torch.testing.assert_close(logits(llama, batch), seen, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"^composition: these maps have gates"):
        found.composed()
    for how in ({"gates": gates["a"], "on_top_of": first}, {"on_top_of": found.results["a"].maps}):
        with pytest.raises(ValueError, match=r"^on_top_of: maps with gates are not composed with others"):
            fit_one(*TASKS["b"], **how)


def test_tokens_that_a_callable_selects(llama, fit):
    def every(here):
        return torch.ones_like(here.positions, dtype=torch.bool)

    found = fit(tokens=every)
    same_maps(found.maps, fit().maps, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="pass it, or another selection, as tokens="):
        found.attach(llama)
    assert not lineas.attached(llama)
    found.attach(llama, tokens=every).remove()


# --- strengths --------------------------------------------------------------------------------------------------------


def test_every_concept_has_a_live_strength(llama, fit, first):
    found, batch, before = fit(on_top_of=first), prompts(4, 12), snapshot(llama)
    a, b = (result.maps for result in found.results.values())
    with found.attach(llama, {"b": 0.5}) as handle:
        assert handle.strengths == {"a": 1.0, "b": 0.5} and list(handle) == ["a", "b"] and len(handle) == 2
        assert len(lineas.attached(llama)) == 3
        seen = logits(llama, batch)
        handle["a"].strength = -0.5
        handle.strengths = {"b": 2.0}
        changed = logits(llama, batch)
        assert repr(handle) == "SequenceHandle('a', 'b'; strengths={'a': -0.5, 'b': 2.0})"
    assert snapshot(llama) == before and not handle.attached and repr(handle) == "SequenceHandle('a', 'b'; removed)"
    for strengths, expected in (((1.0, 0.5), seen), ((-0.5, 2.0), changed)):
        with first.attach(llama), a.attach(llama, strengths[0]), b.attach(llama, strengths[1]):
            torch.testing.assert_close(logits(llama, batch), expected, rtol=0, atol=0)
        with found.composed(dict(zip("ab", strengths, strict=True))).attach(llama):
            torch.testing.assert_close(logits(llama, batch), expected, rtol=1e-9, atol=1e-9)
    assert not torch.equal(seen, changed)
    with pytest.raises(RuntimeError, match="were removed from the model"):
        handle.__enter__()


def test_strengths_of_every_prompt(llama, fit):
    found, batch = fit(), prompts(2, 12)
    with found.attach(llama, {"a": [0.0, 1.0], "b": lambda here: 0.5}):
        seen = logits(llama, batch)
    with found.results["b"].maps.attach(llama, 0.5):
        torch.testing.assert_close(seen[0], logits(llama, batch)[0])


def test_wrong_strengths(llama, fit):
    found = fit()
    for strengths, error, text in (
        ({"c": 1.0}, ValueError, r"^strengths has 'c', which is none of the concepts \['a', 'b'\]"),
        (0.5, TypeError, "^strengths must map concepts to strengths, got float"),
        ({"b": "strong"}, ValueError, "^strength must be a number or 'calibrated', got 'strong'"),
        ({"b": np.nan}, ValueError, "^strength must be finite, got nan"),
    ):
        with pytest.raises(error, match=text):
            found.attach(llama, strengths)
        assert not lineas.attached(llama)
    with pytest.raises(TypeError, match=r"^strengths\['b'\] must be a real number, got list"):
        found.composed({"b": [1.0]})
    with found.attach(llama) as handle:
        with pytest.raises(ValueError, match="must be finite, got inf"):
            handle.strengths = {"a": 0.5, "b": np.inf}
        assert handle.strengths == {"a": 1.0, "b": 1.0}
        with pytest.raises(KeyError, match=r"no concept .d.; this sequence has a, b"):
            handle["d"]
    with pytest.raises(ValueError, match="has no module"):
        found.attach(zoo.mlp())
    with pytest.raises(ValueError, match=r"^results must hold at least one concept"):
        SequenceResult({})


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_result_is_saved_and_loaded(fit, first, tmp_path):
    for k, found in enumerate((fit(held_out=HELD_OUT), fit(dict(reversed(TASKS.items())), on_top_of=first))):
        found.save(tmp_path / f"{k}.safetensors")
        back = lineas.load(tmp_path / f"{k}.safetensors")
        assert back == found and list(back.results) == list(found.results)
        same_maps(back.maps, found.maps)
        assert back.maps.metadata == found.maps.metadata
    found.maps.save(tmp_path / "maps.safetensors")
    assert lineas.load(tmp_path / "maps.safetensors") == found.maps


def test_names_that_would_share_a_tensor_are_refused(fit, tmp_path):
    result = fit().results["a"]
    one = next(iter(result.maps.values()))
    clash = SequenceResult(
        {
            "a": lineas.FitResult(SteeringMaps({"maps.x": one}), {}, 0, "finished"),
            "a.maps": lineas.FitResult(SteeringMaps({"x": one}), {}, 0, "finished"),
        }
    )
    with pytest.raises(ValueError, match=r"^cannot save two arrays under the name 'results\.a\.maps\.maps\.x\.weight'"):
        clash.save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


# --- fits that are cut off --------------------------------------------------------------------------------------------


def calls_of(llama, tasks, **settings):
    """How often the model is called in a whole fit of tasks."""
    counter = Trouble(-1, None)
    fit_sequence(llama, tasks, forward=counter, **{**SETTINGS, **settings})
    return counter.calls


def test_ctrl_c_in_a_later_fit_keeps_what_there_is(llama, fit):
    before, whole = snapshot(llama), fit(THREE, forward=Trouble(-1, None))
    each = calls_of(llama, THREE) // 3
    # In the last step of the second fit, and while the targets of the third are taken.
    for at, names in ((2 * each, "ab"), (2 * each + 1, "ab")):
        with pytest.warns(RuntimeWarning, match="^fit_sequence was interrupted: 'c' not fitted") as caught:
            found = fit(THREE, forward=Trouble(at, interrupt))
        assert caught[0].filename == __file__ and snapshot(llama) == before
        assert (list(found.results), found.stopped) == (list(names), "interrupted")
        same_maps(found.results["a"].maps, whole.results["a"].maps)
    same_maps(found.maps, SequenceResult({name: whole.results[name] for name in "ab"}).maps)
    with pytest.raises(KeyboardInterrupt):
        fit(forward=Trouble(1, interrupt))
    assert snapshot(llama) == before


@pytest.mark.parametrize("settings", [{}, {"lr": "auto"}, {"mini_batch": 3}], ids=["sgd", "auto", "mini"])
def test_a_sequence_that_was_cut_off_goes_on_to_the_same_bits(llama, fit, tmp_path, settings):
    folder = tmp_path / "new" / "folder"
    settings = {"held_out": HELD_OUT, "disjoint": True, **SPARSE, **settings}
    whole = fit(forward=Trouble(-1, None), **settings)
    calls = calls_of(llama, TASKS, **settings)
    with pytest.warns(RuntimeWarning, match="was interrupted: 'b' not fitted"):
        cut = fit(forward=Trouble(calls // 2 + 1, interrupt), checkpoint=folder, **settings)
    assert list(cut.results) == ["a"]
    cut = fit(forward=Trouble(calls - 2, interrupt), checkpoint=folder, **settings)
    assert cut.stopped in ("interrupted", "finished")
    assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", "b.safetensors"]
    same_result(fit(forward=Trouble(-1, None), checkpoint=folder, **settings), whole)
    same_result(fit(forward=Trouble(-1, None), checkpoint=str(folder), **settings), whole)


def test_checkpoints_of_other_sequences(fit, fit_one, first, tmp_path):
    names = {"../a": TASKS["a"], "b/c": TASKS["b"]}
    fit(names, checkpoint=tmp_path / "x")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["..%2Fa.safetensors", "b%2Fc.safetensors"]
    with pytest.raises(ValueError, match="of which the digest of on_top_of differs"):
        fit(dict(reversed(names.items())), checkpoint=tmp_path / "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError):
        fit(checkpoint=tmp_path / "file")
    path = tmp_path / "one.safetensors"
    fit_one(*TASKS["b"], on_top_of=first, checkpoint=path)
    same_maps(*(fit_one(*TASKS["b"], on_top_of=first, checkpoint=one).maps for one in (path, None)))
    for other in (None, first.scaled(0.5)):
        with pytest.raises(ValueError, match="of which the digest of on_top_of differs"):
            fit_one(*TASKS["b"], on_top_of=other, checkpoint=path)
    state = checkpoint.load(path)[1]
    assert isinstance(state["identity"]["digest of on_top_of"], str)


@pytest.mark.parametrize(
    ("settings", "more"),
    [({}, {"steps": 5}), ({"held_out": HELD_OUT, "patience": 2}, {"patience": 9})],
    ids=["steps", "patience"],
)
def test_a_fit_that_others_stand_on_takes_no_more_steps(llama, fit, tmp_path, settings, more):
    settings = {"lr": "auto", **settings}
    done = fit(checkpoint=tmp_path, **settings)
    before, weights = {path: path.read_bytes() for path in tmp_path.iterdir()}, snapshot(llama)
    with pytest.raises(ValueError, match=r"a\.safetensors has [23] steps and would go on, .*b\.safetensors") as seen:
        fit(checkpoint=tmp_path, **{**settings, **more})
    assert "give steps and patience as before or another folder, or remove" in str(seen.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before and snapshot(llama) == weights
    same_result(fit(checkpoint=tmp_path, **settings), done)
    (tmp_path / "b.safetensors").unlink()  # as the message says
    same_result(fit(checkpoint=tmp_path, **{**settings, **more}), fit(**{**settings, **more}))


def test_the_last_fit_of_a_sequence_takes_more_steps_where_those_before_have_ended(fit, tmp_path):
    settings = {"lr": "auto", "held_out": HELD_OUT, "patience": 1, "steps": 40}
    found = fit(checkpoint=tmp_path, **settings)
    assert all("no lower held-out loss" in one.stopped for one in found.results.values())
    same_result(fit(checkpoint=tmp_path, **{**settings, "steps": 50}), found)


# --- errors -----------------------------------------------------------------------------------------------------------

B = {**TASKS, "b": (["x"], prompts(3, 1))}


@pytest.mark.parametrize(
    ("tasks", "settings", "error", "text"),
    [
        (list(TASKS.values()), {}, TypeError, r"^tasks must map names to pairs \(source, target\), got list"),
        ({"a": TASKS["a"]}, {}, ValueError, "^tasks must have at least 2 entries, got 1: fit_end_to_end fits one"),
        ({1: TASKS["a"], "b": TASKS["b"]}, {}, TypeError, "^tasks must have names as keys, got 1"),
        ({**TASKS, "c": "text"}, {}, TypeError, r"^tasks\['c'\] must be a pair \(source, target\), got str"),
        (TASKS, {"held_out": {"a": HELD_OUT["a"]}}, ValueError,
         r"^held_out must have the tasks of tasks, \['a', 'b'\]: it lacks 'b'"),
        (TASKS, {"held_out": HELD_OUT["a"]}, TypeError, "^held_out must map names to pairs .*, got tuple"),
        (TASKS, {"init": {"c": None}}, ValueError, r"^init must have tasks of tasks only, \['a', 'b'\]: it has 'c'"),
        (TASKS, {"init": {"b": {}}}, TypeError, r"^init\['b'\] must be a SteeringMaps, got dict"),
        (TASKS, {"gates": {"c": None}}, ValueError, r"^gates must have tasks of tasks only, \['a', 'b'\]: it has 'c'"),
        (TASKS, {"gates": 3}, TypeError, "^gates must be a dict by task, got int"),
        (TASKS, {"on_top_of": {}}, TypeError, "^on_top_of must be a SteeringMaps, got dict"),
        (TASKS, {"disjoint": True}, ValueError, "^disjoint must be False unless l1 or group is above 0"),
        (TASKS, {"disjoint": 1}, TypeError, "^disjoint must be True or False, got 1"),
        (TASKS, {"preserve": True}, ValueError, "^preserve must be False without a weight: give keep_weight= or max"),
        (TASKS, {"preserve": 1, "max_kl": 0.1}, TypeError, "^preserve must be True or False, got 1"),
        (TASKS, {"mini_batch": 7}, ValueError,
         r"mini_batch must be at most the 6 prompts of tasks\['a'\] source, got 7"),
        ({"b": TASKS["b"], "a": TASKS["a"]}, {"mini_batch": 7}, ValueError, r"the 6 prompts of tasks\['a'\] source"),
        (TASKS, {"checkpoint": 3}, TypeError, "^checkpoint must be a path, got int"),
    ],
)  # fmt: skip
def test_errors_come_before_any_fit(llama, fit, tasks, settings, error, text):
    before = snapshot(llama)
    forward = Trouble(1, lambda model: pytest.fail("the model was called"))
    with pytest.raises(error, match=text):
        fit(tasks, forward=forward, **settings)
    assert snapshot(llama) == before


def test_texts_of_a_later_task_without_a_tokenizer(fit):
    with pytest.raises(ValueError, match=r"tasks\['b'\] source holds texts: pass tokenizer="):
        fit(B, forward=Trouble(1, lambda model: pytest.fail("the model was called")))


def test_an_error_in_a_later_fit_says_where(llama, fit):
    before = snapshot(llama)
    with pytest.raises(ValueError, match=r"tasks\['b'\] target must give at least 2 samples") as caught:
        fit({**TASKS, "b": (prompts(3, 1), prompts(1, 1))})
    assert caught.value.__notes__ == ["fit_sequence: in the fit of 'b', after those of ['a']"]
    with pytest.raises(ValueError, match=r"^disjoint leaves no neuron to fit"):
        fit(disjoint=True, l1=1e-9)
    assert snapshot(llama) == before


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"on_top_of": 3}, TypeError, "^on_top_of must be a SteeringMaps, got int"),
        ({"disjoint": True}, ValueError, "^disjoint must be False without on_top_of"),
        ({"disjoint": "yes"}, TypeError, "^disjoint must be True or False, got 'yes'"),
    ],
)
def test_wrong_settings_of_one_fit(fit_one, settings, error, text):
    with pytest.raises(error, match=text):
        fit_one(*TASKS["b"], **settings)


def test_maps_below_that_do_not_fit(llama, fit_one, first):
    before = snapshot(llama)
    with pytest.raises(ValueError, match=r"^on_top_of must be maps for the tokens of this fit, 'last': they were fitt"):
        fit_one(*TASKS["b"], on_top_of=first, tokens="last")
    with pytest.raises(ValueError, match=r"has no module 'model.layers.7.norm'"):
        fit_one(*TASKS["b"], on_top_of=SteeringMaps({"model.layers.7.norm": next(iter(first.values()))}))
    with pytest.raises(ValueError, match="the map is for 3 neurons, the module has"):
        narrow = AffineMap(np.ones(3), np.ones(3))
        fit_one(*TASKS["b"], on_top_of=SteeringMaps({next(iter(first)): narrow}))
    assert snapshot(llama) == before
