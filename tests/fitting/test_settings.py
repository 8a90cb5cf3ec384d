"""Settings of fits: one class, shown and checked as keyword arguments."""

import inspect
import subprocess
import sys
from dataclasses import fields

import models_zoo as zoo
import pytest
import torch
from fits import QUIET, prompts

import lineas
from lineas.fitting.settings import FitSettings, IncrementalSettings, JointSettings, PathSettings, SequenceSettings
from lineas.hooks.settings import QuantilesSettings, RunSettings, takes

CALLS = {
    lineas.collect: RunSettings,
    lineas.collect_quantiles: QuantilesSettings,
    lineas.fit_end_to_end: FitSettings,
    lineas.fit_jointly: JointSettings,
    lineas.fit_sequence: SequenceSettings,
    lineas.fit_incremental: IncrementalSettings,
    lineas.sparse_path_end_to_end: PathSettings,
}


@pytest.mark.parametrize(("function", "settings"), CALLS.items(), ids=lambda one: one.__name__)
def test_signature_and_description_show_every_setting(function, settings):
    shown = inspect.signature(function).parameters
    for field in fields(settings):
        assert shown[field.name].default == field.default and shown[field.name].kind == inspect.Parameter.KEYWORD_ONLY
    given = [name for name in shown if name not in settings.__dataclass_fields__]
    assert given in (["model", "data"], ["model", "source", "target"], ["model", "tasks"])
    described = inspect.getdoc(function).partition("Parameters\n----------\n")[2].partition("\nReturns\n")[0]
    entries = [line.partition(" : ")[0] for line in described.splitlines() if line and not line.startswith(" ")]
    names = [name for entry in entries for name in entry.split(", ")]
    assert names == list(dict.fromkeys(names)) and set(names) == set(shown)
    assert "**settings" not in function.__doc__


def test_every_setting_is_described_once():
    for settings in set(CALLS.values()):
        for base in settings.__mro__[:-1]:
            for name in base.__annotations__:
                assert f"{name} : " in base.__doc__ or f"{name}, " in base.__doc__ or f", {name} : " in base.__doc__


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lineas.fit_end_to_end, "(source, target)"),
        (lineas.sparse_path_end_to_end, "(source, target)"),
        (lineas.fit_jointly, "dict of str to (source, target)"),
        (lineas.fit_sequence, "dict of str to (source, target)"),
    ],
)
def test_the_held_out_sets_are_described_as_each_function_takes_them(function, kind):
    described = inspect.getdoc(function)
    assert f"\nheld_out : {kind}, optional\n" in described
    assert any(words in described for words in ("each task", "each concept")) == ("dict" in kind)
    assert ("mini-batches, and of torch" in described) == (function is not lineas.sparse_path_end_to_end)


def test_arguments_are_bound_as_python_does():
    @takes(RunSettings)
    def fit(model, source, settings):
        """Fit."""
        return model, source, settings

    model, source, settings = fit(1, source=2, pooling="max")
    assert (model, source, settings.pooling, settings.progress) == (1, 2, "max", True)
    with pytest.raises(TypeError, match=r"^fit\(\) missing a required argument: 'source'"):
        fit(1)
    with pytest.raises(TypeError, match=r"^fit\(\) got an unexpected keyword argument 'poling' \(similar: pooling"):
        fit(1, 2, poling="max")
    with pytest.raises(TypeError, match=r"^fit\(\) takes only model, source by position, got 3 positional .* by name"):
        fit(1, 2, 3)


def test_an_unknown_setting_of_a_fit_names_its_like():
    with pytest.raises(TypeError, match=r"^fit_end_to_end\(\) got an unexpected keyword argument 'learning_rate'"):
        lineas.fit_end_to_end(zoo.mlp(), [], [], learning_rate=1)


def test_settings_need_no_torch():
    code = "import sys, lineas.fitting.settings as s; s.FitSettings(l1=0.1); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_metadata_keep_the_settings():
    maps = lineas.fit_end_to_end(
        zoo.llama(), prompts(3, 1), prompts(3, 2), layers=zoo.NORMS["llama"], steps=1, l1=0.5, **QUIET
    ).maps
    kept = maps.metadata["settings"]
    elsewhere = {"layers", "loss_layers", "pooling", "tokens"}
    unknown_to_json = {
        "tokenizer",
        "forward",
        "progress",
        "held_out",
        "keep",
        "gates",
        "init",
        "on_top_of",
        "checkpoint",
        "process_group",
    }
    assert set(kept) == {field.name for field in fields(FitSettings)} - elsewhere - unknown_to_json
    assert (kept["l1"], kept["l1_bias"], kept["lr"], kept["betas"]) == (0.5, 0.5, "auto", [0.9, 0.999])


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"forward": 3}, TypeError, "forward must be a function of model and batch, got int"),
        ({"progress": 1}, TypeError, "progress must be True or False, got 1"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"max_length": True}, TypeError, "max_length must be an int, got bool"),
        ({"pooling": "median"}, ValueError, "pooling must be one of 'mean', 'min', 'max', 'last', 'all', got 'median'"),
        ({"tokenizer": "gpt2"}, TypeError, r"tokenizer must be a loaded tokenizer, .*from_pretrained\(name\), got str"),
        ({"tokenizer": dict}, TypeError, r"tokenizer must be a loaded tokenizer, .*, got <class 'dict'>"),
        ({"tokens": 3}, TypeError, "tokens must be 'all', 'last', 'prompt', 'generated', a slice or a callable"),
    ],
)
def test_settings_are_checked_before_anything_is_run(settings, error, text):
    with pytest.raises(error, match=text):
        RunSettings(**settings)


def calls_of(model, **settings):
    """Every function that runs a model, called with one."""
    pair, settings = (torch.ones(2, 5), torch.zeros(2, 5)), {"layers": "0", **settings, **QUIET}
    return {
        "collect": lambda: lineas.collect(model, pair[0], **settings),
        "fit_incremental": lambda: lineas.fit_incremental(model, *pair, **settings),
        "fit_end_to_end": lambda: lineas.fit_end_to_end(model, *pair, **settings),
        "fit_jointly": lambda: lineas.fit_jointly(model, {"a": pair, "b": pair}, **settings),
        "sparse_path_end_to_end": lambda: lineas.sparse_path_end_to_end(model, *pair, **settings),
        "sites": lambda: lineas.sites(model, pair[0]),
    }


FUNCTIONS = list(calls_of(None))


class Pipeline:
    """Neither callable nor a module, with a model in it."""

    model = zoo.mlp()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("model", ["gpt2", None, [], Pipeline()], ids=lambda model: type(model).__name__)
def test_what_is_no_model_is_refused_by_every_function(name, model):
    kind = type(model).__name__
    with pytest.raises(TypeError, match=rf"^model must be a torch\.nn\.Module, got {kind} \(of a pipeline, pass the"):
        calls_of(model)[name]()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_model_without_weights_is_refused_by_every_function(name):
    with pytest.raises(ValueError, match=r"^model: its weights are on the meta device, which holds shapes and no val"):
        calls_of(zoo.mlp().to("meta"))[name]()


@pytest.mark.parametrize("name", ["fit_end_to_end", "fit_jointly", "sparse_path_end_to_end"])
def test_seeds_that_torch_has_none_of(name):
    with pytest.raises(ValueError, match=r"^seed must be below 2\*\*64, got 1180591620717411303424"):
        calls_of(zoo.mlp(), seed=2**70)[name]()
    calls_of(zoo.mlp(), seed=2**64 - 1, steps=1)[name]()
