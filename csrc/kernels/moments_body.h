/* Template body: count, mean, squared deviations and range of a chunk of rows.
 *
 * Included by moments.c through simd/variants.h, once per working type and CPU variant. */
#include "kernels/simd/strip_body.h"

/* LANES columns of a chunk: first the sums as they grow, then what they come to. All of a group lies together, since
 * arrays of their own, a power of two apart, would push each other out of the first-level cache. */
typedef union VNAME(group) {
    struct {
        real shift[LANES], low[LANES], high[LANES];
        double sum[LANES], squares[LANES]; /* of x - shift */
    } running;
    struct {
        double mean[LANES], m2[LANES], low[LANES], high[LANES];
    } result;
} VNAME(group);

/* Adds `count` <= LNS_ROW_BLOCK rows to the first lanes of a group; the elements of its first column lie at at[r]. Sums
 * of the rows are in the working type, sums of those in double. */
static LNS_INLINE void VNAME(add_rows)(const void *x, lns_dtype dtype, const int64_t *at, int64_t count, int64_t lanes,
                                       VNAME(group) * group)
{
    real sums[LANES] = {0}, squares[LANES] = {0};
    if (count == LNS_ROW_BLOCK && lanes == LANES) {
        for (int k = 0; k < LANES; k += VEC_LANES) {
            const VNAME(reals) shift = VNAME(reals_load)(group->running.shift + k);
            VNAME(reals) low = VNAME(reals_load)(group->running.low + k);
            VNAME(reals) high = VNAME(reals_load)(group->running.high + k), sum = {0}, square = {0};
            for (int r = 0; r < LNS_ROW_BLOCK; r++) {
                const VNAME(reals) v = VNAME(reals_at)(x, dtype, at[r] + k), shifted = v - shift;
                low = VNAME(reals_min)(v, low);
                high = VNAME(reals_max)(v, high);
                sum += shifted;
                square += shifted * shifted;
            }
            VNAME(reals_store)(group->running.low + k, low);
            VNAME(reals_store)(group->running.high + k, high);
            VNAME(reals_store)(sums + k, sum);
            VNAME(reals_store)(squares + k, square);
        }
    } else {
        for (int64_t l = 0; l < lanes; l++) {
            for (int64_t r = 0; r < count; r++) {
                const real v = (real)lns_value(x, dtype, at[r] + l), shifted = v - group->running.shift[l];
                group->running.low[l] = v < group->running.low[l] ? v : group->running.low[l];
                group->running.high[l] = v > group->running.high[l] ? v : group->running.high[l];
                sums[l] += shifted;
                squares[l] += shifted * shifted;
            }
        }
    }
    for (int l = 0; l < LANES; l++) {
        group->running.sum[l] += (double)sums[l];
        group->running.squares[l] += (double)squares[l];
    }
}

/* Adds the rows [begin, end) of the sample to the groups of all columns. Asks for the block of rows after the one that
 * it reads: rows are so long that the processor sees many short streams, and by itself is late for each. */
static LNS_INLINE void VNAME(add_range_as)(const lns_sample *s, lns_dtype dtype, int64_t begin, int64_t end,
                                           VNAME(group) * groups)
{
    for (int64_t i = begin; i < end; i += LNS_ROW_BLOCK) {
        const int64_t count = end - i < LNS_ROW_BLOCK ? end - i : LNS_ROW_BLOCK;
        const int64_t ahead = end - i < 2 * LNS_ROW_BLOCK ? 0 : LNS_ROW_BLOCK * s->d;
        int64_t at[LNS_ROW_BLOCK];
        for (int64_t r = 0; r < LNS_ROW_BLOCK; r++) {
            at[r] = (i + r) * s->d;
        }
        for (int64_t j = 0; j < s->d; j += LANES) {
            for (int r = 0; ahead > 0 && r < LNS_ROW_BLOCK; r++) {
                __builtin_prefetch(lns_element(s->data, dtype, at[r] + ahead));
            }
            VNAME(add_rows)(s->data, dtype, at, count, s->d - j < LANES ? s->d - j : LANES, &groups[j / LANES]);
            for (int r = 0; r < LNS_ROW_BLOCK; r++) {
                at[r] += LANES;
            }
        }
    }
}

