/* Covariances and the optimal transport map between Gaussians, by BLAS and LAPACK. */
#include "lineas.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/blas.h"
#include "core/sizes.h"
#include "core/subnormals.h"
#include "kernels/samples.h"
#include "kernels/simd/load.h"

/* Up to this exponent, weighted sums of squares stay far inside the range of a double, and nothing is scaled. */
#define USUAL_EXPONENT 300

/* The exponent of a power of two that numbers up to `most` are divided by, to be near 1: even, so that its root is a
 * power of two as well; 0 for usual numbers. */
static int scale_exponent(double most)
{
    int exponent;
    frexp(most, &exponent);
    return !(most > 0 && most < INFINITY) || abs(exponent) <= USUAL_EXPONENT ? 0 : exponent - exponent % 2;
}

static double largest(const double *x, int64_t count)
{
    double most = 0;
    for (int64_t i = 0; i < count; i++) {
        most = fabs(x[i]) > most ? fabs(x[i]) : most;
    }
    return most;
}

/* x 2^exponent into `to`; whether all of it is finite. */
static int copy_scaled(const double *x, int64_t count, int exponent, double *to)
{
    int finite = 1;
    for (int64_t i = 0; i < count; i++) {
        to[i] = exponent != 0 ? ldexp(x[i], exponent) : x[i];
        finite &= isfinite(to[i]) != 0;
    }
    return finite;
}

int64_t lns_covariance_worksize(int64_t n, int64_t d)
{
    if (n < 1 || d < 1 || n > INT32_MAX || d > INT32_MAX) {
        return -1;
    }
    return lns_mul(lns_mul(n + 2, d), sizeof(double));
}

lns_status lns_covariance(const lns_sample *sample, void *work, double *mean, double *covariance, lns_place *place)
{
    LNS_KEEP_SUBNORMALS;
    const int64_t n = sample->n, d = sample->d;
    lns_place found = {0};
    if (!lns_is_dtype(sample->dtype)) {
        return LNS_BAD_TYPE;
    }
    if (!lns_sample_ok(sample) || n > INT32_MAX || d > INT32_MAX || (sample->mass == NULL && n < 2)) {
        return LNS_BAD_SIZE;
    }
    lns_status status = lns_check_mass(sample, &found);
    if (status == LNS_OK && lns_find_not_finite(sample, &found)) {
        status = LNS_NOT_FINITE;
    }
    if (status != LNS_OK) {
        if (place != NULL) {
            *place = found;
        }
        return status;
    }
    double *centred = work;                    /* [n, d], each row times the root of its weight */
    double *most = centred + n * d;            /* [d] of each column */
    int *exponent = (int *)(void *)(most + d); /* [d]: columns are divided by 2^exponent */
    double total = 0;
    memset(mean, 0, (size_t)d * sizeof(double));
    memset(most, 0, (size_t)d * sizeof(double));
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < d; j++) {
            const double x = lns_value(sample->data, sample->dtype, i * d + j);
            centred[i * d + j] = x;
            most[j] = fabs(x) > most[j] ? fabs(x) : most[j];
        }
    }
    int scaled = 0;
    for (int64_t j = 0; j < d; j++) {
        exponent[j] = scale_exponent(most[j]);
        scaled |= exponent[j] != 0;
    }
    for (int64_t i = 0; scaled && i < n * d; i++) {
        centred[i] = ldexp(centred[i], -exponent[i % d]);
    }
    const int mass_exponent = sample->mass != NULL ? scale_exponent(largest(sample->mass, n)) : 0;
    for (int64_t i = 0; i < n; i++) {
        const double mass = sample->mass != NULL ? ldexp(sample->mass[i], -mass_exponent) : 1;
        total += mass;
        for (int64_t j = 0; j < d; j++) {
            mean[j] += mass * centred[i * d + j];
        }
    }
    for (int64_t j = 0; j < d; j++) {
        mean[j] /= total;
    }
    for (int64_t i = 0; i < n; i++) {
        const double root = sample->mass != NULL ? sqrt(ldexp(sample->mass[i], -mass_exponent)) : 1;
        for (int64_t j = 0; j < d; j++) {
            centred[i * d + j] = root * (centred[i * d + j] - mean[j]);
        }
    }
    LNS_CBLAS(dsyrk)(CblasRowMajor, CblasUpper, CblasTrans, (int)d, (int)n,
                     1 / (sample->mass != NULL ? total : total - 1), centred, (int)d, 0, covariance, (int)d);
    for (int64_t i = 0; i < d; i++) {
        for (int64_t j = 0; j < i; j++) {
            covariance[i * d + j] = covariance[j * d + i];
        }
    }
    int finite = 1;
    for (int64_t i = 0; scaled && i < d; i++) {
        mean[i] = ldexp(mean[i], exponent[i]);
        finite &= isfinite(mean[i]) != 0;
        for (int64_t j = 0; j < d; j++) {
            covariance[i * d + j] = ldexp(covariance[i * d + j], exponent[i] + exponent[j]);
            finite &= isfinite(covariance[i * d + j]) != 0;
        }
    }
    return finite ? LNS_OK : LNS_OUT_OF_RANGE;
}

