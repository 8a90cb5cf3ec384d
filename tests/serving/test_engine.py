"""Jobs side by side: each as if it were alone, in turns, ended when nobody waits for it."""

import threading

import pytest
from served import Reference, all_maps, model, tokenizer

from lineas.serving import engine as engine_module
from lineas.serving.engine import Engine, Job, Turns
from lineas.serving.errors import ApiError
from lineas.serving.generation import Sampling

PROMPTS = ("the dog is", "a", "my neighbour was very happy today and", "we")


class Watched:
    """A job, with what it told."""

    def __init__(self, engine, prompt, strengths=None, submit=True, **sampling):
        self.events, self.over, self.begun = [], threading.Event(), threading.Event()
        ids = engine.codec.encode(prompt, "prompt")
        settings = Sampling(**{"max_tokens": 16, **sampling})
        self.job = Job([ids], settings, strengths or {}, continues=True, emit=self.hear)
        if submit:
            engine.submit(self.job)

    def hear(self, event):
        self.events.append(event)
        self.begun.set()
        if event is None or isinstance(event, ApiError):
            self.over.set()

    def text(self):
        assert self.over.wait(120)
        assert self.events[-1] is None
        return "".join(piece.text for piece in self.events[:-1])


@pytest.fixture
def make():
    """Makes engines, and closes them."""
    made = []

    def build(concurrency=4, **options):
        made.append(Engine(model(**options), tokenizer(), all_maps(), concurrency=concurrency))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


def test_turns_go_round():
    turns, order, ready = Turns(), [], threading.Barrier(4)

    def work(name):
        ready.wait()
        with turns:
            for _ in range(20):
                order.append(name)
                turns.hand_on()

    with turns:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
        for thread in threads:
            thread.start()
        ready.wait()
        while len(turns._gates) < 3:  # all wait
            threading.Event().wait(0.001)
    for thread in threads:
        thread.join()
    assert order == order[:3] * 20 and sorted(order[:3]) == [0, 1, 2]


@pytest.mark.parametrize("concurrency", [1, 5])
def test_jobs_of_different_strengths_are_each_as_if_alone(make, reference, concurrency):
    engine = make(concurrency)
    asked = [
        (prompt, strengths, sampling)
        for prompt in PROMPTS
        for strengths in ({}, {"a": 1.0}, {"a": 0.3, "b": 1.2}, {"b": -0.5})
        for sampling in ({"temperature": 0.0}, {"temperature": 1.3, "seed": 5})
    ]
    watched = [Watched(engine, prompt, strengths, max_tokens=8, **sampling) for prompt, strengths, sampling in asked]
    for one, (prompt, strengths, sampling) in zip(watched, asked, strict=True):
        how = {"seed": 5, "temperature": 1.3} if sampling["temperature"] else {}
        assert one.text() == reference.text(prompt, strengths, max_tokens=8, **how)
    assert engine.jobs == 0
    assert all(handle.strength == 0 for handle in engine.handles.values())


def test_jobs_take_turns_token_by_token(make):
    engine, heard, lock = make(2, context=10**6, endless=True), [], threading.Lock()
    watched = [Watched(engine, "the dog", submit=False, max_tokens=30, logprobs=0) for _ in range(2)]
    for k, one in enumerate(watched):

        def hear(event, k=k, hear=one.hear):
            with lock:
                heard.append((k, event))
            hear(event)

        one.job.emit = hear
    engine._turns.take()  # both are there before the first begins
    for one in watched:
        engine.submit(one.job)
    while len(engine._turns._gates) < 2:
        threading.Event().wait(0.001)
    engine._turns.give()
    assert watched[0].text() == watched[1].text()
    order = [k for k, event in heard if event is not None]
    assert len(order) == 60 and order[::2] == [order[0]] * 30 and order[1::2] == [1 - order[0]] * 30


def test_a_job_that_is_cancelled_ends_and_the_others_go_on(make, reference):
    engine = make(2, context=10**6, endless=True)
    long = [Watched(engine, "the dog", {"a": 1.0}, max_tokens=10**6) for _ in range(3)]
    assert long[0].begun.wait(60)
    long[2].job.cancel()  # which waits still
    long[0].job.cancel()
    assert long[0].over.wait(60) and long[0].events[-1] is None and long[0].events[-2].finish is None
    assert long[2].over.wait(60) and long[2].events == [None]
    other = Watched(engine, "the dog", {"b": 1.0}, temperature=0.0)
    alone = Reference(model(context=10**6, endless=True))
    assert other.text() == alone.text("the dog", {"b": 1.0})
    long[1].job.cancel()
    assert long[1].over.wait(60)