static void VNAME(add_range)(const lns_sample *s, int64_t begin, int64_t end, VNAME(group) * groups)
{
    LNS_CALL_WITH_DTYPE(VNAME(add_range_as), s, s->dtype, begin, end, groups);
}

/* Mean and squared deviations of a column whose sums have left the range of a double, scaled so that they cannot; where
 * the squared deviations themselves are out of range, infinity. Low and high are known. */
static void VNAME(moments_near_range)(const lns_sample *s, int64_t begin, int64_t end, int64_t column, double low,
                                      double high, double *mean, double *m2)
{
    enum { SCALE = 600 };
    const double down = ldexp(1, -SCALE), first = down * lns_value(s->data, s->dtype, begin * s->d + column);
    const double rows = (double)(end - begin);
    double sum = 0, squares = 0;
    for (int64_t i = begin; i < end; i++) {
        const double shifted = down * lns_value(s->data, s->dtype, i * s->d + column) - first;
        sum += shifted;
        squares += shifted * shifted;
    }
    *mean = ldexp(first + sum / rows, SCALE);
    *mean = *mean < low ? low : *mean > high ? high : *mean; /* rounding must not leave the range either */
    *m2 = ldexp(squares - sum * (sum / rows), 2 * SCALE);
}

/* Statistics of up to LNS_STRIP columns from `at` on, from sums in double around the first row. */
static void VNAME(moments_exactly)(const lns_sample *s, int64_t begin, int64_t end, int64_t at, int64_t count,
                                   VNAME(group) * groups)
{
    real buffer[LNS_STRIP], low[LNS_STRIP], high[LNS_STRIP], first[LNS_STRIP];
    double sum[LNS_STRIP] = {0}, squares[LNS_STRIP] = {0};
    const double rows = (double)(end - begin);
    const real *x = VNAME(strip)(s->data, s->dtype, begin * s->d + at, count, buffer);
    for (int64_t l = 0; l < count; l++) {
        first[l] = low[l] = high[l] = x[l];
    }
    for (int64_t i = begin; i < end; i++) {
        x = VNAME(strip)(s->data, s->dtype, i * s->d + at, count, buffer);
        for (int64_t l = 0; l < count; l++) {
            const double shifted = (double)x[l] - (double)first[l];
            sum[l] += shifted;
            squares[l] += shifted * shifted;
            low[l] = x[l] < low[l] ? x[l] : low[l];
            high[l] = x[l] > high[l] ? x[l] : high[l];
        }
    }
    for (int64_t l = 0; l < count; l++) {
        VNAME(group) *group = groups + (at + l) / LANES;
        double m2 = squares[l] - sum[l] * sum[l] / rows, mean = (double)first[l] + sum[l] / rows;
        if (REAL_IS_DOUBLE && !(isfinite(m2) && isfinite(mean))) {
            VNAME(moments_near_range)(s, begin, end, at + l, (double)low[l], (double)high[l], &mean, &m2);
        }
        group->result.mean[l % LANES] = mean;
        group->result.m2[l % LANES] = m2 > 0 || m2 != m2 ? m2 : 0;
        group->result.low[l % LANES] = (double)low[l];
        group->result.high[l % LANES] = (double)high[l];
    }
}

/* The same from the sums of a group; 0 where these cannot tell: sums or squares have left the range of the working
 * type, or the mean lies so far from the shift that they cancel. */
