/* z -> weight * z + bias at a strength, and its gradients. */
#include "lineas.h"

#include "core/sizes.h"
#include "core/subnormals.h"
#include "core/threads.h"
#include "kernels/simd/blocks.h"
#include "kernels/simd/load.h"

typedef struct affine_context {
    const void *z, *grad_out;
    lns_dtype dtype;
    int64_t outer, d, inner;
    const void *weight, *bias; /* bias NULL: backward */
    double strength;
    void *scale;  /* [2, d] real: scales, then shifts */
    double *sums; /* [chunks, 2, d] */
    int64_t chunk_rows;
    void *out;
} affine_context;

#define LNS_BODY "kernels/affine_body.h"
#include "kernels/simd/variants.h"

static void (*const PREPARE[LNS_CPU_COUNT][2])(const affine_context *) = LNS_TABLE(prepare);
static const lns_loop_body APPLY[LNS_CPU_COUNT][2] = LNS_TABLE(affine_units);
static const lns_loop_body GRAD_Z[LNS_CPU_COUNT][2] = LNS_TABLE(grad_z_units);
static const lns_loop_body SUM[LNS_CPU_COUNT][2] = LNS_TABLE(sum_units);
static void (*const ADD_CHUNKS[LNS_CPU_COUNT][2])(const affine_context *, int64_t, void *,
                                                  void *) = LNS_TABLE(add_chunks);

static int bad_sizes(int64_t outer, int64_t d, int64_t inner)
{
    return outer < 0 || d < 1 || inner < 0 || lns_mul(lns_mul(lns_mul(outer, d), inner), 8) < 0;
}

int64_t lns_affine_worksize(int64_t outer, int64_t d, int64_t inner)
{
    if (bad_sizes(outer, d, inner)) {
        return -1;
    }
    const int64_t rows = lns_chunk_rows(outer, LNS_FOLD), chunks = (outer + rows - 1) / rows;
    return lns_mul(lns_mul(d, 16), chunks + 1) < 0 ? -1 : lns_pad(16 * d) + 16 * d * chunks;
}

lns_status lns_affine(const void *z, lns_dtype dtype, int64_t outer, int64_t d, int64_t inner, const void *weight,
                      const void *bias, double strength, int threads, void *work, void *out)
{
    LNS_KEEP_SUBNORMALS;
    const int is_double = lns_is_double(dtype);
    affine_context c = {.z = z,
                        .dtype = dtype,
                        .outer = outer,
                        .d = d,
                        .inner = inner,
                        .weight = weight,
                        .bias = bias,
                        .strength = strength,
                        .scale = work,
                        .out = out};
    if (bad_sizes(outer, d, inner)) {
        return LNS_BAD_SIZE;
    }
    if (!lns_is_dtype(dtype)) {
        return LNS_BAD_TYPE;
    }
    const int64_t units = inner == 1 ? outer : outer * d;
    PREPARE[lns_cpu()][is_double](&c);
    lns_parallel_for(units, lns_thread_count(units, outer * d * inner / 4, threads), APPLY[lns_cpu()][is_double], &c);
    return LNS_OK;
}

lns_status lns_affine_backward(const void *z, lns_dtype dtype, int64_t outer, int64_t d, int64_t inner,
                               const void *weight, double strength, const void *grad_out, int threads, void *work,
                               void *grad_z, void *grad_weight, void *grad_bias)
{
    LNS_KEEP_SUBNORMALS;
    const int is_double = lns_is_double(dtype);
    affine_context c = {.z = z,
                        .grad_out = grad_out,
                        .dtype = dtype,
                        .outer = outer,
                        .d = d,
                        .inner = inner,
                        .weight = weight,
                        .strength = strength,
                        .scale = work,
                        .out = grad_z};
    if (bad_sizes(outer, d, inner)) {
        return LNS_BAD_SIZE;
    }
    if (!lns_is_dtype(dtype)) {
        return LNS_BAD_TYPE;
    }
    const int64_t units = inner == 1 ? outer : outer * d, cost = outer * d * inner / 4;
    c.sums = (double *)(void *)((char *)work + lns_pad(d * 16));
    c.chunk_rows = lns_chunk_rows(outer, LNS_FOLD);
    const int64_t chunks = (outer + c.chunk_rows - 1) / c.chunk_rows;
    if (grad_z != NULL) {
        PREPARE[lns_cpu()][is_double](&c);
        lns_parallel_for(units, lns_thread_count(units, cost, threads), GRAD_Z[lns_cpu()][is_double], &c);
    }
    lns_parallel_for(chunks, lns_thread_count(chunks, cost, threads), SUM[lns_cpu()][is_double], &c);
    ADD_CHUNKS[lns_cpu()][is_double](&c, chunks, grad_weight, grad_bias);
    return LNS_OK;
}
