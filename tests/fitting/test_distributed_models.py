"""Fits of models that are divided between two processes: by fully_shard, and by tensor parallelism."""

import distributed_worker as worker
import models_zoo as zoo
import processes
import pytest
import torch
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", worker.DIVIDED)
def test_fully_shard(said, results, name):
    """Losses at the last norm and in the middle of units, batches of other numbers on each, whole forward passes."""
    found = processes.same_bits(results, f"fully_shard {name}")
    one = worker.fit(zoo.llama().double(), **worker.DIVIDED[name])
    processes.close(found, worker.arrays(one), torch.float64)


@pytest.mark.parametrize("name", worker.DIVIDED)
def test_tensor_parallelism(said, results, name):
    found = processes.same_bits(results, f"tensor {name}")
    model = LlamaForCausalLM.from_pretrained(results / "model").eval()
    processes.close(found, worker.arrays(worker.fit(model, **worker.DIVIDED[name])), torch.float32)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("part self_attn.q_proj", "module 'model.layers.0.self_attn.q_proj' has other activations in process 1 than"),
        ("part mlp.act_fn", "module 'model.layers.0.mlp.act_fn' has other activations in process 1 than in process 0"),
        ("alone", "model: 'model.embed_tokens.weight' is divided among processes (fully_shard or tensor parallelism)"),
        (
            "sharded alone",
            "is divided among processes (fully_shard or tensor parallelism), so that all of them must fit",
        ),
        ("DTensor", "module 'model.layers.0.post_attention_layernorm' gives a DTensor with placements [Shard(dim="),
        ("other group", "process_group has 1 processes, and 'model.layers.0.mlp.gate_proj.weight' of the model is"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(said, name, text):
    for one in said:
        kind, message, _ = one[name]
        assert kind == "ValueError" and text in message
