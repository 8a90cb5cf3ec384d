"""What the extension refuses, and in which words: the argument, what is wanted and what was seen."""

import sys

import numpy as np
import pytest
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


WRITTEN = {
    "moments_update": ("mean", "m2", "low", "high"),
    "moments_merge": ("mean", "m2", "low", "high"),
    "step": ("weight", "bias"),
}


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
    """A row without mass is looked at too: a value that is not a number is a mistake anywhere."""
    u = ones(4, 3)
    u[2, 1] = np.nan
    mass = np.array([1.0, 1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"^u: nan at row 2, column 1$"):
        call("wasserstein", u=[u], u_mass=[mass])
    with pytest.raises(ValueError, match=r"^u: nan at row 2, column 1$"):
        call("fit_local", source=[u], source_mass=[mass])
    with pytest.raises(ValueError, match=r"^x: nan at row 2, column 1$"):
        call("covariance", x=u, mass=mass)


def test_an_overflow_in_the_map_is_found():
    u = np.full((4, 3), 1e30, np.float32)
    single = {"v": [ones(5, 3, dtype=np.float32)], "bias": [ones(3, dtype=np.float32)]}
    with pytest.raises(ValueError, match=r"^u: inf at row \d, column \d"):
        call("wasserstein", u=[u], weight=[np.full(3, 1e30, np.float32)], **single)


# --- argument by argument ---


TYPE_ERRORS = [
    ("sort_columns", {"samples": 3}, r"^samples must be a sequence, got int"),
    ("sort_columns", {"names": 3}, r"^names must be a sequence, got int"),
    ("wasserstein", {"u_mass": 3.0}, r"^row weights must be a sequence, got float"),
    ("wasserstein", {"weight": 3}, r"^weight must be a sequence, got int"),
    ("wasserstein", {"bias": 3}, r"^bias must be a sequence, got int"),
    ("sort_columns", {"names": [3]}, r"^samples: names must be str"),
    (
        "sort_columns",
        {"samples": [ones(2, 3), ones(2, 3, dtype=F32)], "names": ["x", "y"]},
        r"^y: float64 cannot be mixed",
    ),
    ("wasserstein", {"v": [ones(4, 3, dtype=np.float16)]}, r"^v: float64 cannot be mixed"),
    ("wasserstein", {"bias": [ones(3, dtype=F32)]}, r"^bias must have dtype float64, got float32"),
    ("wasserstein", {"gradient": None}, r"^gradient must be an int, got NoneType"),
    ("wasserstein", {"u_mass": [ones(4, dtype=F32)]}, r"^row weights must have dtype float64, got float32"),
    ("affine_apply", {"bias": ones(3, dtype=F32)}, r"^bias must have dtype float64, got float32"),
    ("affine_apply", {"z": ones(2, 3, 4, dtype=np.float16)}, r"^weight must have dtype float32, got float64"),
    ("affine_apply", {"strength": "1"}, r"^strength must be a real number, got str"),
    ("pool", {"mask": ones(2, 4)}, r"^mask must have dtype uint8, got float64"),
    ("pool", {"mode": 3}, r"^pooling must be a str, got int"),
    ("fit_local", {"method": None}, r"^method must be a str, got NoneType"),
    ("quantile_moments", {"source": 3}, r"^source must be a sequence, got int"),
    ("largest_penalty", {"moments": 3}, r"^moments must be a sequence, got int"),
    ("sparse_path", {"moments": [ones(5, 3, dtype=np.float32)]}, r"^moments must have dtype float64, got float32"),
    ("sparse_path", {"penalties": [1.0]}, r"^penalties must be a NumPy array, got list"),
    ("pool_backward", {"mode": "max"}, r"^index must be a NumPy array, got NoneType"),
    ("pool_backward", {"mode": "max", "index": np.zeros((2, 3))}, r"^index must have dtype int32, got float64"),
    ("moments_update", {"m2": np.zeros(3, F32)}, r"^m2 must have dtype float64, got float32"),
    ("step", {"grad_weight": ones(5, dtype=F32)}, r"^grad_weight must have dtype float64, got float32"),
    ("step", {"offsets": np.array([0, 5], np.int32)}, r"^offsets must have dtype int64, got int32"),
    ("step", {"adam": (1, 2)}, r"^adam must be a tuple \(m_weight, v_weight, .*eps\)"),
    ("covariance", {"name": 3}, r"^sample: names must be str"),
]

VALUE_ERRORS = [
    ("sort_columns", {"samples": [ones(0, 3)]}, r"^x must have at least one row and one column, got shape \(0, 3\)"),
    ("sort_columns", {"samples": [ones(3, 0)]}, r"^x must have at least one row and one column, got shape \(3, 0\)"),
    ("sort_columns", {"names": []}, r"^samples: arrays, names and row weights must have one"),
    ("wasserstein", {"v": [ones(4, 2)]}, r"^v has 2 columns, but u has 3"),
    ("wasserstein", {"v": []}, r"^v: arrays, names and row weights must have one"),
    ("wasserstein", {"v": [], "v_names": []}, r"^v must have 1 entries, one a module, got 0"),
    ("wasserstein", {"v": [ones(2, 3)] * 2, "v_names": ["a", "b"]}, r"^v must have 1 entries, .*got 2"),
    ("wasserstein", {"weight": [ones(2)]}, r"^weight must have 3 entries, got 2"),
    ("wasserstein", {"weight": []}, r"^weight and bias must have one entry a module"),
    ("wasserstein", {"weight": None}, r"^weight and bias must both be given"),
    ("wasserstein", {"weight": None, "bias": None, "gradient": 1}, r"are needed for gradient=1"),
    ("wasserstein", {"gradient": 3}, r"^gradient must be from 0 to 2, got 3"),
    ("wasserstein", {"u_mass": [ones(3)]}, r"^row weights must have 4 entries, got 3"),
    ("wasserstein", {"u_mass": []}, r"^u: arrays, names and row weights must have one"),
    ("wasserstein", {"u_mass": [-ones(4)]}, r"^u: row weights must be .*got -1.0 for row 0"),
    ("wasserstein", {"v_mass": [np.array([1, 1, np.nan, 1, 1])]}, r"^v: row weights must be .*got nan for row 2"),
    ("wasserstein", {"v_mass": [np.zeros(5)]}, r"^v: row weights must be .* a positive sum"),
    ("wasserstein", {"v_mass": [ones(5)], "v_sorted": True}, r"^v_sorted cannot be combined with weights of v"),
    ("affine_apply", {"weight": ones(4)}, r"^weight must have 3 entries, got 4"),
    ("affine_apply", {"bias": ones(2)}, r"^bias must have 3 entries, got 2"),
    ("affine_apply", {"strength": np.nan}, r"^strength must be finite, got nan"),
    ("affine_apply", {"strength": 10**400}, r"^strength must be finite, got 1000"),
    ("affine_apply", {"z": ones(2, 0, 4)}, r"^z must have at least one channel, got shape \(2, 0, 4\)"),
    ("pool", {"x": ones(2, 4, 0)}, r"^x must have at least one column, got shape \(2, 4, 0\)"),
    ("pool_backward", {"grad_out": ones(2, 0)}, r"^grad_out must have at least one column, got shape \(2, 0\)"),
    ("affine_backward", {"z": ones(2, 3, 0), "grad_out": ones(5, 3, 0)}, r"^grad_out must have the dtype and shape of"),
    ("affine_backward", {"grad_out": ones(2, 3, 5)}, r"^grad_out must have the dtype and shape of"),
    ("affine_backward", {"grad_out": ones(2, 3, 4, dtype=F32)}, r"^grad_out must have the dtype and shape of"),
    ("affine_backward", {"strength": np.inf}, r"^strength must be finite, got inf"),
    ("pool", {"mask": ones(2, 3, dtype=np.uint8)}, r"^mask must have shape \(2, 4\), got \(2, 3\)"),
    ("pool", {"mode": "median"}, r"^pooling must be 'mean', 'min', 'max', 'last' or 'all', got 'median'"),
    ("pool_backward", {"mask": ones(3, 4, dtype=np.uint8)}, r"^mask must have shape \(2, 4\), got \(3, 4\)"),
    ("pool_backward", {"mode": "max", "index": np.zeros((2, 2), np.int32)}, r"^index must have the shape of grad_out"),
    ("pool_backward", {"mode": "max", "index": np.full((2, 3), 4, np.int32)}, r"a size is zero, negative or"),
    ("pool_backward", {"mode": "max", "index": np.full((2, 3), -1, np.int32)}, r"a size is zero, negative or"),
    ("pool_backward", {"mode": "all"}, r"^grad_out must have 8 rows, got 2"),
    ("pool_backward", {"mode": "all", "mask": None}, r"^grad_out must have 0 rows, got 2"),
    ("pool_backward", {"tokens": 0}, r"^tokens must be from 1 to 2147483647, got 0"),
    ("moments_update", {"mean": np.zeros(2)}, r"^mean must have 3 entries, got 2"),
    ("moments_update", {"count": -1}, r"^count must be from 0 to \d+, got -1"),
    ("moments_merge", {"high": ones(2)}, r"^high must have 3 entries, got 2"),
    ("moments_merge", {"low_b": ones(2)}, r"^low_b must have 3 entries, got 2"),
    ("moments_merge", {"count_b": -1}, r"^count_b must be from 0 to \d+, got -1"),
    ("prox_sparse_group", {"tau": -1.0}, r"^tau must not be negative, got -1.0"),
    ("prox_sparse_group", {"l1": np.nan}, r"^l1 must be finite, got nan"),
    ("prox_sparse_group", {"group": -0.5}, r"^group must not be negative, got -0.5"),
    ("prox_sparse_group", {"x": np.ones(0)}, r"^x must have at least one entry"),
    ("step", {"bias": ones(4)}, r"^bias must have 5 entries, got 4"),
    ("step", {"grad_bias": np.array([0, 0, np.nan, 0, 0])}, r"^grad_bias is not finite at position 2 \(module 1\)"),
    ("step", {"grad_weight": np.array([0, 0, 0, 0, np.inf])}, r"^grad_weight is not finite at position 4 \(module 1\)"),
    ("step", {"offsets": np.array([0, 2, 4])}, r"^offsets must run from 0 to the number of .*, 5"),
    ("step", {"offsets": np.array([1, 2, 5])}, r"^offsets must run from 0 to the number of .*, 5"),
    ("step", {"offsets": np.array([], np.int64)}, r"^offsets must run from 0 to the number of .*, 5"),
    ("step", {"offsets": np.array([0, 3, 2, 5])}, r"^offsets must ascend strictly, entry 2 does not"),
    ("step", {"offsets": np.array([0, 9, 5])}, r"^offsets must ascend strictly, entry 2 does not"),
    ("step", {"lr": -0.1}, r"^lr must not be negative, got -0.1"),
    ("step", {"l1_bias": np.inf}, r"^l1_bias must be finite, got inf"),
    ("step", {"adam": (*np.zeros((4, 4)), 1, 0.9, 0.9, 1e-8)}, r"^m_weight must have 5 entries, got 4"),
    ("step", {"adam": (*np.zeros((4, 5)), 0, 0.9, 0.9, 1e-8)}, r"^step must be from 1 to \d+, got 0"),
    ("step", {"adam": (*np.zeros((4, 5)), 1, np.nan, 0.9, 1e-8)}, r"^beta1 must be finite, got nan"),
    ("quantile_moments", {"source": [ones(1, 3)]}, r"^u must have at least 2 rows, got 1"),
    ("largest_penalty", {"l1_ratio": 1.5}, r"^l1_ratio must be from 0 to 1, got 1.5"),
    ("largest_penalty", {"moments": [ones(4, 3)]}, r"^moments must have shape \[5, d\] with d >= 1, got \[4, 3\]"),
    ("sparse_path", {"held_out": [ones(5, 4)]}, r"^held_out must have the modules and widths of moments"),
    ("sparse_path", {"penalties": np.zeros(2)}, r"^penalties must be one or more finite numbers above 0"),
    ("sparse_path", {"penalties": np.ones(0)}, r"^penalties must be one or more finite numbers above 0"),
    ("fit_local", {"method": "median"}, r"^method must be 'mean', 'gaussian' or 'linear', got 'median'"),
    ("fit_local", {"source": [ones(1, 3)]}, r"^u must have at least 2 rows, got 1"),
    ("fit_local", {"target": [ones(1, 3)]}, r"^v must have at least 2 rows, got 1"),
    ("fit_local", {"target": [ones(4, 5)]}, r"^v has 5 columns, but u has 3"),
    ("fit_local", {"source_mass": [-ones(4)]}, r"^u: row weights must be .*got -1.0 for row 0"),
    ("covariance", {"x": ones(1, 3)}, r"^x must have at least 2 rows, got 1"),
    ("covariance", {"mass": np.zeros(4)}, r"^x: row weights must be .* a positive sum"),
    ("bures_map", {"cov_target": np.eye(4)}, r"must be square and of one size, got \(3, 3\) and \(4, 4\)"),
    ("bures_map", {"cov_source": ones(3, 2)}, r"must be square and of one size, got \(3, 2\) and \(3, 3\)"),
    ("bures_map", {"ridge": np.inf}, r"^ridge must be finite, got inf"),
    ("bures_map", {"cov_source": np.diag([1, np.nan, 1])}, r"^cov_source is not finite at row 1, column 1"),
    ("bures_map", {"cov_target": np.diag([1, 1, -np.inf])}, r"^cov_target is not finite at row 2, column 2"),
]


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
