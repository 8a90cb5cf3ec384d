/* Masked pooling over tokens. Rows that the mask drops are never read. */
#include "lineas.h"

#include <math.h>

#include "core/sizes.h"
#include "core/threads.h"
#include "kernels/simd/blocks.h"
#include "kernels/simd/load.h"

/* Columns of a sequence that are pooled at once: long pieces of a row, since rows are far apart. */
#define POOL_STRIP 2048

typedef struct pool_context {
    const void *x;
    lns_dtype dtype;
    int64_t batch, tokens, d;
    const uint8_t *mask;
    lns_pooling mode;
    void *out;
    int32_t *index;
} pool_context;

static int64_t kept_in(const pool_context *c, int64_t row)
{
    int64_t kept = 0;
    for (int64_t t = 0; t < c->tokens; t++) {
        kept += c->mask == NULL || c->mask[row * c->tokens + t] != 0;
    }
    return kept;
}

/* Real tokens of all rows before this one: where its rows stand in LNS_POOL_ALL's result. It reads the whole mask
 * before the row: a thread asks once, and counts on from there. */
static int64_t kept_before(const pool_context *c, int64_t row)
{
    int64_t kept = 0;
    for (int64_t r = 0; r < row; r++) {
        kept += kept_in(c, r);
    }
    return kept;
}

#define LNS_BODY "kernels/pool_body.h"
#include "kernels/simd/variants.h"

static const lns_loop_body POOL[LNS_CPU_COUNT][2] = LNS_TABLE(pool_units);
static const lns_loop_body UNPOOL[LNS_CPU_COUNT][2] = LNS_TABLE(unpool_units);

static lns_status check(const pool_context *c, const int32_t *index, lns_place *place)
{
    const int extreme = c->mode == LNS_POOL_MIN || c->mode == LNS_POOL_MAX;
    if (!lns_is_dtype(c->dtype) || (unsigned)c->mode > (unsigned)LNS_POOL_ALL ||
        (extreme && index == NULL && c->batch > 0)) {
        return LNS_BAD_TYPE;
    }
    if (c->batch < 0 || c->tokens < 0 || c->d < 1 || c->tokens > INT32_MAX ||
        lns_mul(lns_mul(lns_mul(c->batch, c->tokens), c->d), 8) < 0) {
        return LNS_BAD_SIZE;
    }
    for (int64_t row = 0; c->mode != LNS_POOL_ALL && row < c->batch; row++) {
        if (kept_in(c, row) == 0) {
            if (place != NULL) {
                *place = (lns_place){.row = row};
            }
            return LNS_EMPTY_ROW;
        }
    }
    return LNS_OK;
}

lns_status lns_pool(const void *x, lns_dtype dtype, int64_t batch, int64_t tokens, int64_t d, const uint8_t *mask,
                    lns_pooling mode, int threads, void *out, int32_t *index, lns_place *place)
{
    pool_context c = {x, dtype, batch, tokens, d, mask, mode, out, index};
    const lns_status status = check(&c, index, place);
    if (status != LNS_OK) {
        return status;
    }
    const int64_t units = batch * ((d + POOL_STRIP - 1) / POOL_STRIP);
    lns_parallel_for(units, lns_thread_count(units, batch * tokens * d / 8, threads),
                     POOL[lns_cpu()][lns_is_double(dtype)], &c);
    return LNS_OK;
}

lns_status lns_pool_backward(const void *grad_out, lns_dtype dtype, int64_t batch, int64_t tokens, int64_t d,
                             const uint8_t *mask, lns_pooling mode, const int32_t *index, int threads, void *grad_x,
                             lns_place *place)
{
    pool_context c = {grad_out, dtype, batch, tokens, d, mask, mode, grad_x, NULL};
    const lns_status status = lns_is_real(dtype) ? check(&c, index, place) : LNS_BAD_TYPE;
    if (status != LNS_OK) {
        return status;
    }
    if (mode == LNS_POOL_MIN || mode == LNS_POOL_MAX) {
        for (int64_t i = 0; i < batch * d; i++) {
            if (index[i] < 0 || index[i] >= tokens) {
                return LNS_BAD_SIZE;
            }
        }
        c.index = (int32_t *)(uintptr_t)index; /* read only in this direction */
    }
    lns_parallel_for(batch, lns_thread_count(batch, batch * tokens * d / 4, threads),
                     UNPOOL[lns_cpu()][lns_is_double(dtype)], &c);
    return LNS_OK;
}
