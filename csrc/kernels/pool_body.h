/* Template body: pooling over the tokens of one sequence, a strip of columns at a time.
 *
 * Included by pool.c through simd/variants.h, once per working type and CPU variant. */
#include "kernels/simd/strip_body.h"

static inline int VNAME(kept)(const pool_context *c, int64_t row, int64_t token)
{
    return c->mask == NULL || c->mask[row * c->tokens + token] != 0;
}

/* Adds the `width` <= LNS_STRIP columns from at[r] on of `count` <= LNS_ROW_BLOCK rows to the totals: their sum in the
 * working type, in double. */
static LNS_INLINE void VNAME(add_rows)(const void *x, lns_dtype dtype, const int64_t *at, int64_t count, int64_t width,
                                       double *restrict total)
{
    real sums[LNS_STRIP];
    int64_t l = 0;
    for (; count == LNS_ROW_BLOCK && l + VEC_LANES <= width; l += VEC_LANES) {
        VNAME(reals) sum = {0};
        for (int r = 0; r < LNS_ROW_BLOCK; r++) {
            sum += VNAME(reals_at)(x, dtype, at[r] + l);
        }
        VNAME(reals_store)(sums + l, sum);
    }
    for (; l + VEC_LANES <= width; l += VEC_LANES) {
        VNAME(reals) sum = {0};
        for (int64_t r = 0; r < count; r++) {
            sum += VNAME(reals_at)(x, dtype, at[r] + l);
        }
        VNAME(reals_store)(sums + l, sum);
    }
    for (; l < width; l++) {
        sums[l] = 0;
        for (int64_t r = 0; r < count; r++) {
            sums[l] += (real)lns_value(x, dtype, at[r] + l);
        }
    }
    for (l = 0; l < width; l++) {
        total[l] += (double)sums[l];
    }
}

/* The mean of a column whose sums have left the range of their type: in double, scaled so that they cannot. */
static double VNAME(mean_near_range)(const pool_context *c, int64_t row, int64_t column, int64_t kept)
{
    double total = 0, most = 0;
    for (int64_t t = 0; t < c->tokens; t++) {
        if (VNAME(kept)(c, row, t)) {
            const double x = lns_value(c->x, c->dtype, (row * c->tokens + t) * c->d + column);
            total += 0x1p-32 * x;
            most = fabs(x) > most ? fabs(x) : most;
        }
    }
    const double mean = 0x1p32 * (total / (double)kept);
    return fabs(mean) > most ? copysign(most, mean) : mean; /* rounding must not leave the range either */
}

static void VNAME(pool_mean)(const pool_context *c, int64_t row, int64_t at, int64_t count)
{
    real *out = (real *)c->out + row * c->d + at;
    double total[POOL_STRIP] = {0};
    int64_t kept = 0, t = 0;
    while (t < c->tokens) {
        int64_t rows[LNS_ROW_BLOCK], some = 0;
        for (; t < c->tokens && some < LNS_ROW_BLOCK; t++) {
            if (VNAME(kept)(c, row, t)) {
                rows[some++] = (row * c->tokens + t) * c->d + at;
            }
        }
        kept += some;
        for (int64_t from = 0; from < count; from += LNS_STRIP) {
            const int64_t width = count - from < LNS_STRIP ? count - from : LNS_STRIP;
            LNS_CALL_WITH_DTYPE(VNAME(add_rows), c->x, c->dtype, rows, some, width, total + from);
            for (int64_t r = 0; r < some; r++) {
                rows[r] += width;
            }
        }
    }
    int overflow = 0;
    for (int64_t l = 0; l < count; l++) {
        out[l] = (real)(total[l] / (double)kept);
        overflow |= !(total[l] - total[l] == 0);
    }
    for (int64_t l = 0; overflow && l < count; l++) {
        if (!(total[l] - total[l] == 0)) {
            out[l] = (real)VNAME(mean_near_range)(c, row, at + l, kept);
        }
    }
}

/* Smallest or largest value and its first token; a NaN wins and stays. */
static LNS_INLINE void VNAME(update_extreme)(const real *restrict x, int64_t count, int32_t token, int smallest,
                                             real *restrict best, int32_t *restrict index)
{
    for (int64_t l = 0; l < count; l++) {
        const int wins = (smallest ? !(x[l] >= best[l]) : !(x[l] <= best[l])) & (best[l] == best[l]);
        best[l] = wins ? x[l] : best[l];
        index[l] = wins ? token : index[l];
    }
}

