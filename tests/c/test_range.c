/* Numbers near the ends of the range: sums and squares of them are not numbers of their type. And types and options
 * that a function does not take. */
#include "check.h"

#include <float.h>

enum { ROWS = 300, D = 21 };

static void moments_of_constants(void)
{
    const float values[] = {1e38f, -FLT_MAX, 1e-45f, 0};
    float *x = memory(ROWS * D * 4);
    double *wide = memory(ROWS * D * 8), state[4 * D];
    void *work = memory(lns_moments_worksize(ROWS, D));
    for (int is_double = 0; is_double < 2; is_double++) {
        for (int i = 0; i < ROWS * D; i++) {
            x[i] = values[i % D % 4];
            wide[i] = i % D % 2 ? -DBL_MAX : 1e308;
        }
        lns_moments moments = {0, state, state + D, state + 2 * D, state + 3 * D};
        const lns_sample sample = {is_double ? (void *)wide : x, is_double ? LNS_F64 : LNS_F32, ROWS, D, NULL};
        for (int j = 0; j < D; j++) {
            state[j] = state[D + j] = 0;
            state[2 * D + j] = INFINITY;
            state[3 * D + j] = -INFINITY;
        }
        CHECK(lns_moments_update(&sample, 1, work, &moments, NULL) == LNS_OK);
        for (int j = 0; j < D; j++) {
            CHECK(state[j] == (is_double ? wide[j] : x[j]) && state[D + j] == 0);
        }
        x[7 * D] = NAN; /* among equal numbers it must not get lost */
        wide[7 * D] = NAN;
        lns_place place = {0};
        CHECK(lns_moments_update(&sample, 1, work, &moments, &place) == LNS_NOT_FINITE);
        CHECK(place.row == 7 && place.column == 0);
    }
    free(x);
    free(wide);
    free(work);
}

/* Halves of +DBL_MAX and -DBL_MAX: the mean is 0, the squared deviations are no double. */
static void moments_of_opposites(void)
{
    double *x = memory(ROWS * 8), state[4] = {0, 0, INFINITY, -INFINITY}, other[4] = {-DBL_MAX, 0, -DBL_MAX, -DBL_MAX};
    void *work = memory(lns_moments_worksize(ROWS, 1));
    const lns_sample sample = {x, LNS_F64, ROWS, 1, NULL};
    lns_moments moments = {0, state, state + 1, state + 2, state + 3};
    for (int i = 0; i < ROWS; i++) {
        x[i] = i % 2 ? DBL_MAX : -DBL_MAX;
    }
    CHECK(lns_moments_update(&sample, 1, work, &moments, NULL) == LNS_OK);
    CHECK(state[0] == 0 && state[1] == INFINITY && state[2] == -DBL_MAX && state[3] == DBL_MAX);
    state[0] = state[2] = DBL_MAX;
    moments.count = 1;
    const lns_moments least = {1, other, other + 1, other + 2, other + 3};
    CHECK(lns_moments_merge(&moments, &least, 1) == LNS_OK && state[0] == 0);
    free(x);
    free(work);
}

static void means_of_tokens(void)
{
    enum { TOKENS = 9 };
    float x[TOKENS * D], out[D];
    double wide[TOKENS * D], wide_out[D];
    for (int i = 0; i < TOKENS * D; i++) {
        x[i] = i % D == 3 && i / D % 2 ? -FLT_MAX : FLT_MAX;
        wide[i] = i % D == 3 && i / D % 2 ? -DBL_MAX : DBL_MAX;
    }
    CHECK(lns_pool(x, LNS_F32, 1, TOKENS, D, NULL, LNS_POOL_MEAN, 1, out, NULL, NULL) == LNS_OK);
    CHECK(lns_pool(wide, LNS_F64, 1, TOKENS, D, NULL, LNS_POOL_MEAN, 1, wide_out, NULL, NULL) == LNS_OK);
    for (int j = 0; j < D; j++) {
        CHECK_NEAR(out[j] / FLT_MAX, j == 3 ? 1 / 9.0 : 1, 1e-7);
        CHECK_NEAR(wide_out[j] / DBL_MAX, j == 3 ? 1 / 9.0 : 1, 1e-15);
    }
    x[4] = INFINITY;
    CHECK(lns_pool(x, LNS_F32, 1, TOKENS, D, NULL, LNS_POOL_MEAN, 1, out, NULL, NULL) == LNS_OK);
    CHECK(out[4] == INFINITY && out[5] == FLT_MAX);
}

/* The prox is homogeneous: x and both penalties times a power of two. */
static void prox_at(int exponent)
{
    const double x[4] = {3, -0.5, -4, 0};
    double scaled[4], usual[4], out[4];
    for (int j = 0; j < 4; j++) {
        scaled[j] = ldexp(x[j], exponent);
    }
    CHECK(lns_prox(x, LNS_F64, 4, 1, 1, 0.5, usual) == LNS_OK);
    CHECK(lns_prox(scaled, LNS_F64, 4, ldexp(1, exponent), 1, 0.5, out) == LNS_OK);
    for (int j = 0; j < 4; j++) {
        CHECK(out[j] == ldexp(usual[j], exponent));
    }
}

