/* Streaming statistics: count, mean, squared deviations, range. */
#include "lineas.h"

#include <math.h>

#include "core/sizes.h"
#include "core/subnormals.h"
#include "core/threads.h"
#include "kernels/samples.h"
#include "kernels/simd/blocks.h"
#include "kernels/simd/load.h"

/* Fewer rows than a chunk has at least are summed in double. */
#define LEAST_ROWS 256

/* Adds `other` to d columns of a state, whose count is left to the caller. */
static void merge_columns(lns_moments *state, const lns_moments *other, int64_t d)
{
    const double a = (double)state->count, b = (double)other->count, both = a + b;
    for (int64_t j = 0; j < d; j++) {
        const double delta = other->mean[j] - state->mean[j];
        state->mean[j] = a == 0 ? other->mean[j] : state->mean[j] + delta * (b / both);
        state->m2[j] = a == 0 ? other->m2[j] : state->m2[j] + other->m2[j] + delta * delta * (a / both * b);
        state->low[j] = other->low[j] < state->low[j] ? other->low[j] : state->low[j];
        state->high[j] = other->high[j] > state->high[j] ? other->high[j] : state->high[j];
    }
}

/* The same where the means of a column may be so far apart that their difference is no double. */
static void merge_far_columns(lns_moments *state, const lns_moments *other, int64_t d)
{
    const double a = (double)state->count, b = (double)other->count, both = a + b;
    for (int64_t j = 0; j < d; j++) {
        lns_moments column = {state->count, state->mean + j, state->m2 + j, state->low + j, state->high + j};
        const lns_moments more = {other->count, other->mean + j, other->m2 + j, other->low + j, other->high + j};
        const double between = state->mean[j] * (a / both) + other->mean[j] * (b / both);
        const int far = !isfinite(other->mean[j] - state->mean[j]);
        merge_columns(&column, &more, 1);
        state->mean[j] = far ? between : state->mean[j];
    }
}

typedef struct moments_context {
    const lns_sample *sample;
    int64_t chunk_rows, chunk_bytes;
    void *work; /* a chunk's groups of columns behind another's */
    int bad[LNS_MAX_THREADS];
} moments_context;

#define LNS_BODY "kernels/moments_body.h"
#include "kernels/simd/variants.h"

static const lns_loop_body MOMENTS[LNS_CPU_COUNT][2] = LNS_TABLE(moments_units);
static void (*const MERGE[LNS_CPU_COUNT][2])(const moments_context *, int64_t, lns_moments *) = LNS_TABLE(merge_chunks);

/* A cache line of each of five numbers for eight columns is the most that a group of either type takes. */
static int64_t chunk_bytes(int64_t d)
{
    return lns_mul((d + 15) / 16, 2 * 5 * LNS_ALIGN);
}

int64_t lns_moments_worksize(int64_t n, int64_t d)
{
    if (n < 1 || d < 1 || lns_mul(n, d) < 0) {
        return -1;
    }
    const int64_t rows = lns_chunk_rows(n, LEAST_ROWS);
    return lns_mul((n + rows - 1) / rows, chunk_bytes(d));
}

lns_status lns_moments_merge(lns_moments *state, const lns_moments *other, int64_t d)
{
    LNS_KEEP_SUBNORMALS;
    if (d < 1 || state->count < 0 || other->count < 0 || state->count > INT64_MAX - other->count) {
        return LNS_BAD_SIZE;
    }
    if (other->count > 0) {
        merge_far_columns(state, other, d);
        state->count += other->count;
    }
    return LNS_OK;
}

lns_status lns_moments_update(const lns_sample *sample, int threads, void *work, lns_moments *state, lns_place *place)
{
    LNS_KEEP_SUBNORMALS;
    const int is_double = lns_is_double(sample->dtype);
    lns_place found = {0};
    moments_context c = {.sample = sample, .work = work};
    if (!lns_sample_ok(sample) || state->count < 0 || state->count > INT64_MAX - sample->n) {
        return LNS_BAD_SIZE;
    }
    if (!lns_is_dtype(sample->dtype)) {
        return LNS_BAD_TYPE;
    }
    c.chunk_rows = lns_chunk_rows(sample->n, LEAST_ROWS);
    c.chunk_bytes = chunk_bytes(sample->d);
    const int64_t chunks = (sample->n + c.chunk_rows - 1) / c.chunk_rows;
    threads = lns_thread_count(chunks, sample->n * sample->d / 8, threads);
    lns_parallel_for(chunks, threads, MOMENTS[lns_cpu()][is_double], &c);
    for (int t = 0; t < threads; t++) {
        if (c.bad[t] && lns_find_not_finite(sample, &found)) {
            if (place != NULL) {
                *place = found;
            }
            return LNS_NOT_FINITE;
        }
    }
    MERGE[lns_cpu()][is_double](&c, chunks, state);
    return LNS_OK;
}
