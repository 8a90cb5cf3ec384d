"""Exported models for tests and benchmarks: the texts that graphs are made with, and ONNX files run by onnxruntime."""

import contextlib
import logging

import numpy as np
import torch
from torch import nn

BATCH, SEQUENCE = (torch.export.Dim(name) for name in ("batch", "sequence"))
TEXT = {name: {0: BATCH, 1: SEQUENCE} for name in ("input_ids", "attention_mask")}


class Logits(nn.Module):
    """A language model as a function of ids and mask alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def texts(rows, tokens, padding=0):
    """Random ids of the models of fold_cases and gguf_files, the first row padded on the left."""
    ids = torch.randint(2, 50, (rows, tokens), generator=torch.Generator().manual_seed(100 * rows + tokens))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


@contextlib.contextmanager
def quiet():
    """Without the exporter's warning that torchvision is missing."""
    noisy = logging.getLogger("torch.onnx")
    before = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(before)


def export(model, path, inputs, shapes=None):
    """Write a model to an ONNX file with the maps that are on it; returns the path. Inputs are by position or name."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(model, args, kwargs=kwargs, dynamic_shapes=shapes, dynamo=True, verbose=False)
    program.save(path)
    return path


class Session:
    """onnxruntime on one thread of the CPU."""

    def __init__(self, path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, *inputs, **named):
        named |= zip((one.name for one in self._session.get_inputs()), inputs, strict=False)
        (found,) = self._session.run(None, {name: np.asarray(value) for name, value in named.items()})
        return torch.from_numpy(found)


@torch.no_grad()
def real_logits(run, inputs, **others):
    """What a model, or a session, makes of the tokens that are no padding."""
    return run(**inputs, **others)[inputs["attention_mask"] != 0]
