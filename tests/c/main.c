#define _POSIX_C_SOURCE 200112L
#include "check.h"

int checks, failures;

void *memory(int64_t size)
{
    void *block = NULL;
    if (size < 0 || posix_memalign(&block, 64, (size_t)(size > 0 ? size : 1)) != 0) {
        fprintf(stderr, "no memory, or a work size of %lld\n", (long long)size);
        exit(2);
    }
    return block;
}

static double uniform(unsigned *state)
{
    *state = *state * 1664525u + 1013904223u;
    return ((double)(*state >> 8) + 0.5) / 16777216.0;
}

double *normal_f64(int64_t count, unsigned seed)
{
    double *x = memory(count * (int64_t)sizeof *x);
    for (int64_t i = 0; i < count; i++) {
        const double radius = sqrt(-2 * log(uniform(&seed)));
        x[i] = radius * cos(6.283185307179586 * uniform(&seed));
    }
    return x;
}

float *normal_f32(int64_t count, unsigned seed)
{
    double *x = normal_f64(count, seed);
    float *y = memory(count * (int64_t)sizeof *y);
    for (int64_t i = 0; i < count; i++) {
        y[i] = (float)x[i];
    }
    free(x);
    return y;
}

/* The name of a variant as argument: that one alone. */
int main(int argc, char **argv)
{
    static const char *const variants[] = {"portable", "avx2", "avx512"};
    CHECK(lns_cpu_init("no such processor") == -1);
    for (int v = 0; v < 3; v++) {
        if (argc > 1 && strcmp(argv[1], variants[v]) != 0) {
            continue;
        }
        if (lns_cpu_init(variants[v]) != 0) {
            printf("%s: not on this processor\n", variants[v]);
            continue;
        }
        CHECK(strcmp(lns_cpu_name(), variants[v]) == 0);
        test_core();
        test_sort();
        test_wasserstein();
        test_transport();
        test_affine();
        test_pool();
        test_moments();
        test_quantiles();
        test_prox();
        test_path();
        test_range();
        test_subnormals();
        test_bits();
        test_threads();
    }
    printf("%d checks, %d failed\n", checks, failures);
    return failures != 0;
}
