/* Quantile W2 per neuron, its gradient, and both through an affine map. */
#include "lineas.h"

#include <math.h>

#include "core/sizes.h"
#include "core/threads.h"
#include "kernels/samples.h"
#include "kernels/segments.h"
#include "kernels/simd/blocks.h"
#include "kernels/simd/rank.h"

typedef struct w2_context {
    const lns_w2_job *jobs;
    void *work;
    int64_t segments_each, work_each;
    int v_sorted;
    int bad[LNS_MAX_THREADS];
} w2_context;

static int lns_w2_gradient(const lns_w2_job *job)
{
    return job->grad_u != NULL || job->grad_weight != NULL || job->grad_bias != NULL;
}

/* Tiles in a panel of the job, of which `left` are left. */
static int64_t lns_w2_panel(const lns_w2_job *job, int64_t left)
{
    return lns_panel(job->u.n > job->v.n ? job->u.n : job->v.n, left);
}

#define LNS_BODY "kernels/wasserstein_body.h"
#include "kernels/simd/variants.h"

static const lns_loop_body W2[LNS_CPU_COUNT][2] = LNS_TABLE(w2_units);

/* Work of one thread: the job's shared segments, then what its tile takes. -1 where sizes are not acceptable. */
static int64_t work_each(const lns_w2_job *jobs, int64_t count, int64_t *segments_each)
{
    int64_t most = 0;
    *segments_each = 0;
    for (int64_t k = 0; k < count; k++) {
        const lns_w2_job *job = &jobs[k];
        const int64_t n = job->u.n, m = job->v.n;
        if (!lns_sample_ok(&job->u) || !lns_sample_ok(&job->v) || job->u.d != job->v.d || n > UINT32_MAX ||
            m > UINT32_MAX) {
            return -1;
        }
        const int weighted = lns_is_weighted(&job->u, &job->v);
        const int64_t segments = lns_pad((n + m) * (int64_t)sizeof(lns_segment));
        const int64_t panel = lns_w2_panel(job, INT64_MAX);
        const int64_t tiles = (2 * panel + 1) * lns_tile_bytes(n) + panel * lns_tile_bytes(m);
        const int64_t orders = lns_order_bytes(n, weighted ? LNS_ROWS : LNS_RANKS) +
                               lns_order_bytes(m, weighted ? LNS_ROWS : LNS_NO_RANKS);
        *segments_each = segments > *segments_each ? segments : *segments_each;
        most = tiles + orders + segments > most ? tiles + orders + segments : most;
    }
    return lns_pad(*segments_each + most);
}

static int threads_for(const lns_w2_job *jobs, int64_t count, int threads, int64_t *units)
{
    int64_t cost = 0;
    *units = 0;
    for (int64_t k = 0; k < count; k++) {
        cost += 2 * lns_sort_cost(jobs[k].u.n, jobs[k].u.d) + lns_sort_cost(jobs[k].v.n, jobs[k].v.d);
        *units += lns_sample_tiles(&jobs[k].u);
    }
    return lns_thread_count(*units, cost, threads);
}

int64_t lns_wasserstein_worksize(const lns_w2_job *jobs, int64_t count, int threads)
{
    int64_t units, segments;
    const int64_t each = work_each(jobs, count, &segments);
    return each < 0 ? -1 : lns_mul(each, threads_for(jobs, count, threads, &units));
}

/* The first value of job's weight * z + bias that is not finite. */
static int find_through_map(const lns_w2_job *job, lns_place *place)
{
    const lns_sample *s = &job->u;
    for (int64_t i = 0; i < s->n; i++) {
        for (int64_t j = 0; j < s->d; j++) {
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

/* Which thread saw a bad value first is chance; the position reported is not. */
static void find_first(const lns_w2_job *jobs, int64_t count, lns_place *place)
{
    for (place->entry = 0; place->entry < count; place->entry++) {
        const lns_w2_job *job = &jobs[place->entry];
        place->argument = 0;
        if (job->weight != NULL ? find_through_map(job, place) : lns_find_not_finite(&job->u, place)) {
            return;
        }
        place->argument = 1;
        if (lns_find_not_finite(&job->v, place)) {
            return;
        }
    }
}

lns_status lns_wasserstein(const lns_w2_job *jobs, int64_t count, int v_sorted, int threads, void *work,
                           lns_place *place)
{
    lns_place found = {0};
    int64_t units;
    w2_context c = {.jobs = jobs, .work = work, .v_sorted = v_sorted};
    lns_status status = LNS_OK;
    c.work_each = work_each(jobs, count, &c.segments_each);
    if (c.work_each < 0) {
        return LNS_BAD_SIZE;
    }
    for (int64_t k = 0; k < 2 * count && status == LNS_OK; k++) {
        found.entry = k / 2;
        found.argument = (int)(k % 2);
        status = lns_check_mass(k % 2 ? &jobs[k / 2].v : &jobs[k / 2].u, &found);
    }
    if (status == LNS_OK && count > 0) {
        threads = threads_for(jobs, count, threads, &units);
        lns_parallel_for(units, threads, W2[lns_cpu()][lns_is_double(jobs[0].u.dtype)], &c);
        for (int t = 0; t < threads && status == LNS_OK; t++) {
            if (c.bad[t]) {
                find_first(jobs, count, &found);
                status = LNS_NOT_FINITE;
            }
        }
    }
    if (status != LNS_OK && place != NULL) {
        *place = found;
    }
    return status;
}
