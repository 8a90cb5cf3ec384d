"""What goes wrong on one of two processes: both stop, soon, with an error that says what it was."""

import math

import distributed_worker as worker
import models_zoo as zoo
import processes
import pytest
import torch

from lineas.fitting import checkpoint

pytestmark = pytest.mark.slow

SOON = 45  # seconds on a busy machine; without news a process would wait for the 60 of the group


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts", "differ in the digest of the prompts"),
        ("settings", "differ in the l1: 0.1 and 0.2"),
        ("layers", "differ in the layers: "),
        ("weights", "differ in the digest of the model's weights"),
        ("init", "differ in the digest of init"),
        ("held out", "differ in the digest of the prompts"),
        ("checkpoint", "differ in the checkpoint: True and False"),
    ],
)
def test_other_arguments_are_refused_on_both(said, name, text):
    start = "process_group: every process must be given the same arguments: processes 0 and 1 "
    for one in said:
        kind, message, seconds = one[f"other {name}"]
        assert kind == "ValueError" and message.startswith(start + text) and seconds < SOON


@pytest.mark.parametrize(
    ("name", "failed", "own"),
    [
        ("other read", 1, ("ValueError", "source is empty")),
        ("broken at 1", 1, ("RuntimeError", "the forward is broken")),
        ("broken at 2", 1, ("RuntimeError", "the forward is broken")),
        ("broken at 5", 1, ("RuntimeError", "the forward is broken")),
        ("no folder", 0, ("FileNotFoundError", "cannot write the checkpoint (No such file or directory; there is no")),
    ],
)
def test_an_error_on_one_process_is_told_to_the_other(said, name, failed, own):
    kind, message, seconds = said[failed][name]
    assert kind == own[0] and own[1] in message and seconds < SOON
    kind, message, seconds = said[1 - failed][name]
    assert kind == "ProcessError" and seconds < SOON
    assert message.startswith(f"process {failed} of the fit has stopped: {own[0]}: ") and own[1] in message


def test_what_is_not_finite_on_one_process_ends_the_fit_on_both_with_the_same_maps(said, results):
    assert said[0]["not finite"] == said[1]["not finite"]
    assert said[0]["not finite"][0].startswith("not finite at step 3: source: model.layers.0.post_attention_layernorm")
    found = processes.same_bits(results, "not finite")
    assert len(found["loss"]) == 3 and all(map(math.isfinite, found["loss"]))


def test_a_group_without_this_process(said):
    kind, message, _ = said[1]["not a member"]
    assert kind == "TypeError" and message.startswith("process_group must be None, 'world' or a ProcessGroup of")


def test_fits_go_on_after_errors(said, results):
    processes.close(
        processes.same_bits(results, "after all"), worker.arrays(worker.fit(zoo.llama().double())), torch.float64
    )


def test_a_process_that_dies_ends_the_other_and_leaves_a_whole_checkpoint(said, results):
    kind, message, seconds = said[0]["killed"]
    assert kind == "ProcessError" and seconds < SOON
    assert message.startswith("another process of the fit has ended or does not answer, and so this one stops: a")
    assert "killed" not in said[1]
    path = results / "fit.safetensors"
    assert len(checkpoint.load(path)[1]["records"]) == 3
    settings = {"steps": 8, "l1": 0.02, "forward": lambda model, batch: model(**batch)}
    # One process goes on with what two have begun. This forward gives no positions, so that they depend on the padding,
    # and rotations are made in float32.
    found = worker.fit(zoo.llama().double(), checkpoint=path, **settings)
    whole = worker.fit(zoo.llama().double(), **settings)
    processes.close(worker.arrays(found), worker.arrays(whole), torch.float32)