def test_all_prompts_of_a_cancelled_job_are_left(make):
    engine = make(1, context=10**6, endless=True)
    one = Watched(engine, "the dog", submit=False, max_tokens=10**6)
    one.job.prompts = [*one.job.prompts] * 5
    engine.submit(one.job)
    assert one.begun.wait(60)
    one.job.cancel()
    assert one.over.wait(60)
    assert {event.index for event in one.events if event} == {0}


def test_too_many_jobs_are_refused(make, monkeypatch):
    monkeypatch.setattr(engine_module, "WAITING", 2)
    engine = make(1, context=10**6, endless=True)
    long = [Watched(engine, "the dog", max_tokens=10**6) for _ in range(3)]
    with pytest.raises(ApiError, match="3 requests are waiting already") as error:
        Watched(engine, "the dog")
    assert error.value.status == 429
    for one in long:
        one.job.cancel()
        assert one.over.wait(60)
    assert Watched(engine, "the dog", max_tokens=2).text()


def test_an_engine_that_is_closed_ends_its_jobs_and_says_so(make):
    engine = make(1, context=10**6, endless=True)
    running, waiting = (Watched(engine, "the dog", max_tokens=10**6) for _ in range(2))
    assert running.begun.wait(60)
    engine.close()
    for one in (running, waiting):
        assert one.over.is_set() and one.events[-1].status == 503
        assert one.events[-1].message == "the server is shutting down"
    with pytest.raises(ApiError, match="the server is shutting down"):
        Watched(engine, "the dog")
    assert not any(handle.attached for handle in engine.handles.values())


def test_a_failure_leaves_no_strength_and_no_turn_behind(make, reference, caplog):
    engine = make(2)
    broken = Watched(engine, "the dog", {"a": 1.0, "b": 1.0}, submit=False, temperature=0.0)
    told = broken.job.emit

    def fail(event):
        told(event)
        if event is not None and not isinstance(event, ApiError):
            raise RuntimeError("nobody listens")

    broken.job.emit = fail
    engine.submit(broken.job)
    assert broken.over.wait(60) and broken.events[-1].status == 500
    assert "nobody listens" in caplog.text
    for _ in range(2):  # in both threads
        assert Watched(engine, "the dog", temperature=0.0).text() == reference.text("the dog")
    infinite = Watched(engine, "the dog", {"a": 1e38})
    assert infinite.over.wait(60)
    assert infinite.events[-1].message == "the model's logits are not finite at the strengths {'a': 1e+38}"
    assert Watched(engine, "the dog", temperature=0.0).text() == reference.text("the dog")


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2"])
def test_other_families(family):
    import models_zoo
    import torch

    import lineas

    def build():
        return models_zoo.LANGUAGE_MODELS[family]()

    layers = [models_zoo.NORMS[family].replace("*", str(k)) for k in range(models_zoo.LAYERS)]
    rng = torch.Generator().manual_seed(0)
    maps = lineas.SteeringMaps(
        {
            layer: lineas.AffineMap(
                1 + 0.3 * torch.randn(models_zoo.WIDTH, generator=rng).numpy(),
                torch.randn(models_zoo.WIDTH, generator=rng).numpy(),
            )
            for layer in layers
        }
    )
    engine = Engine(build(), tokenizer(), {"a": maps}, concurrency=3)
    try:
        strengths = (0.0, 0.4, 1.0)
        watched = [Watched(engine, "the dog is", {"a": one}, temperature=0.0) for one in strengths]
        alone = Reference(build())
        alone.maps = {"a": maps}
        expected = [alone.text("the dog is", {"a": one}) for one in strengths]
        assert [one.text() for one in watched] == expected and len(set(expected)) == 3
    finally:
        engine.close()


def test_what_maps_follow_from_pass_to_pass_belongs_to_each_generation(reference):
    maps = all_maps()
    made = model()
    engine = Engine(made, tokenizer(), {}, concurrency=4)
    try:
        for name in maps:
            engine.handles[name] = maps[name].attach(made, 0.0, tokens="generated")
        watched = [Watched(engine, prompt, {"a": 1.0, "b": 0.5}, temperature=0.0) for prompt in PROMPTS]
        for one, prompt in zip(watched, PROMPTS, strict=True):
            with (
                reference.maps["a"].attach(reference.model, 1.0, tokens="generated"),
                reference.maps["b"].attach(reference.model, 0.5, tokens="generated"),
            ):
                assert one.text() == reference.text(prompt)
    finally:
        engine.close()
