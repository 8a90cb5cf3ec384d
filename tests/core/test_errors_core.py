"""What the extension refuses, and in which words: the argument, what is wanted and what was seen."""

import sys

import numpy as np
import pytest
from bad_calls import TYPE_ERRORS, VALUE_ERRORS, WRITTEN
from calls import NAMES, arrays_in, call, flat, ones, sound
from samples import encode

from lineas import _core

F32 = np.float32

# Every array argument: those of samples stand in lists.
ARRAYS = [
    (name, argument) for name in NAMES for argument, value in sound(name).items()
    if isinstance(value[0] if isinstance(value, list) else value, np.ndarray)
]  # fmt: skip
every_array = pytest.mark.parametrize(("name", "argument"), ARRAYS, ids=["-".join(pair) for pair in ARRAYS])


def good_array(name, argument):
    """(a copy of the array that the sound call passes, how to pass another one)."""
    value = sound(name)[argument]
    if isinstance(value, list):
        return value[0].copy(), lambda bad: call(name, **{argument: [bad]})
    return value.copy(), lambda bad: call(name, **{argument: bad})


def label(argument):
    """What messages call an argument: samples go by their names."""
    return {"samples": "x", "source": "u", "target": "v"}.get(argument, argument)


@pytest.mark.parametrize("name", NAMES)
def test_the_sound_calls_are_sound(name):
    call(name)


@every_array
def test_arrays_of_a_wrong_dtype(name, argument):
    good, passing = good_array(name, argument)
    for dtype in (np.complex128, np.int16, bool, ">f8", object):
        with pytest.raises(TypeError, match=rf"^{label(argument)} must (have dtype .*|be in native byte order), got "):
            passing(np.zeros_like(good, dtype))


@every_array
def test_arrays_of_a_wrong_rank(name, argument):
    good, passing = good_array(name, argument)
    for bad in (good[None], good.reshape(-1)[:1].reshape(())):
        text = rf"^{label(argument)} must have {good.ndim} dimensions, got {bad.ndim}"
        with pytest.raises(ValueError, match=text):
            passing(bad)


@every_array
def test_arrays_with_gaps_or_out_of_line(name, argument):
    good, passing = good_array(name, argument)
    bad = [np.repeat(good, 2, axis=-1)[..., ::2]]
    if good.itemsize > 1:
        shifted = np.zeros(good.nbytes + 1, np.uint8)[1:].view(good.dtype).reshape(good.shape)
        shifted[...] = good
        bad.append(shifted)
    if good.ndim > 1:
        bad.append(np.asfortranarray(good))
    for array in bad:
        with pytest.raises(ValueError, match=rf"^{label(argument)} must be C-contiguous and aligned"):
            passing(array)


@every_array
def test_what_is_no_array(name, argument):
    _, passing = good_array(name, argument)
    for bad, kind in (([1.0], "list"), (3.0, "float"), ("x", "str"), (np.float64(1), "numpy.float64")):
        with pytest.raises(TypeError, match=rf"^{label(argument)} must be a NumPy array, got {kind}"):
            passing(bad)


@pytest.mark.parametrize(("name", "argument"), [(name, part) for name, parts in WRITTEN.items() for part in parts])
def test_outputs_that_are_read_only(name, argument):
    good, passing = good_array(name, argument)
    good.flags.writeable = False
    with pytest.raises(ValueError, match=rf"^{argument} must be writeable"):
        passing(good)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_may_be_read_only_and_are_not_changed(name):
    arguments = sound(name)
    arrays = []
    for argument, value in arguments.items():
        if argument not in WRITTEN.get(name, ()):
            arrays += [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, np.ndarray)]
    before = [x.copy() for x in arrays]
    for x in arrays:
        x.flags.writeable = False
    getattr(_core, name)(*arguments.values())
    assert arrays
    for x, same in zip(arrays, before, strict=True):
        assert x.tobytes() == same.tobytes()


