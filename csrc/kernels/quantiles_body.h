/* Template body: tiles of a summary as rows come in, and as they are read.
 *
 * Included by quantiles.c through simd/variants.h, once per working type and CPU variant. */
#include "kernels/simd/rank_body.h"

/* The rows of a slot in tile `unit`. */
static inline key *VNAME(slot)(const lns_quantiles *q, int64_t unit, int64_t slot)
{
    return (key *)q->keys + (unit * q->slots + slot) * q->rows * LANES;
}

/* Means of neighbours, each between the two: halves of subnormal numbers are rounded. */
static inline VNAME(vec) VNAME(mean_of)(VNAME(vec) low, VNAME(vec) high)
{
    const VNAME(reals) x = (VNAME(reals))VNAME(vec_flip)(low), y = (VNAME(reals))VNAME(vec_flip)(high);
    VNAME(vec) mean = VNAME(vec_flip)((VNAME(vec))(x * (real)0.5 + y * (real)0.5));
    VNAME(vec_exchange)(&low, &mean);
    VNAME(vec_exchange)(&mean, &high);
    return mean;
}

static void VNAME(collapse_slots)(const lns_quantiles *q, int64_t unit, const collapse *made, key *work)
{
    const size_t bytes = (size_t)q->rows * LNS_TILE_ROW;
    key *into = VNAME(slot)(q, unit, made->into);
    memcpy(work, into, bytes);
    memcpy(work + q->rows * LANES, VNAME(slot)(q, unit, made->from), bytes);
    VNAME(lns_merge_rows)(work, levels_of(q->rows), 2 * q->rows);
    for (int64_t i = 0; i < q->rows; i++, into += LANES, work += 2 * LANES) {
        for (int p = 0; p < LANES; p += VEC_LANES) {
            VNAME(vec_store)(into + p, VNAME(mean_of)(VNAME(vec_load)(work + p), VNAME(vec_load)(work + LANES + p)));
        }
    }
}

/* `count` rows behind those of the open slot, from tile `unit` of the sample (its rows from `first` on), or from
 * `keys`.
 */
static void VNAME(fill_slot)(const lns_quantiles *q, int64_t unit, const lns_sample *s, int64_t first, const key *keys,
                             int64_t count)
{
    key *to = VNAME(slot)(q, unit, q->open) + q->filled * LANES;
    if (s == NULL) {
        memcpy(to, keys + first * LANES, (size_t)count * LNS_TILE_ROW);
        return;
    }
    const lns_sample part = {lns_element(s->data, s->dtype, first * s->d), s->dtype, count, s->d, NULL};
    VNAME(load_tiles)(&part, unit * LANES, 1, to, 1);
}

/* All rows of the sample, or those of the open slot of `other`, into the tiles [begin, end). */
static LNS_NOINLINE void VNAME(take_all)(lns_quantiles *q, const quantiles_context *c, int64_t n, int64_t begin,
                                         int64_t end, key *work)
{
    for (int64_t i = 0, count; i < n; i += count) {
        collapse made;
        count = rows_to_take(q, n - i, &made);
        const lns_quantiles before = *q;
        const int full = take_rows(q, count);
        for (int64_t unit = begin; unit < end; unit++) {
            if (made.into >= 0) {
                VNAME(collapse_slots)(q, unit, &made, work);
            }
            const key *keys = c->sample == NULL ? VNAME(slot)(c->other, unit, c->other->open) : NULL;
            VNAME(fill_slot)(&before, unit, c->sample, i, keys, count);
            if (full) {
                VNAME(lns_sort_rows)(VNAME(slot)(q, unit, q->open), q->rows);
            }
        }
    }
}

static void VNAME(update_units)(void *context, int64_t begin, int64_t end, int thread)
{
    const quantiles_context *c = context;
    lns_quantiles q = *c->state;
    VNAME(take_all)(&q, c, c->sample->n, begin, end, (key *)(void *)(c->work + thread * c->work_each));
}

static void VNAME(merge_units)(void *context, int64_t begin, int64_t end, int thread)
{
    const quantiles_context *c = context;
    key *work = (key *)(void *)(c->work + thread * c->work_each);
    lns_quantiles q = *c->state;
    for (int64_t s = 0; s < c->other->slots; s++) {
        collapse made;
        if (c->other->weight[s] == 0) {
            continue;
        }
        const int64_t slot = free_slot(&q, &made);
        for (int64_t unit = begin; unit < end; unit++) {
            if (made.into >= 0) {
                VNAME(collapse_slots)(&q, unit, &made, work);
            }
            memcpy(VNAME(slot)(&q, unit, slot), VNAME(slot)(c->other, unit, s), (size_t)q.rows * LNS_TILE_ROW);
        }
        q.weight[slot] = c->other->weight[s];
    }
    VNAME(take_all)(&q, c, c->other->filled, begin, end, work);
}

