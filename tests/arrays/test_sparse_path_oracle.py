"""The sparse path against CVXPY, a modelling language whose solvers know nothing of ours."""

import cvxpy
import numpy as np
import pytest

from lineas import _core
from lineas.arrays import reference


def with_cvxpy(moments, l1, group):
    """The same minimum as a cone program, solved by Clarabel: (weight, bias, objective)."""
    mean_u, mean_v, var_u, cov, var_v = moments
    d = len(mean_u)
    w, b = cvxpy.Variable(d), cvxpy.Variable(d)
    spread = np.sqrt(var_u)
    # var w^2 - 2 cov w + var_v as a square; where the source is constant cov is 0 too.
    slope = np.divide(cov, spread, out=np.zeros(d), where=spread > 0)
    loss = cvxpy.sum_squares(cvxpy.multiply(spread, w) - slope) + np.sum(var_v - slope**2)
    loss += cvxpy.sum_squares(cvxpy.multiply(mean_u, w) + b - mean_v)
    penalty = l1 * (cvxpy.norm1(w - 1) + cvxpy.norm1(b))
    penalty += group * np.sqrt(d) * (cvxpy.norm2(w - 1) + cvxpy.norm2(b))
    problem = cvxpy.Problem(cvxpy.Minimize(loss + penalty), [w >= 0])
    problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return w.value, b.value, problem.value


def objective(moments, weight, bias, l1, group):
    d = len(weight)
    norms = np.linalg.norm(weight - 1) + np.linalg.norm(bias)
    sums = np.abs(weight - 1).sum() + np.abs(bias).sum()
    return reference.sparse_loss(moments, weight, bias) + l1 * sums + group * np.sqrt(d) * norms


@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_a_cone_solver(seed):
    rng = np.random.default_rng(seed)
    d = int(rng.integers(2, 12))
    u = rng.normal(size=(15, d)) * rng.uniform(0.2, 2, d) + rng.normal(size=d) * 2
    v = rng.normal(size=(20, d)) * rng.uniform(0.2, 2, d) - rng.normal(size=d) * 2
    u[:, 0] = 1.5  # a constant neuron
    ratio = (0.0, 0.5, 1.0, 0.8)[seed % 4]
    moments = _core.quantile_moments([u], [v], None, None, ["u"], ["v"], 1)[0]
    largest = _core.largest_penalty([moments], ratio)[0]
    penalties = largest * np.array([0.9, 0.4, 0.1, 0.01])
    weight, bias, *_ = _core.sparse_path([moments], None, penalties, ratio, True, largest, 1)
    for k, penalty in enumerate(penalties):
        l1, group = penalty * ratio, penalty * (1 - ratio)
        theirs_w, theirs_b, value = with_cvxpy(moments, l1, group)
        ours = objective(moments, weight[k], bias[k], l1, group)
        assert ours <= value + 1e-8 * abs(value)
        if ratio < 1:  # without a group penalty a constant neuron has many solutions
            np.testing.assert_allclose(weight[k], theirs_w, atol=2e-4)
            np.testing.assert_allclose(bias[k], theirs_b, atol=2e-4)


def test_the_bound_of_the_slopes_agrees_too():
    rng = np.random.default_rng(99)
    u = rng.normal(size=(15, 6)) * 0.1 + 3
    moments = _core.quantile_moments([u], [np.full((15, 6), -3.0)], None, None, ["u"], ["v"], 1)[0]
    largest = _core.largest_penalty([moments], 0.5)[0]
    weight, bias, *_ = _core.sparse_path([moments], None, largest * np.array([0.02]), 0.5, True, largest, 1)
    assert weight.min() == 0
    theirs_w, theirs_b, value = with_cvxpy(moments, largest * 0.01, largest * 0.01)
    assert objective(moments, weight[0], bias[0], largest * 0.01, largest * 0.01) <= value * (1 + 1e-9)
    np.testing.assert_allclose(weight[0], theirs_w, atol=1e-4)
    np.testing.assert_allclose(bias[0], theirs_b, atol=1e-4)
