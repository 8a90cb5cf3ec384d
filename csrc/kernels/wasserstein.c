/* Quantile W2 per neuron, its gradient, and both through an affine map. */
#include "lineas.h"

#include <math.h>

#include "core/sizes.h"
#include "core/subnormals.h"
#include "kernels/pairs.h"
#include "kernels/samples.h"
#include "kernels/segments.h"
#include "kernels/simd/blocks.h"
#include "kernels/simd/rank.h"

typedef struct w2_context {
    lns_pair_call call; /* first: lns_pairs_run hands it on */
    int v_sorted;
} w2_context;

static int wants_gradient(const lns_w2_job *job)
{
    return job->grad_u != NULL || job->grad_weight != NULL || job->grad_bias != NULL;
}

/* Neighbouring tiles of a job that are loaded together, where `left` are left. */
static int64_t w2_panel(const lns_w2_job *job, int64_t left)
{
    return lns_panel(job->u.n > job->v.n ? job->u.n : job->v.n, left);
}

#define LNS_BODY "kernels/wasserstein_body.h"
#include "kernels/simd/variants.h"

static const lns_loop_body UNITS[LNS_CPU_COUNT][2] = LNS_TABLE(w2_units);

static lns_pair pair(const void *jobs, int64_t k)
{
    const lns_w2_job *job = (const lns_w2_job *)jobs + k;
    return (lns_pair){&job->u, &job->v};
}

/* As VNAME(w2_work_at) lays it out. With a map, or without a gradient, that takes less than this. */
static int64_t tile_bytes(const void *jobs, int64_t k)
{
    const lns_w2_job *job = (const lns_w2_job *)jobs + k;
    const int weighted = lns_is_weighted(&job->u, &job->v);
    const int64_t n = job->u.n, m = job->v.n, panel = w2_panel(job, INT64_MAX);
    return (2 * panel + 1) * lns_tile_bytes(n) + panel * lns_tile_bytes(m) +
           lns_order_bytes(n, weighted ? LNS_ROWS : LNS_RANKS) + lns_order_bytes(m, weighted ? LNS_ROWS : LNS_NO_RANKS);
}

/* Two sorts of u stand for one and the gradient's way back. */
static int64_t cost(const void *jobs, int64_t k)
{
    const lns_w2_job *job = (const lns_w2_job *)jobs + k;
    return 2 * lns_sort_cost(job->u.n, job->u.d) + lns_sort_cost(job->v.n, job->v.d);
}

/* The first value of weight * z + bias that is not finite, in a row that counts. */
static int find_not_finite_u(const void *jobs, int64_t k, lns_place *place)
{
    const lns_w2_job *job = (const lns_w2_job *)jobs + k;
    const lns_sample *s = &job->u;
    if (job->weight == NULL) {
        return lns_find_not_finite_counted(s, place);
    }
    for (int64_t i = 0; i < s->n; i++) {
        for (int64_t j = 0; lns_row_counts(s->mass, i) && j < s->d; j++) {
            double value = lns_value(s->data, s->dtype, i * s->d + j);
            if (lns_is_double(s->dtype)) {
                value = ((const double *)job->weight)[j] * value + ((const double *)job->bias)[j];
            } else {
                const float product = ((const float *)job->weight)[j] * (float)value;
                value = (double)(product + ((const float *)job->bias)[j]);
            }
            if (!isfinite(value)) {
                place->row = i;
                place->column = j;
                place->value = value;
                return 1;
            }
        }
    }
    return 0;
}

static const lns_pair_kernel KERNEL = {1, pair, tile_bytes, cost, find_not_finite_u, UNITS};

int64_t lns_wasserstein_worksize(const lns_w2_job *jobs, int64_t count, int threads)
{
    return lns_pairs_worksize(&KERNEL, jobs, count, threads);
}

lns_status lns_wasserstein(const lns_w2_job *jobs, int64_t count, int v_sorted, int threads, void *work,
                           lns_place *place)
{
    LNS_KEEP_SUBNORMALS;
    w2_context c = {.call = {.jobs = jobs, .count = count, .work = work}, .v_sorted = v_sorted};
    return lns_pairs_run(&KERNEL, &c.call, threads, place);
}
