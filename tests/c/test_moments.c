#include "check.h"

enum { D = 517 };

static lns_moments start(void)
{
    lns_moments state = {0, memory(D * 8), memory(D * 8), memory(D * 8), memory(D * 8)};
    for (int j = 0; j < D; j++) {
        state.mean[j] = state.m2[j] = 0;
        state.low[j] = INFINITY;
        state.high[j] = -INFINITY;
    }
    return state;
}

static void release(lns_moments *state)
{
    free(state->mean);
    free(state->m2);
    free(state->low);
    free(state->high);
}

static void update(const float *x, int64_t n, int threads, lns_moments *state)
{
    const lns_sample sample = {x, LNS_F32, n, D, NULL};
    void *work = memory(lns_moments_worksize(n, D));
    CHECK(lns_moments_update(&sample, threads, work, state, NULL) == LNS_OK);
    free(work);
}

void test_moments(void)
{
    enum { N = 1000, CUT = 300 };
    float *x = normal_f32(N * D, 11);
    lns_moments whole = start(), parts = start(), rest = start();
    update(x, N, 1, &whole);
    update(x, CUT, 4, &parts);
    update(x + CUT * D, N - CUT, 4, &rest);
    CHECK(lns_moments_merge(&parts, &rest, D) == LNS_OK);
    CHECK(whole.count == N && parts.count == N);
    for (int j = 0; j < D; j += 43) {
        double mean = 0, m2 = 0;
        for (int i = 0; i < N; i++) {
            mean += x[i * D + j] / (double)N;
        }
        for (int i = 0; i < N; i++) {
            m2 += (x[i * D + j] - mean) * (x[i * D + j] - mean);
        }
        CHECK_NEAR(whole.mean[j], mean, 1e-7);
        CHECK_NEAR(whole.m2[j] / m2, 1, 1e-7);
        CHECK_NEAR(parts.mean[j], mean, 1e-7);
        CHECK_NEAR(parts.m2[j] / m2, 1, 1e-7);
        CHECK(whole.low[j] == parts.low[j] && whole.high[j] == parts.high[j]);
    }
    x[2 * D + 5] = INFINITY;
    const lns_sample bad = {x, LNS_F32, N, D, NULL};
    void *work = memory(lns_moments_worksize(N, D));
    lns_place place = {0};
    const double before = whole.mean[5];
    CHECK(lns_moments_update(&bad, 2, work, &whole, &place) == LNS_NOT_FINITE);
    CHECK(place.row == 2 && place.column == 5 && whole.count == N && whole.mean[5] == before);
    free(work);
    free(x);
    release(&whole);
    release(&parts);
    release(&rest);
    CHECK(lns_moments_worksize(INT64_MAX, 2) == -1);
}