@pytest.mark.parametrize("name", [name for name in NAMES if "threads" in sound(name)])
def test_threads(name):
    for bad in (0, -1):
        with pytest.raises(ValueError, match=rf"^threads must be from 1 to 2147483647, got {bad}"):
            call(name, threads=bad)
    with pytest.raises(ValueError, match=rf"^threads must be from 1 to 2147483647, got {10**30}"):
        call(name, threads=10**30)
    for bad, kind in (("1", "str"), (1.5, "float"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"^threads must be an int, got {kind}"):
            call(name, threads=bad)


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_arguments(name):
    with pytest.raises(TypeError, match=rf"{name} takes {len(sound(name))} arguments, got 0"):
        getattr(_core, name)()
    with pytest.raises(TypeError, match=r"takes no keyword arguments"):
        getattr(_core, name)(x=1)


# --- places of NaN and infinity ---


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan])
def test_the_place_of_what_is_not_finite(rng, dtype, value):
    text = "nan" if np.isnan(value) else str(value)
    for n, d in [(2, 1), (4, 7), (33, 40), (32, 64), (100, 17), (600, 3)]:
        for row, column in {(0, 0), (n - 1, d - 1), (n // 2, d // 3), (1, d - 1)}:
            x = rng.normal(size=(n, d))
            x[row, column] = value
            bad, good = encode(x, dtype), encode(rng.normal(size=(n, d)), dtype)
            place = rf"^it: {text} at row {row}, column {column}$"
            batch, names = [good, bad], ["good", "it"]
            with pytest.raises(ValueError, match=place):
                _core.sort_columns(batch, names, 1)
            for us, vs in ((batch, [good, good]), ([good, good], batch)):
                u_names = names if us is batch else ["a", "b"]
                v_names = names if vs is batch else ["a", "b"]
                for gradient in (0, 2):
                    with pytest.raises(ValueError, match=place):
                        _core.wasserstein(us, vs, None, None, None, None, False, gradient, u_names, v_names, 1)
                for method in ("mean", "gaussian", "linear"):
                    with pytest.raises(ValueError, match=place):
                        _core.fit_local(us, vs, None, None, method, u_names, v_names, 1)
            with pytest.raises(ValueError, match=place):
                _core.covariance(bad, None, "it")
            state = [np.zeros(d), np.zeros(d), np.full(d, np.inf), np.full(d, -np.inf)]
            before = [part.copy() for part in state]
            with pytest.raises(ValueError, match=place):
                _core.moments_update(bad, 0, *state, "it", 1)
            for part, same in zip(state, before, strict=True):
                assert part.tobytes() == same.tobytes()


def test_one_of_several_places_is_named(rng):
    x = rng.normal(size=(40, 30))
    x[3, 17] = x[20, 4] = np.nan
    with pytest.raises(ValueError, match=r"x: nan at row (3, column 17|20, column 4)$"):
        _core.sort_columns([x], ["x"], 1)


@pytest.mark.parametrize("v_sorted", [False, True])
def test_the_place_in_a_sorted_target(v_sorted):
    v = np.sort(np.arange(12.0).reshape(4, 3), axis=0)
    v[3, 1] = np.inf
    with pytest.raises(ValueError, match=r"^v: inf at row 3, column 1$"):
        call("wasserstein", v=[v], u=[ones(4, 3)], v_sorted=v_sorted)


def test_the_place_under_masses():
    """Losses and maps do not see a row without mass, and find what is behind it; covariances look at all rows."""
    u = ones(4, 3)
    u[2, 1] = np.nan
    mass = np.array([1.0, 1.0, 0.0, 1.0])
    call("wasserstein", u=[u], u_mass=[mass])
    call("fit_local", source=[u], source_mass=[mass])
    u[3, 0] = np.inf
    with pytest.raises(ValueError, match=r"^u: inf at row 3, column 0$"):
        call("wasserstein", u=[u], u_mass=[mass])
    with pytest.raises(ValueError, match=r"^u: inf at row 3, column 0$"):
        call("fit_local", source=[u], source_mass=[mass])
    with pytest.raises(ValueError, match=r"^x: nan at row 2, column 1$"):
        call("covariance", x=u, mass=mass)


def test_an_overflow_in_the_map_is_found():
    u = np.full((4, 3), 1e30, np.float32)
    single = {"v": [ones(5, 3, dtype=np.float32)], "bias": [ones(3, dtype=np.float32)]}
    with pytest.raises(ValueError, match=r"^u: inf at row \d, column \d"):
        call("wasserstein", u=[u], weight=[np.full(3, 1e30, np.float32)], **single)


# --- argument by argument ---


@pytest.mark.parametrize(("name", "changes", "text"), TYPE_ERRORS)
def test_type_errors(name, changes, text):
    with pytest.raises(TypeError, match=text):
        call(name, **changes)


@pytest.mark.parametrize(("name", "changes", "text"), VALUE_ERRORS)
def test_value_errors(name, changes, text):
    with pytest.raises(ValueError, match=text):
        call(name, **changes)


def test_a_row_of_the_mask_without_tokens():
    mask = np.array([[1, 0, 1, 0], [0, 0, 0, 0]], np.uint8)
    for mode in ("mean", "min", "max", "last"):
        with pytest.raises(ValueError, match=r"^mask: row 1 keeps no token"):
            call("pool", mask=mask, mode=mode)
    assert call("pool", mask=mask, mode="all")[0].shape == (2, 3)
    assert call("pool", mask=np.zeros((2, 4), np.uint8), mode="all")[0].shape == (0, 3)


def test_a_bad_gradient_changes_nothing():
    arrays = [*np.ones((2, 5)), *np.ones((4, 5))]
    before = [x.copy() for x in arrays]
    with pytest.raises(ValueError, match=r"^grad_bias is not finite at position 4 \(module 1\)"):
        call(
            "step",
            weight=arrays[0],
            bias=arrays[1],
            grad_bias=np.array([1, 1, 1, 1, np.nan]),
            adam=(*arrays[2:], 1, 0.9, 0.9, 1e-8),
        )
    for x, same in zip(arrays, before, strict=True):
        assert x.tobytes() == same.tobytes()


def test_errors_leak_no_references():
    """Each way out gives back what it took."""
    array, bad = ones(40, 30), ones(40, 30)
    bad[1, 1] = np.nan
    names, mass = ["x"], ones(40)
    counts = [sys.getrefcount(x) for x in (array, bad, names, mass)]
    for _ in range(50):
        _core.wasserstein([array], [array], None, None, [mass], None, False, 2, names, names, 1)
        for batch, weights in (([bad], [mass]), ([array], [mass, mass]), ([array], [ones(3)]), ([array, 3], None)):
            with pytest.raises((TypeError, ValueError)):
                _core.wasserstein([array], batch, None, None, None, weights, False, 2, names, names, 1)
            with pytest.raises((TypeError, ValueError)):
                _core.fit_local([array], batch, None, weights, "linear", names, names, 1)
    del batch
    assert [sys.getrefcount(x) for x in (array, bad, names, mass)] == counts


# --- what is updated in place, and numbers and sequences that run Python code ---


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        *(("moments_update", *pair) for pair in (("mean", "m2"), ("low", "high"), ("m2", "x"))),
        *(("moments_merge", *pair) for pair in (("mean", "high"), ("mean", "mean_b"), ("low", "high_b"))),
        *(("quantiles_update", *pair) for pair in (("mean", "m2"), ("low", "high"), ("m2", "x"))),
        *(("quantiles_merge", *pair) for pair in (("mean", "high"), ("mean", "mean_b"), ("low", "high_b"))),
        *(("step", *pair) for pair in (("weight", "bias"), ("weight", "grad_weight"), ("bias", "grad_weight"))),
    ],
)
def test_memory_shared_with_what_is_updated(name, first, second):
    a, b = sound(name)[first], sound(name)[second]
    memory = np.ones(a.size + b.size - 1)  # one number belongs to both
    with pytest.raises(ValueError, match=rf"^{first} and {second} must not share memory"):
        call(name, **{first: memory[: a.size], second: memory[a.size - 1 :].reshape(b.shape)})


