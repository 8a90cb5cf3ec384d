#include "python/functions.h"

/* How a state travels: count, mean, m2, low, high, keys, schedule; the last is weight, open, filled, error. */
enum { STATE = 7, ARRAYS = STATE - 1, SCHEDULE = LNS_MOST_SLOTS + 3 };

static const char *const NAMES[2 * ARRAYS + 1] = {"mean",   "m2",   "low",   "high",   "keys",   "schedule",
                                                  "mean_b", "m2_b", "low_b", "high_b", "keys_b", "schedule_b"};

static int take_state(PyObject *const *args, const char *const *names, int64_t seen, int writeable,
                      lns_quantiles *state, PyArrayObject **arrays)
{
    if ((arrays[4] = lns_array(args[5], names[4], 4, LNS_TAKE_I32 | LNS_TAKE_I64, writeable)) == NULL ||
        (arrays[5] = lns_array(args[6], names[5], 1, LNS_TAKE_I64, writeable)) == NULL ||
        (arrays[0] = lns_array(args[1], names[0], 1, LNS_TAKE_F64, writeable)) == NULL) {
        return 0;
    }
    const npy_intp *shape = PyArray_DIMS(arrays[4]);
    const int is_double = PyArray_TYPE(arrays[4]) == NPY_INT64, lanes = is_double ? 8 : 16;
    const int64_t d = PyArray_DIM(arrays[0], 0);
    if (PyArray_DIM(arrays[5], 0) != SCHEDULE) {
        PyErr_Format(PyExc_ValueError, "%s must have %d entries, got %zd", names[5], SCHEDULE,
                     (Py_ssize_t)PyArray_DIM(arrays[5], 0));
        return 0;
    }
    if (shape[0] != (d + lanes - 1) / lanes || shape[3] != lanes) {
        PyErr_Format(PyExc_ValueError, "%s must have shape [%lld, slots, rows, %d], got [%zd, %zd, %zd, %zd]", names[4],
                     (long long)((d + lanes - 1) / lanes), lanes, (Py_ssize_t)shape[0], (Py_ssize_t)shape[1],
                     (Py_ssize_t)shape[2], (Py_ssize_t)shape[3]);
        return 0;
    }
    for (int k = 1; k < 4; k++) {
        if ((arrays[k] = lns_vector(args[1 + k], names[k], d, LNS_F64, writeable)) == NULL) {
            return 0;
        }
    }
    const int64_t *schedule = PyArray_DATA(arrays[5]), *rest = schedule + LNS_MOST_SLOTS;
    *state = (lns_quantiles){.dtype = is_double ? LNS_F64 : LNS_F32,
                             .d = d,
                             .slots = shape[1],
                             .rows = shape[2],
                             .keys = PyArray_DATA(arrays[4]),
                             .open = rest[0],
                             .filled = rest[1],
                             .error = rest[2],
                             .moments = {seen, PyArray_DATA(arrays[0]), PyArray_DATA(arrays[1]),
                                         PyArray_DATA(arrays[2]), PyArray_DATA(arrays[3])}};
    memcpy(state->weight, schedule, sizeof state->weight);
    return 1;
}

/* The schedule as a call has left it; the other arrays were written where they lie. */
static void put_schedule(const lns_quantiles *state, PyArrayObject *array)
{
    const int64_t rest[3] = {state->open, state->filled, state->error};
    int64_t *schedule = PyArray_DATA(array);
    memcpy(schedule, state->weight, sizeof state->weight);
    memcpy(schedule + LNS_MOST_SLOTS, rest, sizeof rest);
}

