"""Arrays in every disguise, and what only claims to be one: the result of a clean copy, or an error that names it."""

import re
import sys

import numpy as np
import pytest
from bad_calls import WRITTEN
from calls import NAMES, arrays_in, bits, call, sound
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays, scalar_dtypes

import lineas
from lineas import _core

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

# --- disguises: the same numbers, lying otherwise in memory or in another object ---


class Subclass(np.ndarray):
    """Its own ideas of indexing and arithmetic must not reach the engine."""

    def __getitem__(self, key):
        raise AssertionError("indexed")

    def __array_ufunc__(self, *args, **kwargs):
        raise AssertionError("calculated with")


class Converted:
    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return self.x


class Interface:
    def __init__(self, x):
        self.x, self.__array_interface__ = x, x.__array_interface__


def spread(x, gap=2):
    """A view into a larger array, full of NaN elsewhere."""
    large = np.full([size * gap + 1 for size in x.shape], np.nan, x.dtype)
    view = large[tuple(slice(1, 1 + size * gap, gap) for size in x.shape)]
    view[...] = x
    return view


def misaligned(x):
    memory = np.zeros(x.nbytes + 1, np.uint8)
    view = memory[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


DISGUISES = {
    "itself": lambda x: x,
    "Fortran order": np.asfortranarray,
    "negative strides": lambda x: np.flip(np.flip(x).copy()),
    "gaps": spread,
    "a field of records": lambda x: np.rec.fromarrays([x, x + 1], names="a,b").a,
    "out of line": misaligned,
    "swapped bytes": lambda x: x.astype(x.dtype.newbyteorder()),
    "swapped bytes and gaps": lambda x: spread(x.astype(x.dtype.newbyteorder())),
    "read-only": read_only,
    "a subclass": lambda x: x.view(Subclass),
    "a matrix": lambda x: np.asmatrix(x) if x.ndim == 2 else x,
    "__array__": Converted,
    "__array_interface__": lambda x: Interface(x) if x.dtype.kind == "f" else Converted(x),
    "memoryview": lambda x: memoryview(x) if x.dtype.char in "fd" else x,
    "a list of rows": lambda x: list(x) if x.ndim == 2 else x,
}

WITH_TORCH = {
    "tensor": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "gaps": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "flipped twice": lambda t: t.flip(0).flip(0),
    "with gradient": lambda t: t.clone().requires_grad_(),
    "a result with gradient": lambda t: t.clone().requires_grad_() * 1,
    "parameter": lambda t: sys.modules["torch"].nn.Parameter(t),
    "negative bit": lambda t: (-t)._neg_view(),
}

REAL = ["float32", "float64"]
DTYPES = REAL + ["float16"] + (["bfloat16"] if ml_dtypes else [])
SMALL = ml_dtypes.bfloat16 if ml_dtypes else np.float16
few = st.integers(-64, 64).map(lambda k: k / 8)  # in every dtype exactly


def typed(x, dtype):
    return x.astype(SMALL if dtype == "bfloat16" else dtype)


@st.composite
def samples(draw, dtypes=DTYPES, rows=2):
    """Two arrays of one width, each broadcast from one row or column now and then: strides of zero."""
    d, out = draw(st.integers(1, 5)), []
    for dtype in (draw(st.sampled_from(dtypes)), draw(st.sampled_from(dtypes))):
        n = draw(st.integers(rows, 6))
        shape = draw(st.sampled_from([(n, d), (n, d), (1, d), (n, 1), (1, 1)]))
        out.append(np.broadcast_to(typed(draw(arrays(np.float64, shape, elements=few)), dtype), (n, d)))
    return out


def results(u, v, weights):
    """All functions for people on two samples and weights of the rows of the first.

    Without the transform of a GaussianMap, a product that torch takes for tensors.
    """
    lin, gaussian = lineas.fit(u, v, source_weights=weights), lineas.fit(u, v, method="gaussian")
    seen, same = lineas.Moments().update(u).update(v), lineas.moments([u, v])
    return [
        lineas.wasserstein(u, v),
        lineas.wasserstein(u, v, u_weights=weights),
        *lineas.wasserstein_grad(u, v),
        *(part for one in (lin, gaussian) for part in (one.weight, one.bias)),
        lineas.covariance(u),
        lineas.covariance(u, weights=weights),
        lineas.bures_map(u, v, ridge=0.5).matrix,
        *(part for moments in (seen, same) for part in (moments.mean, moments.variance(), moments.min, moments.max)),
        *(plain(lin.transform(z, 0.5)) for z in (u, v)),
    ]


def plain(x):
    """An array of a result that may be a tensor; bfloat16 as float32."""
    if not isinstance(x, np.ndarray):
        x = x.detach()
        x = (x.float() if x.element_size() == 2 else x).numpy()
    return x.astype(np.float32) if x.itemsize == 2 else x


@given(samples(), st.sampled_from(list(DISGUISES)), st.sampled_from(list(DISGUISES)), st.sampled_from(list(DISGUISES)))
@settings(max_examples=100)
@example([np.ones((2, 3), "f4"), np.ones((2, 3), SMALL)], "itself", "swapped bytes", "gaps")
@example([np.ones((2, 3), SMALL), np.ones((2, 3), "f4")], "a list of rows", "gaps", "gaps")
def test_a_disguise_changes_nothing(pair, first, second, third):
    clean = [x.copy() for x in pair]
    weights = np.arange(1.0, len(clean[0]) + 1)
    expected = bits(results(*clean, weights))
    assert bits(results(DISGUISES[first](pair[0]), DISGUISES[second](pair[1]), DISGUISES[third](weights))) == expected
    assert all((x == same).all() for x, same in zip(pair, clean, strict=True))


@given(samples(["float32", "float64", "float16"]), st.sampled_from(list(WITH_TORCH)), st.sampled_from(list(WITH_TORCH)))
def test_a_disguised_tensor_changes_nothing(pair, first, second):
    torch = pytest.importorskip("torch")
    clean = [x.copy() for x in pair]
    weights = np.arange(1.0, len(clean[0]) + 1)
    u, v = (WITH_TORCH[name](torch.from_numpy(x)) for name, x in zip((first, second), clean, strict=True))
    expanded = torch.from_numpy(clean[0][:1]).expand(3, -1)
    assert bits(results(u, v, torch.from_numpy(weights))) == bits(results(*clean, weights))
    assert bits([lineas.wasserstein(expanded, v)]) == bits([lineas.wasserstein(clean[0][[0, 0, 0]], clean[1])])
    assert bits([lineas.wasserstein(u.bfloat16(), v)]) == bits([lineas.wasserstein(u.bfloat16().float(), v)])


@given(samples(REAL, rows=1), st.sampled_from(list(DISGUISES)), st.sampled_from(list(DISGUISES)))
def test_disguised_vectors(pair, first, second):
    (w, *_), (b, *_) = clean = [x.copy() for x in pair]
    weight, bias = DISGUISES[first](pair[0][0]), DISGUISES[second](pair[1][0])
    assert bits(lineas.AffineMap(weight, bias).__reduce__()[1]) == bits(lineas.AffineMap(w, b).__reduce__()[1])
    options = {"tau": 0.5, "l1": 1.0, "group": 0.25}
    assert bits([lineas.prox_sparse_group(weight, **options)]) == bits([lineas.prox_sparse_group(w, **options)])
    assert all((x == same).all() for x, same in zip(pair, clean, strict=True))


@given(st.data())
def test_inputs_may_share_memory(data):
    """Two views of one array, rows backwards or every other one among them."""
    d = data.draw(st.integers(1, 4))
    memory = data.draw(arrays(np.float64, st.integers(4 * d, 12 * d), elements=few))
    views = [
        np.lib.stride_tricks.as_strided(memory[at:], (n, d), (8 * row, 8), writeable=False)
        for n, row, at in (
            data.draw(st.tuples(st.integers(2, 3), st.integers(0, d), st.integers(0, d - 1))) for _ in range(2)
        )
    ]
    assert bits(results(*views, None)) == bits(results(*(x.copy() for x in views), None))


# --- outputs ---


@given(st.data())
@settings(max_examples=100)
def test_outputs_share_no_memory(data):
    """Parameters and gradients of a step anywhere in one array: refused exactly if an output overlaps."""
    memory, d = np.arange(24.0), data.draw(st.integers(1, 6))
    starts = [data.draw(st.integers(0, len(memory) - d)) for _ in range(4)]
    parts = [memory[at : at + d] for at in starts]
    copies = [x.copy() for x in parts]
    settings = (np.array([0, d]), 0.1, 0.2, 0.3, 0.4, 0.5, None, 1)
    overlap = any(np.shares_memory(parts[i], parts[k]) for i in (0, 1) for k in range(i + 1, 4))
    before = memory.copy()
    if overlap:
        with pytest.raises(ValueError, match="must not share memory"):
            _core.step(*parts, *settings)
        assert np.array_equal(memory, before)
    else:
        assert bits(_core.step(*parts, *settings)) == bits(_core.step(*copies, *settings))
        assert bits(parts) == bits(copies)


# --- what is refused ---


class Claims:
    def __init__(self, **interface):
        self.__array_interface__ = {"version": 3, "data": bytes(64), "typestr": "<f8", "shape": (2, 3)} | interface


class Capsule:
    """The protocol of tensors, with nothing behind it."""

    def __dlpack__(self, **options):
        return 3

    def __dlpack_device__(self):
        return 1, 0


def recursive():
    out = []
    out.append(out)
    return out


DTYPE = "must be float16, bfloat16, float32, float64 or an integer type, got dtype"
HOSTILE = {
    "structured": (lambda: np.zeros((2, 3), [("a", "f8")]), TypeError, DTYPE),
    "records": (lambda: np.rec.fromarrays([np.zeros((2, 3))]), TypeError, DTYPE),
    "objects": (lambda: np.ones((2, 3), object), TypeError, DTYPE),
    "none in it": (lambda: [[1.0, None, 3.0]] * 2, TypeError, DTYPE),
    "booleans": (lambda: np.ones((2, 3), bool), TypeError, DTYPE),
    "complex": (lambda: np.ones((2, 3), complex), TypeError, DTYPE),
    "dates": (lambda: np.zeros((2, 3), "M8[s]"), TypeError, DTYPE),
    "text": (lambda: np.full((2, 3), "1.0"), TypeError, DTYPE),
    "bytes": (lambda: b"123", TypeError, DTYPE),
    "void": (lambda: np.zeros((2, 3), "V8"), TypeError, DTYPE),
    "set": (lambda: {1.0}, TypeError, DTYPE),
    "generator": (lambda: (x for x in [1.0]), TypeError, DTYPE),
    "tensor protocol": (Capsule, TypeError, DTYPE),
    "masked": (lambda: np.ma.masked_equal(np.eye(2, 3), 1), TypeError, "must be a plain array, got a masked array"),
    "masked rows": (lambda: list(np.ma.array(np.eye(2, 3))), TypeError, "must be a plain array, got a masked array"),
    "no dimensions": (lambda: np.float64(1), ValueError, r"must have .*got shape \(\)"),
    "four dimensions": (lambda: np.ones((1, 1, 2, 4)), ValueError, r"must have .*got shape \(1, 1, 2, 4\)"),
    "nothing in it": (lambda: np.ones((2, 0)), ValueError, r"must have .*got shape \(2, 0\)"),
    "huge and empty": (lambda: np.ones((1 << 58, 0)), ValueError, rf"must have .*got shape \({1 << 58}, 0\)"),
    "ragged": (lambda: [[1.0], [1.0, 2.0]], ValueError, "must be array_like, got list: .*inhomogeneous"),
    "itself in it": (recursive, (TypeError, ValueError), "must be "),
    "array of a list": (lambda: Converted([1.0]), ValueError, "must be array_like, got Converted: .*not producing"),
    "array of objects": (lambda: Converted(np.ones(2, object)), TypeError, DTYPE),
    "unknown type": (lambda: Claims(typestr="<q9"), TypeError, "must be array_like, got Claims: data type"),
    "negative size": (lambda: Claims(shape=(-2, 3)), ValueError, "must be array_like, got Claims: negative"),
    "no shape": (lambda: Claims(shape=3), TypeError, "must be array_like, got Claims: shape"),
    "no data": (lambda: Claims(data=(None, False)), TypeError, "must be array_like, got Claims: "),
}


def tensors(torch):
    """Tensors without numbers to read."""
    ones = torch.ones(2, 3)
    yield "sparse", ones.to_sparse(), "must be a dense tensor, got layout torch.sparse_coo"
    yield "compressed", ones.to_sparse_csr(), "must be a dense tensor, got layout torch.sparse_csr"
    yield "blocked", ones.to_mkldnn(), "must be a dense tensor, got layout torch._mkldnn"
    yield "nested", torch.nested.nested_tensor([ones, ones]), "must be a dense tensor, got nested layout"
    yield "jagged", torch.nested.nested_tensor([ones], layout=torch.jagged), "must be a dense tensor, got nested layout"
    yield "quantised", torch.quantize_per_tensor(ones, 1, 0, torch.qint8), "must be a dense tensor, .* torch.qint8"
    yield "lazy", torch.nn.UninitializedParameter(), "must be a dense tensor, got an uninitialized parameter"
    yield "booleans", ones.bool(), r"must be float16, .*torch\.bool|got torch\.bool"
    yield "complex", torch.complex(ones, ones).conj(), r"must be float16, .*torch\.complex64|got torch\.complex64"
    yield "small", ones.to(torch.float8_e4m3fn), r"must be float16, .*torch\.float8_e4m3fn|got torch\.float8_e4m3fn"


def unreadable(torch):
    """Tensors that torch can calculate with, but NumPy cannot read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    yield "meta", torch.ones(2, 3, device="meta"), "must be a tensor with data, got one on device meta"
    with FakeTensorMode():
        yield "fake", torch.ones(2, 3), "must be a tensor that NumPy can read, got FakeTensor"


GOOD = np.array([[1.0, 2.0, 4.0], [2.0, 3.0, 5.0]])
GAUSSIAN = lineas.GaussianMap(np.eye(3), np.zeros(3))
ENTRIES = {
    "wasserstein u": ("u", lambda x: lineas.wasserstein(x, GOOD)),
    "wasserstein v": ("v", lambda x: lineas.wasserstein_grad(GOOD, x)),
    "fit source": ("source", lambda x: lineas.fit(x, GOOD)),
    "fit target": (r"target\['a'\]", lambda x: lineas.fit({"a": GOOD}, {"a": x})),
    "covariance": ("x", lambda x: lineas.covariance(x)),
    "bures_map": ("target", lambda x: lineas.bures_map(GOOD, x)),
    "Moments": ("x", lambda x: lineas.Moments().update(x)),
    "moments": ("batch 1", lambda x: lineas.moments([GOOD, x])),
    "Quantiles": ("x", lambda x: lineas.Quantiles().update(x)),
    "prox": ("x", lambda x: lineas.prox_sparse_group(x, tau=1, l1=1, group=1)),
    "AffineMap": ("weight", lambda x: lineas.AffineMap(x, GOOD[0])),
    "bias": ("bias", lambda x: lineas.AffineMap(GOOD[0], x)),
    "transform": ("z", lambda x: lineas.AffineMap.identity(3).transform(x)),
    "gaussian": ("z", lambda x: GAUSSIAN.transform(x)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_refused(kind):
    make, error, text = HOSTILE[kind]
    for entry, (name, use) in ENTRIES.items():
        if kind == "four dimensions" and entry == "moments":
            continue
        if kind == "generator" and entry in ("fit source", "fit target", "wasserstein u"):
            with pytest.raises(ValueError, match=rf"^{name}, batch 0 must have shape \[n, d\]"):
                use(make())  # iterators are welcome, of batches
            continue
        with pytest.raises(error) as raised:
            use(make())
        assert re.search(rf"^{name} {text}", str(raised.value)), (entry, str(raised.value))


@pytest.mark.parametrize(
    "kind", ["structured", "objects", "complex", "masked", "masked rows", "ragged", "unknown type"]
)
def test_weights_that_are_refused(kind):
    make, error, text = HOSTILE[kind]
    with pytest.raises(error, match=f"^u_weights ({text}|must hold real numbers, got dtype)"):
        lineas.wasserstein(GOOD, GOOD, u_weights=make())


def test_tensors_that_are_refused():
    torch = pytest.importorskip("torch")
    for kind, tensor, text in [*tensors(torch), *unreadable(torch)]:
        for entry, (name, use) in ENTRIES.items():
            if "transform" in entry or entry == "gaussian":
                continue
            with pytest.raises(TypeError) as raised:
                use(tensor)
            assert re.search(rf"^{name} ({text})", str(raised.value)), (kind, entry, str(raised.value))
    for kind, tensor, text in tensors(torch):
        for entry in ("transform", "gaussian"):
            with pytest.raises(TypeError) as raised:
                ENTRIES[entry][1](tensor)
            assert re.search(text, str(raised.value)), (kind, entry, str(raised.value))
    for kind, tensor, text in tensors(torch):
        if kind not in ("booleans", "complex", "small"):
            with pytest.raises(TypeError, match=f"^u_weights {text}"):
                lineas.wasserstein(GOOD, GOOD, u_weights=tensor)


def test_tensors_that_are_being_traced():
    torch = pytest.importorskip("torch")

    def loss(x):
        return x.sum() * lineas.wasserstein(x, GOOD)[0]

    for traced, x in ((torch.func.grad(loss), torch.ones(2, 3)), (torch.func.vmap(loss), torch.ones(4, 2, 3))):
        with pytest.raises(TypeError, match=r"^u must be a tensor that NumPy can read, got Tensor"):
            traced(x)


def test_what_an_object_raises_itself_comes_through():
    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        lineas.wasserstein(Broken(), GOOD)


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_numbers_beyond_all_floats(value):
    sign = "-" if value < 0 else ""
    with pytest.raises(ValueError, match=f"^strength must be finite, got {sign}inf"):
        lineas.AffineMap.identity(3).transform(GOOD, value)
    with pytest.raises(ValueError, match=f"^tau must be finite, got {sign}inf"):
        lineas.prox_sparse_group(GOOD[0], tau=value, l1=1.0, group=1.0)


def test_whole_numbers():
    with pytest.raises(TypeError, match=r"^axis must be an int, got float"):
        lineas.AffineMap.identity(3).transform(GOOD, axis=1.0)
    with pytest.raises(TypeError, match=r"^chunk_rows must be an int, got str"):
        lineas.moments(GOOD, chunk_rows="2")


# --- the extension, which trusts nobody either ---


class Raises:
    """Whatever it is asked to be, it refuses."""

    def refuse(self, *arguments):
        raise ValueError("ask somebody else")

    __index__ = __float__ = __bool__ = __len__ = __iter__ = __getitem__ = __str__ = refuse


@st.composite
def views(draw):
    """Any dtype, up to four dimensions, any strides within one block of memory; some of them huge or empty."""
    dtype = draw(st.sampled_from(["f4", "f8", "f2", "u2", "u1", "i4", "i8", ">f4"]) | scalar_dtypes().map(str))
    huge = [1 << 40, 1 << 58] if draw(st.integers(0, 4)) == 0 else []
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, *huge]), max_size=4))
    size, memory = np.dtype(dtype).itemsize, np.zeros(1 << 14, np.uint8)
    if draw(st.booleans()) and not huge:
        out = np.ones(shape, dtype)
    else:
        strides = [0 if n in huge else draw(st.sampled_from([size, -size, 0, 1, 3 * size, 8])) for n in shape]
        try:
            out = np.ndarray(shape, dtype, memory, 1 << 13, strides)
        except ValueError:  # even a view has a limit
            out = np.ones(0)
    if draw(st.booleans()):
        out.flags.writeable = False
    return out


JUNK = st.one_of(
    views(),
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 1 << 31, 1 << 63, 10**400, float("nan"), 1e308, -0.5, "mean", "\ud800", b"", Ellipsis]),
    st.text(max_size=3),
    st.builds(Raises),
)
MORE = JUNK | st.lists(JUNK, max_size=3) | st.lists(JUNK, min_size=8, max_size=8).map(tuple)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=60)
def test_junk(name, data):
    """A result or a TypeError, ValueError or MemoryError; and then nothing was changed."""
    arguments = list(sound(name).values())
    for at in data.draw(st.sets(st.integers(0, len(arguments) - 1), min_size=1, max_size=3)):
        good = arguments[at]
        arguments[at] = data.draw(JUNK.map(lambda x: [x]) | MORE if isinstance(good, list) else MORE)
    if name == "pool_backward" and isinstance(arguments[4], int) and arguments[4] > 1000:
        arguments[4] = 1000  # a gradient of so many tokens is right, and large
    for k, value in enumerate(arguments):
        if list(sound(name))[k] == "threads" and isinstance(value, int) and not isinstance(value, bool):
            arguments[k] = min(value, 4)
    outputs = {list(sound(name)).index(part) for part in WRITTEN.get(name, ())}
    small = [x for k, value in enumerate(arguments) for x in arrays_in(value) if x.size < 1000 and k not in outputs]
    before = bits(small)
    written = [x for x in arrays_in(arguments) if x.size < 1000]
    all_before = bits(written)
    try:
        getattr(_core, name)(*arguments)
    except (TypeError, ValueError, MemoryError):
        assert bits(written) == all_before
    if name != "step":  # whose moments stand in a tuple
        assert bits(small) == before


class Shrinks:
    """Asked for a number, a truth or its entries it takes the memory of arrays away, and then answers."""

    def __init__(self, victims, answer):
        self.victims, self.answer = victims, answer

    def strike(self):
        for x in self.victims:
            x.resize((0,) * x.ndim, refcheck=False)
        return self.answer

    def __iter__(self):
        return iter(self.strike())

    def __len__(self):
        return len(self.answer)

    __index__ = __float__ = __bool__ = strike


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, key) for name in NAMES for key, value in sound(name).items() if isinstance(value, int | float | list)],
)
def test_arrays_that_vanish_while_arguments_are_read(name, argument):
    """Nothing about an array is remembered from before Python code runs for the last time."""
    arguments = sound(name)
    victims = arrays_in(list(arguments.values()))
    value = arguments[argument]
    if isinstance(value, list) and isinstance(value[0], np.ndarray):
        value = [value[0].copy()]
    try:
        call(name, **(arguments | {argument: Shrinks(victims, value)}))
    except (TypeError, ValueError) as error:
        assert str(error)
    assert all(x.size == 0 for x in victims)