def test_memory_shared_with_the_moments_of_adam():
    for place, part in enumerate(("m_weight", "v_weight", "m_bias", "v_bias")):
        moments = list(np.zeros((4, 5)))
        with pytest.raises(ValueError, match=rf"^bias and {part} must not share memory"):
            call("step", bias=moments[place], adam=(*moments, 1, 0.9, 0.99, 1e-8))
        with pytest.raises(ValueError, match=rf"^{part} and grad_bias must not share memory"):
            call("step", grad_bias=moments[place], adam=(*moments, 1, 0.9, 0.99, 1e-8))
    moments[0] = moments[1]
    with pytest.raises(ValueError, match=r"^m_weight and v_weight must not share memory"):
        call("step", adam=(*moments, 1, 0.9, 0.99, 1e-8))


def test_inputs_may_share_memory():
    x = np.random.default_rng(0).normal(size=(4, 3))
    apart = call("wasserstein", u=[x], v=[x.copy()], weight=[x[0].copy()], bias=[x[0].copy()])
    for a, b in zip(flat(call("wasserstein", u=[x], v=[x], weight=[x[0]], bias=[x[0]])), flat(apart), strict=True):
        assert a.tobytes() == b.tobytes()


def turn(arrays):
    """Give matrices the shape of a column, in place."""
    for x in arrays:
        if x.ndim > 1:
            x.resize((x.size, *[1] * (x.ndim - 1)), refcheck=False)


