"""Models that several threads use at the same time: none sees what another does, and nothing is left behind."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import models_zoo as zoo
import numpy as np
import pytest
import torch
from attached import hooks_on, ids, logits, random_maps
from torch import nn

import lineas
from lineas.inputs import frozen

NORMS = "model.layers.*.post_attention_layernorm"


def state_of(model):
    return [module.training for module in model.modules()], [one.requires_grad for one in model.parameters()]


@pytest.mark.parametrize("gradients", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("last", [0, 1])
def test_blocks_that_overlap_leave_the_model_as_the_first_found_it(gradients, last):
    model = zoo.llama().train()
    model.model.layers[1].eval()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = state_of(model)
    stacks = [contextlib.ExitStack(), contextlib.ExitStack()]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        threads = [one, other]
        for thread, stack, wanted in zip(threads, stacks, gradients, strict=True):
            thread.submit(stack.enter_context, frozen.frozen(model, gradients=wanted)).result()
        threads[1 - last].submit(stacks[1 - last].close).result()
        assert not any(module.training for module in model.modules() if not list(module.children()))
        assert any(one.requires_grad for one in model.parameters()) is (not gradients[last])
        threads[last].submit(stacks[last].close).result()
    assert state_of(model) == before


@pytest.mark.parametrize("last", [0, 1])
def test_compilation_is_on_again_after_blocks_that_overlap(last):
    model, x, compiled = nn.Linear(3, 3), torch.randn(2, 3), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    torch.compile(model, backend=backend)(x)
    assert len(compiled) == 1
    stacks = [contextlib.ExitStack(), contextlib.ExitStack()]
    for stack in stacks:
        stack.enter_context(frozen.frozen(nn.Linear(3, 3)))
    stacks[1 - last].close()
    torch.compiler.reset()
    torch.compile(model, backend=backend)(x)
    assert len(compiled) == 1  # the other block is still open
    stacks[last].close()
    torch.compile(model, backend=backend)(x)
    assert len(compiled) == 2
    torch.compiler.reset()


@pytest.mark.parametrize("what", ["collect", "fit", "incremental", "path"])
def test_passes_of_other_threads_are_neither_ended_nor_collected(what):
    """A thread serves while another collects or fits: each gets what it gets alone."""
    model, texts, others = zoo.llama(), zoo.texts(4, seed=1), ids([5, 3, 7])
    settings = {"layers": NORMS, "tokenizer": zoo.tokenizer(), "progress": False}
    works = {
        "collect": lambda: lineas.collect(model, texts, **settings),
        "fit": lambda: lineas.fit_end_to_end(model, texts, zoo.texts(4, seed=2), steps=4, lr=0.1, **settings).maps,
        "incremental": lambda: lineas.fit_incremental(model, texts, zoo.texts(4, seed=2), **settings),
        "path": lambda: lineas.sparse_path_end_to_end(
            model, texts, zoo.texts(4, seed=2), n_penalties=2, steps=2, **settings
        ).at(index=1),
    }
    work = works[what]
    expected, alone, over, served = work(), logits(model, others), threading.Event(), []

    def serve():
        while not over.is_set():
            served.append(logits(model, others))

    with ThreadPoolExecutor(2) as pool:
        serving = [pool.submit(serve), pool.submit(serve)]
        try:
            for _ in range(3):
                found = work()
                for name in expected:
                    if what == "collect":
                        np.testing.assert_array_equal(found[name], expected[name])
                    else:
                        assert found[name] == expected[name]
        finally:
            over.set()
        for one in serving:
            one.result()
    assert len(served) > 3 and all(torch.equal(one, alone) for one in served)
    assert hooks_on(model) == 0


def test_serving_with_maps_collecting_and_fitting_on_one_model_go_on_side_by_side():
    model, maps = zoo.llama(), random_maps(dict.fromkeys([f"model.layers.{k}.input_layernorm" for k in range(3)], 16))
    settings = {"layers": NORMS, "tokenizer": zoo.tokenizer(), "progress": False}
    texts, over = [zoo.texts(3, seed=k) for k in range(2)], threading.Event()
    batch = ids([5, 3])
    with maps.attach(model) as handle:
        rows = lineas.collect(model, texts[0], **settings)
        fitted = lineas.fit_end_to_end(model, *texts, steps=2, lr=0.1, **settings).maps
        expected = {}
        for strength in (0.0, 0.5):
            with handle.at(strength):
                expected[strength] = logits(model, batch)
        wrong, done = [], []

        def run(name, work):
            try:
                while not over.is_set():
                    if not work():
                        wrong.append(name)
                    done.append(name)
            except BaseException as error:
                wrong.append(f"{name}: {error!r}")
                raise

        def serve(strength):
            with handle.at(strength):
                return torch.equal(logits(model, batch), expected[strength])

        def collect():
            found = lineas.collect(model, texts[0], **settings)
            return all(np.array_equal(found[name], rows[name]) for name in rows)

        def fit():
            return dict(lineas.fit_end_to_end(model, *texts, steps=2, lr=0.1, **settings).maps) == dict(fitted)

        works = {"off": lambda: serve(0.0), "half": lambda: serve(0.5), "collect": collect, "fit": fit}
        threads = [threading.Thread(target=run, args=entry) for entry in works.items()]
        for thread in threads:
            thread.start()
        over.wait(6.0)
        over.set()
        for thread in threads:
            thread.join()
    assert wrong == [] and set(done) == set(works)
    assert hooks_on(model) == 0 and not model.training
