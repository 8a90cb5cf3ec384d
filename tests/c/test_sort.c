#include "check.h"

static int ascending_f32(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Sorts one sample and compares with qsort, column by column. */
static void like_qsort(int64_t n, int64_t d, int threads)
{
    float *x = normal_f32(n * d, (unsigned)(n + d)), *out = memory(n * d * 4), *column = memory(n * 4);
    const lns_sample sample = {x, LNS_F32, n, d, NULL};
    void *work = memory(lns_sort_worksize(&sample, 1, threads)), *outs[1] = {out};
    int wrong = 0;
    CHECK(lns_sort(&sample, 1, threads, work, outs, NULL) == LNS_OK);
    for (int64_t j = 0; j < d; j++) {
        for (int64_t i = 0; i < n; i++) {
            column[i] = x[i * d + j];
        }
        qsort(column, (size_t)n, sizeof *column, ascending_f32);
        for (int64_t i = 0; i < n; i++) {
            wrong += column[i] != out[i * d + j];
        }
    }
    CHECK(wrong == 0);
    free(x);
    free(out);
    free(column);
    free(work);
}

static void a_nan_is_found(void)
{
    float *x = normal_f32(40 * 21, 1), *out = memory(40 * 21 * 4);
    const lns_sample sample = {x, LNS_F32, 40, 21, NULL};
    void *work = memory(lns_sort_worksize(&sample, 1, 1)), *outs[1] = {out};
    lns_place place = {0};
    x[33 * 21 + 20] = NAN;
    x[34 * 21 + 3] = -INFINITY;
    CHECK(lns_sort(&sample, 1, 1, work, outs, &place) == LNS_NOT_FINITE);
    CHECK(place.entry == 0 && place.row == 33 && place.column == 20 && isnan(place.value));
    free(x);
    free(out);
    free(work);
}

static void sizes_are_checked(void)
{
    const lns_sample empty = {NULL, LNS_F32, 0, 5, NULL}, huge = {NULL, LNS_F64, INT64_MAX / 2, INT64_MAX / 2, NULL};
    CHECK(lns_sort_worksize(&empty, 1, 1) == -1);
    CHECK(lns_sort_worksize(&huge, 1, 1) == -1);
    CHECK(lns_sort(&huge, 1, 1, NULL, NULL, NULL) == LNS_BAD_SIZE);
    CHECK(lns_sort(NULL, 0, 1, NULL, NULL, NULL) == LNS_OK);
}

static void types_are_checked(void)
{
    const float x[2] = {2, 1};
    const double y[2] = {2, 1};
    float out[2][2];
    void *const outs[2] = {out[0], out[1]};
    lns_sample samples[2] = {{x, LNS_F32, 2, 1, NULL}, {y, LNS_F64, 2, 1, NULL}};
    CHECK(lns_sort_worksize(samples, 2, 1) == -1);
    CHECK(lns_sort(samples, 2, 1, NULL, outs, NULL) == LNS_BAD_TYPE);
    samples[0].dtype = (lns_dtype)-1;
    CHECK(lns_sort(samples, 1, 1, NULL, outs, NULL) == LNS_BAD_TYPE);
}

/* Weights are not looked at: rows of weight 0 are sorted as well. */
static void rows_without_mass_are_sorted(void)
{
    const double x[3] = {3, 1, 2}, mass[3] = {1, 0, 1};
    double out[3];
    const lns_sample sample = {x, LNS_F64, 3, 1, mass};
    void *work = memory(lns_sort_worksize(&sample, 1, 1)), *const outs[1] = {out};
    CHECK(lns_sort(&sample, 1, 1, work, outs, NULL) == LNS_OK);
    CHECK(out[0] == 1 && out[1] == 2 && out[2] == 3);
    free(work);
}

void test_sort(void)
{
    static const int64_t sizes[] = {1, 2, 3, 8, 9, 16, 31, 32, 33, 64, 100, 257, 1024, 1025, 1500};
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        like_qsort(sizes[k], 37, 1);
    }
    like_qsort(64, 6000, 3);
    a_nan_is_found();
    sizes_are_checked();
    types_are_checked();
    rows_without_mass_are_sorted();
}
