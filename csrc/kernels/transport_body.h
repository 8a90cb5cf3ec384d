/* Template body: closed-form maps of a tile of the source to a tile of the target.
 *
 * Included by transport.c through simd/variants.h, once per working type and CPU variant. */
#include "kernels/simd/rank_body.h"

/* Moments of the columns of a tile and its target. */
typedef struct VNAME(fit_sums) {
    double mean_u[LANES], mean_v[LANES], variance_u[LANES], variance_v[LANES];
    double covariance[LANES]; /* of the paired quantiles */
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

/* Mean and variance of the columns of a tile (ddof = 1, or the weighted population's), around its first row. */
static inline void VNAME(tile_moments)(const real *tile, const lns_sample *s, double total, double *restrict mean,
                                       double *restrict variance)
{
    for (int l = 0; l < LANES; l++) {
        mean[l] = variance[l] = 0;
    }
    for (int64_t i = 0; i < s->n; i++) {
        const double mass = (s->mass != NULL ? s->mass[i] : 1) / total;
        for (int l = 0; l < LANES; l++) {
            mean[l] += mass * ((double)tile[i * LANES + l] - (double)tile[l]);
        }
    }
    for (int l = 0; l < LANES; l++) {
        mean[l] += (double)tile[l];
    }
    for (int64_t i = 0; i < s->n; i++) {
        const double mass = s->mass != NULL ? s->mass[i] / total : 1 / (double)(s->n - 1);
        for (int l = 0; l < LANES; l++) {
            const double x = (double)tile[i * LANES + l] - mean[l];
            variance[l] += mass * (x * x);
        }
    }
}

/* A constant column, told exactly: rounding can leave its variance a little above zero. Rows without mass are none. */
static inline void VNAME(constant_columns)(const real *tile, int64_t n, const double *mass, int *constant)
{
    int64_t first = 0;
    while (mass != NULL && first < n - 1 && mass[first] == 0) {
        first++;
    }
    for (int l = 0; l < LANES; l++) {
        constant[l] = 1;
    }
    for (int64_t i = first + 1; i < n; i++) {
        if (mass != NULL && mass[i] == 0) {
            continue;
        }
        for (int l = 0; l < LANES; l++) {
            constant[l] &= tile[i * LANES + l] == tile[first * LANES + l];
        }
    }
}

/* The same for lane l of a sorted tile with the masses of its rows. */
static inline int VNAME(is_constant)(const real *sorted, int64_t n, const double *mass, int64_t l)
{
    int64_t low = 0, high = n - 1;
    while (mass != NULL && low < high && mass[low] == 0) {
        low++;
    }
    while (mass != NULL && low < high && mass[high] == 0) {
        high--;
    }
    return sorted[low * LANES + l] == sorted[high * LANES + l];
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

/* Sorts tile t of a panel of keys and pairs it; returns whether everything was finite. */
static inline int VNAME(fit_sorted)(const lns_fit_job *job, const lns_pairing *pairing, key *u, key *v,
                                    const VNAME(fit_work) * work, int *constant, VNAME(fit_sums) * sums)
{
    const int64_t n = job->source.n, m = job->target.n;
    real *const reals_u = (real *)(void *)u, *const reals_v = (real *)(void *)v;
    if (pairing->weighted) {
        VNAME(rank_tile)(u, n, &work->order_u);
        VNAME(rank_tile)(v, m, &work->order_v);
    } else {
        VNAME(sort_tile)(u, n);
        VNAME(sort_tile)(v, m);
    }
    if (!VNAME(sorted_finite)(u, n) || !VNAME(sorted_finite)(v, m)) {
        return 0;
    }
    VNAME(flip_tile)(u, n);
    VNAME(flip_tile)(v, m);
    if (!pairing->weighted) {
        for (int l = 0; l < LANES; l += DOUBLES) {
            VNAME(pair_columns)(reals_u, n, reals_v, m, pairing->segments, pairing->segment_count, l, sums);
        }
        for (int64_t l = 0; l < LANES; l++) {
            constant[l] = VNAME(is_constant)(reals_u, n, NULL, l);
        }
        return 1;
    }
    for (int64_t l = 0; l < LANES; l++) {
        const double *mass_u = VNAME(column_mass)(job->source.mass, n, l, &work->order_u);
        const double *mass_v = VNAME(column_mass)(job->target.mass, m, l, &work->order_v);
        const int64_t count =
            lns_weighted_segments(n, mass_u, pairing->total_u, m, mass_v, pairing->total_v, work->own);
        VNAME(pair_column)(reals_u, reals_v, work->own, count, l, sums);
        constant[l] = VNAME(is_constant)(reals_u, n, mass_u, l);
    }
    return 1;
}

/* Rounding leaves no variance below zero, and none in a constant column. */
static inline void VNAME(store_moments)(const VNAME(fit_sums) * sums, const int *constant, int64_t lanes, int64_t d,
                                        double *moments)
{
    for (int64_t l = 0; l < lanes; l++) {
        const int varies = !constant[l] && !(sums->variance_u[l] <= 0);
        moments[l] = sums->mean_u[l];
        moments[d + l] = sums->mean_v[l];
        moments[2 * d + l] = varies ? sums->variance_u[l] : 0;
        moments[3 * d + l] = varies ? sums->covariance[l] : 0;
        moments[4 * d + l] = sums->variance_v[l] <= 0 ? 0 : sums->variance_v[l];
    }
}

/* Tile t of a panel; returns whether everything was finite. */
static int VNAME(fit_tile)(const lns_fit_job *job, lns_method method, const lns_pairing *pairing, int64_t column,
                           int64_t t, const VNAME(fit_work) * work)
{
    const int64_t n = job->source.n, m = job->target.n;
    const int64_t lanes = job->source.d - column < LANES ? job->source.d - column : LANES;
    key *const u = work->u + t * lns_tile_bytes(n) / (int64_t)sizeof(key);
    key *const v = work->v + t * lns_tile_bytes(m) / (int64_t)sizeof(key);
    VNAME(fit_sums) sums = {0};
    int constant[LANES];
    if (method == LNS_LINEAR || method == LNS_MOMENTS) {
        if (!VNAME(fit_sorted)(job, pairing, u, v, work, constant, &sums)) {
            return 0;
        }
    } else {
        const real *const reals_u = (const real *)(void *)u, *const reals_v = (const real *)(void *)v;
        VNAME(constant_columns)(reals_u, n, job->source.mass, constant);
        if (!VNAME(rows_finite)(reals_u, 0, n) || !VNAME(rows_finite)(reals_v, 0, m)) {
            return 0;
        }
        VNAME(tile_moments)(reals_u, &job->source, pairing->total_u, sums.mean_u, sums.variance_u);
        VNAME(tile_moments)(reals_v, &job->target, pairing->total_v, sums.mean_v, sums.variance_v);
    }
    if (method == LNS_MOMENTS) {
        VNAME(store_moments)(&sums, constant, lanes, job->source.d, job->moments + column);
        return 1;
    }
    for (int64_t l = 0; l < lanes; l++) {
        double slope = 1;
        if (method != LNS_MEAN && !constant[l] && !(sums.variance_u[l] <= 0)) { /* an overflow shows as NaN */
            slope = method == LNS_GAUSSIAN ? sqrt(sums.variance_v[l] / sums.variance_u[l])
                                           : sums.covariance[l] / sums.variance_u[l];
        }
        ((real *)job->weight)[column + l] = (real)slope;
        ((real *)job->bias)[column + l] = (real)(sums.mean_v[l] - slope * sums.mean_u[l]);
    }
    return 1;
}

static void VNAME(fit_units)(void *context, int64_t begin, int64_t end, int thread)
{
    fit_context *c = context;
    const lns_fit_job *job = c->call.jobs;
    char *memory = c->call.work + thread * c->call.thread_bytes;
    const int as_keys = c->method == LNS_LINEAR || c->method == LNS_MOMENTS;
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
            c->call.not_finite[thread] |= !VNAME(fit_tile)(job, c->method, &pairing, column + t * LANES, t, &work);
        }
    }
}

#undef DOUBLES
