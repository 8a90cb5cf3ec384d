/* Fits a linear map between two small samples with the engine alone, applies it, and shows the distance it closes.
 *
 * Build and run: make ctest, or, with the engine installed (docs/c.md says how),
 *     cc -std=c11 fit_map.c $(pkg-config --cflags --libs lineas) -o fit_map && ./fit_map
 */
#define _POSIX_C_SOURCE 200112L
#include <stdio.h>
#include <stdlib.h>

#include "lineas.h"

enum { N = 200, M = 150, D = 3, THREADS = 2 };

/* The engine allocates nothing: its callers do. Work memory begins on a cache line; a negative size is a refusal. */
static void *work_memory(int64_t size)
{
    void *block = NULL;
    if (size < 0 || posix_memalign(&block, 64, (size_t)size + 1) != 0) {
        fprintf(stderr, "sizes are not acceptable, or no memory is left\n");
        exit(EXIT_FAILURE);
    }
    return block;
}

static void check(lns_status status, const lns_place *place)
{
    if (status != LNS_OK) {
        fprintf(stderr, "%s: sample %d, row %lld, column %lld is %g\n", lns_status_text(status), place->argument,
                (long long)place->row, (long long)place->column, place->value);
        exit(EXIT_FAILURE);
    }
}

/* A bell-shaped sample: each value the sum of four uniform ones, moved and stretched per column. */
static void fill(float *x, int64_t n, float shift, float spread, uint32_t seed)
{
    for (int64_t i = 0; i < n * D; i++) {
        float sum = 0;
        for (int k = 0; k < 4; k++) {
            seed = seed * 1664525u + 1013904223u;
            sum += (float)(seed >> 8) / 16777216.0f - 0.5f;
        }
        x[i] = (float)(i % D + 1) * spread * sum + shift;
    }
}

/* Squared 2-Wasserstein distance of each column. */
static void distance(const lns_sample *u, const lns_sample *v, float *value)
{
    const lns_w2_job job = {.u = *u, .v = *v, .value = value};
    lns_place place = {0};
    void *work = work_memory(lns_wasserstein_worksize(&job, 1, THREADS));
    check(lns_wasserstein(&job, 1, 0, THREADS, work, &place), &place);
    free(work);
}

int main(void)
{
    static float source[N * D], target[M * D], moved[N * D];
    float weight[D], bias[D], before[D], after[D];
    const lns_sample u = {source, LNS_F32, N, D, NULL}, v = {target, LNS_F32, M, D, NULL};
    const lns_sample mapped = {moved, LNS_F32, N, D, NULL};
    const lns_fit_job job = {.source = u, .target = v, .weight = weight, .bias = bias};
    lns_place place = {0};

    lns_cpu_init(NULL); /* once, before anything else: picks the kernels for this processor */
    fill(source, N, 0.0f, 1.0f, 1);
    fill(target, M, 2.0f, 0.5f, 2);

    void *work = work_memory(lns_fit_worksize(&job, 1, THREADS));
    check(lns_fit(&job, 1, LNS_LINEAR, THREADS, work, &place), &place);
    free(work);

    /* At strength 1; 0 would copy, 0.5 go half the way. Rows are "outer", columns the channels, nothing is inside. */
    work = work_memory(lns_affine_worksize(N, D, 1));
    check(lns_affine(source, LNS_F32, N, D, 1, weight, bias, 1.0, THREADS, work, moved), &place);
    free(work);

    distance(&u, &v, before);
    distance(&mapped, &v, after);
    printf("column  weight    bias  W2 before  W2 after\n");
    for (int j = 0; j < D; j++) {
        printf("%6d  %6.3f  %6.3f  %9.4f  %8.4f\n", j, (double)weight[j], (double)bias[j], (double)before[j],
               (double)after[j]);
    }
    return 0;
}
