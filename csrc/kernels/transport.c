/* Closed-form maps per neuron. (The full-covariance map is in gaussian.c.) */
#include "lineas.h"

#include <float.h>
#include <math.h>

#include "core/subnormals.h"
#include "kernels/pairs.h"
#include "kernels/samples.h"
#include "kernels/segments.h"
#include "kernels/simd/rank.h"

typedef struct fit_context {
    lns_pair_call call; /* first: lns_pairs_run hands it on */
    lns_method method;
} fit_context;

static lns_ranks fit_ranks(const lns_fit_job *job)
{
    return lns_is_weighted(&job->source, &job->target) ? LNS_ROWS : LNS_NO_RANKS;
}

/* Neighbouring tiles of a job that are loaded together, where `left` are left. */
static int64_t fit_panel(const lns_fit_job *job, int64_t left)
{
    return lns_panel(job->source.n > job->target.n ? job->source.n : job->target.n, left);
}

/* Whether the method pairs quantiles. */
static int fit_sorts(lns_method method)
{
    return method == LNS_LINEAR || method == LNS_MOMENTS;
}

/* A column is constant where variance * share <= mean^2 * bound. */
typedef struct fit_rounding {
    double share, bound;
} fit_rounding;

/* What rounding alone can make of n equal rows: the error that scikit-learn expects of a mean and a variance summed in
 * double (_is_constant_feature), and values as close to each other as numbers of their type can be without being equal.
 * ddof: of the variance. */
static fit_rounding fit_rounding_of(double n, int ddof, lns_dtype dtype)
{
    static const double steps[] = {
        [LNS_F32] = FLT_EPSILON, [LNS_F64] = DBL_EPSILON, [LNS_F16] = 0x1p-10, [LNS_BF16] = 0x1p-7};
    const double of_sums = n * DBL_EPSILON, of_values = steps[dtype];
    return (fit_rounding){(1 - of_sums) * ((n - ddof) / n), of_sums * of_sums + of_values * of_values};
}

static int fit_varies(double variance, double mean, const fit_rounding *rounding)
{
    return variance * rounding->share > mean * mean * rounding->bound;
}

#define LNS_BODY "kernels/transport_body.h"
#include "kernels/simd/variants.h"

static const lns_loop_body UNITS[LNS_CPU_COUNT][2] = LNS_TABLE(fit_units);

static lns_pair pair(const void *jobs, int64_t k)
{
    const lns_fit_job *job = (const lns_fit_job *)jobs + k;
    return (lns_pair){&job->source, &job->target};
}

/* As VNAME(fit_work_at) lays it out. */
static int64_t tile_bytes(const void *jobs, int64_t k)
{
    const lns_fit_job *job = (const lns_fit_job *)jobs + k;
    const int64_t n = job->source.n, m = job->target.n;
    const lns_ranks ranks = fit_ranks(job);
    return fit_panel(job, INT64_MAX) * (lns_tile_bytes(n) + lns_tile_bytes(m)) + lns_order_bytes(n, ranks) +
           lns_order_bytes(m, ranks);
}

static int64_t cost(const void *jobs, int64_t k)
{
    const lns_fit_job *job = (const lns_fit_job *)jobs + k;
    return lns_sort_cost(job->source.n, job->source.d) + lns_sort_cost(job->target.n, job->target.d);
}

static int find_not_finite_source(const void *jobs, int64_t k, lns_place *place)
{
    const lns_fit_job *job = (const lns_fit_job *)jobs + k;
    return lns_find_not_finite_counted(&job->source, place);
}

static const lns_pair_kernel KERNEL = {2, pair, tile_bytes, cost, find_not_finite_source, UNITS};

int64_t lns_fit_worksize(const lns_fit_job *jobs, int64_t count, int threads)
{
    return lns_pairs_worksize(&KERNEL, jobs, count, threads);
}

lns_status lns_fit(const lns_fit_job *jobs, int64_t count, lns_method method, int threads, void *work, lns_place *place)
{
    LNS_KEEP_SUBNORMALS;
    if ((unsigned)method > (unsigned)LNS_MOMENTS) {
        return LNS_BAD_TYPE;
    }
    fit_context c = {.call = {.jobs = jobs, .count = count, .work = work}, .method = method};
    return lns_pairs_run(&KERNEL, &c.call, threads, place);
}
