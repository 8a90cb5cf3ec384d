"""Everything gives the same bits whatever torch's default device and dtype are: every tensor says where and what it is.

"meta" stands for an accelerator, which would be the default where models are loaded onto it.
"""

import contextlib
import functools
import os
from types import SimpleNamespace

import fold_cases
import models_zoo as zoo
import numpy as np
import pytest
import torch
from attached import GREEDY, random_maps

import lineas
from lineas import baselines
from lineas.fitting import autograd, parameters
from lineas.hooks import affine, modules, pooling

NORMS = zoo.NORMS["llama"]
TEXTS = {seed: zoo.texts(6, seed=seed) for seed in range(1, 5)}
FIT = {"layers": NORMS, "tokenizer": zoo.tokenizer(), "progress": False}
SHORT = {**FIT, "steps": 3}
LAST = {"layers": NORMS, "tokens": "last", "tokenizer": zoo.tokenizer(), "progress": False}


@contextlib.contextmanager
def defaults(device=None, dtype=torch.float32):
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


ODD = {"meta": {"device": "meta"}, "float64": {"dtype": torch.float64}, "bfloat16": {"dtype": torch.bfloat16}}


@functools.cache
def inputs():
    """What users have made before, with torch as it usually is."""
    model, rng = zoo.llama(), np.random.default_rng(0)
    names = modules.resolve(model, NORMS)
    maps = random_maps(dict.fromkeys(names, zoo.WIDTH))
    encoder = zoo.tokenizer()
    return SimpleNamespace(
        model=model,
        half=zoo.llama().bfloat16(),
        checkpointed=_checkpointed(),
        cnn=zoo.cnn(),
        images=[zoo.images(5, seed=seed) for seed in (1, 2)],
        maps=maps,
        batch=dict(encoder(TEXTS[1][:3], return_tensors="pt", padding=True)),
        tensors=[torch.tensor(rng.normal(size=(n, 4)), dtype=torch.float32) for n in (9, 8)],
        folded=fold_cases.language_model("llama"),
        converted=fold_cases.language_model("mistral"),
    )


def _checkpointed():
    model = zoo.llama().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def end_to_end(given, model=None, *, batches=False, **settings):
    source, target, *held_out = (list(texts) for texts in TEXTS.values())
    settings = {**SHORT, "held_out": tuple(held_out), **settings}
    if batches:
        source, target = given.batch, {key: value.flip(0) for key, value in given.batch.items()}
        settings |= {"tokenizer": None, "held_out": None}
    result = lineas.fit_end_to_end(model or given.model, source, target, **settings)
    return [result.maps, result.history["loss"], result.history["held_out_loss"]]


def path_end_to_end(given):
    settings = {**SHORT, "n_penalties": 3, "refit_steps": 2, "held_out": (TEXTS[3], TEXTS[4])}
    return lineas.sparse_path_end_to_end(given.model, TEXTS[1], TEXTS[2], **settings)


def jointly(given):
    tasks = {"a": (TEXTS[1], TEXTS[2]), "b": (TEXTS[3], TEXTS[4])}
    return lineas.fit_jointly(given.model, tasks, **SHORT).maps


def in_sequence(given):
    tasks = {"a": (TEXTS[1], TEXTS[2]), "b": (TEXTS[3], TEXTS[4])}
    return lineas.fit_sequence(given.model, tasks, **SHORT, l1=0.3, disjoint=True, max_kl=0.1, preserve=True).maps


def attached(given, strength, **settings):
    with torch.no_grad(), given.maps.attach(given.model, **settings) as handle:
        handle.strength = strength
        logits = given.model(**given.batch).logits
        with handle.at(strength=0.5):
            return [logits, given.model(**given.batch).logits]


def generated(given, strength=1.0, **settings):
    with given.maps.attach(given.model, strength, **settings):
        return given.model.generate(**given.batch, **GREEDY)


def on_tokens(given):
    chosen = [lambda tokens: (tokens.positions % 2 == 0).numpy(), "last", "prompt", slice(-2, None), slice(1, 9, 2)]
    return [generated(given, tokens=tokens) for tokens in chosen]


