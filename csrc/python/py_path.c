#include "python/functions.h"

/* Checks the moments of all modules, a tuple of float64 arrays [5, d], d >= 1; total: the sum of d. */
static int check_moments(PyObject *all, const char *name, int64_t *total)
{
    *total = 0;
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(all); k++) {
        PyArrayObject *one = lns_array(PyTuple_GET_ITEM(all, k), name, 2, LNS_TAKE_F64, 0);
        if (one == NULL) {
            return 0;
        }
        if (PyArray_DIM(one, 0) != 5 || PyArray_DIM(one, 1) < 1) {
            PyErr_Format(PyExc_ValueError, "%s must have shape [5, d] with d >= 1, got [%zd, %zd]", name,
                         (Py_ssize_t)PyArray_DIM(one, 0), (Py_ssize_t)PyArray_DIM(one, 1));
            return 0;
        }
        *total += PyArray_DIM(one, 1);
    }
    return 1;
}

static double *data_of(PyObject *tuple, Py_ssize_t k)
{
    return PyArray_DATA((PyArrayObject *)PyTuple_GET_ITEM(tuple, k));
}

static int64_t width_of(PyObject *tuple, Py_ssize_t k)
{
    return PyArray_DIM((PyArrayObject *)PyTuple_GET_ITEM(tuple, k), 1);
}

static int take_ratio(PyObject *object, double *ratio)
{
    if (!lns_double(object, "l1_ratio", ratio)) {
        return 0;
    }
    if (*ratio < 0 || *ratio > 1) {
        PyErr_Format(PyExc_ValueError, "l1_ratio must be from 0 to 1, got %S", object);
        return 0;
    }
    return 1;
}

/* largest_penalty(moments, l1_ratio) */
LNS_FUNCTION(largest_penalty)
{
    (void)module;
    double ratio;
    int64_t total;
    if (!lns_expect("largest_penalty", count, 2) || !take_ratio(args[1], &ratio)) {
        return NULL;
    }
    PyObject *moments = lns_tuple(args[0], "moments");
    if (moments == NULL || !check_moments(moments, "moments", &total)) {
        Py_XDECREF(moments);
        return NULL;
    }
    const npy_intp modules = PyTuple_GET_SIZE(moments);
    PyArrayObject *out = lns_new(1, &modules, NPY_DOUBLE);
    for (Py_ssize_t k = 0; out != NULL && k < modules; k++) {
        const lns_path_job job = {.d = width_of(moments, k), .stride = width_of(moments, k)};
        const double *at = data_of(moments, k);
        double *largest = (double *)PyArray_DATA(out) + k;
        void *work = lns_work_new(lns_path_worksize(&job, 1, 1, 1));
        if (work == NULL) {
            Py_CLEAR(out);
            break;
        }
        Py_BEGIN_ALLOW_THREADS
        *largest = lns_path_largest(at, job.d, ratio, work);
        Py_END_ALLOW_THREADS
        lns_work_free(work);
    }
    Py_DECREF(moments);
    return (PyObject *)out;
}

/* What the solver writes, in the order in which Python gets it. */
enum { WEIGHT, BIAS, LOSS, HELD_OUT, DISTANCE, SUPPORT, OUTPUTS };

static int new_outputs(PyArrayObject **out, npy_intp modules, npy_intp points, npy_intp total, int typenum,
                       int held_out)
{
    const npy_intp maps[2] = {points, total}, losses[2] = {modules, points};
    for (int k = 0; k < OUTPUTS; k++) {
        if (k == HELD_OUT && !held_out) {
            continue;
        }
        out[k] = k <= BIAS ? lns_new(2, maps, typenum) : lns_new(2, losses, k == SUPPORT ? NPY_INT64 : NPY_DOUBLE);
        if (out[k] == NULL) {
            return 0;
        }
    }
    return 1;
}

static int same_widths(PyObject *moments, PyObject *held_out)
{
    const Py_ssize_t modules = PyTuple_GET_SIZE(moments);
    int same = PyTuple_GET_SIZE(held_out) == modules;
    for (Py_ssize_t k = 0; same && k < modules; k++) {
        same = width_of(moments, k) == width_of(held_out, k);
    }
    if (!same) {
        PyErr_SetString(PyExc_ValueError, "held_out must have the modules and widths of moments");
    }
    return same;
}

