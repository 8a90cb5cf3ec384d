#include "python/functions.h"

static int take_mode(PyObject *object, lns_pooling *mode)
{
    static const char *const names[] = {[LNS_POOL_MEAN] = "mean",
                                        [LNS_POOL_MIN] = "min",
                                        [LNS_POOL_MAX] = "max",
                                        [LNS_POOL_LAST] = "last",
                                        [LNS_POOL_ALL] = "all"};
    int choice = 0;
    const int found = lns_choice(object, "pooling", "'mean', 'min', 'max', 'last' or 'all'", names, 5, &choice);
    *mode = (lns_pooling)choice;
    return found;
}

/* A private copy of the mask, NULL for None; *rows becomes the number of real tokens. Returns 0 on failure. */
static int take_mask(PyObject *object, int64_t batch, int64_t tokens, PyArrayObject **copy, int64_t *rows)
{
    *copy = NULL;
    if (object == Py_None) {
        *rows = batch * tokens;
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
    *copy = lns_copy(array);
    if (*copy == NULL) {
        return 0;
    }
    const uint8_t *mask = PyArray_DATA(*copy);
    *rows = 0;
    for (int64_t i = 0; i < batch * tokens; i++) {
        *rows += mask[i] != 0;
    }
    return 1;
}

static const void *data_or_null(PyArrayObject *array)
{
    return array == NULL ? NULL : PyArray_DATA(array);
}

/* pool(x, mask, mode, threads) */
LNS_FUNCTION(pool)
{
    (void)module;
    PyArrayObject *x, *mask = NULL, *out = NULL, *index = NULL;
    PyObject *result = NULL;
    lns_place place = {0};
    lns_status status = LNS_OK;
    lns_pooling mode;
    int64_t rows;
    int threads;
    if (!lns_expect("pool", count, 4) || !take_mode(args[2], &mode) || !lns_threads(args[3], &threads) ||
        (x = lns_array(args[0], "x", 3, LNS_TAKE_ANY, 0)) == NULL) {
        return NULL;
    }
    const int64_t batch = PyArray_DIM(x, 0), tokens = PyArray_DIM(x, 1), d = PyArray_DIM(x, 2);
    const lns_dtype dtype = lns_dtype_of(x);
    const void *data = PyArray_DATA(x);
    if (d < 1) {
        PyErr_Format(PyExc_ValueError, "x must have at least one column, got shape (%lld, %lld, 0)", (long long)batch,
                     (long long)tokens);
        return NULL;
    }
    if (!take_mask(args[1], batch, tokens, &mask, &rows)) {
        return NULL;
    }
    const npy_intp shape[2] = {(npy_intp)(mode == LNS_POOL_ALL ? rows : batch), (npy_intp)d};
    const int extreme = mode == LNS_POOL_MIN || mode == LNS_POOL_MAX;
    if ((out = lns_new(2, shape, lns_typenum(lns_working(dtype)))) == NULL ||
        (extreme && (index = lns_new(2, shape, NPY_INT32)) == NULL)) {
        goto done;
    }
    const uint8_t *real = data_or_null(mask);
    void *to = PyArray_DATA(out);
    int32_t *winners = index == NULL ? NULL : PyArray_DATA(index);
    Py_BEGIN_ALLOW_THREADS
    status = lns_pool(data, dtype, shape[0] == 0 ? 0 : batch, tokens, d, real, mode, threads, to, winners, &place);
    Py_END_ALLOW_THREADS
    if (status == LNS_OK) {
        result = PyTuple_Pack(2, out, index != NULL ? (PyObject *)index : Py_None);
    } else {
        lns_raise(status, &place, NULL, NULL);
    }
done:
    Py_XDECREF(mask);
    Py_XDECREF(out);
    Py_XDECREF(index);
    return result;
}

/* How many sequences there are: the rows of grad_out, except for "all", whose rows are tokens; there the mask tells. */
static int64_t sequences(int64_t pooled, PyObject *mask, lns_pooling mode, int64_t tokens)
{
    if (mode != LNS_POOL_ALL) {
        return pooled;
    }
    if (mask == Py_None) {
        return pooled / tokens;
    }
    const int has_rows = PyArray_Check(mask) && PyArray_NDIM((PyArrayObject *)mask) > 0;
    return has_rows ? PyArray_DIM((PyArrayObject *)mask, 0) : 0;
}

/* A private copy of what pool returned for "min" and "max". */
static PyArrayObject *take_index(PyObject *object, PyArrayObject *grad_out)
{
    PyArrayObject *index = lns_array(object, "index", 2, LNS_TAKE_I32, 0);
    if (index == NULL) {
        return NULL;
    }
    if (!PyArray_SAMESHAPE(index, grad_out)) {
        PyErr_SetString(PyExc_ValueError, "index must have the shape of grad_out");
        return NULL;
    }
    return lns_copy(index);
}

/* pool_backward(grad_out, mask, mode, index, tokens, threads) */
LNS_FUNCTION(pool_backward)
{
    (void)module;
    PyArrayObject *grad_out, *mask = NULL, *index = NULL, *grad_x = NULL;
    lns_place place = {0};
    lns_status status = LNS_BAD_SIZE;
    lns_pooling mode;
    int64_t tokens, rows;
    int threads;
    if (!lns_expect("pool_backward", count, 6) || !take_mode(args[2], &mode) ||
        !lns_int(args[4], "tokens", 1, INT32_MAX, &tokens) || !lns_threads(args[5], &threads) ||
        (grad_out = lns_array(args[0], "grad_out", 2, LNS_TAKE_REAL, 0)) == NULL) {
        return NULL;
    }
    const int64_t pooled = PyArray_DIM(grad_out, 0), d = PyArray_DIM(grad_out, 1);
    const int64_t batch = sequences(pooled, args[1], mode, tokens);
    const lns_dtype dtype = lns_dtype_of(grad_out);
    const npy_intp shape[3] = {(npy_intp)batch, (npy_intp)tokens, (npy_intp)d};
    if (d < 1) {
        PyErr_Format(PyExc_ValueError, "grad_out must have at least one column, got shape (%lld, 0)",
                     (long long)pooled);
        return NULL;
    }
    if ((grad_x = lns_new(3, shape, lns_typenum(dtype))) == NULL || !take_mask(args[1], batch, tokens, &mask, &rows) ||
        ((mode == LNS_POOL_MIN || mode == LNS_POOL_MAX) && (index = take_index(args[3], grad_out)) == NULL)) {
        goto done;
    }
    if (mode == LNS_POOL_ALL && rows != pooled) {
        PyErr_Format(PyExc_ValueError, "grad_out must have %lld rows, got %lld", (long long)rows, (long long)pooled);
        goto done;
    }
    const void *data = PyArray_DATA(grad_out);
    const uint8_t *real = data_or_null(mask);
    const int32_t *winners = data_or_null(index);
    void *to = PyArray_DATA(grad_x);
    Py_BEGIN_ALLOW_THREADS
    status = lns_pool_backward(data, dtype, batch, tokens, d, real, mode, winners, threads, to, &place);
    Py_END_ALLOW_THREADS
    if (status != LNS_OK) {
        lns_raise(status, &place, NULL, NULL);
    }
done:
    Py_XDECREF(mask);
    Py_XDECREF(index);
    if (status != LNS_OK) {
        Py_CLEAR(grad_x);
    }
    return (PyObject *)grad_x;
}
