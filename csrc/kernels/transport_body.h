/* Template body: closed-form maps of a tile of the source to a tile of the target.
 *
 * Included by transport.c through simd/variants.h, once per working type and CPU variant. */
#include "kernels/simd/rank_body.h"

/* Moments of the columns of a tile and its target, both divided by a power of two where squares would leave the range
 * of double. */
typedef struct VNAME(fit_sums) {
    double mean_u[LANES], mean_v[LANES], variance_u[LANES], variance_v[LANES];
    double covariance[LANES];                 /* of the paired quantiles */
    int exponent_u[LANES], exponent_v[LANES]; /* of that power */
} VNAME(fit_sums);

/* Pairs the quantiles of one column of sorted tiles. Sums are taken around the medians: a large mean costs no digits,
 * all products of x and y are >= 0, and what is subtracted in the end is at most half of their sum, so that no weights
 * are too uneven for variances and covariances with nearly all digits. In double: of slopes and shifts that nearly
 * cancel, every digit counts. */
static inline void VNAME(pair_column)(const real *u, const real *v, const lns_segment *segments, int64_t count,
                                      int64_t l, VNAME(fit_sums) * sums)
{
    const lns_segment *middle = segments + lns_middle_segment(segments, count);
    const double middle_u = (double)u[middle->i * LANES + l], middle_v = (double)v[middle->k * LANES + l];
    double sum_u = 0, sum_v = 0, sum_uu = 0, sum_uv = 0, sum_vv = 0;
    for (int64_t s = 0; s < count; s++) {
        const double mass = segments[s].mass;
        const double x = (double)u[segments[s].i * LANES + l] - middle_u;
        const double y = (double)v[segments[s].k * LANES + l] - middle_v;
        sum_u += mass * x;
        sum_v += mass * y;
        sum_uu += mass * x * x;
        sum_uv += mass * x * y;
        sum_vv += mass * y * y;
    }
    sums->mean_u[l] = sum_u + middle_u;
    sums->mean_v[l] = sum_v + middle_v;
    sums->variance_u[l] = sum_uu - sum_u * sum_u;
    sums->covariance[l] = sum_uv - sum_u * sum_v;
    sums->variance_v[l] = sum_vv - sum_v * sum_v;
}

/* Columns that are paired at once: wider vectors than registers would be kept in memory. */
#define DOUBLES (VEC_BYTES / 8)

/* The same for DOUBLES columns from l on, along segments that they share. */
static inline void VNAME(pair_columns)(const real *u, int64_t n, const real *v, int64_t m, const lns_segment *segments,
                                       int64_t count, int64_t l, VNAME(fit_sums) * sums)
{
    typedef real reals __attribute__((vector_size(DOUBLES * sizeof(real))));
    typedef double doubles __attribute__((vector_size(DOUBLES * sizeof(double))));
    reals a, b;
    memcpy(&a, u + n / 2 * LANES + l, sizeof a);
    memcpy(&b, v + m / 2 * LANES + l, sizeof b);
    const doubles middle_u = __builtin_convertvector(a, doubles), middle_v = __builtin_convertvector(b, doubles);
    doubles sum_u = {0}, sum_v = {0}, sum_uu = {0}, sum_uv = {0}, sum_vv = {0};
    for (int64_t s = 0; s < count; s++) {
        memcpy(&a, u + segments[s].i * LANES + l, sizeof a);
        memcpy(&b, v + segments[s].k * LANES + l, sizeof b);
        const doubles x = __builtin_convertvector(a, doubles) - middle_u;
        const doubles y = __builtin_convertvector(b, doubles) - middle_v;
        const doubles mass_x = segments[s].mass * x, mass_y = segments[s].mass * y;
        sum_u += mass_x;
        sum_v += mass_y;
        sum_uu += mass_x * x;
        sum_uv += mass_x * y;
        sum_vv += mass_y * y;
    }
    const doubles mean_u = sum_u + middle_u, mean_v = sum_v + middle_v;
    const doubles variance_u = sum_uu - sum_u * sum_u, variance_v = sum_vv - sum_v * sum_v;
    const doubles covariance = sum_uv - sum_u * sum_v;
    memcpy(sums->mean_u + l, &mean_u, sizeof mean_u);
    memcpy(sums->mean_v + l, &mean_v, sizeof mean_v);
    memcpy(sums->variance_u + l, &variance_u, sizeof variance_u);
    memcpy(sums->covariance + l, &covariance, sizeof covariance);
    memcpy(sums->variance_v + l, &variance_v, sizeof variance_v);
}