class Meddling:
    """A number, a flag or a sequence that turns arrays round when it is read."""

    def __init__(self, value, arrays):
        self.value, self.arrays = value, arrays

    def read(self):
        turn(self.arrays)
        return self.value

    __index__ = __float__ = __bool__ = read

    def __iter__(self):
        return iter(self.read())


@pytest.mark.parametrize("name", NAMES)
def test_code_that_an_argument_runs_cannot_change_arrays_after_their_check(name):
    """Numbers and sequences are read first: the call does what it does on arrays that were turned before it."""

    def outcome(arguments):
        try:
            return list(map(repr, flat(getattr(_core, name)(*arguments.values()))))
        except ValueError as error:
            return str(error)

    turned = sound(name)
    turn(arrays_in(list(turned.values())))
    expected = outcome(turned)
    for key, value in sound(name).items():
        if isinstance(value, list | float | int):
            arguments = sound(name)
            arguments[key] = Meddling(arguments[key], arrays_in(list(arguments.values())))
            assert outcome(arguments) == expected, key


def test_empty_arrays_that_claim_many_rows():
    """Whatever they claim, there is nothing to do."""
    many = 1 << 40
    z = np.empty((many, 3, 0))
    assert call("affine_apply", z=z).shape == z.shape
    grad_z, grad_weight, grad_bias = call("affine_backward", z=z, grad_out=z)
    assert grad_z.shape == z.shape and not grad_weight.any() and not grad_bias.any()
    pooled, _ = call("pool", x=np.empty((many, 0, 3)), mask=None, mode="all")
    assert pooled.shape == (0, 3)
    with pytest.raises(ValueError, match=r"^mask: row 0 keeps no token"):
        call("pool", x=np.empty((7, 0, 3)), mask=None)
    with pytest.raises((ValueError, MemoryError)):  # more than there is memory for, or can be addressed
        call("pool_backward", grad_out=np.ones((1 << 20, 1)), mask=None, tokens=(1 << 31) - 1)