static int VNAME(moments_from_sums)(VNAME(group) * group, int64_t lanes, double rows)
{
    const VNAME(group) sums = *group;
    for (int64_t l = 0; l < lanes; l++) {
        const double mean = sums.running.sum[l] / rows, squares = sums.running.squares[l];
        const double m2 = squares - sums.running.sum[l] * mean;
        const int constant = sums.running.low[l] == sums.running.high[l] && isfinite(m2);
        if (!constant && !(m2 > 0x1p-90 && m2 < INFINITY && m2 > squares / 4)) {
            return 0;
        }
        group->result.mean[l] = (double)sums.running.shift[l] + mean;
        group->result.m2[l] = constant || !(m2 > 0) ? 0 : m2;
        group->result.low[l] = (double)sums.running.low[l];
        group->result.high[l] = (double)sums.running.high[l];
    }
    return 1;
}

/* A chunk of many rows: sums around the mean of its first rows, so that a large mean costs no digits. */
static void VNAME(moments_chunk)(const lns_sample *s, int64_t begin, int64_t end, VNAME(group) * groups)
{
    const int64_t count = (s->d + LANES - 1) / LANES;
    for (int64_t g = 0; g < count; g++) {
        for (int l = 0; l < LANES; l++) {
            groups[g].running.shift[l] = 0;
            groups[g].running.low[l] = (real)INFINITY;
            groups[g].running.high[l] = (real)-INFINITY;
            groups[g].running.sum[l] = groups[g].running.squares[l] = 0;
        }
    }
    VNAME(add_range)(s, begin, begin + LNS_FOLD, groups);
    for (int64_t g = 0; g < count; g++) {
        for (int l = 0; l < LANES; l++) {
            groups[g].running.shift[l] = (real)(groups[g].running.sum[l] / LNS_FOLD);
            groups[g].running.sum[l] = groups[g].running.squares[l] = 0;
        }
    }
    VNAME(add_range)(s, begin, end, groups);
    for (int64_t g = 0; g < count; g++) {
        const int64_t at = g * LANES, lanes = s->d - at < LANES ? s->d - at : LANES;
        if (!VNAME(moments_from_sums)(&groups[g], lanes, (double)(end - begin))) {
            VNAME(moments_exactly)(s, begin, end, at, lanes, groups);
        }
    }
}

static void VNAME(moments_units)(void *context, int64_t begin, int64_t end, int thread)
{
    moments_context *c = context;
    const lns_sample *s = c->sample;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t first = chunk * c->chunk_rows;
        const int64_t last = first + c->chunk_rows < s->n ? first + c->chunk_rows : s->n;
        VNAME(group) *groups = (VNAME(group) *)(void *)((char *)c->work + chunk * c->chunk_bytes);
        if (last - first >= LEAST_ROWS) {
            VNAME(moments_chunk)(s, first, last, groups);
        } else {
            for (int64_t at = 0; at < s->d; at += LNS_STRIP) {
                const int64_t count = s->d - at < LNS_STRIP ? s->d - at : LNS_STRIP;
                VNAME(moments_exactly)(s, first, last, at, count, groups);
            }
        }
        for (int64_t j = 0; j < s->d; j++) {
            c->bad[thread] |= !isfinite(groups[j / LANES].result.mean[j % LANES]);
        }
    }
}

/* Merges the chunks into the state, in their order. */
static void VNAME(merge_chunks)(const moments_context *c, int64_t chunks, lns_moments *state)
{
    const lns_sample *s = c->sample;
    for (int64_t at = 0; at < s->d; at += LANES) {
        lns_moments sum = {state->count, state->mean + at, state->m2 + at, state->low + at, state->high + at};
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int64_t first = chunk * c->chunk_rows;
            const int64_t rows = s->n - first < c->chunk_rows ? s->n - first : c->chunk_rows;
            VNAME(group) *groups = (VNAME(group) *)(void *)((char *)c->work + chunk * c->chunk_bytes);
            VNAME(group) *group = groups + at / LANES;
            const lns_moments part = {rows, group->result.mean, group->result.m2, group->result.low,
                                      group->result.high};
            (REAL_IS_DOUBLE ? merge_far_columns : merge_columns)(&sum, &part, s->d - at < LANES ? s->d - at : LANES);
            sum.count += rows;
        }
    }
    state->count += s->n;
}