static void covariances(void)
{
    const double x[8] = {1, 2, 3, 5, -2, 1, 0, 4}, masses[4] = {3, 1, 0, 2};
    double scaled[8], scaled_mass[4], mean[2], cov[4], usual[4], map[4];
    const lns_sample sample = {scaled, LNS_F64, 4, 2, scaled_mass};
    void *work = memory(lns_covariance_worksize(4, 2)), *bures_work = memory(lns_bures_map_worksize(2));
    for (int k = 0; k < 5; k++) {
        const int exponents[] = {0, 0, 500, -500, -300}, mass_exponents[] = {0, -1074, 1000, -700, 20};
        for (int i = 0; i < 8; i++) {
            scaled[i] = ldexp(x[i], i % 2 ? exponents[k] : 0); /* the first column stays */
            scaled_mass[i / 2] = ldexp(masses[i / 2], mass_exponents[k]);
        }
        CHECK(lns_covariance(&sample, work, mean, cov, NULL) == LNS_OK);
        memcpy(usual, cov, k == 0 ? sizeof usual : 0);
        for (int i = 0; i < 4; i++) {
            CHECK(cov[i] == ldexp(usual[i], (i / 2 + i % 2) * exponents[k]));
        }
    }
    scaled[1] = 1e300;
    CHECK(lns_covariance(&sample, work, mean, cov, NULL) == LNS_OUT_OF_RANGE);
    const double source[4] = {4, 1, 1, 2};
    double from[4], to[4];
    CHECK(lns_bures_map(source, usual, 2, 0.5, bures_work, map) == LNS_OK);
    memcpy(cov, map, sizeof cov);
    for (int k = 0; k < 4; k++) {
        const int exponents[] = {1000, -660, -1000, 30};
        for (int i = 0; i < 4; i++) {
            from[i] = ldexp(source[i], exponents[k]);
            to[i] = ldexp(usual[i], exponents[k]);
        }
        CHECK(lns_bures_map(from, to, 2, ldexp(0.5, exponents[k]), bures_work, map) == LNS_OK);
        for (int i = 0; i < 4; i++) {
            CHECK_NEAR(map[i], cov[i], 1e-14);
        }
    }
    from[0] = NAN;
    CHECK(lns_bures_map(from, to, 2, 0, bures_work, map) == LNS_NOT_FINITE);
    const double least[1] = {5e-324}, most[1] = {DBL_MAX};
    CHECK(lns_bures_map(least, most, 1, 0, bures_work, map) == LNS_OUT_OF_RANGE); /* 2^1049 */
    free(work);
    free(bures_work);
}

static void types(void)
{
    const lns_dtype none = (lns_dtype)9;
    const int64_t offsets[2] = {0, 2};
    uint16_t half[4] = {0};
    double wide[5] = {0}, state[4] = {0};
    lns_moments moments = {0, state, state + 1, state + 2, state + 3};
    lns_sample sample = {half, none, 2, 1, NULL};
    lns_step_problem step = {.dtype = LNS_BF16,
                             .modules = 1,
                             .offsets = offsets,
                             .weight = half,
                             .bias = half,
                             .grad_weight = half,
                             .grad_bias = half};
    lns_path_job path = {.d = 1, .moments = wide, .dtype = LNS_F16, .stride = 1};
    CHECK(lns_pool(wide, none, 1, 2, 1, NULL, LNS_POOL_MEAN, 1, wide, NULL, NULL) == LNS_BAD_TYPE);
    CHECK(lns_pool(wide, LNS_F32, 1, 2, 1, NULL, (lns_pooling)5, 1, wide, NULL, NULL) == LNS_BAD_TYPE);
    CHECK(lns_pool(wide, LNS_F32, 1, 2, 1, NULL, (lns_pooling)-1, 1, wide, NULL, NULL) == LNS_BAD_TYPE);
    CHECK(lns_pool(wide, LNS_F32, 1, 2, 1, NULL, LNS_POOL_MAX, 1, wide, NULL, NULL) == LNS_BAD_TYPE);
    CHECK(lns_pool_backward(half, LNS_F16, 1, 2, 1, NULL, LNS_POOL_MEAN, NULL, 1, wide, NULL) == LNS_BAD_TYPE);
    CHECK(lns_pool_backward(wide, LNS_F64, 1, 2, 1, NULL, (lns_pooling)7, NULL, 1, wide, NULL) == LNS_BAD_TYPE);
    CHECK(lns_pool_backward(wide, LNS_F64, 1, 2, 1, NULL, LNS_POOL_MIN, NULL, 1, wide, NULL) == LNS_BAD_TYPE);
    CHECK(lns_step(&step, 1, wide, NULL) == LNS_BAD_TYPE);
    CHECK(lns_prox(half, LNS_BF16, 2, 1, 1, 1, half) == LNS_BAD_TYPE);
    CHECK(lns_affine(half, none, 1, 2, 1, wide, wide, 1, 1, wide, half) == LNS_BAD_TYPE);
    CHECK(lns_affine_backward(half, none, 1, 2, 1, wide, 1, half, 1, wide, NULL, wide, wide) == LNS_BAD_TYPE);
    CHECK(lns_moments_update(&sample, 1, wide, &moments, NULL) == LNS_BAD_TYPE);
    CHECK(lns_covariance(&sample, wide, wide, wide, NULL) == LNS_BAD_TYPE);
    CHECK(lns_path(&path, 1, wide, 1, 1, 1, wide) == LNS_BAD_TYPE);
    path.dtype = LNS_F64;
    wide[2] = 1e150; /* a variance */
    CHECK(lns_path(&path, 1, wide, 1, 1, 1, wide) == LNS_OUT_OF_RANGE);
}

void test_range(void)
{
    moments_of_constants();
    moments_of_opposites();
    means_of_tokens();
    prox_at(700);
    prox_at(-600);
    prox_at(1020);
    covariances();
    types();
}