/* Largest d whose LAPACK work size, 2 d^2 + 6 d + 1, is an int. */
#define MOST_DIMENSIONS 32000

typedef struct buffers {
    double *vectors, *square, *other; /* [d, d] each */
    double *values, *roots, *lapack;  /* [d], [d], [1 + 6 d + 2 d^2] */
    int *integers;                    /* [3 + 5 d] */
} buffers;

static int64_t lapack_size(int64_t d)
{
    return 1 + 6 * d + 2 * d * d;
}

int64_t lns_bures_map_worksize(int64_t d)
{
    if (d < 1 || d > MOST_DIMENSIONS) {
        return -1;
    }
    return (3 * d * d + 2 * d + lapack_size(d)) * (int64_t)sizeof(double) + (3 + 5 * d) * (int64_t)sizeof(int);
}

/* Eigenvalues (ascending) and, as rows of matrix, eigenvectors of the symmetric matrix given there. */
static lns_status eigen(double *matrix, double *values, int64_t d, const buffers *b)
{
    const int n = (int)d, size = (int)lapack_size(d), integers = (int)(3 + 5 * d);
    int info = 0;
    LNS_LAPACK(dsyevd)("V", "L", &n, matrix, &n, values, b->lapack, &size, b->integers, &integers, &info);
    return info == 0 ? LNS_OK : LNS_NO_CONVERGENCE;
}

/* out = A op(B), all [d, d] row-major. */
static void multiply(CBLAS_TRANSPOSE transpose_a, CBLAS_TRANSPOSE transpose_b, int64_t d, const double *a,
                     const double *b, double *out)
{
    const int n = (int)d;
    LNS_CBLAS(dgemm)(CblasRowMajor, transpose_a, transpose_b, n, n, n, 1, a, n, b, n, 0, out, n);
}

static double root(double x)
{
    return x > 0 ? sqrt(x) : 0;
}

lns_status lns_bures_map(const double *source, const double *target, int64_t d, double ridge, void *work, double *map)
{
    LNS_KEEP_SUBNORMALS;
    if (d < 1 || d > MOST_DIMENSIONS) {
        return LNS_BAD_SIZE;
    }
    double *memory = work;
    buffers b = {.vectors = memory, .square = memory + d * d, .other = memory + 2 * d * d};
    b.values = memory + 3 * d * d;
    b.roots = b.values + d;
    b.lapack = b.roots + d;
    b.integers = (int *)(void *)(b.lapack + lapack_size(d));

    /* source + ridge I = V' diag(lambda) V, V the rows of vectors; R = diag(lambda)^(1/2). */
    const int exponent = scale_exponent(fmax(largest(source, d * d), ridge));
    const int target_exponent = scale_exponent(fmax(largest(target, d * d), ridge));
    if (!copy_scaled(source, d * d, -exponent, b.vectors) || !copy_scaled(target, d * d, -target_exponent, b.other) ||
        !isfinite(ridge)) {
        return LNS_NOT_FINITE;
    }
    for (int64_t j = 0; j < d; j++) {
        b.vectors[j * d + j] += ldexp(ridge, -exponent);
    }
    lns_status status = eigen(b.vectors, b.values, d, &b);
    if (status != LNS_OK) {
        return status;
    }
    const double cutoff = (double)d * DBL_EPSILON * b.values[d - 1];
    for (int64_t j = 0; j < d; j++) {
        b.roots[j] = b.values[j] > cutoff ? root(b.values[j]) : 0;
    }
    /* In the basis V: M = R V (target + ridge I) V' R, and A = V' R^-1 M^(1/2) R^-1 V. */
    multiply(CblasNoTrans, CblasNoTrans, d, b.vectors, b.other, b.square);
    multiply(CblasNoTrans, CblasTrans, d, b.square, b.vectors, b.other);
    for (int64_t i = 0; i < d; i++) {
        b.other[i * d + i] += ldexp(ridge, -target_exponent);
        for (int64_t j = 0; j < d; j++) {
            b.other[i * d + j] *= b.roots[i] * b.roots[j];
        }
    }
    status = eigen(b.other, b.values, d, &b);
    if (status != LNS_OK) {
        return status;
    }
    for (int64_t k = 0; k < d; k++) {
        const double fourth = sqrt(root(b.values[k]));
        for (int64_t j = 0; j < d; j++) {
            b.other[k * d + j] *= b.roots[j] > 0 ? fourth / b.roots[j] : 0;
        }
    }
    /* other = mu^(1/4) W R^-1, so R^-1 M^(1/2) R^-1 is its Gram matrix. */
    multiply(CblasTrans, CblasNoTrans, d, b.other, b.other, b.square);
    multiply(CblasTrans, CblasNoTrans, d, b.vectors, b.square, b.other);
    multiply(CblasNoTrans, CblasNoTrans, d, b.other, b.vectors, map);
    for (int64_t i = 0; i < d; i++) {
        for (int64_t j = 0; j < i; j++) {
            map[i * d + j] = map[j * d + i] = 0.5 * (map[i * d + j] + map[j * d + i]);
        }
    }
    return copy_scaled(map, d * d, (target_exponent - exponent) / 2, map) ? LNS_OK : LNS_OUT_OF_RANGE;
}
