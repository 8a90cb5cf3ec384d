import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest

from lineas import AffineMap, SteeringMaps


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, -0.5, 2.0])
def test_transform_is_the_formula(rng, dtype, strength):
    one = AffineMap(*rng.normal(size=(2, 5)))
    z = rng.normal(size=(3, 4, 5)).astype(dtype)
    work = np.float64 if dtype == np.float64 else np.float32
    expected = z + strength * (one.weight * z + one.bias - z)
    out = one.transform(z, strength)
    assert out.dtype == dtype
    np.testing.assert_allclose(out, expected, rtol=4 * np.finfo(dtype).eps, atol=16 * np.finfo(dtype).eps)
    # The same to the last bit as in the working type, rounded once.
    assert np.array_equal(out, one.transform(z.astype(work), strength).astype(dtype))


def test_transform_takes_any_layout(rng):
    one = AffineMap(*rng.normal(size=(2, 5)))
    z = rng.normal(size=(5, 6, 4))
    for view in (z.T, z[:, ::2].transpose(1, 2, 0), np.asfortranarray(z.T), z.T.astype(">f8")):
        np.testing.assert_allclose(one.transform(view), one.weight * view + one.bias, rtol=1e-15)
    frozen = z.T.copy()
    frozen.flags.writeable = False
    assert np.array_equal(one.transform(frozen), one.transform(z.T))
    assert one.transform(np.arange(5.0)).shape == (5,)
    assert one.transform(np.empty((0, 5))).shape == (0, 5)
    assert one.transform([[0.0] * 5]).tolist() == [one.bias.tolist()]


def test_transform_along_an_axis(rng):
    one = AffineMap(*rng.normal(size=(2, 3)))
    z = rng.normal(size=(2, 3, 4, 5))
    expected = one.weight[:, None, None] * z + one.bias[:, None, None]
    np.testing.assert_allclose(one.transform(z, axis=1), expected, rtol=1e-15)
    np.testing.assert_allclose(one.transform(z, axis=-3), expected, rtol=1e-15)


def test_transform_does_not_touch_its_input(rng):
    z = rng.normal(size=(4, 3))
    before = z.copy()
    out = AffineMap.identity(3).transform(z)
    assert out is not z and not np.shares_memory(out, z)
    AffineMap(np.zeros(3), np.ones(3)).transform(z)
    assert np.array_equal(z, before)


def test_transform_of_ml_dtypes_bfloat16(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    one = AffineMap(*rng.normal(size=(2, 5)).astype(np.float32))
    z = rng.normal(size=(7, 5)).astype(ml_dtypes.bfloat16)
    out = one.transform(z, 0.5)
    assert out.dtype == ml_dtypes.bfloat16
    assert np.array_equal(out, one.transform(z.astype(np.float32), 0.5).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64])
def test_transform_of_integers_is_float64(dtype):
    one = AffineMap([2, 1], [1, 0])
    assert one.dtype == np.float64
    z = np.array([[1, 2], [3, 100]], dtype)
    assert one.transform(z).dtype == np.float64 and one.transform(z, 0.5).tolist() == [[2, 2], [5, 100]]
    torch = pytest.importorskip("torch")
    out = one.transform(torch.tensor([1, 2]), 0.5)
    assert out.dtype == torch.float64 and out.tolist() == [2, 2]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_transform_of_torch_tensors(rng, name):
    torch = pytest.importorskip("torch")
    one = AffineMap(*rng.normal(size=(2, 5)))
    z = torch.tensor(rng.normal(size=(2, 5, 3)), dtype=getattr(torch, name))
    out = one.transform(z, 0.5, axis=1)
    assert out.dtype == z.dtype and out.shape == z.shape
    work = z.double() if name == "float64" else z.float()
    expected = torch.from_numpy(one.transform(work.numpy(), 0.5, axis=1)).to(z.dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_transform_of_torch_tensors_is_differentiable(rng):
    torch = pytest.importorskip("torch")
    one = AffineMap(*rng.normal(size=(2, 5)))
    z = torch.tensor(rng.normal(size=(4, 5)), requires_grad=True)
    one.transform(z, 0.5).sum().backward()
    np.testing.assert_allclose(z.grad.numpy(), np.broadcast_to(0.5 + 0.5 * one.weight, (4, 5)), rtol=1e-14)


def test_strength_one_is_the_map_however_small_the_weight():
    one = AffineMap(np.array([1e-30, 0.0, 1.0], np.float32), np.array([0.0, 1e-30, 0.0], np.float32))
    assert one.scaled(1) == one
    out = one.transform(np.ones((1, 3), np.float32))
    assert out.tolist() == [[one.weight[0], one.bias[1], 1.0]]


def test_strength_zero_changes_no_bit(rng):
    one = AffineMap(*rng.normal(size=(2, 64)).astype(np.float32))
    z = np.concatenate([rng.normal(size=(20, 64)), [[np.finfo(np.float32).max] * 64, [1e-45] * 64]]).astype(np.float32)
    assert one.transform(z, 0.0).tobytes() == z.tobytes()
    assert one.scaled(0.0) == AffineMap.identity(64)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0, 3.0])
