/* Streaming quantiles: sorted runs of equally weighted rows. Two of them are merged, and neighbours in the merged order
 * replaced by their mean (Munro and Paterson 1980; Manku, Rajagopalan and Lindsay 1998, who keep one of the two). */
#include "lineas.h"

#include <math.h>

#include "core/sizes.h"
#include "core/subnormals.h"
#include "core/threads.h"
#include "kernels/samples.h"
#include "kernels/simd/rank.h"

/* ---- the schedule: which slot takes what, the same for all columns ---- */

/* The rows of slots `into` and `from` merged, and the means of neighbours put into `into`. */
typedef struct collapse {
    int64_t into, from; /* into < 0: none */
} collapse;

static int64_t slot_of_weight(const lns_quantiles *q, int64_t begin, int64_t weight)
{
    while (begin < q->slots && (q->weight[begin] != weight || (begin == q->open && q->filled > 0))) {
        begin++;
    }
    return begin;
}

/* A free slot. Where there is none, two slots of the least weight that two of them have become one. Such a pair exists:
 * slots of different weights alone would hold more rows than a summary takes. */
static int64_t free_slot(lns_quantiles *q, collapse *made)
{
    const int64_t found = slot_of_weight(q, 0, 0);
    made->into = -1;
    if (found < q->slots) {
        return found;
    }
    for (int64_t weight = 1;; weight *= 2) {
        made->into = slot_of_weight(q, 0, weight);
        made->from = slot_of_weight(q, made->into + 1, weight);
        if (made->from < q->slots) {
            /* Where an odd number of the rows merged is below a value, one of them becomes none or two. */
            q->error += weight;
            q->weight[made->into] = 2 * weight;
            q->weight[made->from] = 0;
            return made->from;
        }
    }
}

/* How many of `left` rows the open slot takes next; opens one where none is. */
static int64_t rows_to_take(lns_quantiles *q, int64_t left, collapse *made)
{
    made->into = -1;
    if (q->filled == 0) {
        q->open = free_slot(q, made);
    }
    return left < q->rows - q->filled ? left : q->rows - q->filled;
}

/* Whether the open slot, with `count` more rows, is full: it is closed then. */
static int take_rows(lns_quantiles *q, int64_t count)
{
    const int full = q->filled + count == q->rows;
    q->filled = full ? 0 : q->filled + count;
    q->weight[q->open] = full;
    return full;
}

/* ---- sizes ---- */

static int64_t tiles_of(const lns_quantiles *q)
{
    return lns_tiles(q->d, q->dtype);
}

static int levels_of(int64_t rows)
{
    int levels = 0;
    while (INT64_C(1) << levels < rows) {
        levels++;
    }
    return levels;
}

/* The most rows a summary takes. */
static int64_t most_rows(const lns_quantiles *q)
{
    const int64_t bits = q->slots - 1 + levels_of(q->rows);
    return bits > 62 ? INT64_C(1) << 62 : (INT64_C(1) << bits) - q->rows;
}

/* Whether sizes and schedule are those of a summary, whatever else may be in it. */
static int state_ok(const lns_quantiles *q)
{
    if (q->d < 1 || q->d > INT64_C(1) << 56 || q->slots < 2 || q->slots > LNS_MOST_SLOTS || q->rows < LNS_RUN ||
        q->rows > INT64_C(1) << 20 || q->rows != INT64_C(1) << levels_of(q->rows) || q->open < 0 ||
        q->open >= q->slots || q->filled < 0 || q->filled >= q->rows || (q->filled > 0 && q->weight[q->open] != 0) ||
        q->error < 0 || q->error > INT64_C(1) << 60 ||
        lns_mul(lns_mul(tiles_of(q), q->slots), q->rows * LNS_TILE_ROW) < 0) {
        return 0;
    }
    int64_t count = q->filled;
    for (int64_t s = 0; s < q->slots; s++) {
        const int64_t weight = q->weight[s];
        if (weight < 0 || (weight & (weight - 1)) != 0 || weight > (most_rows(q) - count) / q->rows) {
            return 0;
        }
        count += weight * q->rows;
    }
    return q->moments.count == count;
}