/* Mean and variance of the columns of a tile of n rows (ddof = 1, or the weighted population's), around its first row:
 * the variance of a column whose rows are all equal is exactly 0. */
static inline void VNAME(tile_moments)(const real *tile, int64_t n, const double *masses, double total,
                                       double *restrict mean, double *restrict variance)
{
    for (int l = 0; l < LANES; l++) {
        mean[l] = variance[l] = 0;
    }
    for (int64_t i = 0; i < n; i++) {
        const double mass = (masses != NULL ? masses[i] : 1) / total;
        for (int l = 0; l < LANES; l++) {
            mean[l] += mass * ((double)tile[i * LANES + l] - (double)tile[l]);
        }
    }
    for (int l = 0; l < LANES; l++) {
        mean[l] += (double)tile[l];
    }
    for (int64_t i = 0; i < n; i++) {
        const double mass = masses != NULL ? masses[i] / total : 1 / (double)(n - 1);
        for (int l = 0; l < LANES; l++) {
            const double x = (double)tile[i * LANES + l] - mean[l];
            variance[l] += mass * (x * x);
        }
    }
}

/* Work for a panel of neighbouring tiles. */
typedef struct VNAME(fit_work) {
    key *u, *v; /* the bits of reals where the method does without sorting */
    VNAME(order) order_u, order_v;
    lns_segment *own; /* of one column */
} VNAME(fit_work);

static inline VNAME(fit_work) VNAME(fit_work_at)(char *memory, const lns_fit_job *job)
{
    const int64_t n = job->source.n, m = job->target.n, tiles = fit_panel(job, INT64_MAX);
    const lns_ranks ranks = fit_ranks(job);
    VNAME(fit_work) w;
    w.u = (key *)(void *)memory;
    memory += tiles * lns_tile_bytes(n);
    w.v = (key *)(void *)memory;
    memory += tiles * lns_tile_bytes(m);
    w.order_u = VNAME(order_at)(&memory, n, ranks);
    w.order_v = VNAME(order_at)(&memory, m, ranks);
    w.own = (lns_segment *)(void *)memory;
    return w;
}

/* A pair of tiles: the bits of reals, sorted where the method pairs quantiles. */
typedef struct VNAME(fit_pair) {
    key *u, *v;
    int64_t lanes;
} VNAME(fit_pair);

/* Sorts a pair of tiles of keys and makes reals of them; returns whether everything was finite. */
static inline int VNAME(fit_sort)(const lns_pairing *pairing, const VNAME(fit_pair) * t, const VNAME(fit_work) * work)
{
    const int64_t n = pairing->n, m = pairing->m;
    if (pairing->weighted) {
        VNAME(rank_tile)(t->u, n, &work->order_u);
        VNAME(rank_tile)(t->v, m, &work->order_v);
    } else {
        VNAME(lns_sort_tile)(t->u, n);
        VNAME(lns_sort_tile)(t->v, m);
    }
    if (!VNAME(sorted_finite)(t->u, n) || !VNAME(sorted_finite)(t->v, m)) {
        return 0;
    }
    VNAME(flip_tile)(t->u, n);
    VNAME(flip_tile)(t->v, m);
    return 1;
}

