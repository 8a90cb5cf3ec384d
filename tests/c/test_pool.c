#include "check.h"

enum { BATCH = 2, TOKENS = 3, D = 600 };

static const uint8_t MASK[BATCH * TOKENS] = {0, 1, 1, 1, 1, 0};

static float *pooled(const float *x, lns_pooling mode, int32_t *index)
{
    float *out = memory((mode == LNS_POOL_ALL ? 4 : BATCH) * D * 4);
    CHECK(lns_pool(x, LNS_F32, BATCH, TOKENS, D, MASK, mode, 2, out, index, NULL) == LNS_OK);
    return out;
}

static void forward_and_backward(void)
{
    float *x = normal_f32(BATCH * TOKENS * D, 4), *grad = memory(BATCH * TOKENS * D * 4);
    int32_t *index = memory(BATCH * D * 4);
    float *mean = pooled(x, LNS_POOL_MEAN, NULL), *last = pooled(x, LNS_POOL_LAST, NULL);
    float *all = pooled(x, LNS_POOL_ALL, NULL), *low = pooled(x, LNS_POOL_MIN, index);
    int wrong = 0;
    for (int j = 0; j < D; j++) {
        const float a = x[D + j], b = x[2 * D + j], c = x[3 * D + j], d = x[4 * D + j];
        wrong += fabs(mean[j] - (a + b) / 2) > 1e-6 || fabs(mean[D + j] - (c + d) / 2) > 1e-6;
        wrong += last[j] != b || last[D + j] != d || all[j] != a || all[3 * D + j] != d;
        wrong += low[j] != fminf(a, b) || index[j] != (a <= b ? 1 : 2);
    }
    CHECK(lns_pool_backward(low, LNS_F32, BATCH, TOKENS, D, MASK, LNS_POOL_MIN, index, 2, grad, NULL) == LNS_OK);
    for (int j = 0; j < D; j++) {
        wrong += grad[j] != 0 || grad[index[j] * D + j] != low[j];
    }
    CHECK(lns_pool_backward(mean, LNS_F32, BATCH, TOKENS, D, MASK, LNS_POOL_MEAN, NULL, 2, grad, NULL) == LNS_OK);
    for (int j = 0; j < D; j++) {
        wrong += grad[j] != 0 || grad[D + j] != mean[j] / 2 || grad[5 * D + j] != 0;
    }
    CHECK(wrong == 0);
    index[3] = TOKENS;
    CHECK(lns_pool_backward(low, LNS_F32, BATCH, TOKENS, D, MASK, LNS_POOL_MIN, index, 1, grad, NULL) == LNS_BAD_SIZE);
    free(x);
    free(grad);
    free(index);
    free(mean);
    free(last);
    free(all);
    free(low);
}

void test_pool(void)
{
    const uint8_t empty[2] = {0, 0};
    const float x[2] = {1, 2};
    float out[1];
    lns_place place = {0};
    forward_and_backward();
    CHECK(lns_pool(x, LNS_F32, 1, 2, 1, empty, LNS_POOL_MEAN, 1, out, NULL, &place) == LNS_EMPTY_ROW);
    CHECK(place.row == 0);
}
