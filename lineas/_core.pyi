"""Types of the C extension. Private: the public functions in lineas.* normalise their input and call these.

Conventions, for every function:

* Arrays must be C-contiguous, aligned, in native byte order; a wrong dtype, rank or layout is a TypeError or
  ValueError that names the argument. Input arrays are never modified unless "in place" is said.
* `Sample` is a 2-D array [n, d] of float32, float64, float16, or uint16 holding bfloat16 bits. Work is done in
  float64 for float64 input and in float32 for the others; all samples of one call must share the working type.
* A list argument is a batch, one entry a module; results come back as a list in the same order.
* `names` are labels for error messages, one per entry of the batch.
* What is updated in place must not share memory with any other array of the call; inputs may.
* A NaN or infinity in a sample raises ValueError "<name>: nan at row 3, column 17".
* `threads` >= 1 is an upper bound; results do not depend on it.
* MemoryError leaves what is updated in place as it was (but see `step`). A thread that cannot be started is no error.
* Another thread may write into the arrays during a call: its results are then arbitrary, but nothing worse happens.
"""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]

def sort_columns(samples: Sequence[Array], names: Sequence[str], threads: int) -> list[Array]:
    """Sort every column of every sample [n, d], ascending, into new float32 or float64 arrays."""

def wasserstein(
    u: Sequence[Array], v: Sequence[Array],
    weight: Sequence[Array] | None, bias: Sequence[Array] | None,
    u_mass: Sequence[Array | None] | None, v_mass: Sequence[Array | None] | None,
    v_sorted: bool, gradient: int, u_names: Sequence[str], v_names: Sequence[str], threads: int,
) -> tuple[list[Array], list[Array] | None, list[Array] | None, list[Array] | None]:
    """Squared W2 per neuron of (weight * u + bias) against v, for a batch of modules.

    u[k] is [n_k, d_k], v[k] [m_k, d_k]; weight[k], bias[k] [d_k] in the working type, or both None (identity).
    u_mass[k] [n_k], v_mass[k] [m_k] are float64 row weights >= 0 with a positive sum (normalised inside) or None.
    v_sorted: the columns of every v[k] ascend already (checked only for NaN and Inf; not with v_mass).
    gradient: 0 values only; 1 also the gradients in weight and bias (needs weight); 2 also the gradient in u.
    Returns (values [d_k], grad_u [n_k, d_k] | None, grad_weight [d_k] | None, grad_bias [d_k] | None), all in the
    working type; grad_u is the gradient in u itself, that is, through weight.
    """

def affine_apply(z: Array, weight: Array, bias: Array, strength: float, threads: int) -> Array:
    """A map at strength s on z [outer, d, inner] of any of the four dtypes; the result has z's dtype.

    scale z + s bias, where scale is 1 for a weight of 1, else (1 - s) + s weight. weight, bias [d] are float32
    (float64 for float64 z). Computed in that type, rounded once.
    """

def affine_backward(
    z: Array, weight: Array, strength: float, grad_out: Array, need_z: bool, threads: int
) -> tuple[Array | None, Array, Array]:
    """Gradients of affine_apply: (grad_z with z's dtype or None, grad_weight [d], grad_bias [d]).

    grad_out has z's dtype and shape [outer, d, inner]; grad_weight and grad_bias are float32 (float64 for float64 z).
    """

def pool(x: Array, mask: Array | None, mode: str, threads: int) -> tuple[Array, Array | None]:
    """Pool x [B, T, d] over the tokens where mask [B, T] (uint8, nonzero = real) holds; None = all of them.

    mode: "mean", "min", "max", "last" (last real token) give [B, d]; "all" gives the real tokens' rows
    [sum(mask), d] in order. Result is float32 (float64 for float64 x). The second value is, for min and max, the
    int32 token index [B, d] that won (the first one at ties; NaN wins, as in NumPy), else None.
    ValueError where a row of the mask has no real token (except "all").
    """

def pool_backward(
    grad_out: Array, mask: Array | None, mode: str, index: Array | None, tokens: int, threads: int
) -> Array:
    """Gradient in x [B, tokens, d] of pool, in grad_out's dtype (float32 or float64). index: what pool returned."""

def moments_update(
    x: Array, count: int, mean: Array, m2: Array, low: Array, high: Array, name: str, threads: int
) -> int:
    """Merge the rows of x [n, d] into the float64 state arrays [d] in place; returns the new count.

    m2 is the sum of squared deviations from the mean. Start: count 0, mean = m2 = 0, low = +inf, high = -inf.
    The state is untouched when an error is raised.
    """

def moments_merge(
    count: int, mean: Array, m2: Array, low: Array, high: Array,
    count_b: int, mean_b: Array, m2_b: Array, low_b: Array, high_b: Array,
) -> int:
    """Merge state b into the first one in place; returns the new count."""

def quantiles_update(
    x: Array, count: int, mean: Array, m2: Array, low: Array, high: Array, keys: Array, schedule: Array,
    name: str, threads: int,
) -> int:
    """Take the rows of x [n, d] into a summary, in place; returns the new count. `struct lns_quantiles` of lineas.h.

    keys: int32 [ceil(d / 16), slots, rows, 16] for x that is worked on in float32, int64 [ceil(d / 8), slots, rows, 8]
    for float64. schedule: int64 [67]: the weights of 64 slots, open, filled, error; zeros at the start. The others as
    those of moments_update. Nothing is changed when an error is raised.
    """

