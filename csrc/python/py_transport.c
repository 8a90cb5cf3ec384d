#include "python/functions.h"

static int take_method(PyObject *object, lns_method *method)
{
    static const char *const names[] = {[LNS_MEAN] = "mean", [LNS_GAUSSIAN] = "gaussian", [LNS_LINEAR] = "linear"};
    int choice = 0;
    const int found = lns_choice(object, "method", "'mean', 'gaussian' or 'linear'", names, 3, &choice);
    *method = (lns_method)choice;
    return found;
}

/* A closed-form map needs two rows on both sides. */
static int enough_rows(const lns_batch *batch)
{
    for (Py_ssize_t k = 0; k < batch->count; k++) {
        if (batch->samples[k].n < 2) {
            PyErr_Format(PyExc_ValueError, "%S must have at least 2 rows, got 1", PyTuple_GET_ITEM(batch->names, k));
            return 0;
        }
    }
    return 1;
}

/* New: a list of float64 [5, d] arrays, one for each sample. */
static PyObject *new_moments(const lns_batch *like)
{
    PyObject *list = PyList_New(like->count);
    for (Py_ssize_t k = 0; list != NULL && k < like->count; k++) {
        const npy_intp shape[2] = {5, (npy_intp)like->samples[k].d};
        PyArrayObject *array = lns_new(2, shape, NPY_DOUBLE);
        if (array == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SET_ITEM(list, k, (PyObject *)array);
        }
    }
    return list;
}

/* source, target, source_mass, target_mass, names of source and target. Maps, or for LNS_MOMENTS the moments. */
static PyObject *fit_batches(lns_method method, PyObject *const *args, PyObject *const *names, int threads)
{
    lns_batch u = {0}, v = {0};
    lns_place place = {0};
    lns_status status = LNS_OK;
    PyObject *result = NULL, *weights = NULL, *biases = NULL, *moments = NULL;
    lns_fit_job *jobs = NULL;
    void *work = NULL;
    if (!lns_batch_open(&u, args[0], names[0], args[2], "source") ||
        !lns_batch_open(&v, args[1], names[1], args[3], "target") || !lns_batch_fill(&u, NULL) ||
        !lns_batch_fill(&v, &u) || !enough_rows(&u) || !enough_rows(&v)) {
        goto done;
    }
    jobs = PyMem_Calloc((size_t)u.count + 1, sizeof *jobs);
    if (jobs == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    if (method == LNS_MOMENTS) {
        moments = new_moments(&u);
    } else if ((weights = lns_new_list(&u, 1)) != NULL) {
        biases = lns_new_list(&u, 1);
    }
    if (moments == NULL && biases == NULL) {
        goto done;
    }
    for (Py_ssize_t k = 0; k < u.count; k++) {
        jobs[k] = (lns_fit_job){.source = u.samples[k], .target = v.samples[k]};
        if (moments != NULL) {
            jobs[k].moments = lns_list_data(moments, k);
        } else {
            jobs[k].weight = lns_list_data(weights, k);
            jobs[k].bias = lns_list_data(biases, k);
        }
    }
    work = lns_work_new(lns_fit_worksize(jobs, u.count, threads));
    if (work == NULL) {
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    status = lns_fit(jobs, u.count, method, threads, work, &place);
    Py_END_ALLOW_THREADS
    if (status != LNS_OK) {
        result = lns_raise(status, &place, &u, &v);
    } else {
        result = moments != NULL ? Py_NewRef(moments) : PyTuple_Pack(2, weights, biases);
    }
done:
    lns_work_free(work);
    PyMem_Free(jobs);
    Py_XDECREF(weights);
    Py_XDECREF(biases);
    Py_XDECREF(moments);
    lns_batch_clear(&u);
    lns_batch_clear(&v);
    return result;
}

/* fit_local(source, target, source_mass, target_mass, method, source_names, target_names, threads) */
LNS_FUNCTION(fit_local)
{
    (void)module;
    lns_method method;
    int threads;
    if (!lns_expect("fit_local", count, 8) || !take_method(args[4], &method) || !lns_threads(args[7], &threads)) {
        return NULL;
    }
    return fit_batches(method, args, args + 5, threads);
}

/* quantile_moments(source, target, source_mass, target_mass, source_names, target_names, threads) */
LNS_FUNCTION(quantile_moments)
{
    (void)module;
    int threads;
    if (!lns_expect("quantile_moments", count, 7) || !lns_threads(args[6], &threads)) {
        return NULL;
    }
    return fit_batches(LNS_MOMENTS, args, args + 4, threads);
}