def schedules(given):
    found = [lambda tokens: 0.5, lambda tokens: [0.0, 1.0, 0.5], lambda tokens: 0.9**tokens.positions]
    return [generated(given, schedule) for schedule in found]


def arrays(given):
    source, target = given.tensors
    fitted = lineas.fit(source, target)
    gaussian = lineas.bures_map(source, target)
    return [
        *(f(source, target) for f in (lineas.wasserstein, baselines.mean, baselines.iti_c, baselines.aura)),
        *lineas.wasserstein_grad(source, target),
        fitted,
        fitted.transform(source),
        fitted.transform(source.bfloat16(), 0.5),
        gaussian.transform(source),
        gaussian.transform(source.bfloat16()),
        *lineas.covariance(source),
        lineas.sparse_path(source, target).weight,
        lineas.fit({"a": source.bfloat16()}, {"a": target}, l1=0.1),
    ]


def checkpoint(given, folder):
    path = os.path.join(folder, "fit.safetensors")
    end_to_end(given, checkpoint=path, steps=2)
    return end_to_end(given, checkpoint=path, steps=4)


def conversations(given):
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ 'the ' + m['content'] + ' <eos> ' }}{% endfor %}"
    roles = ("user", "assistant")
    talks = [
        [
            [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)]
            for pair in zip(*two, strict=True)
        ]
        for two in ((TEXTS[1], TEXTS[2]), (TEXTS[3], TEXTS[4]))
    ]
    settings = {**SHORT, "tokenizer": tokenizer, "tokens": "generated"}
    return lineas.fit_end_to_end(given.model, *talks, **settings).maps


def token_ids(given):
    rows = zoo.tokenizer()(TEXTS[1])["input_ids"]
    return lineas.collect(given.model, rows, **FIT)


def copied(given):
    """Strengths by row where generate makes two rows of each prompt, and other maps that are set later."""
    with given.maps.attach(given.model, [0.5, 0.0, 2.0]) as handle:
        handle.maps = given.maps * 0.5
        torch.manual_seed(0)  # beams of transformers need the default device themselves
        return given.model.generate(**given.batch, **{**GREEDY, "do_sample": True}, num_return_sequences=2)


def saved(given, folder):
    path = os.path.join(folder, "maps.safetensors")
    given.maps.save(path)
    return lineas.load(path)


def folded(given):
    maps = fold_cases.random_maps(given.folded, "**.input_layernorm")
    return [p.detach() for p in maps.fold(given.folded, 0.5).parameters()]


def converted(given):
    maps = fold_cases.random_maps(given.converted, "**.input_layernorm")
    return [p.detach() for p in maps.fold(given.converted, convert=True).parameters()]


def adapter(given, folder):
    pytest.importorskip("peft")
    maps = fold_cases.random_maps(given.folded, "**.input_layernorm")
    maps.to_peft_lora(given.folded, folder)
    return [open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))]


def explored(given):
    pytest.importorskip("lineas.notebook.explorer", exc_type=ImportError)
    with lineas.explore(given.maps, given.model, zoo.tokenizer(), max_new_tokens=4) as view:
        return [*view.generate("the train was"), view._point_data["cells"]]


def evaluated(given):
    settings = {"prompts": TEXTS[1][:3], "neutral": TEXTS[2], "max_new_tokens": 3, "strengths": [0.5, 1]}
    settings |= {"tokenizer": zoo.tokenizer(), "instruction": "the day was", "tokens": "generated"}
    found = lineas.evaluate(given.model, given.maps, controls="random", samples=2, progress=False, **settings)
    return found.continuations, found.price, found.statistics


def calibrated(given):
    settings = {"neutral": TEXTS[3], "tokenizer": zoo.tokenizer(), "progress": False}
    found = given.maps.calibrate(given.model, max_kl=0.05, max_strength=1.0, tokens=slice(-2, None), **settings)
    return found.strength, found.measured


