#include "python/functions.h"

static int take_penalty(PyObject *object, const char *name, double *out)
{
    if (!lns_double(object, name, out)) {
        return 0;
    }
    if (*out < 0) {
        PyErr_Format(PyExc_ValueError, "%s must not be negative, got %S", name, object);
        return 0;
    }
    return 1;
}

/* prox_sparse_group(x, tau, l1, group) */
LNS_FUNCTION(prox_sparse_group)
{
    (void)module;
    PyArrayObject *x, *out;
    double tau, l1, group;
    lns_status status;
    if (!lns_expect("prox_sparse_group", count, 4) || (x = lns_array(args[0], "x", 1, LNS_TAKE_REAL, 0)) == NULL ||
        !take_penalty(args[1], "tau", &tau) || !take_penalty(args[2], "l1", &l1) ||
        !take_penalty(args[3], "group", &group)) {
        return NULL;
    }
    const int64_t d = PyArray_DIM(x, 0);
    const lns_dtype dtype = lns_dtype_of(x);
    if (d < 1) {
        PyErr_SetString(PyExc_ValueError, "x must have at least one entry");
        return NULL;
    }
    out = lns_new_vector(d, dtype);
    if (out == NULL) {
        return NULL;
    }
    const void *from = PyArray_DATA(x);
    void *to = PyArray_DATA(out);
    Py_BEGIN_ALLOW_THREADS
    status = lns_prox(from, dtype, d, tau, l1, group, to);
    Py_END_ALLOW_THREADS
    if (status != LNS_OK) {
        Py_DECREF(out);
        PyErr_SetString(PyExc_ValueError, lns_status_text(status));
        return NULL;
    }
    return (PyObject *)out;
}

/* (m_weight, v_weight, m_bias, v_bias, step, beta1, beta2, eps) */
static int take_adam(PyObject *object, int64_t total, lns_dtype dtype, lns_adam *adam)
{
    void *moments[4];
    static const char *const names[4] = {"m_weight", "v_weight", "m_bias", "v_bias"};
    if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 8) {
        PyErr_SetString(PyExc_TypeError,
                        "adam must be a tuple (m_weight, v_weight, m_bias, v_bias, step, beta1, beta2, eps)");
        return 0;
    }
    for (int k = 0; k < 4; k++) {
        PyArrayObject *array = lns_vector(PyTuple_GET_ITEM(object, k), names[k], total, dtype, 1);
        if (array == NULL) {
            return 0;
        }
        moments[k] = PyArray_DATA(array);
    }
    *adam = (lns_adam){.m_weight = moments[0], .v_weight = moments[1], .m_bias = moments[2], .v_bias = moments[3]};
    return lns_int(PyTuple_GET_ITEM(object, 4), "step", 1, INT64_MAX, &adam->step) &&
           lns_double(PyTuple_GET_ITEM(object, 5), "beta1", &adam->beta1) &&
           lns_double(PyTuple_GET_ITEM(object, 6), "beta2", &adam->beta2) &&
           lns_double(PyTuple_GET_ITEM(object, 7), "eps", &adam->eps);
}

/* Checks a private copy of the offsets: with the GIL released, somebody could change the array given. */
static int take_offsets(PyObject *object, int64_t total, PyArrayObject **copy, lns_step_problem *problem)
{
    PyArrayObject *offsets = lns_array(object, "offsets", 1, LNS_TAKE_I64, 0);
    *copy = offsets == NULL ? NULL : (PyArrayObject *)PyArray_NewCopy(offsets, NPY_CORDER);
    if (*copy == NULL) {
        return 0;
    }
    problem->offsets = PyArray_DATA(*copy);
    problem->modules = PyArray_DIM(*copy, 0) - 1;
    if (problem->modules < 0 || problem->offsets[0] != 0 || problem->offsets[problem->modules] != total) {
        PyErr_Format(PyExc_ValueError, "offsets must run from 0 to the number of parameters, %lld", (long long)total);
        return 0;
    }
    for (int64_t k = 0; k < problem->modules; k++) {
        if (problem->offsets[k + 1] <= problem->offsets[k]) {
            PyErr_Format(PyExc_ValueError, "offsets must ascend strictly, entry %lld does not", (long long)(k + 1));
            return 0;
        }
    }
    return 1;
}

/* step(weight, bias, grad_weight, grad_bias, offsets, lr, l1, group, l1_bias, group_bias, adam, threads) */
LNS_FUNCTION(step)
{
    (void)module;
    PyArrayObject *weight, *bias, *grad_weight, *grad_bias, *offsets = NULL;
    PyObject *result = NULL;
    lns_step_problem problem = {0};
    lns_adam adam;
    lns_place place = {0};
    lns_status status;
    double *per_module = NULL;
    int threads;
    if (!lns_expect("step", count, 12) || (weight = lns_array(args[0], "weight", 1, LNS_TAKE_REAL, 1)) == NULL) {
        return NULL;
    }
    const int64_t total = PyArray_DIM(weight, 0);
    problem.dtype = lns_dtype_of(weight);
    if ((bias = lns_vector(args[1], "bias", total, problem.dtype, 1)) == NULL ||
        (grad_weight = lns_vector(args[2], "grad_weight", total, problem.dtype, 0)) == NULL ||
        (grad_bias = lns_vector(args[3], "grad_bias", total, problem.dtype, 0)) == NULL ||
        !take_offsets(args[4], total, &offsets, &problem) || !take_penalty(args[5], "lr", &problem.lr) ||
        !take_penalty(args[6], "l1", &problem.l1) || !take_penalty(args[7], "group", &problem.group) ||
        !take_penalty(args[8], "l1_bias", &problem.l1_bias) ||
        !take_penalty(args[9], "group_bias", &problem.group_bias) || !lns_threads(args[11], &threads) ||
        (args[10] != Py_None && !take_adam(args[10], total, problem.dtype, &adam))) {
        goto done;
    }
    problem.adam = args[10] != Py_None ? &adam : NULL;
    problem.weight = PyArray_DATA(weight);
    problem.bias = PyArray_DATA(bias);
    problem.grad_weight = PyArray_DATA(grad_weight);
    problem.grad_bias = PyArray_DATA(grad_bias);
    per_module = lns_work_new((problem.modules + 1) * 2 * (int64_t)sizeof(double));
    if (per_module == NULL) {
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    status = lns_step(&problem, threads, per_module, &place);
    Py_END_ALLOW_THREADS
    if (status == LNS_OK) {
        double penalty = 0;
        int64_t support = 0;
        for (int64_t k = 0; k < problem.modules; k++) {
            penalty += per_module[2 * k];
            support += (int64_t)per_module[2 * k + 1];
        }
        result = Py_BuildValue("dL", penalty, (long long)support);
    } else if (status == LNS_NOT_FINITE) {
        PyErr_Format(PyExc_ValueError, "grad_%s is not finite at position %lld (module %lld)",
                     place.argument == 0 ? "weight" : "bias", (long long)(problem.offsets[place.entry] + place.column),
                     (long long)place.entry);
    } else {
        PyErr_SetString(PyExc_ValueError, lns_status_text(status));
    }
done:
    lns_work_free(per_module);
    Py_XDECREF(offsets);
    return result;
}
