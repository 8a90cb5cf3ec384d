#include "python/functions.h"

#include <string.h>

static int take_mode(PyObject *object, lns_pooling *mode)
{
    static const char *const names[] = {[LNS_POOL_MEAN] = "mean",
                                        [LNS_POOL_MIN] = "min",
                                        [LNS_POOL_MAX] = "max",
                                        [LNS_POOL_LAST] = "last",
                                        [LNS_POOL_ALL] = "all"};
    const char *name = PyUnicode_AsUTF8(object);
    for (int k = 0; name != NULL && k < 5; k++) {
        if (strcmp(name, names[k]) == 0) {
            *mode = (lns_pooling)k;
            return 1;
        }
    }
    if (name != NULL) {
        PyErr_Format(PyExc_ValueError, "pooling must be 'mean', 'min', 'max', 'last' or 'all', got %R", object);
    }
    return 0;
}

/* The mask's data, NULL for None; *rows becomes the number of real tokens. Returns 0 on failure. */
static int take_mask(PyObject *object, int64_t batch, int64_t tokens, const uint8_t **mask, int64_t *rows)
{
    *mask = NULL;
    *rows = batch * tokens;
    if (object == Py_None) {
        return 1;
    }
    PyArrayObject *array = lns_array(object, "mask", 2, LNS_TAKE_U8, 0);
    if (array == NULL) {
        return 0;
    }
    if (PyArray_DIM(array, 0) != batch || PyArray_DIM(array, 1) != tokens) {
        PyErr_Format(PyExc_ValueError, "mask must have shape (%lld, %lld), got (%zd, %zd)", (long long)batch,
                     (long long)tokens, (Py_ssize_t)PyArray_DIM(array, 0), (Py_ssize_t)PyArray_DIM(array, 1));
        return 0;
    }
    *mask = PyArray_DATA(array);
    *rows = 0;
    for (int64_t i = 0; i < batch * tokens; i++) {
        *rows += (*mask)[i] != 0;
    }
    return 1;
}

/* pool(x, mask, mode, threads) */
LNS_FUNCTION(pool)
{
    (void)module;
    PyArrayObject *x, *out = NULL, *index = NULL;
    PyObject *result = NULL;
    lns_place place = {0};
    lns_status status = LNS_OK;
    lns_pooling mode;
    const uint8_t *mask;
    int64_t rows;
    int threads;
    if (!lns_expect("pool", count, 4) || (x = lns_array(args[0], "x", 3, LNS_TAKE_ANY, 0)) == NULL ||
        !take_mask(args[1], PyArray_DIM(x, 0), PyArray_DIM(x, 1), &mask, &rows) || !take_mode(args[2], &mode) ||
        !lns_threads(args[3], &threads)) {
        return NULL;
    }
    const int64_t batch = PyArray_DIM(x, 0), tokens = PyArray_DIM(x, 1), d = PyArray_DIM(x, 2);
    const lns_dtype dtype = lns_dtype_of(x);
    const npy_intp shape[2] = {(npy_intp)(mode == LNS_POOL_ALL ? rows : batch), (npy_intp)d};
    const int extreme = mode == LNS_POOL_MIN || mode == LNS_POOL_MAX;
    if ((out = lns_new(2, shape, lns_typenum(lns_working(dtype)))) == NULL ||
        (extreme && (index = lns_new(2, shape, NPY_INT32)) == NULL)) {
        goto done;
    }
    const void *data = PyArray_DATA(x);
    void *to = PyArray_DATA(out);
    int32_t *winners = index == NULL ? NULL : PyArray_DATA(index);
    Py_BEGIN_ALLOW_THREADS status = lns_pool(data, dtype, batch, tokens, d, mask, mode, threads, to, winners, &place);
    Py_END_ALLOW_THREADS if (status == LNS_OK)
    {
        result = PyTuple_Pack(2, out, index != NULL ? (PyObject *)index : Py_None);
    }
    else
    {
        lns_raise(status, &place, NULL, NULL);
    }
done:
    Py_XDECREF(out);
    Py_XDECREF(index);
    return result;
}

/* pool_backward(grad_out, mask, mode, index, tokens, threads) */
LNS_FUNCTION(pool_backward)
{
    (void)module;
    PyArrayObject *grad_out, *index = NULL, *grad_x;
    lns_place place = {0};
    lns_status status = LNS_OK;
    lns_pooling mode;
    const uint8_t *mask;
    int64_t tokens, rows, batch;
    int threads;
    if (!lns_expect("pool_backward", count, 6) ||
        (grad_out = lns_array(args[0], "grad_out", 2, LNS_TAKE_REAL, 0)) == NULL || !take_mode(args[2], &mode) ||
        !lns_int(args[4], "tokens", 1, INT32_MAX, &tokens) || !lns_threads(args[5], &threads)) {
        return NULL;
    }
    batch = PyArray_DIM(grad_out, 0);
    if (mode == LNS_POOL_ALL) { /* the rows of grad_out are tokens: the mask tells how many sequences there are */
        batch = args[1] == Py_None ? batch / tokens
                : PyArray_Check(args[1]) && PyArray_NDIM((PyArrayObject *)args[1]) > 0
                    ? PyArray_DIM((PyArrayObject *)args[1], 0)
                    : 0;
    }
    if (!take_mask(args[1], batch, tokens, &mask, &rows)) {
        return NULL;
    }
    if (mode == LNS_POOL_ALL && rows != PyArray_DIM(grad_out, 0)) {
        PyErr_Format(PyExc_ValueError, "grad_out must have %lld rows, got %zd", (long long)rows,
                     (Py_ssize_t)PyArray_DIM(grad_out, 0));
        return NULL;
    }
    if (mode == LNS_POOL_MIN || mode == LNS_POOL_MAX) {
        if ((index = lns_array(args[3], "index", 2, LNS_TAKE_I32, 0)) == NULL) {
            return NULL;
        }
        if (!PyArray_SAMESHAPE(index, grad_out)) {
            PyErr_SetString(PyExc_ValueError, "index must have the shape of grad_out");
            return NULL;
        }
    }
    const int64_t d = PyArray_DIM(grad_out, 1);
    const lns_dtype dtype = lns_dtype_of(grad_out);
    const npy_intp shape[3] = {(npy_intp)batch, (npy_intp)tokens, (npy_intp)d};
    grad_x = lns_new(3, shape, lns_typenum(dtype));
    if (grad_x == NULL) {
        return NULL;
    }
    const void *data = PyArray_DATA(grad_out);
    const int32_t *winners = index == NULL ? NULL : PyArray_DATA(index);
    void *to = PyArray_DATA(grad_x);
    Py_BEGIN_ALLOW_THREADS status =
        lns_pool_backward(data, dtype, batch, tokens, d, mask, mode, winners, threads, to, &place);
    Py_END_ALLOW_THREADS if (status != LNS_OK)
    {
        Py_DECREF(grad_x);
        return lns_raise(status, &place, NULL, NULL);
    }
    return (PyObject *)grad_x;
}
