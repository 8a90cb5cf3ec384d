"""lineas.explore on the kernel's side: what is sent to the browser, what reaches the model, and where no browser is."""

import dataclasses
import gc
import itertools
import json
import subprocess
import sys
import weakref
from base64 import b64decode

import models_zoo
import numpy as np
import paths
import pytest
import torch
from attached import hooks_on, logits

import lineas
from lineas.hooks import modules

explorer = pytest.importorskip("lineas.notebook.explorer", exc_type=ImportError)
CELLS, TOP = explorer.CELLS, explorer.TOP

PROMPT = "the train was"


@pytest.fixture(scope="module")
def path():
    return paths.path(4, 300, 12, metadata={"method": "sparse path"})


@pytest.fixture(autouse=True)
def close_widgets():
    yield
    import ipywidgets

    ipywidgets.Widget.close_all()


def small_model(seed=0):
    """A tiny language model, its tokenizer, and a path for its norms."""
    model = models_zoo.llama(seed)
    names = modules.resolve(model, models_zoo.NORMS["llama"])
    return model, models_zoo.tokenizer(), paths.path(names, models_zoo.WIDTH, 10, seed=seed)


def cells(view):
    data = np.frombuffer(view._point_data["cells"], "<u4")
    return data.reshape(-1, view._path_data["columns"])


# ---- the pictures ----------------------------------------------------------------------------------------------------


def test_moves_send_what_the_maps_of_that_point_change(path):
    view = lineas.explore(path)
    for index in (0, 5, 11):
        view.index = index
        maps = path.at(index=index)
        assert view.maps == maps and view.support == maps.support and view.penalty == path.penalties[index]
        assert view._point_data["index"] == index
        found = cells(view)
        assert found.shape == (4, CELLS)
        assert found.sum(axis=1).tolist() == [one.support for one in maps.values()]
        # Cell by cell, against masks cut at the cells' edges.
        for row, one in zip(found, maps.values(), strict=True):
            changed = (one.weight != 1) | (one.bias != 0)
            edges = np.arange(CELLS + 1) * 300 // CELLS
            assert row.tolist() == [changed[a:b].sum() for a, b in itertools.pairwise(edges)]


def test_the_most_changed_neurons_are_listed_largest_first(path):
    view = lineas.explore(path, index=8)
    rows = view._point_data["top"]
    assert len(rows) == TOP
    sizes = {
        (module, neuron): np.hypot(one.weight[neuron] - 1, one.bias[neuron])
        for module, one in enumerate(view.maps.values())
        for neuron in range(one.d)
    }
    expected = sorted(sizes, key=sizes.get, reverse=True)[:TOP]
    assert [(module, neuron) for module, neuron, _, _ in rows] == expected
    for module, neuron, weight, bias in rows:
        one = list(view.maps.values())[module]
        assert (weight, bias) == (one.weight[neuron], one.bias[neuron])


def test_the_curves_of_the_path_are_sent_once(path):
    view = lineas.explore(path)
    data = view._path_data
    assert data["penalties"] == path.penalties.tolist() and data["support"] == path.support.tolist()
    assert data["loss"] == path.loss.tolist() and data["heldOut"] == path.held_out_loss.tolist()
    assert np.array_equal(np.frombuffer(data["moduleSupport"], "<u4").reshape(12, 4), path.module_support)
    assert data["pattern"] == "model.layers.*.post_attention_layernorm" and data["labels"] == ["0", "1", "2", "3"]
    view.index = 1
    assert view._path_data is data


def test_values_that_json_does_not_have_are_sent_as_null():
    given = paths.path(2, 30, 5)
    given = dataclasses.replace(given, loss=np.where(np.arange(5) == 1, np.nan, given.loss))
    data = lineas.explore(given)._path_data
    assert data["loss"][1] is None
    json.dumps({name: value for name, value in data.items() if not isinstance(value, bytes)}, allow_nan=False)