/* The moments of a pair of tiles of finite reals, as they are. */
static void VNAME(fit_moments)(lns_method method, const lns_pairing *pairing, const VNAME(fit_pair) * t,
                               const VNAME(fit_work) * work, VNAME(fit_sums) * sums)
{
    const int64_t n = pairing->n, m = pairing->m;
    const real *const u = (const real *)(void *)t->u, *const v = (const real *)(void *)t->v;
    if (!fit_sorts(method)) {
        VNAME(tile_moments)(u, n, pairing->mass_u, pairing->total_u, sums->mean_u, sums->variance_u);
        VNAME(tile_moments)(v, m, pairing->mass_v, pairing->total_v, sums->mean_v, sums->variance_v);
        return;
    }
    if (!pairing->weighted) {
        for (int l = 0; l < LANES; l += DOUBLES) {
            VNAME(pair_columns)(u, n, v, m, pairing->segments, pairing->segment_count, l, sums);
        }
        return;
    }
    for (int64_t l = 0; l < t->lanes; l++) {
        const double *mass_u = VNAME(column_mass)(pairing->mass_u, n, l, &work->order_u);
        const double *mass_v = VNAME(column_mass)(pairing->mass_v, m, l, &work->order_v);
        const int64_t count =
            lns_weighted_segments(n, mass_u, pairing->total_u, m, mass_v, pairing->total_v, work->own);
        VNAME(pair_column)(u, v, work->own, count, l, sums);
    }
}

#if REAL_IS_DOUBLE /* squares of floats are in the range of double */
/* Divides the columns of a tile by the powers of two that leave numbers below 1, where their squares would be out of
 * range; returns whether there are any. */
static LNS_NOINLINE int VNAME(scale_columns)(key *tile, int64_t n, int64_t lanes, int *exponents)
{
    enum { SAFE = 400 }; /* squares of what is 2^-53 of that, and their sums, are in range */
    real *const x = (real *)(void *)tile;
    int any = 0;
    for (int64_t l = 0; l < lanes; l++) {
        double most = 0;
        for (int64_t i = 0; i < n; i++) {
            most = fmax(most, fabs(x[i * LANES + l]));
        }
        frexp(most, &exponents[l]);
        if (exponents[l] >= -SAFE && exponents[l] <= SAFE) {
            exponents[l] = 0;
            continue;
        }
        any = 1;
        for (int64_t i = 0; i < n; i++) {
            x[i * LANES + l] = ldexp(x[i * LANES + l], -exponents[l]);
        }
    }
    return any;
}
/* Whether squares may have left that range: a variance of 0 does not tell. */
static inline int VNAME(out_of_range)(const VNAME(fit_sums) * sums, int64_t lanes)
{
    int safe = 1;
    for (int64_t l = 0; l < lanes; l++) {
        safe &= sums->variance_u[l] > 0x1p-900 && sums->variance_u[l] < 0x1p900;
        safe &= sums->variance_v[l] > 0x1p-900 && sums->variance_v[l] < 0x1p900;
    }
    return !safe;
}
#endif

/* x * 2^exponent. */
static inline double VNAME(scale)(double x, int exponent)
{
    return REAL_IS_DOUBLE && exponent != 0 ? ldexp(x, exponent) : x;
}

/* Rounding leaves no variance below zero, and none in a constant column. */
static inline void VNAME(store_moments)(const VNAME(fit_sums) * sums, const fit_rounding *rounding, int64_t lanes,
                                        int64_t d, double *moments)
{
    for (int64_t l = 0; l < lanes; l++) {
        const int u = sums->exponent_u[l], v = sums->exponent_v[l];
        const double variance_u = VNAME(scale)(sums->variance_u[l], 2 * u);
        const double variance_v = VNAME(scale)(sums->variance_v[l], 2 * v);
        const int varies = fit_varies(sums->variance_u[l], sums->mean_u[l], rounding) && variance_u > 0;
        moments[l] = VNAME(scale)(sums->mean_u[l], u);
        moments[d + l] = VNAME(scale)(sums->mean_v[l], v);
        moments[2 * d + l] = varies ? variance_u : 0;
        moments[3 * d + l] = varies ? VNAME(scale)(sums->covariance[l], u + v) : 0;
        moments[4 * d + l] = variance_v <= 0 ? 0 : variance_v;
    }
}

