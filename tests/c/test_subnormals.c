/* Subnormal numbers keep their value where the caller has told the processor to take them for zero. */
#include "check.h"

#include "core/subnormals.h"

enum { N = 40, D = 37 };

static const lns_dtype TYPES[] = {LNS_F32, LNS_F64, LNS_F16, LNS_BF16};
static const int64_t SIZES[] = {4, 8, 2, 2};

/* Subnormals of both signs, and a 1 in each row; by their bits, since arithmetic may be off. */
static void *subnormals(int type)
{
    static const uint64_t one[] = {0x3f800000, 0x3ff0000000000000, 0x3c00, 0x3f80}, mantissa[] = {23, 52, 10, 7};
    char *x = memory(N * D * SIZES[type]);
    for (uint64_t i = 0; i < N * D; i++) {
        const uint64_t sign = (i % 3 == 0 ? UINT64_C(1) : 0) << (8 * SIZES[type] - 1);
        const uint64_t bits = i % D == 5 ? one[type] : (1 + i * 7919 % ((UINT64_C(1) << mantissa[type]) - 1)) | sign;
        memcpy(x + i * (uint64_t)SIZES[type], &bits, (size_t)SIZES[type]); /* little end first */
    }
    return x;
}

static void run(int type, void *const *out)
{
    const int64_t real = type == 1 ? 8 : 4;
    const lns_dtype real_type = type == 1 ? LNS_F64 : LNS_F32;
    void *x = subnormals(type), *weight = memory(D * real), *bias = memory(D * real);
    const lns_sample sample = {x, TYPES[type], N, D, NULL};
    double *state = out[3], *mean = out[5];
    lns_moments moments = {0, state, state + D, state + 2 * D, state + 3 * D};
    void *work[] = {memory(lns_affine_worksize(N, D, 1)), memory(lns_sort_worksize(&sample, 1, 3)),
                    memory(lns_moments_worksize(N, D)), memory(lns_covariance_worksize(N, D))};
    memset(bias, 0, (size_t)(D * real));
    memset(state, 0, 4 * D * sizeof *state);
    for (int j = 0; j < D; j++) {
        const float one = 1;
        const double wide = 1;
        memcpy((char *)weight + j * real, real == 8 ? (const void *)&wide : (const void *)&one, (size_t)real);
        state[3 * D + j] = -INFINITY;
        state[2 * D + j] = INFINITY;
    }
    CHECK(lns_affine(x, TYPES[type], N, D, 1, weight, bias, 1, 3, work[0], out[0]) == LNS_OK);
    CHECK(memcmp(out[0], x, (size_t)(N * D * SIZES[type])) == 0);
    CHECK(lns_sort(&sample, 1, 3, work[1], out + 1, NULL) == LNS_OK);
    CHECK(lns_pool(x, TYPES[type], 4, N / 4, D, NULL, LNS_POOL_MEAN, 3, out[2], NULL, NULL) == LNS_OK);
    CHECK(lns_moments_update(&sample, 3, work[2], &moments, NULL) == LNS_OK);
    CHECK(lns_prox(out[1], real_type, N * D, 1, 0, 1e-3, out[4]) == LNS_OK);
    CHECK(lns_covariance(&sample, work[3], mean, mean + D, NULL) == LNS_OK);
    free(x);
    free(weight);
    free(bias);
    for (int k = 0; k < 4; k++) {
        free(work[k]);
    }
}

void test_subnormals(void)
{
    const uint64_t before = lns_float_mode();
    if (LNS_FLUSH_BITS == 0) {
        return;
    }
    for (int type = 0; type < 4; type++) {
        const int64_t sizes[6] = {N * D * 8, N * D * 8, N * D * 8, 4 * D * 8, N * D * 8, (D + D * D) * 8};
        void *usual[6], *flushed[6];
        for (int k = 0; k < 6; k++) {
            usual[k] = memset(memory(sizes[k]), 0, (size_t)sizes[k]);
            flushed[k] = memset(memory(sizes[k]), 0, (size_t)sizes[k]);
        }
        run(type, usual);
        lns_set_float_mode(before | LNS_FLUSH_BITS);
        run(type, flushed);
        const uint64_t after = lns_float_mode();
        lns_set_float_mode(before);
        CHECK((after & LNS_FLUSH_BITS) == LNS_FLUSH_BITS);
        for (int k = 0; k < 6; k++) {
            CHECK(memcmp(usual[k], flushed[k], (size_t)sizes[k]) == 0);
            free(usual[k]);
            free(flushed[k]);
        }
    }
}
