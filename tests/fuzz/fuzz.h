/* What the fuzzed functions share: reading choices from the input, memory of exactly the size that the contract names,
 * and one call repeated on every CPU variant and on one and several threads. */
#ifndef LNS_FUZZ_H
#define LNS_FUZZ_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/sizes.h"
#include "kernels/samples.h"
#include "kernels/simd/load.h"
#include "lineas.h"

/* A broken promise of the engine: says where, and ends the program, which is what a fuzzer looks for. */
#define REQUIRE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: not so: %s (on %s)\n", __FILE__, __LINE__, #condition, lns_cpu_name());            \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

/* ---- choices, from the input; zeros once it is used up -------------------------------------------------------- */

unsigned byte(void);                 /* 0 .. 255 */
int64_t below(int64_t limit);        /* 0 .. limit - 1, from two bytes */
int64_t few(void);                   /* 1 .. 3 */
int64_t some_rows(void);             /* mostly under 70, some up to 5000 */
int64_t some_columns(int64_t rows);  /* so many that rows * columns stays small */
int64_t any_size(void);              /* anything an int64_t holds, mostly what should be refused */
double some_rate(void);              /* >= 0: 0, tiny, usual or huge */
lns_dtype some_dtype(int is_double); /* LNS_F64, or one of the three that are worked on in float */
lns_dtype real_dtype(int is_double); /* LNS_F64 or LNS_F32 */

/* ---- memory handed to the engine: freed after each input ------------------------------------------------------- */

typedef enum role { INPUT, IN_OUT, OUTPUT } role;

/* `count` elements, aligned as elements are and no better; one byte further belongs to nobody. An INPUT must stay as it
 * is, an IN_OUT must stay where the call fails, an OUTPUT must be written whole where it does not. */
void *elements(role part, lns_dtype dtype, int64_t count);
void *bytes_of(role part, int64_t size);

/* `count` elements with values of some pattern: any bits, ties, neighbours, sorted, constant, special values; some
 * times a power of two that takes them to an end of the range. */
void *some_values(role part, lns_dtype dtype, int64_t count);

/* Weights of n rows: usual, with zeros, subnormal or huge, wrong ones, or NULL. */
double *some_masses(int64_t n);

/* Work memory of exactly `size` bytes, on a cache line, full of rubbish. Freed by the caller. */
void *work_memory(int64_t size);

/* ---- calls ------------------------------------------------------------------------------------------------------ */

/* Calls f(context, threads, place) on every variant of the processor and, where the input asks for it, on several
 * threads too. Status, place and the bits of what was written must be the same; not-a-number is one value. */
lns_status everywhere(lns_status (*f)(void *context, int threads, lns_place *place), void *context);

/* The place that the last call named. */
extern lns_place last_place;

/* Columns worth a check of their own: first, last, and one between; `k` in 0 .. 2. */
int64_t column_to_check(int k, int64_t d);

/* Whether a and b differ by at most `tolerance`, or one is too large to tell. */
int near(double a, double b, double tolerance);

/* The same for what a double may be too narrow to compute; a must be finite where b, rounded to a double, is. */
int near_wide(double a, long double b, long double tolerance);

/* ---- the functions ---------------------------------------------------------------------------------------------- */

void fuzz_sort(void);
void fuzz_wasserstein(void);
void fuzz_fit(void);
void fuzz_affine(void);
void fuzz_affine_backward(void);
void fuzz_pool(void);
void fuzz_moments(void);
void fuzz_quantiles(void);
void fuzz_covariance(void);
void fuzz_bures_map(void);
void fuzz_prox(void);
void fuzz_step(void);
void fuzz_path(void);
void fuzz_sizes(void);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
