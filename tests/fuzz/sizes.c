/* Fuzzing with sizes that no memory holds: work sizes must not overflow, and what cannot be must be refused before any
 * array is touched. */
#include "fuzz.h"

/* Whether [n, d] is a matrix whose elements, 8 bytes each, 62 bits can count. */
static int addressable(int64_t n, int64_t d)
{
    return n >= 1 && d >= 1 && n <= (INT64_C(1) << 62) / 8 / d;
}

static lns_sample nowhere(int64_t n, int64_t d)
{
    return (lns_sample){NULL, (lns_dtype)(byte() % 4), n, d, NULL};
}

void fuzz_sizes(void)
{
    const int64_t n = any_size(), m = any_size(), d = any_size();
    const int threads = 1 + (int)byte();
    const lns_sample s = nowhere(n, d), t = nowhere(m, d);
    const lns_w2_job w2 = {.u = s, .v = t};
    const lns_fit_job fit = {.source = s, .target = t};
    const int s_bad = !addressable(n, d), t_bad = !addressable(m, d);
    /* Float64 and float32 do not go together. */
    const lns_status refusal = (s.dtype == LNS_F64) == (t.dtype == LNS_F64) ? LNS_BAD_SIZE : LNS_BAD_TYPE;
    const int pair_bad = s_bad || t_bad || refusal == LNS_BAD_TYPE;

    REQUIRE(lns_sort_worksize(&s, 1, threads) >= -1);
    REQUIRE(!s_bad ||
            (lns_sort_worksize(&s, 1, threads) == -1 && lns_sort(&s, 1, 1, NULL, NULL, NULL) == LNS_BAD_SIZE));
    REQUIRE(lns_wasserstein_worksize(&w2, 1, threads) >= -1);
    REQUIRE(!pair_bad ||
            (lns_wasserstein_worksize(&w2, 1, threads) == -1 && lns_wasserstein(&w2, 1, 0, 1, NULL, NULL) == refusal));
    REQUIRE(lns_fit_worksize(&fit, 1, threads) >= -1);
    REQUIRE(!(pair_bad || n < 2 || m < 2) ||
            (lns_fit_worksize(&fit, 1, threads) == -1 && lns_fit(&fit, 1, LNS_MEAN, 1, NULL, NULL) == refusal));
    REQUIRE(lns_covariance_worksize(n, d) >= -1);
    REQUIRE(!s_bad || (lns_covariance(&s, NULL, NULL, NULL, NULL) == LNS_BAD_SIZE));
    REQUIRE(lns_bures_map_worksize(d) >= -1);
    REQUIRE(lns_bures_map_worksize(d) >= 0 || lns_bures_map(NULL, NULL, d, 0, NULL, NULL) == LNS_BAD_SIZE);

    REQUIRE(lns_affine_worksize(n, d, m) >= -1);
    if (n < 0 || d < 1 || m < 0) {
        REQUIRE(lns_affine_worksize(n, d, m) == -1);
        REQUIRE(lns_affine(NULL, LNS_F32, n, d, m, NULL, NULL, 1, 1, NULL, NULL) == LNS_BAD_SIZE);
        REQUIRE(lns_affine_backward(NULL, LNS_F32, n, d, m, NULL, 1, NULL, 1, NULL, NULL, NULL, NULL) == LNS_BAD_SIZE);
        REQUIRE(lns_pool(NULL, LNS_F32, n, m, d, NULL, LNS_POOL_MEAN, 1, NULL, NULL, NULL) == LNS_BAD_SIZE);
        REQUIRE(lns_pool_backward(NULL, LNS_F64, n, m, d, NULL, LNS_POOL_MEAN, NULL, 1, NULL, NULL) == LNS_BAD_SIZE);
    }
    const lns_path_job path = {.d = d, .stride = n};
    REQUIRE(lns_path_worksize(&path, 1, 1, threads) >= -1);
    REQUIRE(!(d < 1 || n < d || d > INT64_MAX / 64) ||
            (lns_path_worksize(&path, 1, 1, threads) == -1 && lns_path(&path, 1, NULL, 1, 1, 1, NULL) == LNS_BAD_SIZE));
    lns_moments state = {0};
    REQUIRE(lns_moments_worksize(n, d) >= -1);
    REQUIRE(!s_bad || lns_moments_update(&s, 1, NULL, &state, NULL) == LNS_BAD_SIZE);
    REQUIRE(d >= 1 || lns_moments_merge(&state, &state, d) == LNS_BAD_SIZE);
    lns_quantiles q = {.dtype = s.dtype, .d = d, .slots = m, .rows = n};
    q.weight[byte() % LNS_MOST_SLOTS] = any_size();
    q.filled = any_size();
    q.moments.count = any_size();
    REQUIRE(lns_quantiles_worksize(&q, n, threads) >= -1 && lns_quantiles_read_worksize(&q, threads) >= -1);
    if (d < 1 || m < 2 || m > LNS_MOST_SLOTS || n < 32 || (n & (n - 1)) != 0 || s.dtype == LNS_F16 ||
        s.dtype == LNS_BF16) {
        REQUIRE(lns_quantiles_held(&q) == -1 && lns_quantiles_worksize(&q, 1, 1) == -1);
        REQUIRE(lns_quantiles_update(&s, 1, NULL, &q, NULL) != LNS_OK);
        REQUIRE(lns_quantiles_merge(&q, 1, NULL, &q) != LNS_OK && lns_quantiles_rows(&q, 1, NULL, NULL) != LNS_OK);
        REQUIRE(lns_quantiles_read(&q, NULL, 1, 1, NULL, NULL) != LNS_OK);
    }
    REQUIRE(d >= 1 || lns_prox(NULL, LNS_F32, d, 1, 1, 1, NULL) == LNS_BAD_SIZE);

    /* Types and options that do not exist, or not here. */
    const lns_dtype none = (lns_dtype)(4 + byte()), half = byte() % 2 ? LNS_F16 : LNS_BF16;
    const lns_pooling mode = (lns_pooling)(5 + byte());
    const lns_step_problem step = {.dtype = byte() % 2 ? none : half};
    const lns_sample other = {NULL, none, 1, 1, NULL};
    REQUIRE(lns_pool(NULL, none, 1, 1, 1, NULL, LNS_POOL_MEAN, 1, NULL, NULL, NULL) == LNS_BAD_TYPE);
    REQUIRE(lns_pool(NULL, LNS_F32, 1, 1, 1, NULL, mode, 1, NULL, NULL, NULL) == LNS_BAD_TYPE);
    REQUIRE(lns_pool_backward(NULL, half, 1, 1, 1, NULL, LNS_POOL_MEAN, NULL, 1, NULL, NULL) == LNS_BAD_TYPE);
    REQUIRE(lns_step(&step, 1, NULL, NULL) == LNS_BAD_TYPE);
    REQUIRE(lns_prox(NULL, half, 1, 1, 1, 1, NULL) == LNS_BAD_TYPE);
    REQUIRE(lns_affine(NULL, none, 1, 1, 1, NULL, NULL, 1, 1, NULL, NULL) == LNS_BAD_TYPE);
    REQUIRE(lns_moments_update(&other, 1, NULL, &state, NULL) == LNS_BAD_TYPE);
    REQUIRE(lns_covariance(&other, NULL, NULL, NULL, NULL) == LNS_BAD_TYPE);
    REQUIRE(lns_sort(&other, 1, 1, NULL, NULL, NULL) == LNS_BAD_TYPE);
    REQUIRE(lns_fit(&fit, 1, (lns_method)(4 + byte()), 1, NULL, NULL) == LNS_BAD_TYPE);

    REQUIRE(lns_status_text((lns_status)(int)n)[0] != '\0');
    REQUIRE(lns_cpu_init("a processor that nobody has made") == -1);
    REQUIRE(lns_cpu_init(byte() % 2 ? NULL : "") == 0 && lns_cpu_name()[0] != '\0');
}
