#include "python/functions.h"

/* weight and bias of module k, or both absent. */
static int take_map(lns_w2_job *job, PyObject *weights, PyObject *biases, Py_ssize_t k)
{
    const lns_dtype dtype = lns_working(job->u.dtype);
    if (weights == NULL) {
        return 1;
    }
    PyArrayObject *weight = lns_vector(PyTuple_GET_ITEM(weights, k), "weight", job->u.d, dtype, 0);
    PyArrayObject *bias = weight == NULL ? NULL : lns_vector(PyTuple_GET_ITEM(biases, k), "bias", job->u.d, dtype, 0);
    if (bias == NULL) {
        return 0;
    }
    job->weight = PyArray_DATA(weight);
    job->bias = PyArray_DATA(bias);
    return 1;
}

/* NULL entries become None. */
static PyObject *four(PyObject *a, PyObject *b, PyObject *c, PyObject *d)
{
    return PyTuple_Pack(4, a, b != NULL ? b : Py_None, c != NULL ? c : Py_None, d != NULL ? d : Py_None);
}

/* wasserstein(u, v, weight, bias, u_mass, v_mass, v_sorted, gradient, u_names, v_names, threads) */
LNS_FUNCTION(wasserstein)
{
    (void)module;
    lns_batch u = {0}, v = {0};
    lns_place place = {0};
    lns_status status = LNS_OK;
    PyObject *result = NULL, *values = NULL, *grad_u = NULL, *grad_weight = NULL, *grad_bias = NULL;
    PyObject *weights = NULL, *biases = NULL;
    lns_w2_job *jobs = NULL;
    void *work = NULL;
    int64_t gradient;
    int threads, v_sorted;
    if (!lns_expect("wasserstein", count, 11) || (v_sorted = PyObject_IsTrue(args[6])) < 0 ||
        !lns_int(args[7], "gradient", 0, 2, &gradient) || !lns_threads(args[10], &threads) ||
        !lns_batch_open(&u, args[0], args[8], args[4], "u") || !lns_batch_open(&v, args[1], args[9], args[5], "v")) {
        goto done;
    }
    if ((args[2] == Py_None) != (args[3] == Py_None) || (gradient == 1 && args[2] == Py_None)) {
        PyErr_SetString(PyExc_ValueError, "weight and bias must both be given, and are needed for gradient=1");
        goto done;
    }
    if (args[2] != Py_None) {
        if ((weights = lns_tuple(args[2], "weight")) == NULL || (biases = lns_tuple(args[3], "bias")) == NULL) {
            goto done;
        }
        if (PyTuple_GET_SIZE(weights) != u.count || PyTuple_GET_SIZE(biases) != u.count) {
            PyErr_SetString(PyExc_ValueError, "weight and bias must have one entry a module");
            goto done;
        }
    }
    if (!lns_batch_fill(&u, NULL) || !lns_batch_fill(&v, &u)) {
        goto done;
    }
    jobs = PyMem_Calloc((size_t)u.count + 1, sizeof *jobs);
    if (jobs == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    if ((values = lns_new_list(&u, 1)) == NULL || (gradient == 2 && (grad_u = lns_new_list(&u, 2)) == NULL) ||
        (gradient >= 1 && weights != NULL &&
         ((grad_weight = lns_new_list(&u, 1)) == NULL || (grad_bias = lns_new_list(&u, 1)) == NULL))) {
        goto done;
    }
    for (Py_ssize_t k = 0; k < u.count; k++) {
        jobs[k] = (lns_w2_job){.u = u.samples[k],
                               .v = v.samples[k],
                               .value = lns_list_data(values, k),
                               .grad_u = lns_list_data(grad_u, k),
                               .grad_weight = lns_list_data(grad_weight, k),
                               .grad_bias = lns_list_data(grad_bias, k)};
        if (!take_map(&jobs[k], weights, biases, k)) {
            goto done;
        }
        if (v_sorted && jobs[k].v.mass != NULL) {
            PyErr_SetString(PyExc_ValueError, "v_sorted cannot be combined with weights of v");
            goto done;
        }
    }
    work = lns_work_new(lns_wasserstein_worksize(jobs, u.count, threads));
    if (work == NULL) {
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    status = lns_wasserstein(jobs, u.count, v_sorted, threads, work, &place);
    Py_END_ALLOW_THREADS
    result = status == LNS_OK ? four(values, grad_u, grad_weight, grad_bias) : lns_raise(status, &place, &u, &v);
done:
    lns_work_free(work);
    PyMem_Free(jobs);
    Py_XDECREF(weights);
    Py_XDECREF(biases);
    Py_XDECREF(values);
    Py_XDECREF(grad_u);
    Py_XDECREF(grad_weight);
    Py_XDECREF(grad_bias);
    lns_batch_clear(&u);
    lns_batch_clear(&v);
    return result;
}