/* quantiles_update(x, *state, name, threads) */
LNS_FUNCTION(quantiles_update)
{
    (void)module;
    const char *names[ARRAYS + 1] = {NULL};
    lns_batch x = {0};
    lns_quantiles state;
    lns_place place = {0};
    lns_status status = LNS_OK;
    PyArrayObject *arrays[ARRAYS + 1];
    PyObject *result = NULL;
    void *work = NULL;
    int64_t seen;
    int threads;
    memcpy(names, NAMES, ARRAYS * sizeof *names);
    names[ARRAYS] = "x";
    if (!lns_expect("quantiles_update", count, STATE + 3) || !lns_threads(args[STATE + 2], &threads) ||
        !lns_int(args[1], "count", 0, INT64_MAX, &seen) || !lns_batch_open_one(&x, args[0], args[STATE + 1], Py_None) ||
        !lns_batch_fill(&x, NULL) || !take_state(args + 1, NAMES, seen, 1, &state, arrays)) {
        goto done;
    }
    arrays[ARRAYS] = (PyArrayObject *)args[0];
    if (!lns_apart(arrays, names, ARRAYS, ARRAYS + 1) || (result = lns_count_after(seen, x.samples[0].n)) == NULL) {
        goto done;
    }
    work = lns_work_new(lns_quantiles_worksize(&state, x.samples[0].n, threads));
    if (work == NULL) {
        Py_CLEAR(result);
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    status = lns_quantiles_update(&x.samples[0], threads, work, &state, &place);
    Py_END_ALLOW_THREADS
    if (status == LNS_OK) {
        put_schedule(&state, arrays[5]);
    } else {
        Py_CLEAR(result);
        lns_raise(status, &place, &x, NULL);
    }
done:
    lns_work_free(work);
    lns_batch_clear(&x);
    return result;
}

/* quantiles_merge(*state, *other, threads) */
LNS_FUNCTION(quantiles_merge)
{
    (void)module;
    lns_quantiles state, other;
    lns_status status = LNS_OK;
    PyArrayObject *arrays[2 * ARRAYS];
    int64_t seen, more;
    int threads;
    if (!lns_expect("quantiles_merge", count, 2 * STATE + 1) || !lns_threads(args[2 * STATE], &threads) ||
        !lns_int(args[0], "count", 0, INT64_MAX, &seen) || !lns_int(args[STATE], "count_b", 0, INT64_MAX, &more) ||
        !take_state(args, NAMES, seen, 1, &state, arrays) ||
        !take_state(args + STATE, NAMES + ARRAYS, more, 0, &other, arrays + ARRAYS) ||
        !lns_apart(arrays, NAMES, ARRAYS, 2 * ARRAYS)) {
        return NULL;
    }
    const int64_t held = lns_quantiles_held(&other);
    PyObject *result = lns_count_after(seen, more);
    void *work = result == NULL ? NULL : lns_work_new(lns_quantiles_worksize(&state, held > 0 ? held : 1, threads));
    if (work == NULL) {
        Py_XDECREF(result);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    status = lns_quantiles_merge(&other, threads, work, &state);
    Py_END_ALLOW_THREADS
    if (status == LNS_OK) {
        put_schedule(&state, arrays[5]);
    } else {
        Py_CLEAR(result);
        PyErr_SetString(PyExc_ValueError, lns_status_text(status));
    }
    lns_work_free(work);
    return result;
}

/* A new array [n, d] of a state's type. */
static PyArrayObject *new_rows(const lns_quantiles *state, int64_t n)
{
    const npy_intp shape[2] = {(npy_intp)n, (npy_intp)state->d};
    return lns_new(2, shape, lns_typenum(state->dtype));
}

/* quantiles_rows(*state, threads) */
LNS_FUNCTION(quantiles_rows)
{
    (void)module;
    lns_quantiles state;
    lns_status status = LNS_OK;
    PyArrayObject *arrays[ARRAYS], *rows = NULL, *weights = NULL;
    PyObject *result = NULL;
    int64_t seen;
    int threads;
    if (!lns_expect("quantiles_rows", count, STATE + 1) || !lns_threads(args[STATE], &threads) ||
        !lns_int(args[0], "count", 0, INT64_MAX, &seen) || !take_state(args, NAMES, seen, 0, &state, arrays)) {
        return NULL;
    }
    const int64_t held = lns_quantiles_held(&state);
    if (held < 0) {
        PyErr_SetString(PyExc_ValueError, lns_status_text(LNS_BAD_SIZE));
        return NULL;
    }
    if ((rows = new_rows(&state, held)) != NULL && (weights = lns_new_vector(held, LNS_F64)) != NULL) {
        Py_BEGIN_ALLOW_THREADS
        status = lns_quantiles_rows(&state, threads, PyArray_DATA(rows), PyArray_DATA(weights));
        Py_END_ALLOW_THREADS
        if (status == LNS_OK) {
            result = PyTuple_Pack(2, rows, weights);
        } else {
            PyErr_SetString(PyExc_ValueError, lns_status_text(status));
        }
    }
    Py_XDECREF(rows);
    Py_XDECREF(weights);
    return result;
}

/* quantiles_read(*state, ranks, parts, threads): ranks, or None and the number of parts */
LNS_FUNCTION(quantiles_read)
{
    (void)module;
    lns_quantiles state;
    lns_status status = LNS_OK;
    PyArrayObject *arrays[ARRAYS], *ranks = NULL, *out = NULL;
    void *work = NULL;
    int64_t seen, parts;
    int threads;
    if (!lns_expect("quantiles_read", count, STATE + 3) || !lns_threads(args[STATE + 2], &threads) ||
        !lns_int(args[0], "count", 0, INT64_MAX, &seen) ||
        !lns_int(args[STATE + 1], "parts", 1, INT64_C(1) << 40, &parts) ||
        (args[STATE] != Py_None && (ranks = lns_array(args[STATE], "ranks", 1, LNS_TAKE_I64, 0)) == NULL) ||
        !take_state(args, NAMES, seen, 0, &state, arrays)) {
        return NULL;
    }
    if (ranks != NULL && (ranks = lns_copy(ranks)) == NULL) {
        return NULL;
    }
    parts = ranks != NULL ? PyArray_DIM(ranks, 0) : parts;
    work = lns_work_new(lns_quantiles_read_worksize(&state, threads));
    if (work != NULL && (out = new_rows(&state, parts)) != NULL) {
        Py_BEGIN_ALLOW_THREADS
        status = lns_quantiles_read(&state, ranks != NULL ? PyArray_DATA(ranks) : NULL, parts, threads, work,
                                    PyArray_DATA(out));
        Py_END_ALLOW_THREADS
        if (status != LNS_OK) {
            Py_CLEAR(out);
            PyErr_SetString(PyExc_ValueError, lns_status_text(status));
        }
    }
    Py_XDECREF(ranks);
    lns_work_free(work);
    return (PyObject *)out;
}
