"""Sparse paths through tiny models."""

import math
import warnings

import models_zoo as zoo
import numpy as np
import pytest
import torch
from fits import QUIET, Trouble, interrupt, prompts, rows, same_maps, short_fit, snapshot

import lineas
from lineas import prox_sparse_group, sparse_path_end_to_end
from lineas.fitting.sparse_path import largest_penalty

LR = 0.02


@pytest.fixture(scope="module")
def llama():
    return zoo.llama().double()


@pytest.fixture(scope="module")
def path(llama):
    """A short path of the tiny Llama, unless told otherwise."""

    def make(model=llama, source=None, target=None, **settings):
        source = prompts(6, 1) if source is None else source
        target = prompts(6, 2) if target is None else target
        common = {
            "layers": zoo.NORMS["llama"],
            "scaling": "layer-mean",
            "lr": LR,
            "l1_ratio": 0.5,
            "refit_support": 1.0,
        }
        settings = {**common, **QUIET, **settings}
        if "penalties" not in settings:
            settings.setdefault("n_penalties", 6)
        return sparse_path_end_to_end(model, source, target, **settings)

    return make


HELD_OUT = (prompts(6, 3), prompts(6, 4))


@pytest.fixture(scope="module")
def whole(path):
    return path(held_out=HELD_OUT, min_ratio=1e-2, refit_steps=3)


# --- what a path is ---------------------------------------------------------------------------------------------------


def test_a_path_goes_from_the_identity_to_dense_maps(whole):
    assert isinstance(whole, lineas.EndToEndPath) and len(whole) == 6
    assert whole.modules == tuple(f"model.layers.{k}.post_attention_layernorm" for k in range(3))
    assert whole.widths == (16, 16, 16) and whole.weight.shape == (6, 48)
    assert whole.support[0] == 0 and whole.support[-1] > 40
    assert (np.diff(whole.support) >= 0).all() and (np.diff(whole.penalized_loss) < 0).all()
    np.testing.assert_allclose(whole.penalties / whole.penalties[0], np.geomspace(1, 1e-2, 6))
    assert whole.stopped == "finished" and (whole.history["kept"]).all()
    assert whole.index(best=True) == np.argmin(whole.held_out_loss)


def test_losses_are_those_of_the_maps(whole, path):
    for k in (0, 3, 5):
        seen = short_fit(zoo.llama().double(), init=whole[k], steps=1, held_out=HELD_OUT).history
        assert seen["loss"][0] == pytest.approx(whole.loss[k])
        assert seen["held_out_loss"][0] == pytest.approx(whole.held_out_loss[k])


def test_maps_of_a_point_say_where_they_come_from(whole, tmp_path):
    maps = whole.at(support=0.75)
    assert 0 < maps.support <= 36
    assert maps.metadata["method"] == "sparse path end to end"
    assert maps.metadata["settings"]["l1_ratio"] == 0.5 and maps.metadata["penalty"] in whole.penalties
    maps.save(tmp_path / "maps.safetensors")
    assert lineas.load(tmp_path / "maps.safetensors") == maps


@pytest.mark.parametrize("l1_ratio", [1.0, 0.3, 0.0])
def test_the_first_penalty_is_the_smallest_that_leaves_nothing(path, l1_ratio):
    first = path(l1_ratio=l1_ratio, n_penalties=2, min_ratio=0.5).penalties[0]
    assert path(l1_ratio=l1_ratio, penalties=[first]).support[0] == 0
    below = path(l1_ratio=l1_ratio, penalties=[first * 0.999], steps=1)
    assert below.support[0] > 0
    if l1_ratio == 0:  # whole groups: all slopes or all shifts of a module
        assert set(below.module_support[0]) <= {0, 16}


@pytest.mark.parametrize("l1_ratio", [1.0, 0.9, 0.5, 0.1, 0.0])
def test_the_largest_penalty_against_the_proximal_operator(rng, l1_ratio):
    widths = [7, 1, 30]
    slopes, shifts = rng.normal(size=38) * np.repeat([1, 3, 0.1], widths), rng.normal(size=38)
    p = largest_penalty(slopes, shifts, widths, l1_ratio)

    def left(penalty):
        groups = [part for x in (slopes, shifts) for part in np.split(x, [7, 8])]
        return [
            np.count_nonzero(prox_sparse_group(g, tau=1, l1=penalty * l1_ratio, group=penalty * (1 - l1_ratio)))
            for g in groups
        ]

    assert not any(left(p * (1 + 1e-9)))
    assert sum(map(bool, left(p * (1 - 1e-6)))) == 1
    if l1_ratio == 1:
        assert p == pytest.approx(max(np.abs(slopes).max(), np.abs(shifts).max()))
    assert largest_penalty(np.zeros(38), np.zeros(38), widths, l1_ratio) == 0