def test_scaled_is_transform_at_a_strength(rng, strength):
    one, z = AffineMap(*rng.normal(size=(2, 8))), rng.normal(size=(10, 8))
    np.testing.assert_allclose(one.scaled(strength).transform(z), one.transform(z, strength), rtol=1e-13)


def test_inverse_undoes(rng):
    one, z = AffineMap(*rng.normal(size=(2, 8))), rng.normal(size=(10, 8))
    np.testing.assert_allclose(one.inverse().transform(one.transform(z)), z, rtol=1e-10)
    assert one.inverse().dtype == np.float64


def test_inverse_of_zero_weight():
    one = AffineMap(np.array([1.0, 0.0, 2.0, 0.0]), np.zeros(4))
    with pytest.raises(ValueError, match=r"the map has no inverse: weight is 0 at neuron 1 and 1 other$"):
        one.inverse()


def test_inverse_that_overflows():
    one = AffineMap(np.array([1.0, 1e-45], np.float32), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"the inverse is too large for float32 at neuron 1$"):
        one.inverse()


def test_composition_is_applying_twice(rng):
    first, second = (AffineMap(*rng.normal(size=(2, 8))) for _ in range(2))
    z = rng.normal(size=(10, 8))
    np.testing.assert_allclose((second @ first).transform(z), second.transform(first.transform(z)), rtol=1e-12)
    assert (second @ AffineMap.identity(8)) == second == (AffineMap.identity(8) @ second)


def test_composition_promotes():
    wide, narrow = AffineMap.identity(2, np.float64), AffineMap.identity(2)
    assert (wide @ narrow).dtype == np.float64 and (narrow @ narrow).dtype == np.float32


