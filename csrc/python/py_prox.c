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
    if (!lns_expect("prox_sparse_group", count, 4) || !take_penalty(args[1], "tau", &tau) ||
        !take_penalty(args[2], "l1", &l1) || !take_penalty(args[3], "group", &group) ||
        (x = lns_array(args[0], "x", 1, LNS_TAKE_REAL, 0)) == NULL) {
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

/* (m_weight, v_weight, m_bias, v_bias, step, beta1, beta2, eps): the numbers. */
static int take_adam(PyObject *object, lns_adam *adam)
{
    if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 8) {
        PyErr_SetString(PyExc_TypeError,
                        "adam must be a tuple (m_weight, v_weight, m_bias, v_bias, step, beta1, beta2, eps)");
        return 0;
    }
    return lns_int(PyTuple_GET_ITEM(object, 4), "step", 1, INT64_MAX, &adam->step) &&
           lns_double(PyTuple_GET_ITEM(object, 5), "beta1", &adam->beta1) &&
           lns_double(PyTuple_GET_ITEM(object, 6), "beta2", &adam->beta2) &&
           lns_double(PyTuple_GET_ITEM(object, 7), "eps", &adam->eps);
}

/* Checks a private copy of the offsets: with the GIL released, somebody could change the array given. */
static int take_offsets(PyObject *object, int64_t total, PyArrayObject **copy, lns_step_problem *problem)
{
    PyArrayObject *offsets = lns_array(object, "offsets", 1, LNS_TAKE_I64, 0);
    *copy = offsets == NULL ? NULL : lns_copy(offsets);
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

/* The vectors of a step, all of one size and dtype: parameters, then moments where there are any, then gradients. */
static int take_vectors(PyObject *const *args, lns_step_problem *problem, lns_adam *adam, int64_t *total)
{
    static const char *const names[] = {"weight", "bias",   "m_weight",    "v_weight",
                                        "m_bias", "v_bias", "grad_weight", "grad_bias"};
    PyArrayObject *arrays[8];
    const char *labels[8];
    int count = 0, written = 0;
    PyArrayObject *weight = lns_array(args[0], "weight", 1, LNS_TAKE_REAL, 1);
    if (weight == NULL) {
        return 0;
    }
    *total = PyArray_DIM(weight, 0);
    problem->dtype = lns_dtype_of(weight);
    for (int k = 0; k < 8; k++) {
        const int is_moment = k >= 2 && k < 6, is_gradient = k >= 6;
        if (is_moment && problem->adam == NULL) {
            continue;
        }
        PyObject *object = is_moment ? PyTuple_GET_ITEM(args[10], k - 2) : args[is_gradient ? k - 4 : k];
        labels[count] = names[k];
        if ((arrays[count++] = lns_vector(object, names[k], *total, problem->dtype, !is_gradient)) == NULL) {
            return 0;
        }
        written += !is_gradient;
    }
    problem->weight = PyArray_DATA(arrays[0]);
    problem->bias = PyArray_DATA(arrays[1]);
    if (problem->adam != NULL) {
        adam->m_weight = PyArray_DATA(arrays[2]);
        adam->v_weight = PyArray_DATA(arrays[3]);
        adam->m_bias = PyArray_DATA(arrays[4]);
        adam->v_bias = PyArray_DATA(arrays[5]);
    }
    problem->grad_weight = PyArray_DATA(arrays[written]);
    problem->grad_bias = PyArray_DATA(arrays[written + 1]);
    return lns_apart(arrays, labels, written, count);
}

/* step(weight, bias, grad_weight, grad_bias, offsets, lr, l1, group, l1_bias, group_bias, adam, threads) */
LNS_FUNCTION(step)
{
    (void)module;
    PyArrayObject *offsets = NULL;
    PyObject *result = NULL;
    lns_adam adam = {0};
    lns_step_problem problem = {0};
    lns_place place = {0};
    lns_status status;
    double *per_module = NULL;
    int64_t total;
    int threads;
    if (!lns_expect("step", count, 12)) {
        return NULL;
    }
    problem.adam = args[10] != Py_None ? &adam : NULL;
    if (!take_penalty(args[5], "lr", &problem.lr) || !take_penalty(args[6], "l1", &problem.l1) ||
        !take_penalty(args[7], "group", &problem.group) || !take_penalty(args[8], "l1_bias", &problem.l1_bias) ||
        !take_penalty(args[9], "group_bias", &problem.group_bias) || !lns_threads(args[11], &threads) ||
        (problem.adam != NULL && !take_adam(args[10], &adam)) || !take_vectors(args, &problem, &adam, &total) ||
        !take_offsets(args[4], total, &offsets, &problem)) {
        goto done;
    }
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