def test_each_point_starts_where_the_last_ended(path):
    penalties = [0.3, 0.1, 0.05]
    found = path(penalties=penalties, steps=1, l1_ratio=0.75)
    plain = {"steps": 1, "optimizer": "sgd"}
    init = None
    for k, (penalty, rate) in enumerate(zip(penalties, found.history["lr"], strict=True)):
        expected = short_fit(zoo.llama().double(), init=init, lr=rate, l1=0.75 * penalty, group=0.25 * penalty, **plain)
        same_maps(found[k], expected.maps, atol=1e-14)
        init = found[k]
    assert found.history["lr"][0] == LR and found.history["lr"][2] != LR
    # and so gets further than it would from the identity
    assert found.loss[-1] < 0.9 * path(penalties=penalties[-1:], steps=1, l1_ratio=0.75).loss[-1]


def test_many_steps_solve_the_problem(path):
    """The optimality conditions of the sparse group lasso, where the loss is smooth enough to be solved."""
    penalty, ratio = 0.2, 0.5
    found = path(penalties=[penalty], l1_ratio=ratio, steps=150)
    again = path(penalties=[penalty], l1_ratio=ratio, steps=300)
    assert 0 < found.support[0] < 48
    np.testing.assert_array_equal(found.weight != 1, again.weight != 1)
    np.testing.assert_allclose(found.weight, again.weight, atol=1e-3)
    np.testing.assert_allclose(found.bias, again.bias, atol=1e-3)


def test_a_batched_source_and_unequal_sizes(path, whole):
    source = prompts(6, 1)
    settings = dict(min_ratio=1e-2, held_out=HELD_OUT, refit_steps=3)
    batched = path(source=[rows(source, 0, 2), rows(source, 2, 6)], **settings)
    np.testing.assert_allclose(batched.loss, whole.loss, rtol=1e-6)
    assert path(source=prompts(9, 1), n_penalties=3).loss.shape == (3,)


def test_float32_and_channels_first():
    model = zoo.cnn()
    found = sparse_path_end_to_end(
        model, zoo.images(8, seed=1), zoo.images(6, seed=2) * 2, layers=["bn", "gn"], n_penalties=5, **QUIET
    )
    assert found.weight.dtype == np.float32 and found.widths == (6, 8) and found.support[0] == 0
    assert found.loss[-1] < found.loss[0] and found.held_out_loss is None and found.penalized_held_out_loss is None


def test_loss_layers_seed_and_repeatability(path, llama):
    settings = dict(layers="model.layers.0.*_layernorm", loss_layers="model.layers.1.mlp", n_penalties=3, seed=3)
    before = snapshot(llama)
    first, second = path(**settings), path(**settings)
    np.testing.assert_array_equal(first.weight, second.weight)
    assert len(first.modules) == 2 and snapshot(llama) == before


# --- refits -----------------------------------------------------------------------------------------------------------


def test_a_refit_keeps_the_support_and_lowers_the_loss(path):
    settings = dict(min_ratio=1e-2, n_penalties=6)
    plain, refitted = path(**settings), path(refit_steps=4, **settings)
    np.testing.assert_array_equal(plain.penalized_loss, plain.loss)
    np.testing.assert_array_equal(refitted.penalized_loss, plain.loss)  # a refit leaves the path as it was
    assert not plain.refitted.any() and refitted.refitted.tolist() == [False] + [True] * 5
    np.testing.assert_array_equal(refitted.module_support, plain.module_support)
    changed = (plain.weight != 1) | (plain.bias != 0)
    np.testing.assert_array_equal((refitted.weight != 1) | (refitted.bias != 0), changed)
    assert (refitted.loss[1:] < refitted.penalized_loss[1:]).all()
    # both parameters of a neuron are free, and without a penalty a sparse point reaches a loss far below
    assert refitted.loss[2] < 0.97 * plain.loss[2]