/* A private copy of the penalties, whose number bounds the engine's writes; all above 0. */
static PyArrayObject *take_penalties(PyObject *object)
{
    PyArrayObject *given = lns_array(object, "penalties", 1, LNS_TAKE_F64, 0);
    PyArrayObject *penalties = given == NULL ? NULL : lns_copy(given);
    if (penalties == NULL) {
        return NULL;
    }
    const double *at = PyArray_DATA(penalties);
    const int64_t points = PyArray_DIM(penalties, 0);
    int good = points > 0;
    for (int64_t k = 0; good && k < points; k++) {
        good = at[k] > 0 && Py_IS_FINITE(at[k]);
    }
    if (!good) {
        PyErr_SetString(PyExc_ValueError, "penalties must be one or more finite numbers above 0");
        Py_CLEAR(penalties);
    }
    return penalties;
}

/* sparse_path(moments, held_out, penalties, l1_ratio, double, largest, threads) */
LNS_FUNCTION(sparse_path)
{
    (void)module;
    PyObject *moments = NULL, *held_out = NULL, *result = NULL;
    PyArrayObject *penalties = NULL, *out[OUTPUTS] = {0};
    lns_path_job *jobs = NULL;
    void *work = NULL;
    double ratio, largest;
    int64_t total, also = 0, offset = 0;
    int threads, is_double;
    if (!lns_expect("sparse_path", count, 7) || !take_ratio(args[3], &ratio) ||
        (is_double = PyObject_IsTrue(args[4])) < 0 || !lns_double(args[5], "largest", &largest) ||
        !lns_threads(args[6], &threads) || (moments = lns_tuple(args[0], "moments")) == NULL ||
        (args[1] != Py_None && (held_out = lns_tuple(args[1], "held_out")) == NULL) ||
        !check_moments(moments, "moments", &total) ||
        (held_out != NULL && (!check_moments(held_out, "held_out", &also) || !same_widths(moments, held_out))) ||
        (penalties = take_penalties(args[2])) == NULL) {
        goto done;
    }
    const Py_ssize_t modules = PyTuple_GET_SIZE(moments);
    const int64_t points = PyArray_DIM(penalties, 0);
    jobs = PyMem_Calloc((size_t)modules + 1, sizeof *jobs);
    if (jobs == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    if (!new_outputs(out, modules, points, total, is_double ? NPY_DOUBLE : NPY_FLOAT, held_out != NULL)) {
        goto done;
    }
    const int64_t size = is_double ? 8 : 4;
    for (Py_ssize_t k = 0; k < modules; k++) {
        jobs[k] = (lns_path_job){
            .d = width_of(moments, k),
            .moments = data_of(moments, k),
            .dtype = is_double ? LNS_F64 : LNS_F32,
            .weight = PyArray_BYTES(out[WEIGHT]) + offset * size,
            .bias = PyArray_BYTES(out[BIAS]) + offset * size,
            .stride = total,
            .loss = (double *)PyArray_DATA(out[LOSS]) + k * points,
            .distance = (double *)PyArray_DATA(out[DISTANCE]) + k * points,
            .support = (int64_t *)PyArray_DATA(out[SUPPORT]) + k * points,
            .largest = largest,
        };
        if (held_out != NULL) {
            jobs[k].held_out = data_of(held_out, k);
            jobs[k].held_out_loss = (double *)PyArray_DATA(out[HELD_OUT]) + k * points;
        }
        offset += jobs[k].d;
    }
    work = lns_work_new(lns_path_worksize(jobs, modules, points, threads));
    if (work == NULL) {
        goto done;
    }
    const double *grid = PyArray_DATA(penalties);
    lns_status status;
    Py_BEGIN_ALLOW_THREADS
    status = lns_path(jobs, modules, grid, points, ratio, threads, work);
    Py_END_ALLOW_THREADS
    if (status != LNS_OK) {
        PyErr_SetString(PyExc_ValueError, lns_status_text(status));
        goto done;
    }
    result = PyTuple_Pack(OUTPUTS, out[WEIGHT], out[BIAS], out[LOSS],
                          held_out != NULL ? (PyObject *)out[HELD_OUT] : Py_None, out[DISTANCE], out[SUPPORT]);
done:
    lns_work_free(work);
    PyMem_Free(jobs);
    for (int k = 0; k < OUTPUTS; k++) {
        Py_XDECREF(out[k]);
    }
    Py_XDECREF(penalties);
    Py_XDECREF(moments);
    Py_XDECREF(held_out);
    return result;
}