/* The shift goes with the slope as it is stored: with one that is rounded afterwards, the means would not match. */
static inline void VNAME(store_maps)(const VNAME(fit_sums) * sums, const fit_rounding *rounding, lns_method method,
                                     int64_t lanes, real *weight, real *bias)
{
    for (int64_t l = 0; l < lanes; l++) {
        const int u = sums->exponent_u[l], v = sums->exponent_v[l];
        double slope = 1;
        if (method != LNS_MEAN && fit_varies(sums->variance_u[l], sums->mean_u[l], rounding)) {
            slope = method == LNS_GAUSSIAN ? sqrt(sums->variance_v[l]) / sqrt(sums->variance_u[l])
                                           : sums->covariance[l] / sums->variance_u[l];
            slope = VNAME(scale)(slope, v - u);
        }
        weight[l] = (real)slope;
        bias[l] = (real)(VNAME(scale)(sums->mean_v[l], v) - (double)weight[l] * VNAME(scale)(sums->mean_u[l], u));
    }
}

/* A pair of tiles, as they were loaded; returns whether everything was finite. */
static int VNAME(fit_tile)(const lns_fit_job *job, lns_method method, const lns_pairing *pairing, int64_t column,
                           const VNAME(fit_pair) * t, const VNAME(fit_work) * work)
{
    const int64_t n = pairing->n, m = pairing->m;
    const int ddof = !fit_sorts(method) && pairing->mass_u == NULL;
    const fit_rounding rounding = fit_rounding_of((double)n, ddof, job->source.dtype);
    VNAME(fit_sums) sums = {0};
    if (fit_sorts(method)) {
        if (!VNAME(fit_sort)(pairing, t, work)) {
            return 0;
        }
    } else if (!VNAME(rows_finite)((const real *)(void *)t->u, 0, n) ||
               !VNAME(rows_finite)((const real *)(void *)t->v, 0, m)) {
        return 0;
    }
    VNAME(fit_moments)(method, pairing, t, work, &sums);
#if REAL_IS_DOUBLE
    if (VNAME(out_of_range)(&sums, t->lanes)) {
        const int any = VNAME(scale_columns)(t->u, n, t->lanes, sums.exponent_u);
        if (VNAME(scale_columns)(t->v, m, t->lanes, sums.exponent_v) || any) {
            VNAME(fit_moments)(method, pairing, t, work, &sums);
        }
    }
#endif
    if (method == LNS_MOMENTS) {
        VNAME(store_moments)(&sums, &rounding, t->lanes, job->source.d, job->moments + column);
    } else {
        real *const weight = (real *)job->weight + column, *const bias = (real *)job->bias + column;
        VNAME(store_maps)(&sums, &rounding, method, t->lanes, weight, bias);
    }
    return 1;
}

static void VNAME(fit_units)(void *context, int64_t begin, int64_t end, int thread)
{
    fit_context *c = context;
    const lns_fit_job *job = c->call.jobs;
    char *memory = c->call.work + thread * c->call.thread_bytes;
    const int as_keys = fit_sorts(c->method);
    const lns_fit_job *prepared = NULL;
    int64_t first = 0; /* unit of the job */
    lns_pairing pairing = {0};
    VNAME(fit_work) work = {0};
    for (int64_t unit = begin, count; unit < end; unit += count) {
        while (unit >= first + lns_sample_tiles(&job->source)) {
            first += lns_sample_tiles(&job->source);
            job++;
        }
        if (prepared != job) {
            prepared = job;
            pairing = lns_pair_rows(&job->source, &job->target, (lns_segment *)(void *)memory);
            work = VNAME(fit_work_at)(memory + c->call.segment_bytes, job);
        }
        const int64_t column = (unit - first) * LANES, left = first + lns_sample_tiles(&job->source) - unit;
        count = fit_panel(job, left < end - unit ? left : end - unit);
        VNAME(load_tiles)(&job->source, column, count, work.u, as_keys);
        VNAME(load_tiles)(&job->target, column, count, work.v, as_keys);
        for (int64_t t = 0; t < count; t++) {
            const int64_t at = column + t * LANES;
            const VNAME(fit_pair) tiles = {work.u + t * lns_tile_bytes(job->source.n) / (int64_t)sizeof(key),
                                           work.v + t * lns_tile_bytes(job->target.n) / (int64_t)sizeof(key),
                                           job->source.d - at < LANES ? job->source.d - at : LANES};
            c->call.not_finite[thread] |= !VNAME(fit_tile)(job, c->method, &pairing, at, &tiles, &work);
        }
    }
}

#undef DOUBLES
