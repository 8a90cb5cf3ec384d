"""How often a step of a fit waits for a device: reads of single numbers, which stop the queue of an accelerator.

Counted on the CPU, in the operations that run elsewhere: the engine's own are switched off.
"""

import models_zoo as zoo
import pytest
import torch
from fits import prompts, short_fit, use_engine
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result the host has to know.
READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}


class Reads(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in READS
        return function(*args, **(kwargs or {}))


def reads(steps, layers, **settings):
    with Reads() as mode:
        short_fit(zoo.llama(), prompts(4, 1), prompts(4, 2), layers=layers, steps=steps, **settings)
    return mode.count


def a_step(layers, **settings):
    """Reads of a step, without those at the start of a fit and at its end."""
    return (reads(6, layers, **settings) - reads(2, layers, **settings)) / 4


@pytest.mark.parametrize("settings", [{}, {"lr": "auto", "patience": 9}, {"l1": 1e-3, "optimizer": "adam"}])
def test_a_step_reads_no_more_numbers_for_more_modules(settings, monkeypatch):
    use_engine(monkeypatch, False)
    every = ["model.layers.*.post_attention_layernorm", "model.layers.*.input_layernorm"]
    few, many = a_step("model.layers.0.post_attention_layernorm", **settings), a_step(every, **settings)
    assert 0 < few and many <= few
