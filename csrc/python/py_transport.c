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

/* fit_local(source, target, source_mass, target_mass, method, source_names, target_names, threads) */
LNS_FUNCTION(fit_local)
{
    (void)module;
    lns_batch u = {0}, v = {0};
    lns_place place = {0};
    lns_status status = LNS_OK;
    lns_method method;
    PyObject *result = NULL, *weights = NULL, *biases = NULL;
    lns_fit_job *jobs = NULL;
    void *work = NULL;
    int threads;
    if (!lns_expect("fit_local", count, 8) || !take_method(args[4], &method) || !lns_threads(args[7], &threads) ||
        !lns_batch_open(&u, args[0], args[5], args[2], "source") ||
        !lns_batch_open(&v, args[1], args[6], args[3], "target") || !lns_batch_fill(&u, NULL) ||
        !lns_batch_fill(&v, &u) || !enough_rows(&u) || !enough_rows(&v)) {
        goto done;
    }
    jobs = PyMem_Calloc((size_t)u.count + 1, sizeof *jobs);
    if (jobs == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    if ((weights = lns_new_list(&u, 1)) == NULL || (biases = lns_new_list(&u, 1)) == NULL) {
        goto done;
    }
    for (Py_ssize_t k = 0; k < u.count; k++) {
        jobs[k] = (lns_fit_job){u.samples[k], v.samples[k], lns_list_data(weights, k), lns_list_data(biases, k)};
    }
    work = lns_work_new(lns_fit_worksize(jobs, u.count, threads));
    if (work == NULL) {
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    status = lns_fit(jobs, u.count, method, threads, work, &place);
    Py_END_ALLOW_THREADS
    result = status == LNS_OK ? PyTuple_Pack(2, weights, biases) : lns_raise(status, &place, &u, &v);
done:
    lns_work_free(work);
    PyMem_Free(jobs);
    Py_XDECREF(weights);
    Py_XDECREF(biases);
    lns_batch_clear(&u);
    lns_batch_clear(&v);
    return result;
}
