#include "python/functions.h"

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
    if (!lns_expect("covariance", count, 3) || !lns_batch_open_one(&x, args[0], args[2], args[1]) ||
        !lns_batch_fill(&x, NULL)) {
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

/* LAPACK is not made for what is not finite. */
static int take_covariance(PyObject *object, const char *name, PyArrayObject **out)
{
    PyArrayObject *array = lns_array(object, name, 2, LNS_TAKE_F64, 0);
    const double *value = array == NULL ? NULL : PyArray_DATA(array);
    for (npy_intp i = 0; array != NULL && i < PyArray_SIZE(array); i++) {
        if (!isfinite(value[i])) {
            const npy_intp d = PyArray_DIM(array, 1);
            PyErr_Format(PyExc_ValueError, "%s is not finite at row %zd, column %zd", name, (Py_ssize_t)(i / d),
                         (Py_ssize_t)(i % d));
            return 0;
        }
    }
    *out = array;
    return array != NULL;
}

/* bures_map(cov_source, cov_target, ridge) */
LNS_FUNCTION(bures_map)
{
    (void)module;
    lns_status status = LNS_OK;
    PyArrayObject *source, *target, *map = NULL;
    double ridge;
    void *work = NULL;
    if (!lns_expect("bures_map", count, 3) || !lns_double(args[2], "ridge", &ridge) ||
        !take_covariance(args[0], "cov_source", &source) || !take_covariance(args[1], "cov_target", &target)) {
        return NULL;
    }
    const npy_intp d = PyArray_DIM(source, 0);
    if (d < 1 || PyArray_DIM(source, 1) != d || PyArray_DIM(target, 0) != d || PyArray_DIM(target, 1) != d) {
        PyErr_Format(PyExc_ValueError,
                     "cov_source and cov_target must be square and of one size, got (%zd, %zd) and (%zd, %zd)",
                     (Py_ssize_t)d, (Py_ssize_t)PyArray_DIM(source, 1), (Py_ssize_t)PyArray_DIM(target, 0),
                     (Py_ssize_t)PyArray_DIM(target, 1));
        return NULL;
    }
    map = lns_new(2, PyArray_DIMS(source), NPY_DOUBLE);
    work = map == NULL ? NULL : lns_work_new(lns_bures_map_worksize(d));
    if (work == NULL) {
        Py_CLEAR(map);
        return NULL;
    }
    const double *from = PyArray_DATA(source), *to = PyArray_DATA(target);
    double *out = PyArray_DATA(map);
    Py_BEGIN_ALLOW_THREADS
    status = lns_bures_map(from, to, d, ridge, work, out);
    Py_END_ALLOW_THREADS
    lns_work_free(work);
    if (status != LNS_OK) {
        Py_CLEAR(map);
        PyErr_SetString(PyExc_ValueError, lns_status_text(status));
    }
    return (PyObject *)map;
}