def test_dense_points_are_not_refitted(path):
    found = path(min_ratio=1e-2, refit_steps=2, refit_support=0.75)
    sparse = (found.support > 0) & (found.support <= 0.75 * 48)
    assert 0 < sparse.sum() < 5
    np.testing.assert_array_equal(found.refitted, sparse)
    assert set(found.history["point"][found.history["refit"]]) == set(np.flatnonzero(sparse))


def test_a_refit_that_harms_held_out_prompts_is_not_kept(path):
    # Held-out sets that the identity fits perfectly: every step away from it harms.
    same = prompts(6, 1)
    settings = dict(n_penalties=4, min_ratio=0.05)
    kept, plain = path(held_out=(same, same), refit_steps=3, **settings), path(held_out=(same, same), **settings)
    assert not kept.refitted.any() and kept.history["refit"].any()
    np.testing.assert_array_equal(kept.weight, plain.weight)
    np.testing.assert_array_equal(kept.held_out_loss, kept.penalized_held_out_loss)
    assert kept.index(best=True) == 0


# --- cost and rates ---------------------------------------------------------------------------------------------------


class Count:
    def __init__(self):
        self.calls = 0

    def __call__(self, model, batch):
        self.calls += 1
        return model(**batch)


@pytest.mark.parametrize(("held_out", "refit_steps"), [(None, 0), (HELD_OUT, 0), (HELD_OUT, 3)])
def test_passes_are_counted(path, held_out, refit_steps):
    count = Count()
    found = path(forward=count, held_out=held_out, refit_steps=refit_steps, steps=2)
    taken = len(found.history["loss"])
    assert taken == 5 * 2 + 5 * refit_steps  # the first point is the identity and costs none
    set_up = 1 if held_out is None else 2
    trials = 0 if held_out is None else 6 + (5 if refit_steps else 0)
    assert count.calls == set_up + 1 + taken + trials
    assert found.passes == set_up + 3 * (1 + taken) + trials


def test_steps_that_make_things_worse_are_taken_back(path):
    found = path(lr=8.0, penalties=[0.3, 0.1, 0.03], steps=6)
    kept = found.history["kept"]
    assert 0 < kept.sum() < kept.size
    start = path(n_penalties=2).loss[0]
    assert found.loss[0] <= start and (np.diff(found.loss) <= 0).all()
    worse = np.flatnonzero(~kept[:-1])
    assert (found.history["lr"][worse + 1] <= found.history["lr"][worse] / 4 * (1 + 1e-12)).all()


def test_history(path):
    found = path(penalties=[0.3, 0.1], steps=2, refit_steps=1)
    assert found.history["point"].tolist() == [0, 0, 0, 1, 1, 1]
    assert found.history["penalty"].tolist() == [0.3] * 3 + [0.1] * 3
    assert found.history["refit"].tolist() == [False, False, True] * 2
    assert found.history["loss"][[1, 4]].tolist() == found.penalized_loss.tolist()
    assert found.history["loss"][[2, 5]].tolist() == found.loss.tolist()


# --- early ends -------------------------------------------------------------------------------------------------------


# Calls: targets, held-out targets, start; then two steps, a held-out loss, two steps of the refit, a held-out
# loss for each point. The third penalty's refit is where the last two are interrupted.
@pytest.mark.parametrize(("call", "points", "refitted"), [(4 + 6, 1, 1), (4 + 8, 1, 1), (4 + 9, 2, 1), (4 + 11, 2, 1)])
def test_an_interrupt_keeps_the_points(path, llama, call, points, refitted):
    before = snapshot(llama)
    settings = dict(penalties=[0.3, 0.1, 0.05], refit_steps=2, held_out=(prompts(6, 1), prompts(6, 2)))
    full = path(forward=Trouble(10**9, interrupt), **settings)
    found = path(forward=Trouble(call, interrupt), **settings)
    assert (found.stopped, len(found)) == ("interrupted", points)
    assert found.refitted.sum() == refitted
    np.testing.assert_array_equal(found.penalized_loss, full.penalized_loss[:points])
    np.testing.assert_array_equal(found.loss[:refitted], full.loss[:refitted])
    np.testing.assert_array_equal(found.penalties, full.penalties[:points])
    assert snapshot(llama) == before


