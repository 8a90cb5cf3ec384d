/* A test is a function that calls CHECK; a failed check says where, and the program goes on and fails at its end. */
#ifndef LNS_TEST_CHECK_H
#define LNS_TEST_CHECK_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lineas.h"

extern int checks, failures;

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        checks++;                                                                                                      \
        if (!(condition)) {                                                                                            \
            failures++;                                                                                                \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);                                    \
        }                                                                                                              \
    } while (0)

#define CHECK_NEAR(a, b, tolerance) CHECK(fabs((double)(a) - (double)(b)) <= (tolerance))

/* Memory of exactly `size` bytes on a cache line, so that AddressSanitizer sees the first byte beyond it. */
void *memory(int64_t size);

/* n * d numbers from a normal distribution; the same for the same seed. Freed by the caller. */
float *normal_f32(int64_t count, unsigned seed);
double *normal_f64(int64_t count, unsigned seed);

/* Every test runs once for each kernel variant that the CPU has. */
void test_core(void);
void test_sort(void);
void test_wasserstein(void);
void test_transport(void);
void test_affine(void);
void test_pool(void);
void test_moments(void);
void test_quantiles(void);
void test_prox(void);
void test_path(void);
void test_range(void);
void test_subnormals(void);
void test_bits(void);
void test_threads(void);

#endif
