#include "python/functions.h"

/* A state's four arrays [d], args[1..4] after its count args[0]. */
static int take_state(PyObject *const *args, int64_t d, int writeable, lns_moments *state)
{
    PyArrayObject *mean, *m2, *low, *high;
    if (!lns_int(args[0], "count", 0, INT64_MAX, &state->count) ||
        (mean = lns_vector(args[1], "mean", d, LNS_F64, writeable)) == NULL ||
        (m2 = lns_vector(args[2], "m2", d, LNS_F64, writeable)) == NULL ||
        (low = lns_vector(args[3], "low", d, LNS_F64, writeable)) == NULL ||
        (high = lns_vector(args[4], "high", d, LNS_F64, writeable)) == NULL) {
        return 0;
    }
    state->mean = PyArray_DATA(mean);
    state->m2 = PyArray_DATA(m2);
    state->low = PyArray_DATA(low);
    state->high = PyArray_DATA(high);
    return 1;
}

/* moments_update(x, count, mean, m2, low, high, name, threads) */
LNS_FUNCTION(moments_update)
{
    (void)module;
    lns_batch x = {0};
    lns_moments state;
    lns_place place = {0};
    lns_status status = LNS_OK;
    PyObject *result = NULL;
    void *work = NULL;
    int threads;
    if (!lns_expect("moments_update", count, 8) || !lns_threads(args[7], &threads) ||
        !lns_batch_take_one(&x, args[0], args[6], Py_None) || !take_state(args + 1, x.samples[0].d, 1, &state)) {
        goto done;
    }
    work = lns_work_new(lns_moments_worksize(x.samples[0].n, x.samples[0].d));
    if (work == NULL) {
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    status = lns_moments_update(&x.samples[0], threads, work, &state, &place);
    Py_END_ALLOW_THREADS
    result = status == LNS_OK ? PyLong_FromLongLong(state.count) : lns_raise(status, &place, &x, NULL);
done:
    lns_work_free(work);
    lns_batch_clear(&x);
    return result;
}

/* moments_merge(count, mean, m2, low, high, count_b, mean_b, m2_b, low_b, high_b) */
LNS_FUNCTION(moments_merge)
{
    (void)module;
    lns_moments state, other;
    PyArrayObject *mean;
    if (!lns_expect("moments_merge", count, 10) || (mean = lns_array(args[1], "mean", 1, LNS_TAKE_F64, 1)) == NULL ||
        !take_state(args, PyArray_DIM(mean, 0), 1, &state) || !take_state(args + 5, PyArray_DIM(mean, 0), 0, &other)) {
        return NULL;
    }
    const lns_status status = lns_moments_merge(&state, &other, PyArray_DIM(mean, 0));
    if (status != LNS_OK) {
        PyErr_SetString(PyExc_ValueError, lns_status_text(status));
        return NULL;
    }
    return PyLong_FromLongLong(state.count);
}

/* covariance(x, mass, name) */
LNS_FUNCTION(covariance)
{
    (void)module;
    lns_batch x = {0};
    lns_place place = {0};
    lns_status status = LNS_OK;
    PyArrayObject *mean = NULL, *covariance = NULL;
    PyObject *result = NULL;
    void *work = NULL;
    if (!lns_expect("covariance", count, 3) || !lns_batch_take_one(&x, args[0], args[2], args[1])) {
        goto done;
    }
    const lns_sample *sample = &x.samples[0];
    const npy_intp shape[2] = {(npy_intp)sample->d, (npy_intp)sample->d};
    if (sample->n < 2 && sample->mass == NULL) {
        PyErr_Format(PyExc_ValueError, "%S must have at least 2 rows, got 1", args[2]);
        goto done;
    }
    mean = lns_new(1, shape, NPY_DOUBLE);
    covariance = mean == NULL ? NULL : lns_new(2, shape, NPY_DOUBLE);
    work = covariance == NULL ? NULL : lns_work_new(lns_covariance_worksize(sample->n, sample->d));
    if (work == NULL) {
        goto done;
    }
    double *to_mean = PyArray_DATA(mean), *to_covariance = PyArray_DATA(covariance);
    Py_BEGIN_ALLOW_THREADS
    status = lns_covariance(sample, work, to_mean, to_covariance, &place);
    Py_END_ALLOW_THREADS
    result = status == LNS_OK ? PyTuple_Pack(2, mean, covariance) : lns_raise(status, &place, &x, NULL);
done:
    lns_work_free(work);
    Py_XDECREF(mean);
    Py_XDECREF(covariance);
    lns_batch_clear(&x);
    return result;
}
