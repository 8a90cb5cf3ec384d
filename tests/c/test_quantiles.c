#include "check.h"

enum { D = 37, ROWS = 32, SLOTS = 9, TILES = (D + 15) / 16, KEYS = TILES * SLOTS * ROWS * 16, MOST = SLOTS * ROWS };

static lns_quantiles start(void)
{
    double *moments = memory(4 * D * 8);
    lns_quantiles q = {.dtype = LNS_F32, .d = D, .slots = SLOTS, .rows = ROWS, .keys = memory(KEYS * 4)};
    q.moments = (lns_moments){0, moments, moments + D, moments + 2 * D, moments + 3 * D};
    for (int j = 0; j < D; j++) {
        q.moments.mean[j] = q.moments.m2[j] = 0;
        q.moments.low[j] = INFINITY;
        q.moments.high[j] = -INFINITY;
    }
    return q;
}

static void release(lns_quantiles *q)
{
    free(q->keys);
    free(q->moments.mean);
}

static void update(const float *x, int64_t n, int threads, lns_quantiles *q)
{
    const lns_sample sample = {x, LNS_F32, n, D, NULL};
    void *work = memory(lns_quantiles_worksize(q, n, threads));
    CHECK(lns_quantiles_update(&sample, threads, work, q, NULL) == LNS_OK);
    free(work);
}

static void merge(const lns_quantiles *other, lns_quantiles *q)
{
    const int64_t held = lns_quantiles_held(other);
    void *work = memory(lns_quantiles_worksize(q, held > 0 ? held : 1, 2));
    CHECK(lns_quantiles_merge(other, 2, work, q) == LNS_OK);
    free(work);
}

/* out [count, D]: at ranks, or means over parts. */
static float *reading(const lns_quantiles *q, const int64_t *ranks, int64_t count)
{
    float *out = memory(count * D * 4);
    void *work = memory(lns_quantiles_read_worksize(q, 2));
    CHECK(lns_quantiles_read(q, ranks, count, 2, work, out) == LNS_OK);
    free(work);
    return out;
}

/* The weighted rows that are held tell the number of the n rows up to any of their values to within the error. */
static void check_ranks(const lns_quantiles *q, const float *x, int64_t n)
{
    const int64_t held = lns_quantiles_held(q);
    float *rows = memory(held * D * 4);
    double *weights = memory(held * 8), total = 0;
    CHECK(lns_quantiles_rows(q, 2, rows, weights) == LNS_OK);
    for (int64_t i = 0; i < held; i++) {
        total += weights[i];
    }
    CHECK(total == (double)n && q->moments.count == n && held <= MOST);
    for (int j = 0; j < D; j += 9) {
        for (int64_t k = 0; k < held; k += 7) {
            const float value = rows[k * D + j];
            double told = 0, seen = 0;
            for (int64_t i = 0; i < held; i++) {
                told += rows[i * D + j] <= value ? weights[i] : 0;
            }
            for (int64_t i = 0; i < n; i++) {
                seen += x[i * D + j] <= value;
            }
            CHECK(fabs(told - seen) <= (double)q->error);
        }
    }
    free(rows);
    free(weights);
}

static int same(const lns_quantiles *a, const lns_quantiles *b)
{
    return a->moments.count == b->moments.count && a->filled == b->filled && a->open == b->open &&
           a->error == b->error && memcmp(a->weight, b->weight, sizeof a->weight) == 0 &&
           memcmp(a->keys, b->keys, KEYS * 4) == 0;
}

