#include "python/functions.h"

/* A state's four arrays [d]. */
static int take_state(PyObject *const *args, const char *const *names, int64_t d, int writeable, lns_moments *state,
                      PyArrayObject **arrays)
{
    for (int k = 0; k < 4; k++) {
        if ((arrays[k] = lns_vector(args[k], names[k], d, LNS_F64, writeable)) == NULL) {
            return 0;
        }
    }
    state->mean = PyArray_DATA(arrays[0]);
    state->m2 = PyArray_DATA(arrays[1]);
    state->low = PyArray_DATA(arrays[2]);
    state->high = PyArray_DATA(arrays[3]);
    return 1;
}

/* moments_update(x, count, mean, m2, low, high, name, threads) */
LNS_FUNCTION(moments_update)
{
    (void)module;
    static const char *const names[5] = {"mean", "m2", "low", "high", "x"};
    lns_batch x = {0};
    lns_moments state;
    lns_place place = {0};
    lns_status status = LNS_OK;
    PyArrayObject *arrays[5];
    PyObject *result = NULL;
    void *work = NULL;
    int threads;
    if (!lns_expect("moments_update", count, 8) || !lns_threads(args[7], &threads) ||
        !lns_int(args[1], "count", 0, INT64_MAX, &state.count) || !lns_batch_open_one(&x, args[0], args[6], Py_None) ||
        !lns_batch_fill(&x, NULL) || !take_state(args + 2, names, x.samples[0].d, 1, &state, arrays)) {
        goto done;
    }
    arrays[4] = (PyArrayObject *)args[0];
    if (!lns_apart(arrays, names, 4, 5) || (result = lns_count_after(state.count, x.samples[0].n)) == NULL) {
        goto done;
    }
    work = lns_work_new(lns_moments_worksize(x.samples[0].n, x.samples[0].d));
    if (work == NULL) {
        Py_CLEAR(result);
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    status = lns_moments_update(&x.samples[0], threads, work, &state, &place);
    Py_END_ALLOW_THREADS
    if (status != LNS_OK) {
        Py_CLEAR(result);
        lns_raise(status, &place, &x, NULL);
    }
done:
    lns_work_free(work);
    lns_batch_clear(&x);
    return result;
}

/* moments_merge(count, mean, m2, low, high, count_b, mean_b, m2_b, low_b, high_b) */
LNS_FUNCTION(moments_merge)
{
    (void)module;
    static const char *const names[8] = {"mean", "m2", "low", "high", "mean_b", "m2_b", "low_b", "high_b"};
    lns_moments state, other;
    PyArrayObject *mean, *arrays[8];
    if (!lns_expect("moments_merge", count, 10) || !lns_int(args[0], "count", 0, INT64_MAX, &state.count) ||
        !lns_int(args[5], "count_b", 0, INT64_MAX, &other.count) ||
        (mean = lns_array(args[1], "mean", 1, LNS_TAKE_F64, 1)) == NULL ||
        !take_state(args + 1, names, PyArray_DIM(mean, 0), 1, &state, arrays) ||
        !take_state(args + 6, names + 4, PyArray_DIM(mean, 0), 0, &other, arrays + 4) ||
        !lns_apart(arrays, names, 4, 8)) {
        return NULL;
    }
    PyObject *result = lns_count_after(state.count, other.count);
    const lns_status status = result == NULL ? LNS_OK : lns_moments_merge(&state, &other, PyArray_DIM(mean, 0));
    if (status != LNS_OK) {
        Py_CLEAR(result);
        PyErr_SetString(PyExc_ValueError, lns_status_text(status));
    }
    return result;
}
