#include "python/functions.h"

typedef struct affine_sizes {
    lns_dtype dtype;
    int64_t outer, d, inner;
} affine_sizes;

static PyArrayObject *take_z(PyObject *object, const char *name, affine_sizes *s)
{
    PyArrayObject *z = lns_array(object, name, 3, LNS_TAKE_ANY, 0);
    if (z == NULL) {
        return NULL;
    }
    *s = (affine_sizes){lns_dtype_of(z), PyArray_DIM(z, 0), PyArray_DIM(z, 1), PyArray_DIM(z, 2)};
    if (s->inner == 0) {
        s->outer = 0; /* nothing to do, however many rows an empty array claims */
    }
    if (s->d < 1) {
        PyErr_Format(PyExc_ValueError, "%s must have at least one channel, got shape (%zd, 0, %zd)", name,
                     (Py_ssize_t)PyArray_DIM(z, 0), (Py_ssize_t)PyArray_DIM(z, 2));
        return NULL;
    }
    return z;
}

/* affine_apply(z, weight, bias, strength, threads) */
LNS_FUNCTION(affine_apply)
{
    (void)module;
    affine_sizes s;
    lns_status status;
    PyArrayObject *z, *weight, *bias, *out;
    double strength;
    int threads;
    if (!lns_expect("affine_apply", count, 5) || !lns_double(args[3], "strength", &strength) ||
        !lns_threads(args[4], &threads) || (z = take_z(args[0], "z", &s)) == NULL ||
        (weight = lns_vector(args[1], "weight", s.d, lns_working(s.dtype), 0)) == NULL ||
        (bias = lns_vector(args[2], "bias", s.d, lns_working(s.dtype), 0)) == NULL) {
        return NULL;
    }
    void *work = lns_work_new(lns_affine_worksize(s.outer, s.d, s.inner));
    out = work == NULL ? NULL : lns_new(3, PyArray_DIMS(z), lns_typenum(s.dtype));
    if (out == NULL) {
        lns_work_free(work);
        return NULL;
    }
    const void *data = PyArray_DATA(z), *w = PyArray_DATA(weight), *b = PyArray_DATA(bias);
    void *to = PyArray_DATA(out);
    Py_BEGIN_ALLOW_THREADS
    status = lns_affine(data, s.dtype, s.outer, s.d, s.inner, w, b, strength, threads, work, to);
    Py_END_ALLOW_THREADS
    lns_work_free(work);
    if (status != LNS_OK) {
        Py_DECREF(out);
        PyErr_SetString(PyExc_ValueError, lns_status_text(status));
        return NULL;
    }
    return (PyObject *)out;
}

/* affine_backward(z, weight, strength, grad_out, need_z, threads) */
LNS_FUNCTION(affine_backward)
{
    (void)module;
    affine_sizes s, same;
    lns_status status;
    PyArrayObject *z, *weight, *grad_out, *grad_z = NULL, *grad_weight = NULL, *grad_bias = NULL;
    PyObject *result = NULL;
    void *work = NULL;
    double strength;
    int threads, need_z;
    if (!lns_expect("affine_backward", count, 6) || !lns_double(args[2], "strength", &strength) ||
        (need_z = PyObject_IsTrue(args[4])) < 0 || !lns_threads(args[5], &threads) ||
        (z = take_z(args[0], "z", &s)) == NULL ||
        (weight = lns_vector(args[1], "weight", s.d, lns_working(s.dtype), 0)) == NULL ||
        (grad_out = take_z(args[3], "grad_out", &same)) == NULL) {
        return NULL;
    }
    if (s.dtype != same.dtype || !PyArray_SAMESHAPE(z, grad_out)) {
        PyErr_SetString(PyExc_ValueError, "grad_out must have the dtype and shape of z");
        return NULL;
    }
    work = lns_work_new(lns_affine_worksize(s.outer, s.d, s.inner));
    if (work == NULL || (need_z && (grad_z = lns_new(3, PyArray_DIMS(z), lns_typenum(s.dtype))) == NULL) ||
        (grad_weight = lns_new_vector(s.d, lns_working(s.dtype))) == NULL ||
        (grad_bias = lns_new_vector(s.d, lns_working(s.dtype))) == NULL) {
        goto done;
    }
    const void *data = PyArray_DATA(z), *w = PyArray_DATA(weight), *from = PyArray_DATA(grad_out);
    void *to_z = grad_z == NULL ? NULL : PyArray_DATA(grad_z);
    void *to_weight = PyArray_DATA(grad_weight), *to_bias = PyArray_DATA(grad_bias);
    Py_BEGIN_ALLOW_THREADS
    status = lns_affine_backward(data, s.dtype, s.outer, s.d, s.inner, w, strength, from, threads, work, to_z,
                                 to_weight, to_bias);
    Py_END_ALLOW_THREADS
    if (status != LNS_OK) {
        PyErr_SetString(PyExc_ValueError, lns_status_text(status));
        goto done;
    }
    result = PyTuple_Pack(3, grad_z != NULL ? (PyObject *)grad_z : Py_None, grad_weight, grad_bias);
done:
    lns_work_free(work);
    Py_XDECREF(grad_z);
    Py_XDECREF(grad_weight);
    Py_XDECREF(grad_bias);
    return result;
}