/* Rows that a summary holds. */
static int64_t held_rows(const lns_quantiles *q)
{
    int64_t held = q->filled;
    for (int64_t s = 0; s < q->slots; s++) {
        held += q->weight[s] > 0 ? q->rows : 0;
    }
    return held;
}

/* What a row that is held stands for; `row` counts in the order of lns_quantiles_rows. */
typedef struct held_slot {
    int64_t slot, rows, weight;
} held_slot;

static int64_t held_slots(const lns_quantiles *q, held_slot *out)
{
    int64_t count = 0;
    for (int64_t s = 0; s < q->slots; s++) {
        if (q->weight[s] > 0) {
            out[count++] = (held_slot){s, q->rows, q->weight[s]};
        } else if (q->filled > 0 && s == q->open) {
            out[count++] = (held_slot){s, q->filled, 1};
        }
    }
    return count;
}

/* ---- kernels ---- */

typedef struct quantiles_context {
    const lns_quantiles *state, *other; /* as they are before the call */
    const lns_sample *sample;
    const int64_t *ranks;
    int64_t count; /* of ranks, or of parts */
    char *work;
    int64_t work_each;
    void *out;
} quantiles_context;

#define LNS_BODY "kernels/quantiles_body.h"
#include "kernels/simd/variants.h"

static const lns_loop_body UPDATE[LNS_CPU_COUNT][2] = LNS_TABLE(update_units);
static const lns_loop_body MERGE[LNS_CPU_COUNT][2] = LNS_TABLE(merge_units);
static const lns_loop_body READ[LNS_CPU_COUNT][2] = LNS_TABLE(read_units);
static const lns_loop_body ROWS[LNS_CPU_COUNT][2] = LNS_TABLE(rows_units);

static void run(const lns_loop_body table[LNS_CPU_COUNT][2], quantiles_context *c, int threads)
{
    lns_parallel_for(tiles_of(c->state), threads, table[lns_cpu()][lns_is_double(c->state->dtype)], c);
}

/* ---- taking rows in ---- */

static int64_t update_work_each(const lns_quantiles *q)
{
    return 2 * q->rows * LNS_TILE_ROW; /* a pair of slots of one tile */
}

static int update_threads(const lns_quantiles *q, int64_t n, int threads)
{
    return lns_thread_count(tiles_of(q), lns_cost(3.0 * (double)n * (double)q->d), threads);
}

int64_t lns_quantiles_worksize(const lns_quantiles *state, int64_t n, int threads)
{
    const int64_t moments = lns_moments_worksize(n, state->d);
    if (!lns_is_real(state->dtype) || !state_ok(state) || moments < 0) {
        return -1;
    }
    const int64_t slots = update_work_each(state) * update_threads(state, n, threads);
    return moments > slots ? moments : slots;
}

lns_status lns_quantiles_update(const lns_sample *sample, int threads, void *work, lns_quantiles *state,
                                lns_place *place)
{
    LNS_KEEP_SUBNORMALS;
    if (!lns_is_real(state->dtype) || !lns_is_dtype(sample->dtype) ||
        lns_is_double(sample->dtype) != lns_is_double(state->dtype)) {
        return LNS_BAD_TYPE;
    }
    if (!state_ok(state) || !lns_sample_ok(sample) || sample->d != state->d ||
        sample->n > most_rows(state) - state->moments.count) {
        return LNS_BAD_SIZE;
    }
    const lns_status status = lns_moments_update(sample, threads, work, &state->moments, place);
    if (status != LNS_OK) {
        return status; /* nothing was taken in */
    }
    quantiles_context c = {.state = state, .sample = sample, .work = work, .work_each = update_work_each(state)};
    run(UPDATE, &c, update_threads(state, sample->n, threads));
    collapse made;
    for (int64_t i = 0, count; i < sample->n; i += count) {
        count = rows_to_take(state, sample->n - i, &made);
        take_rows(state, count);
    }
    return LNS_OK;
}

