"""Fits on two processes: the same bits on both, and to rounding those of one process."""

import threading

import distributed_worker as worker
import models_zoo as zoo
import numpy as np
import processes
import pytest
import torch
from torch import distributed

import lineas
from lineas.fitting.distributed import Group, IdleTurn, Shared
from lineas.fitting.sharded import Sharding
from lineas.inputs.prompts import Sampler, read


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), worker.CASES)
def test_the_bits_are_the_same_on_both_and_those_of_one_process_to_rounding(said, results, name, dtype):
    found = processes.same_bits(results, f"{name} {dtype}")
    one = worker.fit(zoo.llama().to(dtype), **worker.FITS[name])
    processes.close(found, worker.arrays(one), dtype)
    assert any((found[key] != 1).any() for key in found if key.startswith("weight"))
    stopped, best_step, held_out_loss, _, held_out_passes = said[0][f"{name} {dtype}"]
    assert (stopped, best_step, held_out_passes) == (one.stopped, one.best_step, one.held_out_passes)
    assert held_out_loss == (one.held_out_loss and pytest.approx(one.held_out_loss, rel=1e-5))
    assert said[0][f"{name} {dtype}"] == said[1][f"{name} {dtype}"]


@pytest.mark.slow
def test_a_model_in_bfloat16(said, results):
    found = processes.same_bits(results, "bfloat16")
    one = worker.arrays(worker.fit(zoo.llama().bfloat16()))
    assert found["weight model.layers.0.post_attention_layernorm"].dtype == np.float32
    np.testing.assert_allclose(found["loss"], one["loss"], rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one batch", "wrapped"])
def test_a_batch_that_the_user_made_and_a_wrapped_model(said, results, name):
    found = processes.same_bits(results, name)
    processes.close(found, worker.arrays(worker.fit(zoo.llama().double())), torch.float64)


@pytest.mark.slow
def test_other_fits(said, results):
    model, settings = zoo.llama().double(), {"layers": zoo.NORMS["llama"], "tokenizer": zoo.tokenizer()}
    pairs = {"a": (worker.SOURCE, worker.TARGET), "b": (worker.TARGET, worker.SOURCE[:4])}
    joint = lineas.fit_jointly(model, pairs, progress=False, steps=2, **settings)
    processes.close(processes.same_bits(results, "joint"), worker.arrays(joint), torch.float64)
    sequence = lineas.fit_sequence(model, pairs, progress=False, steps=2, **settings).results["b"]
    processes.close(processes.same_bits(results, "sequence"), worker.arrays(sequence), torch.float64)
    path = lineas.sparse_path_end_to_end(model, worker.SOURCE, worker.TARGET, n_penalties=4, progress=False, **settings)
    found = processes.same_bits(results, "path")
    for name in ("weight", "bias", "loss"):
        np.testing.assert_allclose(found[name], getattr(path, name), rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_an_interrupt_on_one_process_stops_both_and_the_fit_goes_on_to_the_same_bits(said, results):
    """The model draws random numbers, of which every process keeps its own; only the first writes the file."""
    assert [one["cut"] for one in said] == [["interrupted", 2, True], ["interrupted", 2, False]]
    whole, resumed = (processes.same_bits(results, name) for name in ("whole", "resumed"))
    for key, values in whole.items():
        assert values.tobytes() == resumed[key].tobytes(), key
    assert said[0]["whole"] == said[0]["resumed"] == said[1]["resumed"]


@pytest.mark.slow
def test_ctrl_c_on_one_process_stops_both_at_the_same_step(said):
    assert said[0]["signalled"] == said[1]["signalled"] == ["interrupted", 1]


# --- a group of one ---------------------------------------------------------------------------------------------------


@pytest.fixture
def alone():
    """A group of this process alone, and its Group."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield Group(distributed.group.WORLD, Sharding(zoo.llama(), 1))
    finally:
        distributed.destroy_process_group()


def test_a_group_of_one_fits_what_one_process_does(alone):
    found, one = (worker.fit(zoo.llama(), process_group=group) for group in (distributed.group.WORLD, None))
    for key, values in worker.arrays(one).items():
        assert values.tobytes() == worker.arrays(found)[key].tobytes(), key


def test_messages_of_all_sizes_arrive(alone):
    values = [torch.arange(3), torch.empty(0, 4), torch.ones(2, 2, dtype=torch.bfloat16), torch.tensor(1.5)]
    for size in (0, 4000, 4096, 100_000):
        (message,) = alone._exchange("a test", "ä" * size, values)
        assert message.note == "ä" * size
        for sent, got in zip(values, message.tensors, strict=True):
            assert torch.equal(sent, got) and sent.dtype == got.dtype and sent.shape == got.shape
    assert alone.same([0.1, None, float("inf"), "text"]) == [0.1, None, float("inf"), "text"]


def test_the_fit_of_a_thread_is_left_to_ctrl_c_as_it_is(alone):
    found = []
    thread = threading.Thread(target=lambda: found.append(worker.fit(zoo.llama(), process_group="world", steps=1)))
    thread.start()
    thread.join(timeout=120)
    assert found and found[0].stopped == "finished"


# --- how prompts are dealt out ----------------------------------------------------------------------------------------


def rows_of(batches):
    """The token ids of the prompts of batches, without padding; idle turns have none."""
    real = [batch for batch in batches if not isinstance(batch, IdleTurn)]
    return [
        ids[mask != 0].tolist()
        for batch in real
        for ids, mask in zip(batch.kwargs["input_ids"], batch.kwargs["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("kind", ["texts", "batches"])
def test_every_prompt_is_dealt_out_once(size, batch_size, even, kind):
    texts, tokenizer = zoo.texts(7, seed=1), zoo.tokenizer()
    batches = [dict(tokenizer(texts[k : k + 3], return_tensors="pt", padding=True)) for k in (0, 3, 6)]
    whole = read(texts if kind == "texts" else batches, "source", tokenizer=tokenizer)
    shares = [Shared(whole, rank, size, even=even) for rank in range(size)]
    for deal in (lambda one: one.parts(batch_size), lambda one: one.take([5, 0, 3, 6], batch_size)):
        parts = [deal(share) for share in shares]
        dealt = [row for part in parts for row in rows_of(part)]
        assert sorted(dealt) == sorted(rows_of(deal(whole)))
        assert all(part for part in parts)
        assert not even or len({len(part) for part in parts}) == 1
        assert batch_size is None or all(len(rows_of([batch])) <= batch_size for part in parts for batch in part)


def test_shuffled_batches_are_those_of_one_process():
    whole = read(zoo.texts(10, seed=1), "source", tokenizer=zoo.tokenizer())
    alone, *both = (
        Sampler(prompts, 4, batch_size=3, seed=5)
        for prompts in (whole, Shared(whole, 0, 2, even=False), Shared(whole, 1, 2, even=False))
    )
    for step in range(5):
        assert rows_of(alone.draw(step)) == [row for one in both for row in rows_of(one.draw(step))]


# --- what is no group of processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ("all", ValueError, "process_group must be None, 'world' or a ProcessGroup of torch.distributed, got 'all'"),
        (2, TypeError, "process_group must be None, 'world' or a ProcessGroup of torch.distributed, got int"),
        ("world", ValueError, "process_group='world': torch.distributed is not initialised; call"),
    ],
)
def test_what_is_no_group(given, error, text):
    with pytest.raises(error, match=text):
        worker.fit(zoo.llama(), process_group=given)


def test_metadata_do_not_tell_on_how_many_processes_maps_were_fitted():
    assert "process_group" not in worker.fit(zoo.llama(), steps=1).maps.metadata["settings"]
