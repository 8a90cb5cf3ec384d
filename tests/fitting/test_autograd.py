"""The differentiable operations: engine against torch's own autograd, twins against the engine."""

import numpy as np
import pytest
import torch
from fits import use_engine
from torch.autograd import gradcheck

from lineas.fitting.autograd import _segments, _torch_wasserstein, sort_columns, wasserstein
from lineas.hooks import pooling
from lineas.hooks.affine import _torch_affine, affine, working_dtype
from lineas.hooks.pooling import _moved, _torch_pool, pool

HALF = (torch.float16, torch.bfloat16)
SHAPES = [((7, 5), -1), ((3, 4, 5), -1), ((3, 5, 2, 4), 1), ((3, 5), 1), ((2, 5, 6), 1)]


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(function, inputs, grad_out):
    """Values and gradients of function(*inputs) for a given gradient of the result."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return out.detach(), torch.autograd.grad(out, inputs, grad_out.to(out.dtype))


# --- affine -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0, 2.0])
def test_affine_gradcheck(shape, axis, strength):
    z, weight, bias = normal(*shape), normal(5, seed=1), normal(5, seed=2)
    for x in (z, weight, bias):
        x.requires_grad_()
    assert gradcheck(lambda z, w, b: affine(z, w, b, strength, axis), (z, weight, bias))


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_affine_twin_agrees(shape, axis, dtype):
    work = working_dtype(dtype)
    inputs = normal(*shape, dtype=dtype), normal(5, seed=1, dtype=work), normal(5, seed=2, dtype=work)
    grad_out = normal(*shape, seed=3, dtype=dtype)
    out, grads = gradients(lambda z, w, b: affine(z, w, b, 0.7, axis), inputs, grad_out)
    expected, wanted = gradients(lambda z, w, b: _torch_affine(z, w, b, 0.7, axis), inputs, grad_out)
    assert out.dtype == dtype and out.shape == shape
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype in HALF else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, expected, **tolerance)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, **tolerance)


@pytest.mark.parametrize("dtype", HALF)
def test_affine_rounds_half_precision_once(dtype):
    z, weight, bias = normal(50, 5, dtype=dtype), normal(5, seed=1).float(), normal(5, seed=2).float()
    exact = z.double() + 0.5 * ((weight.double() - 1) * z.double() + bias.double())
    assert torch.equal(affine(z, weight, bias, 0.5), exact.float().to(dtype))


def test_affine_of_a_float64_activation_takes_float32_maps():
    z, weight, bias = normal(4, 5), normal(5, seed=1).float().requires_grad_(), normal(5, seed=2).float()
    out = affine(z, weight, bias)
    torch.testing.assert_close(out, z * weight.double() + bias.double())
    out.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_affine_of_a_view_that_is_not_contiguous():
    z = normal(5, 3, 4).permute(1, 2, 0).requires_grad_()
    weight, bias = normal(5, seed=1), normal(5, seed=2)
    out = affine(z, weight, bias)
    torch.testing.assert_close(out, z * weight + bias)
    (grad,) = torch.autograd.grad(out.sum(), z)
    torch.testing.assert_close(grad, weight.expand(3, 4, 5))


def test_affine_leaves_its_input_alone():
    z = normal(4, 5)
    before = z.clone()
    out = affine(z, normal(5, seed=1), normal(5, seed=2), 0.3)
    assert torch.equal(z, before)
    assert out.data_ptr() != z.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_what_follows_affine_may_work_in_place(dtype):
    z, weight, bias = normal(4, 5, dtype=dtype), normal(5, seed=1), normal(5, seed=2)
    grad = torch.ones(4, 5, dtype=dtype)
    expected = gradients(lambda *x: affine(*x, 0.3).relu(), (z, weight, bias), grad)
    found = gradients(lambda *x: affine(*x, 0.3).relu_(), (z, weight, bias), grad)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_affine_refuses_integers():
    with pytest.raises(TypeError, match=r"activations must be float16, bfloat16, float32 or float64, got torch\.int64"):
        affine(torch.ones(2, 3, dtype=torch.int64), torch.ones(3), torch.zeros(3))


# --- pool -------------------------------------------------------------------------------------------------------------

MASKS = {
    "none": None,
    "left": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]),
    "right": torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("mode", pooling.POOLINGS)
def test_pool_gradcheck(mode, mask):
    assert gradcheck(lambda x: pool(x, mask, mode), (normal(3, 4, 5).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("mode", pooling.POOLINGS)
def test_pool_twin_agrees(mode, mask, dtype):
    x = normal(3, 4, 5, dtype=dtype)
    grad_out = normal(12 if mode == "all" else 3, 5, seed=1)
    if mode == "all" and mask is not None:
        grad_out = grad_out[: int(mask.sum())]
    out, (grad,) = gradients(lambda x: pool(x, mask, mode), [x], grad_out)
    bits = None if mask is None else mask.bool()
    expected, (wanted,) = gradients(lambda x: _torch_pool(x, bits, mode), [x], grad_out)
    assert out.dtype == working_dtype(dtype)
    assert grad.dtype == dtype
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_pool_hands_the_gradient_to_the_first_of_equal_tokens(mode):
    x = torch.ones(1, 4, 2, requires_grad=True)
    wanted = torch.tensor([[[0.0, 0], [1, 1], [0, 0], [0, 0]]])
    mask = torch.tensor([[0, 1, 1, 1]])
    for function in (pool, _torch_pool):
        (grad,) = torch.autograd.grad(function(x, mask.bool(), mode).sum(), x)
        assert torch.equal(grad, wanted)


@pytest.mark.parametrize("function", [pool, _torch_pool])
def test_pool_never_reads_a_padded_token(function):
    x = normal(2, 3, 4)
    x[0, 0] = torch.nan
    mask = torch.tensor([[False, True, True], [True, True, True]])
    for mode in pooling.POOLINGS:
        assert function(x, mask, mode).isfinite().all()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(function(x, mask, "mean").sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.uint8])
def test_pool_takes_masks_of_any_dtype(dtype):
    x = normal(3, 4, 5)
    assert torch.equal(pool(x, MASKS["left"].to(dtype)), pool(x, MASKS["left"]))


def pool_elsewhere(x, mask, mode):
    """What `pool` does on an accelerator."""
    return _torch_pool(x, _moved(mask, x.device, mode), mode)


@pytest.mark.parametrize("function", [pool, pool_elsewhere])
@pytest.mark.parametrize("mode", ["mean", "min", "max", "last"])
def test_pool_refuses_a_row_without_tokens(function, mode):
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match="mask: row 1 keeps no token"):
        function(normal(2, 2, 3), mask, mode)


def test_pool_refuses_other_arguments():
    x = normal(2, 3, 4)
    with pytest.raises(ValueError, match="pooling must be one of 'mean', 'min', 'max', 'last', 'all', got 'median'"):
        pool(x, None, "median")
    with pytest.raises(ValueError, match=r"mask must have the shape \[2, 3\] of the tokens, got \[2, 4\]"):
        pool(x, torch.ones(2, 4))
    with pytest.raises(TypeError, match=r"got torch\.int32"):
        pool(x.int())


# --- wasserstein ------------------------------------------------------------------------------------------------------


def naive_wasserstein(u, v):
    """Differentiable in u: both samples repeated to a common size, so that quantiles pair up."""
    size = np.lcm(len(u), len(v))
    us = u.sort(dim=0).values.repeat_interleave(size // len(u), dim=0)
    return (us - v.sort(dim=0).values.repeat_interleave(size // len(v), dim=0)).square().mean(dim=0)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 5), (4, 6), (7, 3), (1, 4)])
@pytest.mark.parametrize("twin", [False, True])
def test_wasserstein_equals_the_naive_one(n, m, twin):
    function = _torch_wasserstein if twin else wasserstein
    us = [normal(n, 3).requires_grad_(), normal(n, 8, seed=1).requires_grad_()]
    targets = sort_columns([normal(m, 3, seed=2), normal(m, 8, seed=3)], ["a", "b"])
    scale = [normal(3, seed=4), normal(8, seed=5)]
    values = function(us, targets, ["a", "b"])
    grads = torch.autograd.grad(sum((value * s).sum() for value, s in zip(values, scale, strict=True)), us)
    for u, target, s, value, grad in zip(us, targets, scale, values, grads, strict=True):
        expected = naive_wasserstein(u, target)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad, torch.autograd.grad((expected * s).sum(), u)[0])


def test_wasserstein_gradcheck():
    us = normal(5, 4).requires_grad_(), normal(6, 3, seed=1).requires_grad_()
    targets = sort_columns([normal(5, 4, seed=2), normal(4, 3, seed=3)], ["a", "b"])
    assert gradcheck(lambda *us: wasserstein(us, targets, ["a", "b"]), us)
    assert gradcheck(lambda *us: _torch_wasserstein(us, targets, ["a", "b"]), us)


@pytest.mark.parametrize("function", [wasserstein, _torch_wasserstein])
def test_wasserstein_ties_share_the_mean_of_their_targets(function):
    u = torch.tensor([[2.0], [0.0], [2.0], [0.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0.0], [1.0], [5.0], [9.0]], dtype=torch.float64)
    (value,) = function([u], [target], ["a"])
    (grad,) = torch.autograd.grad(value.sum(), u)
    assert torch.equal(grad, 0.5 * (u - torch.tensor([[7.0], [0.5], [7.0], [0.5]])))


def test_wasserstein_without_gradients():
    u, target = normal(4, 3, dtype=torch.float32), normal(4, 3, seed=1, dtype=torch.float32).sort(dim=0).values
    (value,) = wasserstein([u], [target], ["a"])
    assert not value.requires_grad and value.dtype == torch.float32
    torch.testing.assert_close(value, naive_wasserstein(u, target))


@pytest.mark.parametrize("function", [wasserstein, _torch_wasserstein])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_wasserstein_names_the_value_that_is_not_finite(function, bad):
    us = [normal(4, 3), normal(4, 3, seed=1)]
    us[1][2, 1] = bad
    target = normal(4, 3, seed=2).sort(dim=0).values
    with pytest.raises(ValueError, match=f"second: {bad} at row 2, column 1"):
        function(us, [target, target], ["first", "second"])


def test_sort_columns():
    samples = [normal(5, 3), normal(4, 2, seed=1)]
    for sample, ordered in zip(samples, sort_columns(samples, ["a", "b"]), strict=True):
        assert torch.equal(ordered, sample.sort(dim=0).values)
    samples[1][3, 0] = torch.nan
    with pytest.raises(ValueError, match="b: nan at row 3, column 0"):
        sort_columns(samples, ["a", "b"])


def test_sort_columns_off_the_engine(monkeypatch):
    use_engine(monkeypatch, False)
    test_sort_columns()


@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 6), (7, 3), (32, 32)])
def test_segments_have_mass_one(n, m):
    i, k, mass = _segments(n, m)
    assert len(mass) == n + m - np.gcd(n, m)
    np.testing.assert_allclose(np.bincount(i, weights=mass), 1 / n)
    np.testing.assert_allclose(np.bincount(k, weights=mass), 1 / m)