/* The slots of `other` in turn, and the rows of its open one: what to do about each is in merge_units. */
lns_status lns_quantiles_merge(const lns_quantiles *other, int threads, void *work, lns_quantiles *state)
{
    LNS_KEEP_SUBNORMALS;
    if (!lns_is_real(state->dtype) || other->dtype != state->dtype) {
        return LNS_BAD_TYPE;
    }
    if (!state_ok(state) || !state_ok(other) || other->d != state->d || other->rows != state->rows ||
        other->moments.count > most_rows(state) - state->moments.count) {
        return LNS_BAD_SIZE;
    }
    quantiles_context c = {.state = state, .other = other, .work = work, .work_each = update_work_each(state)};
    run(MERGE, &c, update_threads(state, held_rows(other), threads));
    collapse made;
    for (int64_t s = 0; s < other->slots; s++) {
        if (other->weight[s] > 0) {
            const int64_t slot = free_slot(state, &made);
            state->weight[slot] = other->weight[s];
        }
    }
    for (int64_t i = 0, count; i < other->filled; i += count) {
        count = rows_to_take(state, other->filled - i, &made);
        take_rows(state, count);
    }
    state->error += other->error;
    return lns_moments_merge(&state->moments, &other->moments, state->d);
}

/* ---- reading ---- */

int64_t lns_quantiles_held(const lns_quantiles *state)
{
    return lns_is_real(state->dtype) && state_ok(state) ? held_rows(state) : -1;
}

lns_status lns_quantiles_rows(const lns_quantiles *state, int threads, void *out, double *weights)
{
    held_slot slots[LNS_MOST_SLOTS];
    if (!lns_is_real(state->dtype)) {
        return LNS_BAD_TYPE;
    }
    if (!state_ok(state)) {
        return LNS_BAD_SIZE;
    }
    quantiles_context c = {.state = state, .out = out};
    run(ROWS, &c,
        lns_thread_count(tiles_of(state), lns_cost(0.5 * (double)held_rows(state) * (double)state->d), threads));
    const int64_t count = held_slots(state, slots);
    for (int64_t s = 0; s < count; s++) {
        for (int64_t i = 0; i < slots[s].rows; i++) {
            *weights++ = (double)slots[s].weight;
        }
    }
    return LNS_OK;
}

static int64_t read_work_each(const lns_quantiles *q)
{
    const int64_t held = held_rows(q);
    return lns_tile_bytes(held) + lns_order_bytes(held, LNS_ROWS) + lns_pad(held * 8);
}

static int read_threads(const lns_quantiles *q, int threads)
{
    return lns_thread_count(tiles_of(q), lns_sort_cost(held_rows(q), q->d), threads);
}

int64_t lns_quantiles_read_worksize(const lns_quantiles *state, int threads)
{
    if (!lns_is_real(state->dtype) || !state_ok(state) || state->moments.count == 0) {
        return -1;
    }
    return read_work_each(state) * read_threads(state, threads);
}

lns_status lns_quantiles_read(const lns_quantiles *state, const int64_t *ranks, int64_t count, int threads, void *work,
                              void *out)
{
    LNS_KEEP_SUBNORMALS;
    if (!lns_is_real(state->dtype)) {
        return LNS_BAD_TYPE;
    }
    if (!state_ok(state) || state->moments.count == 0 || count < 1 || lns_mul(lns_mul(count, state->d), 8) < 0) {
        return LNS_BAD_SIZE;
    }
    for (int64_t k = 0; ranks != NULL && k < count; k++) {
        if (ranks[k] < (k > 0 ? ranks[k - 1] : 1) || ranks[k] > state->moments.count) {
            return LNS_BAD_SIZE;
        }
    }
    quantiles_context c = {
        .state = state, .ranks = ranks, .count = count, .work = work, .work_each = read_work_each(state), .out = out};
    run(READ, &c, read_threads(state, threads));
    return LNS_OK;
}