@pytest.mark.parametrize("call", [1, 4])
def test_an_interrupt_before_the_first_point_is_passed_on(path, llama, call):
    before = snapshot(llama)
    with pytest.raises(KeyboardInterrupt):
        path(forward=Trouble(call, interrupt), penalties=[0.3, 0.1])
    assert snapshot(llama) == before


def poison(model):
    model[2].weight.data.fill_(math.nan)


X = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(6, 5)


def poisoned(at):
    return sparse_path_end_to_end(
        zoo.mlp().double(), X, X**2, layers="[02]", forward=Trouble(at, poison), penalties=[0.1, 0.01], lr=0.1, **QUIET
    )


def test_a_loss_that_is_not_finite_ends_the_path():
    with pytest.warns(
        RuntimeWarning, match=r"sparse_path_end_to_end stopped, not finite at penalty 0.01: source: 2: nan"
    ):
        found = poisoned(2 + 3)
    assert found.stopped.startswith("not finite at penalty 0.01: source: 2: nan at row 0, column 0")
    assert len(found) == 1 and np.isfinite(found.weight).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert poisoned(10**9).loss[0] == found.loss[0]


def test_a_loss_that_is_not_finite_before_the_first_point_is_an_error():
    with pytest.raises(ValueError, match="not finite before any step: source: 2: nan at row 0, column 0"):
        poisoned(2)
    with pytest.raises(ValueError, match=r"no point of the path was found, not finite at penalty 0\.1: source: 2: nan"):
        poisoned(3)


# --- arguments --------------------------------------------------------------------------------------------------------

BAD = [
    (dict(n_penalties=None), TypeError, "n_penalties must be an int, got NoneType"),
    (dict(penalties=0.1), TypeError, "penalties must be a sequence of numbers, got float"),
    (dict(penalties="0.1"), TypeError, "penalties must be a sequence of numbers, got str"),
    (dict(penalties=[]), ValueError, "penalties is empty"),
    (dict(penalties=[0.1, "a"]), TypeError, r"penalties\[1\] must be a real number, got str"),
    (dict(penalties=[0.1, 0.0]), ValueError, r"penalties\[1\] must be above 0, got 0"),
    (dict(penalties=[0.1, 0.1]), ValueError, "penalties must fall, got 0.1 and then 0.1 at index 1"),
    (dict(n_penalties=1), ValueError, "n_penalties must be at least 2, got 1"),
    (dict(n_penalties=2.0), TypeError, "n_penalties must be an int, got float"),
    (dict(min_ratio=0), ValueError, "min_ratio must be above 0, got 0"),
    (dict(min_ratio=1), ValueError, "min_ratio must be below 1, got 1"),
    (dict(l1_ratio=1.5), ValueError, "l1_ratio must be from 0 to 1, got 1.5"),
    (dict(l1_ratio=-0.1), ValueError, "l1_ratio must be from 0 to 1, got -0.1"),
    (dict(steps=0), ValueError, "steps must be at least 1, got 0"),
    (dict(refit_steps=-1), ValueError, "refit_steps must be at least 0, got -1"),
    (dict(refit_support=1.5), ValueError, "refit_support must be from 0 to 1, got 1.5"),
    (dict(lr=0), ValueError, "lr must be above 0, got 0"),
    (dict(seed=-1), ValueError, "seed must be at least 0, got -1"),
    (
        dict(scaling="eq4"),
        ValueError,
        "scaling must be one of 'standardized', 'layer-mean', 'paper', 'reference', got 'eq4'",
    ),
    (dict(pooling="median"), ValueError, "pooling must be one of"),
    (dict(layers="model.layer.*"), ValueError, "layers: no module matches 'model.layer.*'"),
    (dict(target=prompts(1, 1)), ValueError, "target must give at least 2 samples after pooling, got 1"),
    (dict(held_out=(prompts(4, 1),)), ValueError, r"held_out must be a pair \(source, target\), got 1 entries"),
    (dict(source=["a text"]), ValueError, "source holds texts: pass tokenizer="),
    (dict(source=prompts(4, 1), target=prompts(4, 1)), ValueError, "penalties: the gradient at the identity is zero"),
]


@pytest.mark.parametrize(("settings", "error", "text"), BAD, ids=[text[:40] for *_, text in BAD])
def test_errors(path, llama, settings, error, text):
    before = snapshot(llama)
    with pytest.raises(error, match=text):
        path(**settings)
    assert snapshot(llama) == before