def test_modules_narrower_than_the_picture_have_cells_that_repeat():
    view = lineas.explore(paths.path(["a", "b"], [8, 300], 6), index=5)
    assert view._path_data["columns"] == CELLS
    first = view.maps["a"]
    changed = (first.weight != 1) | (first.bias != 0)
    assert cells(view)[0].tolist() == changed[np.arange(CELLS) * 8 // CELLS].tolist()


def test_a_move_sends_one_small_message_of_new_data(path, monkeypatch):
    view = lineas.explore(path, index=3)
    sent = []
    monkeypatch.setattr(view.comm, "send", lambda data=None, metadata=None, buffers=None: sent.append((data, buffers)))
    view.index = 4
    assert [list(data["state"]) for data, _ in sent] == [["index"], ["_point_data"]]
    assert sum(len(buffer) for _, buffers in sent for buffer in buffers or ()) == 4 * CELLS * 4


# ---- what is chosen --------------------------------------------------------------------------------------------------


def test_the_first_point_is_the_best_on_held_out_data_or_else_the_middle():
    best = paths.path(2, 30, 9)
    assert lineas.explore(best).index == int(np.argmin(best.held_out_loss)) != 4
    assert lineas.explore(paths.path(2, 30, 9, held_out=False)).index == 4
    assert lineas.explore(best, index=-1).index == 8


def test_support_chooses_as_the_path_does(path):
    view = lineas.explore(path)
    view.support = 0.05
    assert view.maps == path.at(support=0.05)
    view.support = 7
    assert view.index == path.index(support=7)


def test_one_set_of_maps_has_no_sparsity_to_choose(path):
    maps = path.at(index=7)
    view = lineas.explore(maps, strength=0.5)
    assert view.maps is maps and view.penalty == path.penalties[7] and view.strength == 0.5
    assert view._path_data["loss"] == [None] and len(view._path_data["support"]) == 1
    assert cells(view).sum() == maps.support
    assert "image/png" in view._repr_mimebundle_()[0]
    one = lineas.explore(maps["model.layers.0.post_attention_layernorm"])
    assert np.isnan(one.penalty) and one.support == one.maps.support


def test_a_path_of_one_array_is_explored():
    view = lineas.explore(paths.path(None, 50, 6))
    assert isinstance(view.maps, lineas.AffineMap) and cells(view).sum() == view.support
    assert "image/png" in view._repr_mimebundle_()[0]


# ---- the model -------------------------------------------------------------------------------------------------------


def test_sliders_reach_the_model_without_a_new_fit():
    model, _, path = small_model()
    plain = logits(model)
    with lineas.explore(path, model, index=9, strength=0.5) as view:
        for index, strength in ((9, 0.5), (9, 1.5), (4, 1.5), (4, 0.0)):
            view.index, view.strength = index, strength
            found = logits(model)
            view.handle.strength = 0
            with path.at(index=index).attach(model, strength=strength):
                expected = logits(model)
            view.handle.strength = strength
            assert torch.equal(found, expected)
            assert torch.equal(found, plain) == (strength == 0)
    assert hooks_on(model) == 0 and torch.equal(logits(model), plain)


def test_close_and_detach_take_the_maps_off_and_can_be_repeated():
    model, tokenizer, path = small_model()
    view = lineas.explore(path, model, tokenizer)
    assert view._attached and view.handle.attached
    view.detach()
    assert not view._attached and view.handle is None and hooks_on(model) == 0
    view.index = 2  # the pictures go on
    assert view._point_data["index"] == 2
    view.close()
    view.close()
    with pytest.raises(RuntimeError, match="text needs a model with its tokenizer: the maps were taken off the model"):
        view.generate(PROMPT)
    with pytest.raises(ZeroDivisionError), lineas.explore(path, model):
        raise ZeroDivisionError
    assert hooks_on(model) == 0


def test_a_second_explorer_of_a_model_takes_the_place_of_the_first():
    model, _, path = small_model()
    first = lineas.explore(path, model)
    hooks = hooks_on(model)
    second = lineas.explore(path, model)
    assert hooks_on(model) == hooks and first.handle is None and not first._attached and second.handle.attached


def test_a_closed_explorer_lets_its_model_go():
    model, tokenizer, path = small_model()
    view = lineas.explore(path, model, tokenizer)
    view.close()
    gone = weakref.ref(model)
    del model, view
    gc.collect()
    assert gone() is None


def test_text_without_and_with_the_maps():
    model, tokenizer, path = small_model()

    def by_hand():
        batch = tokenizer(PROMPT, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)

    expected = by_hand()
    view = lineas.explore(path, model, tokenizer, max_new_tokens=8, strength=1.5)
    assert view._path_data["text"] and view._text_data["state"] == "idle"
    unsteered, steered = view.generate(PROMPT)
    assert (unsteered, steered) == (expected, by_hand())
    assert unsteered != steered
    shown = view._text_data
    assert (shown["state"], shown["unsteered"], shown["steered"]) == ("done", unsteered, steered)
    assert (shown["prompt"], shown["index"], shown["strength"]) == (PROMPT, view.index, 1.5)
    assert view.handle.strength == 1.5


def test_the_browsers_request_is_carried_out_with_what_it_shows():
    model, _, path = small_model()
    calls = []

    def generate(prompt):
        calls.append(view.handle.strength)
        return f"{prompt} {view.handle.strength:g}"

    view = lineas.explore(path, model, generate=generate)
    request = {"type": "generate", "prompt": "a", "index": 3, "strength": 0.25, "renew": True}
    view._handle_custom_msg(request, [])
    assert (view.prompt, view.index, view.strength) == ("a", 3, 0.25)
    assert (view._text_data["unsteered"], view._text_data["steered"]) == ("a 0", "a 0.25")
    # On a slider's move only the steered text is made anew, unless the prompt is another one.
    view._handle_custom_msg({**request, "strength": 0.5, "renew": False}, [])
    assert calls == [0, 0.25, 0.5] and view._text_data["steered"] == "a 0.5"
    view._handle_custom_msg({**request, "prompt": "b", "renew": False}, [])
    assert calls == [0, 0.25, 0.5, 0, 0.25]
    view._handle_custom_msg({"type": "something else"}, [])
    assert len(calls) == 5


def test_errors_while_text_is_made_are_shown_and_leave_the_strength():
    model, _, path = small_model()

    def generate(prompt):
        raise OSError("out of paper")

    view = lineas.explore(path, model, generate=generate, strength=0.5)
    with pytest.raises(OSError, match="out of paper"):
        view.generate("a")
    view._handle_custom_msg({"type": "generate", "prompt": "a", "index": 1, "strength": 0.5, "renew": True}, [])
    assert view._text_data == {"state": "error", "message": "OSError: out of paper"}
    assert view.handle.strength == 0.5


# ---- where no browser is ---------------------------------------------------------------------------------------------


def test_the_saved_output_holds_a_picture_beside_the_view(path):
    view = lineas.explore(path)
    bundle, _ = view._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == view.model_id
    assert b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["text/plain"] == repr(view)
    assert repr(view) == (
        f"Explorer(index={view.index} of 12, penalty={view.penalty:.4g}, support={view.support} of 1200, strength=1)"
    )


def test_the_still_picture_shows_the_chosen_point(path):
    view = lineas.explore(path, index=7)
    axes = {ax.get_label(): ax for ax in view.plot().axes}
    assert {line.get_label() for line in axes["loss"].get_lines()} >= {"fitted", "held out"}
    image = axes["cells"].get_images()[0].get_array()
    assert np.count_nonzero(image) == np.count_nonzero(cells(view))
    assert [bar.get_width() for bar in axes["top"].patches] == pytest.approx(
        [np.hypot(weight - 1, bias) for _, _, weight, bias in view._point_data["top"]]
    )
    assert f"{path.support[7]:,} of 1,200 neurons" in axes["text"].texts[0].get_text()


def test_without_matplotlib_the_view_still_works(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    view = lineas.explore(path)
    assert set(view._repr_mimebundle_()[0]) == {"application/vnd.jupyter.widget-view+json", "text/plain"}
    with pytest.raises(ImportError, match=r'drawing needs matplotlib: pip install "lineas\[plot\]"'):
        view.plot()


def test_without_anywidget_the_error_names_the_extra():
    code = """
import sys
sys.modules["anywidget"] = None
import lineas
try:
    lineas.explore(None)
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == 'lineas.explore needs ipywidgets and anywidget: pip install "lineas[notebook]"'


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"path": 3}, TypeError, r"path must be a SparsePath, FitResult, SteeringMaps or AffineMap, got int"),
        ({"tokenizer": "t"}, TypeError, r"tokenizer needs a model, got model=None"),
        ({"generate": str}, TypeError, r"generate needs a model, got model=None"),
        ({"generate": 3, "model": 1}, TypeError, r"generate must be a function from prompt to text, got int"),
        ({"tokenizer": 3, "model": 1}, TypeError, r"tokenizer must be a loaded tokenizer, such as .*, got int"),
        (
            {"tokenizer": str.split, "model": 1},
            TypeError,
            r"tokenizer must have decode\(\) to make text, got method_de",
        ),
        ({"index": 12}, IndexError, r"index must be from -12 to 11, got 12"),
        ({"index": 1.0}, TypeError, r"index must be an int, got float"),
        ({"strength": [1]}, TypeError, r"strength must be a real number, got list"),
        ({"strength": "1"}, ValueError, r"strength must be a number or 'calibrated', got '1'"),
        ({"strength": "calibrated"}, ValueError, r"strength='calibrated' is for maps that were calibrated"),
        ({"strength": float("nan")}, ValueError, r"strength must be finite, got nan"),
        ({"max_strength": 0}, ValueError, r"max_strength must be above 0, got 0"),
        ({"max_new_tokens": 0}, ValueError, r"max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 1.5}, TypeError, r"max_new_tokens must be an int, got float"),
        ({"prompt": 3}, TypeError, r"prompt must be a str, got int"),
        ({"live_text": "yes"}, TypeError, r"live_text must be a bool, got str"),
    ],
)
def test_arguments_that_are_wrong_are_named(path, settings, error, message):
    with pytest.raises(error, match=message):
        lineas.explore(settings.pop("path", path), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_strength": -1},
        {"max_strength": "2"},
        {"max_new_tokens": 0},
        {"strength": "1"},
        {"index": 10},
        {"tokenizer": 3},
        {"prompt": 3},
        {"live_text": 1},
        {"generate": 3},
    ],
)
def test_wrong_arguments_leave_no_hook_and_the_former_explorer_on(settings):
    model, tokenizer, path = small_model()
    former = lineas.explore(path, model)
    hooks = hooks_on(model)
    with pytest.raises((TypeError, ValueError, IndexError)):
        lineas.explore(path, model, tokenizer, **settings)
    assert hooks_on(model) == hooks and former.handle.attached


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_widget_that_cannot_be_made_leaves_no_hook_and_the_former_explorer_on(monkeypatch, error):
    model, _, path = small_model()
    former = lineas.explore(path, model)
    hooks = hooks_on(model)

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(explorer.anywidget.AnyWidget, "__init__", fail)
        with pytest.raises(error):
            lineas.explore(path, model)
    assert hooks_on(model) == hooks and former.handle.attached
    former.close()
    assert hooks_on(model) == 0


def test_settings_that_are_wrong_later_change_nothing(path):
    view = lineas.explore(path, index=3, strength=0.5)
    with pytest.raises(IndexError, match="index must be from -12 to 11, got 99"):
        view.index = 99
    with pytest.raises(ValueError, match="strength must be a number or 'calibrated', got 'much'"):
        view.strength = "much"
    with pytest.raises(ValueError, match="support must be from 0 to 1200 neurons, got 5000"):
        view.support = 5000
    assert (view.index, view.strength) == (3, 0.5)


@pytest.mark.parametrize("strength", [9.0, -1.0])
def test_a_strength_beyond_the_slider_is_taken(path, strength):
    view = lineas.explore(path, strength=strength, max_strength=2)  # the browser makes the slider longer
    assert view.strength == strength and view._path_data["maxStrength"] == 2
    view.strength = 2 * strength
    assert view.strength == 2 * strength


def test_models_that_do_not_fit_are_refused_and_nothing_is_attached(path):
    model, tokenizer, fits = small_model()
    with pytest.raises(ValueError, match="model: a path or map of one array names no module"):
        lineas.explore(paths.path(None, 16, 5), model)
    with pytest.raises(ValueError, match="the map is for 300 neurons, the module has 16"):
        lineas.explore(paths.path(3, 300, 5), model)
    assert hooks_on(model) == 0
    with pytest.raises(RuntimeError, match="text needs a model with its tokenizer: none was given"):
        lineas.explore(fits, model).generate(PROMPT)
    with pytest.raises(ValueError, match="prompt '' has no tokens"):
        lineas.explore(fits, model, tokenizer).generate("")
