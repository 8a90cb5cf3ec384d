/* Fuzzing summaries: lns_quantiles_update, _merge, _rows and _read, against counting for some columns. */
#include "fuzz.h"

typedef struct summary_call {
    lns_sample first, second;
    lns_quantiles state, other; /* as they are at the start; of `other`, the keys and moments alone are memory */
    void *rows;                 /* [held, d] */
    double *weights;
    int64_t *error; /* of the state at the end, and its number of rows held */
    void *means;
    int64_t parts;
} summary_call;

static int64_t lanes_of(lns_dtype real)
{
    return real == LNS_F64 ? 8 : 16;
}

static lns_quantiles empty_summary(lns_dtype real, int64_t d, int64_t slots, int64_t rows)
{
    const int64_t lanes = lanes_of(real), keys = (d + lanes - 1) / lanes * slots * rows * lanes;
    double *moments = elements(IN_OUT, LNS_F64, 4 * d);
    lns_quantiles q = {.dtype = real, .d = d, .slots = slots, .rows = rows};
    q.keys = bytes_of(IN_OUT, keys * lns_element_size(real));
    for (int64_t j = 0; j < d; j++) {
        moments[j] = moments[d + j] = 0;
        moments[2 * d + j] = INFINITY;
        moments[3 * d + j] = -INFINITY;
    }
    q.moments = (lns_moments){0, moments, moments + d, moments + 2 * d, moments + 3 * d};
    return q;
}

static lns_status take(const lns_sample *s, int threads, lns_quantiles *q, lns_place *place)
{
    lns_quantiles before;
    memcpy(&before, q, sizeof before);
    void *work = work_memory(lns_quantiles_worksize(q, s->n, threads));
    const lns_status status = lns_quantiles_update(s, threads, work, q, place);
    free(work);
    REQUIRE(status == LNS_OK || memcmp(&before, q, sizeof before) == 0);
    return status;
}

/* One half into each of two summaries, the second then into the first; where a half is not finite, that one alone. */
static lns_status call_summaries(void *context, int threads, lns_place *place)
{
    const summary_call *c = context;
    lns_quantiles q = c->state, other = c->other;
    lns_place unused;
    lns_quantiles probe = c->state;
    if (lns_find_not_finite(&c->first, &unused) || lns_find_not_finite(&c->second, &unused)) {
        const lns_sample *bad = lns_find_not_finite(&c->first, &unused) ? &c->first : &c->second;
        return take(bad, threads, &probe, place);
    }
    REQUIRE(take(&c->first, threads, &q, place) == LNS_OK);
    REQUIRE(take(&c->second, threads, &other, place) == LNS_OK);
    void *work = work_memory(lns_quantiles_worksize(&q, lns_quantiles_held(&other), threads));
    REQUIRE(lns_quantiles_merge(&other, threads, work, &q) == LNS_OK);
    free(work);
    REQUIRE(q.moments.count == c->first.n + c->second.n);
    c->error[0] = q.error;
    c->error[1] = lns_quantiles_held(&q);
    REQUIRE(lns_quantiles_rows(&q, threads, c->rows, c->weights) == LNS_OK);
    work = work_memory(lns_quantiles_read_worksize(&q, threads));
    REQUIRE(lns_quantiles_read(&q, NULL, c->parts, threads, work, c->means) == LNS_OK);
    const int64_t ends[] = {1, q.moments.count};
    void *at = malloc((size_t)(2 * q.d * lns_element_size(q.dtype)));
    REQUIRE(lns_quantiles_read(&q, ends, 2, threads, work, at) == LNS_OK);
    for (int k = 0; k < 3; k++) {
        const int64_t j = column_to_check(k, q.d);
        const double low = lns_value(at, q.dtype, j), high = lns_value(at, q.dtype, q.d + j);
        REQUIRE(q.moments.low[j] <= low && low <= high && high <= q.moments.high[j]);
    }
    free(at);
    free(work);
    return LNS_OK;
}

void fuzz_quantiles(void)
{
    const int is_double = byte() % 2;
    const int64_t n = some_rows(), m = some_rows(), d = some_columns(n > m ? n : m), slots = 9 + byte() % 4;
    const lns_dtype dtype = some_dtype(is_double), real = real_dtype(is_double);
    const int64_t most = slots * 32;
    summary_call c = {.parts = 1 + below(20)};
    c.first = (lns_sample){some_values(INPUT, dtype, n * d), dtype, n, d, NULL};
    c.second = (lns_sample){some_values(INPUT, dtype, m * d), dtype, m, d, NULL};
    c.state = empty_summary(real, d, slots, 32);
    c.other = empty_summary(real, d, slots, 32);
    if (n + m > 32 * ((INT64_C(1) << (slots - 1)) - 1)) {
        return;
    }
    c.rows = bytes_of(IN_OUT, most * d * lns_element_size(real));
    c.weights = elements(IN_OUT, LNS_F64, most);
    c.error = bytes_of(IN_OUT, 2 * (int64_t)sizeof *c.error);
    c.means = elements(OUTPUT, real, c.parts * d);
    const lns_status status = everywhere(call_summaries, &c);
    REQUIRE(status == LNS_OK || status == LNS_NOT_FINITE);
    if (status != LNS_OK) {
        return;
    }
    const int64_t error = c.error[0], held = c.error[1];
    REQUIRE(held <= most && (error == 0) == (held == n + m));
    for (int k = 0; k < 3; k++) {
        const int64_t j = column_to_check(k, d), value_at = below(held);
        const double value = lns_value(c.rows, real, value_at * d + j);
        double told = 0, total = 0, seen = 0;
        for (int64_t i = 0; i < held; i++) {
            told += lns_value(c.rows, real, i * d + j) <= value ? c.weights[i] : 0;
            total += c.weights[i];
        }
        for (int64_t i = 0; i < n + m; i++) {
            seen += (i < n ? lns_value(c.first.data, dtype, i * d + j)
                           : lns_value(c.second.data, dtype, (i - n) * d + j)) <= value;
        }
        REQUIRE(total == (double)(n + m) && fabs(told - seen) <= (double)error);
        for (int64_t p = 1; p < c.parts; p++) {
            REQUIRE(lns_value(c.means, real, (p - 1) * d + j) <= lns_value(c.means, real, p * d + j));
        }
    }
}