static void check_refusals(lns_quantiles *q, float *x)
{
    lns_quantiles other = start();
    lns_place place = {0};
    const float kept = x[2 * D + 5];
    x[2 * D + 5] = INFINITY;
    const lns_sample bad = {x, LNS_F32, 9, D, NULL}, wide = {x, LNS_F64, 1, D, NULL},
                     thin = {x, LNS_F32, 1, D - 1, NULL};
    void *work = memory(lns_quantiles_worksize(q, 9, 2));
    memcpy(other.keys, q->keys, KEYS * 4);
    const lns_quantiles before = {.open = q->open,
                                  .filled = q->filled,
                                  .error = q->error,
                                  .keys = other.keys,
                                  .moments = {.count = q->moments.count}};
    lns_quantiles expected = before;
    memcpy(expected.weight, q->weight, sizeof q->weight);
    CHECK(lns_quantiles_update(&bad, 2, work, q, &place) == LNS_NOT_FINITE && place.row == 2 && place.column == 5);
    CHECK(lns_quantiles_update(&wide, 2, work, q, NULL) == LNS_BAD_TYPE);
    CHECK(lns_quantiles_update(&thin, 2, work, q, NULL) == LNS_BAD_SIZE);
    CHECK(same(q, &expected));
    x[2 * D + 5] = kept;
    lns_quantiles odd = *q;
    odd.rows = 33;
    CHECK(lns_quantiles_held(&odd) == -1 && lns_quantiles_worksize(&odd, 1, 1) == -1);
    CHECK(lns_quantiles_merge(&odd, 1, work, q) == LNS_BAD_SIZE);
    odd = *q;
    odd.weight[0] = 3;
    CHECK(lns_quantiles_held(&odd) == -1);
    odd = *q;
    odd.dtype = LNS_F64;
    CHECK(lns_quantiles_merge(&odd, 1, work, q) == LNS_BAD_TYPE);
    odd.dtype = LNS_F16;
    CHECK(lns_quantiles_rows(&odd, 1, NULL, NULL) == LNS_BAD_TYPE && lns_quantiles_read_worksize(&odd, 1) == -1);
    const int64_t falling[] = {3, 2}, beyond = q->moments.count + 1;
    CHECK(lns_quantiles_read(q, falling, 2, 1, NULL, NULL) == LNS_BAD_SIZE);
    CHECK(lns_quantiles_read(q, &beyond, 1, 1, NULL, NULL) == LNS_BAD_SIZE);
    CHECK(lns_quantiles_read(q, NULL, 0, 1, NULL, NULL) == LNS_BAD_SIZE);
    CHECK(lns_quantiles_read_worksize(&other, 1) == -1 && lns_quantiles_held(&other) == 0); /* nothing seen */
    free(work);
    release(&other);
}

void test_quantiles(void)
{
    enum { N = 3000, CUT = 1234 };
    float *x = normal_f32(N * D, 21);
    lns_quantiles few = start(), whole = start(), parts = start(), rest = start();
    update(x, MOST, 2, &few);
    CHECK(few.error == 0 && lns_quantiles_held(&few) == MOST);
    check_ranks(&few, x, MOST);
    update(x, N, 1, &whole);
    CHECK(whole.error > 0 && whole.error < N / 4);
    check_ranks(&whole, x, N);
    update(x, 1, 4, &parts);
    update(x + D, CUT - 1, 4, &parts);
    update(x + CUT * D, N - CUT, 3, &parts);
    CHECK(same(&whole, &parts)); /* however the rows are cut, and on however many threads */
    release(&parts);
    parts = start();
    update(x, CUT, 1, &parts);
    update(x + CUT * D, N - CUT, 1, &rest);
    merge(&rest, &parts);
    check_ranks(&parts, x, N);
    const int64_t ranks[] = {1, N / 4, N / 2, N};
    float *at = reading(&whole, ranks, 4), *means = reading(&whole, NULL, 3), *first = reading(&few, NULL, MOST);
    for (int j = 0; j < D; j++) {
        CHECK(at[j] <= at[D + j] && at[D + j] < at[2 * D + j] && at[2 * D + j] < at[3 * D + j]);
        CHECK_NEAR(at[2 * D + j], 0, 0.3);
        CHECK_NEAR((means[j] + means[D + j] + means[2 * D + j]) / 3, whole.moments.mean[j], 1e-5);
        CHECK((double)first[j] == few.moments.low[j] && (double)first[(MOST - 1) * D + j] == few.moments.high[j]);
    }
    check_refusals(&whole, x);
    free(at);
    free(means);
    free(first);
    free(x);
    release(&few);
    release(&whole);
    release(&parts);
    release(&rest);
}
