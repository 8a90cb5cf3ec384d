/* Template body: pooling over the tokens of one sequence, a strip of columns at a time. */
#include "kernels/strip_body.h"

static inline int VNAME(kept)(const pool_context *c, int64_t row, int64_t token)
{
    return c->mask == NULL || c->mask[row * c->tokens + token] != 0;
}

static void VNAME(pool_mean)(const pool_context *c, int64_t row, int64_t at, int64_t count)
{
    real buffer[LNS_STRIP], part[LNS_STRIP] = {0}, *out = (real *)c->out + row * c->d + at;
    double total[LNS_STRIP] = {0};
    int64_t kept = 0;
    for (int64_t t = 0; t < c->tokens; t++) {
        if (!VNAME(kept)(c, row, t)) {
            continue;
        }
        const real *x = VNAME(strip)(c->x, c->dtype, (row * c->tokens + t) * c->d + at, count, buffer);
        for (int64_t l = 0; l < count; l++) {
            part[l] += x[l];
        }
        if (++kept % LNS_FOLD == 0) {
            for (int64_t l = 0; l < count; l++) {
                total[l] += (double)part[l];
                part[l] = 0;
            }
        }
    }
    for (int64_t l = 0; l < count; l++) {
        out[l] = (real)((total[l] + (double)part[l]) / (double)kept);
    }
}

/* Smallest or largest value and its first token; a NaN wins and stays. */
static void VNAME(pool_extreme)(const pool_context *c, int64_t row, int64_t at, int64_t count)
{
    real buffer[LNS_STRIP], *out = (real *)c->out + row * c->d + at;
    int32_t *index = c->index + row * c->d + at;
    const int smallest = c->mode == LNS_POOL_MIN;
    int first = 1;
    for (int64_t t = 0; t < c->tokens; t++) {
        if (!VNAME(kept)(c, row, t)) {
            continue;
        }
        const real *x = VNAME(strip)(c->x, c->dtype, (row * c->tokens + t) * c->d + at, count, buffer);
        for (int64_t l = 0; l < count; l++) {
            const int better = smallest ? !(x[l] >= out[l]) : !(x[l] <= out[l]);
            if (first || (better && out[l] == out[l])) {
                out[l] = x[l];
                index[l] = (int32_t)t;
            }
        }
        first = 0;
    }
}

static void VNAME(pool_last)(const pool_context *c, int64_t row, int64_t at, int64_t count)
{
    real buffer[LNS_STRIP];
    int64_t t = c->tokens - 1;
    while (!VNAME(kept)(c, row, t)) {
        t--;
    }
    const real *x = VNAME(strip)(c->x, c->dtype, (row * c->tokens + t) * c->d + at, count, buffer);
    memcpy((real *)c->out + row * c->d + at, x, (size_t)count * sizeof(real));
}

static void VNAME(pool_all)(const pool_context *c, int64_t row, int64_t at, int64_t count)
{
    real buffer[LNS_STRIP];
    int64_t to = kept_before(c, row);
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
    (void)thread;
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t strips = (c->d + LNS_STRIP - 1) / LNS_STRIP;
        const int64_t row = unit / strips, at = unit % strips * LNS_STRIP;
        const int64_t count = c->d - at < LNS_STRIP ? c->d - at : LNS_STRIP;
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
            VNAME(pool_all)(c, row, at, count);
            break;
        }
    }
}

/* One sequence of the gradient: c->out is grad_x, c->x the gradient of the pooled rows. */
static void VNAME(unpool_units)(void *context, int64_t begin, int64_t end, int thread)
{
    const pool_context *c = context;
    (void)thread;
    for (int64_t row = begin; row < end; row++) {
        real *grad_x = (real *)c->out + row * c->tokens * c->d;
        const real *g = (const real *)c->x + (c->mode == LNS_POOL_ALL ? kept_before(c, row) : row) * c->d;
        const real share = (real)(1 / (double)kept_in(c, row));
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