def test_composition_of_other_widths():
    with pytest.raises(ValueError, match=r"cannot compose maps of 2 and 3 neurons"):
        AffineMap.identity(2) @ AffineMap.identity(3)
    with pytest.raises(TypeError, match=r"'AffineMap' does not support ufuncs"):
        AffineMap.identity(2) @ np.eye(2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_sum_adds_the_changes(rng, dtype):
    a, b = (AffineMap(*rng.normal(size=(2, 8)).astype(dtype)) for _ in range(2))
    z = rng.normal(size=(10, 8))
    changes = [one.transform(z) - z for one in (a, b)]
    tight = {"rtol": 1e-12, "atol": 1e-12} if dtype == np.float64 else {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose((a + b).transform(z), z + changes[0] + changes[1], **tight)
    np.testing.assert_allclose((a - b).transform(z), z + changes[0] - changes[1], **tight)
    assert (a + b).dtype == dtype and a + b == b + a
    assert a - a == AffineMap.identity(8)


def test_a_sum_leaves_what_one_side_leaves_alone():
    small = np.array([1e-30, 3.0, 1.0, 2.0], np.float32)
    a = AffineMap(small, np.array([1e-30, 0, 0, 1], np.float32))
    b = AffineMap(np.array([1, 1, 0.1, 2], np.float32), np.array([0, 0, 5, 1], np.float32))
    assert (a + b) == (b + a) == AffineMap([*small[:2], np.float32(0.1), 3.0], np.array([1e-30, 0, 5, 2], np.float32))
    assert a - b == AffineMap([*small[:2], 2 - np.float32(0.1), 1.0], np.array([1e-30, 0, -5, 0], np.float32))
    assert a + AffineMap.identity(4) == a == a - AffineMap.identity(4)


def test_numbers_scale(rng):
    one = AffineMap(*rng.normal(size=(2, 8)))
    for number in (0.5, 2, np.float64(0.5), np.float32(0.5)):
        assert number * one == one * number == one.scaled(number)
    for number in (2, 3.0, np.float64(-8), np.float32(0.5), Fraction(1, 2)):
        assert one / number == one.scaled(1 / float(number))
    assert -one == one.scaled(-1) and one * 1 == one / 1 == one
    half = AffineMap(*rng.normal(size=(2, 8)))
    mixed = (0.5 * one + 0.5 * half).transform(np.ones(8))
    np.testing.assert_allclose(mixed, (one.transform(np.ones(8)) + half.transform(np.ones(8))) / 2, rtol=1e-12)


def test_sum_is_a_sum(rng):
    a, b, c = (AffineMap(*rng.normal(size=(2, 8))) for _ in range(3))
    assert sum([a, b, c]) == a + b + c and sum([a]) == a and sum([a, b], start=0.0) == a + b


@pytest.mark.parametrize(
    ("use", "error", "text"),
    [
        (lambda one: one + AffineMap.identity(2), ValueError, "cannot add maps of 3 and 2 neurons"),
        (lambda one: one - AffineMap.identity(2), ValueError, "cannot subtract maps of 3 and 2 neurons"),
        (lambda one: one + 1, TypeError, "unsupported operand"),
        (lambda one: 1 - one, TypeError, "unsupported operand"),
        (lambda one: one * one, TypeError, "unsupported operand"),
        (lambda one: one * True, TypeError, "unsupported operand"),
        (lambda one: "2" * one, TypeError, "can't multiply sequence|unsupported operand"),
        (lambda one: np.ones(3) * one, TypeError, "unsupported operand|does not support ufuncs"),
        (lambda one: one / one, TypeError, "unsupported operand"),
        (lambda one: one / True, TypeError, "unsupported operand"),
        (lambda one: 1 / one, TypeError, "unsupported operand"),
        (lambda one: one / 0, ZeroDivisionError, "division by zero"),
        (lambda one: one / np.float64(0), ZeroDivisionError, "division by zero"),
        (lambda one: one / np.nan, ValueError, "the divisor must be finite, got nan"),
        (lambda one: one / 5e-324, ValueError, "strength must be finite, got inf"),
        (lambda one: 1 + one, TypeError, "unsupported operand"),
        (lambda one: False + one, TypeError, "unsupported operand"),
        (lambda one: sum([one], start=1.0), TypeError, "unsupported operand"),
        (lambda one: one + np.ones(3), TypeError, "unsupported operand|does not support ufuncs"),
        (lambda one: np.inf * one, ValueError, "strength must be finite, got inf"),
        (lambda one: 1e300 * (one + one), ValueError, r"bias must be finite, got inf at neuron 0"),
    ],
)
def test_bad_blends(use, error, text):
    with pytest.raises(error, match=text):
        use(AffineMap(np.ones(3, np.float32), np.ones(3, np.float32)))


def test_properties():
    one = AffineMap(np.array([1.0, 2.0, 1.0, 1.0]), np.array([0.0, 0.0, -1.0, -0.0]))
    assert (one.d, len(one), one.support, one.dtype) == (4, 4, 2, np.float64)
    assert repr(one) == "AffineMap(d=4, support=2, dtype=float64)"
    assert AffineMap.identity(3).support == 0 and AffineMap.identity(3).dtype == np.float32


def test_equality():
    one = AffineMap(np.array([2.0]), np.array([1.0]))
    assert one == AffineMap(np.array([2.0], np.float32), np.array([1.0], np.float32))
    assert one != AffineMap(np.array([2.0]), np.array([0.0]))
    assert one != AffineMap(np.array([2.0, 1.0]), np.array([1.0, 0.0]))
    assert one != "map"
    with pytest.raises(TypeError, match=r"unhashable"):
        hash(one)


def test_a_map_is_immutable():
    weight = np.ones(3)
    one = AffineMap(weight, np.zeros(3))
    weight[0] = 7
    assert one.weight[0] == 1
    with pytest.raises(ValueError, match=r"read-only"):
        one.weight[0] = 7
    with pytest.raises(AttributeError, match=r"an AffineMap is immutable: cannot set 'weight'"):
        one.weight = weight
    with pytest.raises(AttributeError, match=r"an AffineMap is immutable: cannot delete 'bias'"):
        del one.bias
    for twin in (pickle.loads(pickle.dumps(one)), copy.copy(one), copy.deepcopy(one)):
        assert twin == one and not twin.weight.flags.writeable


def test_mixed_dtypes_become_float64():
    one = AffineMap(np.ones(2, np.float32), np.zeros(2, np.float64))
    assert one.weight.dtype == one.bias.dtype == np.float64


def test_a_map_from_tensors():
    torch = pytest.importorskip("torch")
    one = AffineMap(torch.nn.Parameter(torch.ones(3)), torch.zeros(3))
    assert one == AffineMap.identity(3)
    with pytest.raises(TypeError, match=r"weight must be float32 or float64, got dtype bfloat16"):
        AffineMap(torch.ones(3, dtype=torch.bfloat16), torch.zeros(3))


@pytest.mark.parametrize(
    ("weight", "bias", "error", "text"),
    [
        (np.ones(2), np.zeros(3), ValueError, r"weight and bias must have the same shape, got \(2,\) and \(3,\)"),
        (np.ones((1, 2)), np.zeros(2), ValueError, r"weight must have shape \[d\] with d >= 1, got shape \(1, 2\)"),
        (np.ones(2), np.float64(1), ValueError, r"bias must have shape \[d\] with d >= 1, got shape \(\)"),
        (np.ones(0), np.zeros(0), ValueError, r"weight must have shape \[d\] with d >= 1, got shape \(0,\)"),
        (np.array([1, np.nan]), np.zeros(2), ValueError, "weight must be finite, got nan at neuron 1"),
        (np.ones(2), np.array([-np.inf, 0]), ValueError, "bias must be finite, got -inf at neuron 0"),
        (np.ones(2, np.float16), np.zeros(2), TypeError, "weight must be float32 or float64, got dtype float16"),
        (np.ones(2, bool), np.zeros(2), TypeError, "weight must be float16, .* got dtype bool"),
        (np.ones(2), np.zeros(2, complex), TypeError, "bias must be float16, .* got dtype complex128"),
        (np.ones(2), ["a", "b"], TypeError, "bias must be float16, .* got dtype <U1"),
        (np.ma.ones(2), np.zeros(2), TypeError, "weight must be a plain array, got a masked array"),
    ],
)
def test_bad_parameters(weight, bias, error, text):
    with pytest.raises(error, match=text):
        AffineMap(weight, bias)


@pytest.mark.parametrize(
    ("z", "axis", "error", "text"),
    [
        (np.ones((2, 4)), -1, ValueError, r"z must have 3 channels on axis -1, got shape \(2, 4\)"),
        (np.ones((3, 2)), -1, ValueError, r"z must have 3 channels on axis -1, got shape \(3, 2\)"),
        (np.ones((2, 3)), 2, ValueError, r"z must have 3 channels on axis 2, got shape \(2, 3\)"),
        (np.float64(1), -1, ValueError, r"z must have 3 channels on axis -1, got shape \(\)"),
        (np.ones((2, 3), bool), -1, TypeError, "z must be float16, .*float64 or an integer type, got.*bool"),
        (np.ones((2, 3), np.longdouble), -1, TypeError, "z must be .* got dtype (float128|longdouble)"),
        (None, -1, TypeError, "z must be .* got dtype object"),
    ],
)
def test_bad_activations(z, axis, error, text):
    with pytest.raises(error, match=text):
        AffineMap.identity(3).transform(z, axis=axis)


def test_bad_tensors():
    torch = pytest.importorskip("torch")
    one = AffineMap.identity(3)
    with pytest.raises(ValueError, match=r"z must have 3 channels on axis -1, got shape \(2, 4\)"):
        one.transform(torch.ones(2, 4))
    with pytest.raises(TypeError, match=r"got torch.bool"):
        one.transform(torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("use", ["transform", "AffineMap.scaled", "SteeringMaps.scaled"])
@pytest.mark.parametrize(
    ("strength", "error", "text"),
    [
        (np.nan, ValueError, "strength must be finite, got nan"),
        (np.inf, ValueError, "strength must be finite, got inf"),
        ("1", TypeError, "strength must be a real number, got str"),
        (None, TypeError, "strength must be a real number, got NoneType"),
        (np.ones(2), TypeError, "strength must be a real number, got ndarray"),
    ],
)
def test_bad_strength(use, strength, error, text):
    one = AffineMap.identity(3)
    call = {
        "transform": lambda: one.transform(np.ones((1, 3)), strength),
        "AffineMap.scaled": lambda: one.scaled(strength),
        "SteeringMaps.scaled": lambda: SteeringMaps({"a": one}).scaled(strength),
    }[use]
    with pytest.raises(error, match=text):
        call()
