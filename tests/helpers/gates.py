"""Gates for tiny models, and what they are by hand."""

import models_zoo
import numpy as np
import torch
from attached import language_model
from caches import cached
from transformers import DynamicCache

import lineas

WIDTH = models_zoo.WIDTH


def scalar(context="token", *, site=None, seed=0, bias=0.1):
    rng = np.random.default_rng(seed)
    return lineas.Gate(rng.normal(0, 1.5, WIDTH).astype(np.float32), bias, context=context, site=site)


def neurons(seed=0):
    parts = np.random.default_rng(seed).normal(0, 1, (3, WIDTH)).astype(np.float32)
    return lineas.NeuronGate(*parts, closed=np.arange(WIDTH) % 3 == 0)


def gated_model(family="llama", kind="token"):
    """A model, and maps each of which has a gate of its own."""
    model, maps = language_model(family)
    made = {"neuron": neurons}.get(kind, lambda seed: scalar(kind, seed=seed))
    return model, maps.gated({name: made(seed=k) for k, name in enumerate(maps)})


def by_hand(gate, z, mask):
    """The values of a gate, token after token, in float64."""
    z = z.double().numpy()
    if isinstance(gate, lineas.NeuronGate):
        logit = gate.quadratic * z**2 + gate.linear * z + gate.constant
        return np.where(gate.closed, 0, 1 / (1 + np.exp(-logit)))
    found = np.zeros((*z.shape[:2], 1))
    for row, real in enumerate(mask.numpy().astype(bool)):
        seen = []
        for t in np.flatnonzero(real):
            seen.append(z[row, t])
            read = np.mean(seen, axis=0) if gate.context == "mean" else seen[-1]
            found[row, t] = 1 / (1 + np.exp(-(read @ gate.weight.astype(np.float64) + gate.bias)))
    return found


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=2e-6, rtol=2e-5)


def ones(rows, columns):
    return torch.ones(rows, columns, dtype=torch.int64)


def in_steps(model, batch, sizes, cache=None):
    """The logits of a text that comes in pieces of these sizes."""
    cache, start, found = DynamicCache(config=model.config) if cache is None else cache, 0, []
    for size in sizes:
        piece = {"input_ids": batch["input_ids"][:, start : start + size]}
        with torch.no_grad():
            mask = batch["attention_mask"][:, : start + size]
            found.append(model(**piece, attention_mask=mask, **cached(cache)).logits)
        start += size
    return torch.cat(found, dim=1)
