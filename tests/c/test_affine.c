#include "check.h"

static void forward(void)
{
    enum { OUTER = 3, D = 515, INNER = 2, COUNT = OUTER * D * INNER };
    float *z = normal_f32(COUNT, 1), *out = memory(COUNT * 4), *w = normal_f32(D, 2), *b = normal_f32(D, 3);
    int wrong = 0;
    w[7] = 1;
    b[7] = 0;
    for (int inner = 1; inner <= INNER; inner++) {
        void *work = memory(lns_affine_worksize(OUTER, D, inner));
        CHECK(lns_affine(z, LNS_F32, OUTER, D, inner, w, b, 0.37, 2, work, out) == LNS_OK);
        for (int i = 0; i < OUTER * D * inner; i++) {
            const int j = i / inner % D;
            const double exact = z[i] + 0.37 * ((double)w[j] * z[i] + b[j] - z[i]);
            wrong += fabs(exact - out[i]) > 1e-6 * (1 + fabs(exact));
            wrong += j == 7 && out[i] != z[i]; /* a neuron that is off stays as it is, to the bit */
        }
        CHECK(lns_affine(z, LNS_F32, OUTER, D, inner, w, b, 0, 2, work, out) == LNS_OK);
        wrong += memcmp(z, out, (size_t)(OUTER * D * inner) * 4) != 0;
        free(work);
    }
    CHECK(wrong == 0);
    free(z);
    free(out);
    free(w);
    free(b);
}

static void backward(void)
{
    enum { OUTER = 70, D = 9 };
    double *z = normal_f64(OUTER * D, 1), *g = normal_f64(OUTER * D, 2), *w = normal_f64(D, 3), *grad_z;
    double grad_weight[D], grad_bias[D];
    void *work = memory(lns_affine_worksize(OUTER, D, 1));
    grad_z = memory(OUTER * D * 8);
    CHECK(lns_affine_backward(z, LNS_F64, OUTER, D, 1, w, 0.5, g, 2, work, grad_z, grad_weight, grad_bias) == LNS_OK);
    for (int j = 0; j < D; j++) {
        double gz = 0, sum = 0;
        for (int i = 0; i < OUTER; i++) {
            gz += g[i * D + j] * z[i * D + j];
            sum += g[i * D + j];
            CHECK_NEAR(grad_z[i * D + j], g[i * D + j] * (0.5 + 0.5 * w[j]), 1e-14);
        }
        CHECK_NEAR(grad_weight[j], 0.5 * gz, 1e-12);
        CHECK_NEAR(grad_bias[j], 0.5 * sum, 1e-12);
    }
    free(z);
    free(g);
    free(w);
    free(grad_z);
    free(work);
}

/* float16 and bfloat16 bits of 1, -2, the largest float16, the smallest subnormal, infinity. */
static void half_precision(void)
{
    const uint16_t f16[5] = {0x3c00, 0xc000, 0x7bff, 0x0001, 0x7c00},
                   bf16[5] = {0x3f80, 0xc000, 0x4780, 0x0001, 0x7f80};
    const float w[1] = {2}, b[1] = {0};
    const uint16_t twice_f16[5] = {0x4000, 0xc400, 0x7c00, 0x0002, 0x7c00};
    const uint16_t twice_bf16[5] = {0x4000, 0xc080, 0x4800, 0x0002, 0x7f80};
    uint16_t out[5];
    void *work = memory(lns_affine_worksize(5, 1, 1));
    CHECK(lns_affine(f16, LNS_F16, 5, 1, 1, w, b, 1, 1, work, out) == LNS_OK);
    CHECK(memcmp(out, twice_f16, sizeof out) == 0);
    CHECK(lns_affine(bf16, LNS_BF16, 5, 1, 1, w, b, 1, 1, work, out) == LNS_OK);
    CHECK(memcmp(out, twice_bf16, sizeof out) == 0);
    free(work);
}

void test_affine(void)
{
    forward();
    backward();
    half_precision();
    CHECK(lns_affine_worksize(1, 0, 1) == -1);
    CHECK(lns_affine_worksize(INT64_MAX, 2, 2) == -1);
    CHECK(lns_affine_worksize(1, INT64_C(1) << 59, 1) == -1);
}
