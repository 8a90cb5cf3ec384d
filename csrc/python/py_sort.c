#include "python/functions.h"

/* sort_columns(samples, names, threads) */
LNS_FUNCTION(sort_columns)
{
    (void)module;
    lns_batch u = {0};
    lns_place place = {0};
    lns_status status = LNS_OK;
    PyObject *sorted = NULL;
    void **out = NULL, *work = NULL;
    int threads;
    if (!lns_expect("sort_columns", count, 3) || !lns_threads(args[2], &threads) ||
        !lns_batch_open(&u, args[0], args[1], Py_None, "samples") || !lns_batch_fill(&u, NULL)) {
        goto done;
    }
    sorted = lns_new_list(&u, 2);
    work = lns_work_new(lns_sort_worksize(u.samples, u.count, threads));
    out = PyMem_Calloc((size_t)u.count + 1, sizeof *out);
    if (sorted == NULL || work == NULL || out == NULL) {
        if (out == NULL) {
            PyErr_NoMemory();
        }
        Py_CLEAR(sorted);
        goto done;
    }
    for (Py_ssize_t k = 0; k < u.count; k++) {
        out[k] = lns_list_data(sorted, k);
    }
    Py_BEGIN_ALLOW_THREADS
    status = lns_sort(u.samples, u.count, threads, work, out, &place);
    Py_END_ALLOW_THREADS
    if (status != LNS_OK) {
        Py_CLEAR(sorted);
        lns_raise(status, &place, &u, NULL);
    }
done:
    PyMem_Free(out);
    lns_work_free(work);
    lns_batch_clear(&u);
    return sorted;
}