STEPS = {
    "sites": lambda given: str(lineas.sites(given.model, given.batch)),
    "collect": lambda given: lineas.collect(given.model, TEXTS[1], **FIT),
    "collect the last tokens": lambda given: lineas.collect(given.model, TEXTS[1], **LAST),
    "collect batches, all tokens": lambda given: lineas.collect(
        given.model, given.batch, layers=NORMS, pooling="all", tokens=slice(1, None), progress=False
    ),
    "collect of images": lambda given: lineas.collect(given.cnn, given.images[0], layers=["bn", "gn"], progress=False),
    "fit, incremental": lambda given: lineas.fit_incremental(given.model, TEXTS[1], TEXTS[2], **FIT),
    "fit end to end": end_to_end,
    "fit of batches": lambda given: end_to_end(given, batches=True),
    "fit of batches in parts": lambda given: end_to_end(given, batches=True, batch_size=2),
    "fit of images": lambda given: (
        lineas.fit_end_to_end(given.cnn, *given.images, layers=["bn", "gn"], steps=3, progress=False).maps
    ),
    "fit with Adam": lambda given: end_to_end(given, optimizer="adam", lr=0.01, strengths=(0.5, 1.0)),
    "fit with penalties": lambda given: end_to_end(given, l1=0.01, group=0.01),
    "fit of the last tokens": lambda given: end_to_end(given, tokens="last", pooling="max"),
    "fit to conversations": conversations,
    "token ids": token_ids,
    "strengths of samples": copied,
    "fit of mini-batches": lambda given: end_to_end(given, mini_batch=3, batch_size=2),
    "fit from maps": lambda given: end_to_end(given, init=given.maps, lr=0.01),
    "fit in bfloat16": lambda given: end_to_end(given, given.half),
    "fit through checkpoints of layers": lambda given: end_to_end(given, given.checkpointed),
    "fit with a checkpoint": checkpoint,
    "fit jointly": jointly,
    "fit in sequence": in_sequence,
    "sparse path": path_end_to_end,
    "strengths by row": lambda given: attached(given, [0.5, 0.0, 2.0]),
    "strengths by token": lambda given: attached(given, [[0.5, 1.0], [0.0, 0.0], [2.0, 1.0]], tokens=slice(0, None)),
    "tokens": on_tokens,
    "schedules": schedules,
    "arrays": arrays,
    "files": saved,
    "fold": folded,
    "fold, converted": converted,
    "LoRA": adapter,
    "explorer": explored,
    "evaluate": evaluated,
    "calibrate": calibrated,
}
NO_ENGINE = ["fit end to end", "fit with penalties", "collect", "strengths by row"]


def bits(value):
    """A result in a form that can be compared bit by bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray | np.generic):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict | lineas.SteeringMaps):
        return [(name, bits(one)) for name, one in value.items()]
    if isinstance(value, lineas.AffineMap):
        return bits(value.weight), bits(value.bias)
    if isinstance(value, lineas.SparsePath):
        return [bits(x) for x in (value.penalties, value.loss, value.weight, value.bias)]
    return [bits(one) for one in value] if isinstance(value, list | tuple) else value


def run(step, tmp_path):
    """What a step gives; in a folder of its own where it needs one."""
    function, given = STEPS[step], inputs()
    if function in (checkpoint, saved, adapter):
        tmp_path.mkdir(exist_ok=True)
        return function(given, str(tmp_path))
    return function(given)


def compare(step, odd, tmp_path):
    inputs()
    expected = bits(run(step, tmp_path / "usual"))
    with defaults(**ODD[odd]):
        found = run(step, tmp_path / "odd")
    assert bits(found) == expected


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("step", STEPS)
def test_defaults_of_torch_change_no_bit(step, odd, tmp_path):
    compare(step, odd, tmp_path)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("step", NO_ENGINE)
def test_nor_where_torch_stands_in_for_the_engine(step, odd, tmp_path, monkeypatch):
    for module in (affine, pooling, autograd, parameters):
        monkeypatch.setattr(module, "on_engine", lambda tensor: False)
    compare(step, odd, tmp_path)