static void VNAME(rows_units)(void *context, int64_t begin, int64_t end, int thread)
{
    const quantiles_context *c = context;
    const lns_quantiles *q = c->state;
    held_slot slots[LNS_MOST_SLOTS];
    const int64_t count = held_slots(q, slots);
    real *out = c->out;
    (void)thread;
    for (int64_t s = 0; s < count; s++) {
        const lns_sample rows = {NULL, q->dtype, slots[s].rows, q->d, NULL};
        for (int64_t unit = begin; unit < end; unit++) {
            VNAME(store_tiles)(VNAME(slot)(q, unit, slots[s].slot), &rows, unit * LANES, 1, out, 1);
        }
        out += slots[s].rows * q->d;
    }
}

/* Values of a sorted column at ranks that ascend: the first whose weight, with all before it, reaches the rank. */
static void VNAME(column_at)(const key *keys, const double *weights, const int64_t *ranks, int64_t count, int64_t d,
                             real *out)
{
    int64_t reached = (int64_t)weights[0], i = 0;
    for (int64_t k = 0; k < count; k++) {
        while (reached < ranks[k]) {
            reached += (int64_t)weights[++i];
        }
        const key bits = VNAME(flip)(keys[i * LANES]);
        memcpy(out + k * d, &bits, sizeof bits);
    }
}

/* Means of the quantile function of a sorted column over `count` equal parts of [0, 1]. */
static void VNAME(column_means)(const key *keys, const double *weights, int64_t held, double rows, int64_t count,
                                int64_t d, real *out)
{
    const double part = rows / (double)count;
    double left = weights[0];
    int64_t i = 0;
    for (int64_t k = 0; k < count; k++) {
        double missing = part, sum = 0, first = 0, value = 0;
        for (int begun = 0;; begun = 1) {
            const key bits = VNAME(flip)(keys[i * LANES]);
            real x;
            memcpy(&x, &bits, sizeof x);
            value = (double)x;
            first = begun ? first : value;
            if (missing <= left || i == held - 1) { /* what rounding leaves over is the last value's */
                sum += missing / part * value;
                left -= missing;
                break;
            }
            sum += left / part * value;
            missing -= left;
            left = weights[++i];
        }
        sum = sum < first ? first : sum > value ? value : sum;
        out[k * d] = (real)sum;
    }
}

static void VNAME(read_units)(void *context, int64_t begin, int64_t end, int thread)
{
    const quantiles_context *c = context;
    const lns_quantiles *q = c->state;
    char *work = c->work + thread * c->work_each;
    key *tile = (key *)(void *)work;
    const int64_t held = held_rows(q);
    work += lns_tile_bytes(held);
    const VNAME(order) order = VNAME(order_at)(&work, held, LNS_ROWS);
    double *weights = (double *)(void *)work;
    held_slot slots[LNS_MOST_SLOTS];
    const int64_t count = held_slots(q, slots);
    for (int64_t s = 0, row = 0; s < count; s++) {
        for (int64_t i = 0; i < slots[s].rows; i++) {
            weights[row++] = (double)slots[s].weight;
        }
    }
    for (int64_t unit = begin; unit < end; unit++) {
        for (int64_t s = 0, row = 0; s < count; row += slots[s++].rows) {
            memcpy(tile + row * LANES, VNAME(slot)(q, unit, slots[s].slot), (size_t)slots[s].rows * LNS_TILE_ROW);
        }
        VNAME(rank_tile)(tile, held, &order);
        for (int64_t l = 0; l < LANES && unit * LANES + l < q->d; l++) {
            const double *sorted = VNAME(column_mass)(weights, held, l, &order);
            real *out = (real *)c->out + unit * LANES + l;
            if (c->ranks != NULL) {
                VNAME(column_at)(tile + l, sorted, c->ranks, c->count, q->d, out);
            } else {
                VNAME(column_means)(tile + l, sorted, held, (double)q->moments.count, c->count, q->d, out);
            }
        }
    }
}
