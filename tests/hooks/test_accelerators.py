"""Accelerators that know no float64, such as Apple's MPS: none is made there, nor brought there to be cast.

The device "meta" stands for one. Nothing is computed on it, but operations run in order and tell dtypes and devices;
torch works in place of the engine, as on any device but the CPU. What a kernel of MPS does inside is not seen here.
"""

import numpy as np
import pytest
import torch
from attached import ids, random_maps
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lineas
from lineas.hooks import affine, pooling

META = torch.device("meta")


class NoFloat64(TorchDispatchMode):
    """Fails where an operation gives float64 on the accelerator, or takes float64 there from elsewhere."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:  # what comes back to the CPU is made up
            if func is torch.ops.aten._local_scalar_dense.default:
                return True
            if func is torch.ops.aten._to_copy.default and kwargs.get("device", META).type == "cpu":
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        out = func(*args, **kwargs)
        there = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_meta]
        self.seen += len(there)
        assert not any(x.dtype == torch.float64 for x in there), f"{func} gives float64"
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and not x.is_meta]
        assert not (there and any(x.dtype == torch.float64 for x in taken)), f"{func} takes float64"
        return out


class Model(nn.Module):
    """A model of text that asks for no values, which the device has not."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.out = nn.Embedding(60, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask=None):
        return self.out(self.norm(self.embed(input_ids)))


@pytest.fixture
def watch():
    with NoFloat64() as mode:
        yield
    assert mode.seen


def rows(tokens):
    return np.array([0.2, 0.4])


STRENGTHS = [
    1.0,
    0.3,
    np.float64(0.3),
    [0.5, 1.0],
    np.array([[0.1, 0.2, 0.3], [1.0, 1.0, 2.0]]),
    torch.tensor([0.5, 1.0], dtype=torch.float64),
    rows,
    lambda tokens: 0.5,
    lambda tokens: np.ones(tokens.positions.shape),
    lambda tokens: 0.9**tokens.positions,
    lambda tokens: tokens.prompt_length / 5,
]


@pytest.mark.parametrize("map_dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tokens", ["all", "last", slice(1, 3)], ids=str)
@pytest.mark.parametrize("strength", STRENGTHS, ids=range(len(STRENGTHS)))
def test_attached_maps_make_no_float64(strength, tokens, map_dtype, watch):
    model, maps = Model().to(META), random_maps({"norm": 4, "out": 4}, dtype=map_dtype)
    batch = {name: tensor.to(META) for name, tensor in ids([5, 3]).items()}
    with torch.no_grad(), maps.attach(model, strength=strength, tokens=tokens) as handle:
        assert model(**batch).is_meta
        handle.maps = maps.scaled(0.5)
        with handle.at(strength=[1.0, 2.0]):
            model(**batch)
        handle.strength = 0.7
        model(**batch)
        handle.strength = strength
        assert handle.strength is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_maps_and_pooling_by_themselves_make_no_float64(dtype, watch):
    x = torch.ones(2, 3, 4, dtype=dtype, device=META, requires_grad=True)
    one = lineas.AffineMap(np.full(4, 2.0), np.ones(4))
    out = one.transform(x, 0.3)
    out = affine.affine(out, torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64), 0.3)
    out = affine.affine(out, *(torch.ones(4, device=META, requires_grad=True) for _ in range(2)), 0.3)
    assert out.dtype == dtype and out.is_meta
    for mode in ("mean", "min", "max", "last"):
        assert pooling.pool(out, None, mode).dtype == torch.float32
    pooling.pool(out).sum().backward()


def test_a_selection_of_another_dtype_is_refused_before_it_goes_there(watch):
    model, batch = Model().to(META), {name: tensor.to(META) for name, tensor in ids([5, 3]).items()}
    with random_maps({"norm": 4}).attach(model, tokens=lambda tokens: np.ones((2, 5))):
        with pytest.raises(TypeError, match=r"^tokens: <lambda> must return booleans, got torch\.float64"):
            model(**batch)


def test_the_watch_sees_float64():
    for wrong in (
        lambda: torch.ones(2, dtype=torch.float64, device=META),
        lambda: torch.ones(2, dtype=torch.float64).to(META, torch.float32),
        lambda: torch.ones(2, device=META).double(),
    ):
        with pytest.raises(AssertionError, match="float64"), NoFloat64():
            wrong()
