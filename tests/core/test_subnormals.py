"""Subnormal numbers keep their value where the caller has told the processor to take them for zero."""

import ml_dtypes
import numpy as np
import pytest

import lineas
from lineas import _core


@pytest.fixture
def flushing():
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    yield
    torch.set_flush_denormal(False)


def subnormals(dtype, rows=300, d=20):
    """All signs and sizes, and a 1 in each row."""
    size = np.dtype(dtype).itemsize
    least = np.arange(1, rows * d + 1).reshape(rows, d).astype(f"u{size}") * (3 if size > 2 else 1)
    bits = 1 + least % {2: 126 if dtype is ml_dtypes.bfloat16 else 1022, 4: 2**23 - 2, 8: 2**52 - 2}[size]
    bits |= (np.arange(d) % 2).astype(f"u{size}") << (8 * size - 1)
    x = bits.astype(f"u{size}").view(dtype)
    x[:, 3] = 1
    return x


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_results_do_not_depend_on_the_mode(dtype, threads, request):
    x = subnormals(dtype)
    raw = x.view(np.uint16) if dtype is ml_dtypes.bfloat16 else x
    work = np.float64 if dtype is np.float64 else np.float32
    one, zero = np.ones(20, work), np.zeros(20, work)

    def results():
        yield _core.affine_apply(raw[:, :, None], one, zero, 1.0, threads)
        yield _core.sort_columns([raw], ["x"], threads)[0]
        for mode in ("mean", "min", "all"):
            yield _core.pool(raw.reshape(30, 10, 20), None, mode, threads)[0]
        seen = lineas.moments(x)
        yield from (seen.mean, seen.min, seen.max, seen.variance())
        yield lineas.covariance(x)
        if dtype in (np.float32, np.float64):
            yield lineas.prox_sparse_group(x[0], tau=1e-3, l1=0.0, group=1.0)

    usual = [out.tobytes() for out in results()]
    assert usual[0] == x.tobytes()  # the identity
    request.getfixturevalue("flushing")
    assert [out.tobytes() for out in results()] == usual
    assert np.float32(1e-40) * np.float32(1) == 0  # the mode is still on
