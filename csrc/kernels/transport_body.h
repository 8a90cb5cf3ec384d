/* Template body: closed-form maps of a tile of the source to a tile of the target. */
#include "kernels/rank_body.h"

/* Means, variance of u and covariance of the paired quantiles of `width` columns (a constant: 1 or 8, so that the sums
 * stay in registers). Sums are taken around the median rows: a large mean costs no digits. */
static inline __attribute__((always_inline)) void
VNAME(quantile_sums)(const real *u, int64_t n, const real *v, int64_t m, const lns_segment *segments, int64_t count,
                     double *restrict mean_u, double *restrict mean_v, double *restrict variance,
                     double *restrict covariance, const int width)
{
    double middle_u[8], middle_v[8], sum_u[8] = {0}, sum_v[8] = {0}, sum_uu[8] = {0}, sum_uv[8] = {0};
    for (int l = 0; l < width; l++) {
        middle_u[l] = (double)u[n / 2 * LANES + l];
        middle_v[l] = (double)v[m / 2 * LANES + l];
    }
    for (int64_t s = 0; s < count; s++) {
        const real *a = u + segments[s].i * LANES, *b = v + segments[s].k * LANES;
        const double mass = segments[s].mass;
        for (int l = 0; l < width; l++) {
            const double x = (double)a[l] - middle_u[l], y = (double)b[l] - middle_v[l], weighted = mass * x;
            sum_u[l] += weighted;
            sum_v[l] += mass * y;
            sum_uu[l] += weighted * x;
            sum_uv[l] += weighted * y;
        }
    }
    for (int l = 0; l < width; l++) {
        mean_u[l] = sum_u[l] + middle_u[l];
        mean_v[l] = sum_v[l] + middle_v[l];
        variance[l] = sum_uu[l] - sum_u[l] * sum_u[l];
        covariance[l] = sum_uv[l] - sum_u[l] * sum_v[l];
    }
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

/* A constant column, told exactly: rounding can leave its variance a little above zero. */
static inline void VNAME(constant_columns)(const real *tile, int64_t n, int *constant)
{
    for (int l = 0; l < LANES; l++) {
        constant[l] = 1;
    }
    for (int64_t i = 1; i < n; i++) {
        for (int l = 0; l < LANES; l++) {
            constant[l] &= tile[i * LANES + l] == tile[l];
        }
    }
}

static int VNAME(fit_tile)(const lns_fit_job *job, int64_t column, lns_method method, const lns_segment *shared,
                           int64_t shared_count, double total_u, double total_v, char *work)
{
    const lns_sample *source = &job->source, *target = &job->target;
    const int64_t n = source->n, m = target->n, lanes = source->d - column < LANES ? source->d - column : LANES;
    const int weighted = source->mass != NULL || target->mass != NULL;
    const lns_ranks ranks = weighted ? LNS_ROWS : LNS_NO_RANKS;
    double mean_u[LANES], mean_v[LANES], variance[LANES], other[LANES];
    int constant[LANES];

    real *u = (real *)(void *)work;
    work += lns_tile_bytes(n);
    real *v = (real *)(void *)work;
    work += lns_tile_bytes(m);
    const VNAME(order) order_u = VNAME(order_at)(&work, n, ranks);
    const VNAME(order) order_v = VNAME(order_at)(&work, m, ranks);
    lns_segment *own = (lns_segment *)(void *)work;

    if (method != LNS_LINEAR) {
        VNAME(load_tiles)(source, column, 1, (key *)(void *)u, 0);
        VNAME(load_tiles)(target, column, 1, (key *)(void *)v, 0);
        VNAME(constant_columns)(u, n, constant);
        if (!VNAME(rows_finite)(u, 0, n) || !VNAME(rows_finite)(v, 0, m)) {
            return 0;
        }
        VNAME(tile_moments)(u, source, total_u, mean_u, variance);
        VNAME(tile_moments)(v, target, total_v, mean_v, other);
    } else {
        VNAME(load_tiles)(source, column, 1, (key *)(void *)u, 1);
        VNAME(load_tiles)(target, column, 1, (key *)(void *)v, 1);
        if (weighted) {
            VNAME(rank_tile)((key *)(void *)u, n, &order_u);
            VNAME(rank_tile)((key *)(void *)v, m, &order_v);
        } else {
            VNAME(sort_tile)((key *)(void *)u, n);
            VNAME(sort_tile)((key *)(void *)v, m);
        }
        if (!VNAME(sorted_finite)((key *)(void *)u, n) || !VNAME(sorted_finite)((key *)(void *)v, m)) {
            return 0;
        }
        VNAME(flip_tile)(u, n);
        VNAME(flip_tile)(v, m);
        for (int l = 0; l < LANES; l++) {
            constant[l] = u[l] == u[(n - 1) * LANES + l];
        }
        for (int l = 0; !weighted && l < LANES; l += 8) {
            VNAME(quantile_sums)(u + l, n, v + l, m, shared, shared_count, mean_u + l, mean_v + l, variance + l,
                                 other + l, 8);
        }
        for (int64_t l = 0; weighted && l < lanes; l++) {
            const int64_t count = lns_weighted_segments(n, VNAME(column_mass)(source->mass, n, l, &order_u), total_u, m,
                                                        VNAME(column_mass)(target->mass, m, l, &order_v), total_v, own);
            VNAME(quantile_sums)(u + l, n, v + l, m, own, count, mean_u + l, mean_v + l, variance + l, other + l, 1);
        }
    }
    for (int64_t l = 0; l < lanes; l++) {
        double slope = 1;
        if (method != LNS_MEAN && !constant[l] && !(variance[l] <= 0)) { /* an overflow shows as NaN */
            slope = method == LNS_GAUSSIAN ? sqrt(other[l] / variance[l]) : other[l] / variance[l];
        }
        ((real *)job->weight)[column + l] = (real)slope;
        ((real *)job->bias)[column + l] = (real)(mean_v[l] - slope * mean_u[l]);
    }
    return 1;
}

static void VNAME(fit_units)(void *context, int64_t begin, int64_t end, int thread)
{
    fit_context *c = context;
    char *work = (char *)c->work + thread * c->work_each;
    lns_segment *segments = (lns_segment *)(void *)work;
    int64_t k = 0, first = 0, prepared = -1, count = 0;
    double total_u = 0, total_v = 0;
    for (int64_t unit = begin; unit < end; unit++) {
        while (lns_is_past(&c->jobs[k].source, unit, &first)) {
            k++;
        }
        const lns_fit_job *job = &c->jobs[k];
        if (prepared != k) {
            prepared = k;
            total_u = lns_total_mass(&job->source);
            total_v = lns_total_mass(&job->target);
            count = lns_segments(job->source.n, job->target.n, segments);
        }
        c->bad[thread] |= !VNAME(fit_tile)(job, (unit - first) * LANES, c->method, segments, count, total_u, total_v,
                                           work + c->segments_each);
    }
}