static void VNAME(pool_extreme)(const pool_context *c, int64_t row, int64_t at, int64_t count)
{
    real buffer[POOL_STRIP], *out = (real *)c->out + row * c->d + at;
    int32_t *index = c->index + row * c->d + at;
    int first = 1;
    for (int64_t t = 0; t < c->tokens; t++) {
        if (!VNAME(kept)(c, row, t)) {
            continue;
        }
        const real *x = VNAME(strip)(c->x, c->dtype, (row * c->tokens + t) * c->d + at, count, buffer);
        if (first) {
            memcpy(out, x, (size_t)count * sizeof(real));
            for (int64_t l = 0; l < count; l++) {
                index[l] = (int32_t)t;
            }
            first = 0;
        } else if (c->mode == LNS_POOL_MIN) {
            VNAME(update_extreme)(x, count, (int32_t)t, 1, out, index);
        } else {
            VNAME(update_extreme)(x, count, (int32_t)t, 0, out, index);
        }
    }
}

static void VNAME(pool_last)(const pool_context *c, int64_t row, int64_t at, int64_t count)
{
    real buffer[POOL_STRIP];
    int64_t t = c->tokens - 1;
    while (!VNAME(kept)(c, row, t)) {
        t--;
    }
    const real *x = VNAME(strip)(c->x, c->dtype, (row * c->tokens + t) * c->d + at, count, buffer);
    memcpy((real *)c->out + row * c->d + at, x, (size_t)count * sizeof(real));
}

/* The kept tokens become the rows of the result from `to` on. */
static void VNAME(pool_all)(const pool_context *c, int64_t row, int64_t at, int64_t count, int64_t to)
{
    real buffer[POOL_STRIP];
    for (int64_t t = 0; t < c->tokens; t++) {
        if (VNAME(kept)(c, row, t)) {
            const real *x = VNAME(strip)(c->x, c->dtype, (row * c->tokens + t) * c->d + at, count, buffer);
            memcpy((real *)c->out + to++ * c->d + at, x, (size_t)count * sizeof(real));
        }
    }
}

static void VNAME(pool_units)(void *context, int64_t begin, int64_t end, int thread)
{
    const pool_context *c = context;
    const int64_t strips = (c->d + POOL_STRIP - 1) / POOL_STRIP;
    int64_t before = c->mode == LNS_POOL_ALL ? kept_before(c, begin / strips) : 0;
    (void)thread;
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t row = unit / strips, at = unit % strips * POOL_STRIP;
        const int64_t count = c->d - at < POOL_STRIP ? c->d - at : POOL_STRIP;
        switch (c->mode) {
        case LNS_POOL_MEAN:
            VNAME(pool_mean)(c, row, at, count);
            break;
        case LNS_POOL_MIN:
        case LNS_POOL_MAX:
            VNAME(pool_extreme)(c, row, at, count);
            break;
        case LNS_POOL_LAST:
            VNAME(pool_last)(c, row, at, count);
            break;
        case LNS_POOL_ALL:
            VNAME(pool_all)(c, row, at, count, before);
            before += unit % strips == strips - 1 ? kept_in(c, row) : 0;
            break;
        }
    }
}

/* One sequence of the gradient: c->out is grad_x, c->x the gradient of the pooled rows. */
static void VNAME(unpool_units)(void *context, int64_t begin, int64_t end, int thread)
{
    const pool_context *c = context;
    int64_t from = c->mode == LNS_POOL_ALL ? kept_before(c, begin) : begin;
    (void)thread;
    for (int64_t row = begin; row < end; row++) {
        real *grad_x = (real *)c->out + row * c->tokens * c->d;
        const real *g = (const real *)c->x + from * c->d;
        const int64_t kept = kept_in(c, row);
        const real share = (real)(1 / (double)kept);
        from += c->mode == LNS_POOL_ALL ? kept : 1;
        memset(grad_x, 0, (size_t)(c->tokens * c->d) * sizeof(real));
        if (c->mode == LNS_POOL_MIN || c->mode == LNS_POOL_MAX) {
            for (int64_t j = 0; j < c->d; j++) {
                grad_x[c->index[row * c->d + j] * c->d + j] = g[j];
            }
            continue;
        }
        for (int64_t t = c->tokens - 1; t >= 0; t--) {
            if (c->mode == LNS_POOL_LAST && VNAME(kept)(c, row, t)) {
                memcpy(grad_x + t * c->d, g, (size_t)c->d * sizeof(real));
                break;
            }
        }
        for (int64_t t = 0; c->mode != LNS_POOL_LAST && t < c->tokens; t++) {
            if (!VNAME(kept)(c, row, t)) {
                continue;
            }
            if (c->mode == LNS_POOL_ALL) {
                memcpy(grad_x + t * c->d, g, (size_t)c->d * sizeof(real));
                g += c->d;
                continue;
            }
            for (int64_t j = 0; j < c->d; j++) {
                grad_x[t * c->d + j] = share * g[j];
            }
        }
    }
}