def quantiles_merge(
    count: int, mean: Array, m2: Array, low: Array, high: Array, keys: Array, schedule: Array,
    count_b: int, mean_b: Array, m2_b: Array, low_b: Array, high_b: Array, keys_b: Array, schedule_b: Array,
    threads: int,
) -> int:
    """Take summary b into the first one, in place; returns the new count."""

def quantiles_rows(
    count: int, mean: Array, m2: Array, low: Array, high: Array, keys: Array, schedule: Array, threads: int
) -> tuple[Array, Array]:
    """The values that a summary holds [held, d], float32 or float64, and their weights: float64 [held]."""

def quantiles_read(
    count: int, mean: Array, m2: Array, low: Array, high: Array, keys: Array, schedule: Array,
    ranks: Array | None, parts: int, threads: int,
) -> Array:
    """Values at int64 ranks [k], ascending from 1 to count: [k, d]; with None, means over equal parts: [parts, d]."""

def prox_sparse_group(x: Array, tau: float, l1: float, group: float) -> Array:
    """prox of tau (l1 ||x||_1 + group sqrt(d) ||x||_2) at x [d], float32 or float64, as a new array."""

def step(
    weight: Array, bias: Array, grad_weight: Array, grad_bias: Array, offsets: Array,
    lr: float, l1: float, group: float, l1_bias: float, group_bias: float,
    adam: tuple[Array, Array, Array, Array, int, float, float, float] | None,
    threads: int,
) -> tuple[float, int]:
    """One SGD or Adam step, then the prox with tau = lr, in place on flat parameters [D] of L modules.

    Module k owns [offsets[k], offsets[k + 1]) of weight and of bias; offsets is int64 [L + 1]. Groups are w - 1 and
    b of each module. adam: (m_weight, v_weight, m_bias, v_bias, step number from 1, beta1, beta2, eps), the moments
    updated in place. float32 or float64 throughout. Returns (l1 ||.||_1 + group sqrt(d) ||.||_2 over all groups
    after the step, number of neurons with w != 1 or b != 0). A non-finite gradient raises ValueError naming its
    flat position before anything is changed. Should memory run out for just the two numbers that are returned, the
    step has been taken when MemoryError is raised.
    """

def fit_local(
    source: Sequence[Array], target: Sequence[Array],
    source_mass: Sequence[Array | None] | None, target_mass: Sequence[Array | None] | None,
    method: str, source_names: Sequence[str], target_names: Sequence[str], threads: int,
) -> tuple[list[Array], list[Array]]:
    """Closed-form maps "mean", "gaussian" or "linear" of source[k] [n_k, d_k] to target[k] [m_k, d_k].

    Returns (weights [d_k], biases [d_k]) in the working type. n_k, m_k >= 2. Source column that is constant up to
    rounding: w = 1 and the mean shift. Masses: float64 row weights as in wasserstein.
    """

def quantile_moments(
    source: Sequence[Array], target: Sequence[Array],
    source_mass: Sequence[Array | None] | None, target_mass: Sequence[Array | None] | None,
    source_names: Sequence[str], target_names: Sequence[str], threads: int,
) -> list[Array]:
    """Moments of the paired quantiles of source[k] [n_k, d_k] and target[k] [m_k, d_k]: float64 [5, d_k] each.

    Rows: mean u, mean v, var u, cov(u, v), var v, of the population; var u and cov are exactly 0 for a constant column.
    """

def largest_penalty(moments: Sequence[Array], l1_ratio: float) -> Array:
    """float64 [L]: the smallest penalty of each module at which its sparse map is the identity."""

def sparse_path(
    moments: Sequence[Array], held_out: Sequence[Array] | None,
    penalties: Array, l1_ratio: float, double: bool, largest: float, threads: int,
) -> tuple[Array, Array, Array, Array | None, Array, Array]:
    """Sparse maps of L modules (moments [5, d_l], finite) at float64 penalties [K] > 0, best in falling order.

    Returns weight and bias [K, D], D = sum of d_l, float64 where `double` is true, else float32; the loss [L, K]; the
    held-out loss [L, K] or None; [L, K] the distance of 0 to the subdifferential; and int64 [L, K] the number of
    neurons that each map changes. `largest` is the largest penalty, the scale of the tolerance.
    """

def covariance(x: Array, mass: Array | None, name: str) -> tuple[Array, Array]:
    """(mean [d], covariance [d, d]) of a sample, float64; ddof = 1, with mass the weighted population covariance."""

def bures_map(cov_source: Array, cov_target: Array, ridge: float) -> Array:
    """Symmetric A [d, d] with A C_s A = C_t for C_s = cov_source + ridge I, C_t likewise: float64.

    Directions in which C_s has no variance (eigenvalue <= d eps max) are mapped to zero variance. ValueError where a
    covariance is not finite.
    """

def cpu() -> str:
    """Kernel variant in use: "portable", "avx2" or "avx512" (LINEAS_CPU forces one)."""

def blas() -> str:
    """OpenBLAS's own description of itself."""
