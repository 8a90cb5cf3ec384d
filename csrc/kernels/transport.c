/* Closed-form maps per neuron. (The full-covariance map is in gaussian.c.) */
#include "lineas.h"

#include <math.h>

#include "core/sizes.h"
#include "core/threads.h"
#include "kernels/samples.h"
#include "kernels/segments.h"
#include "kernels/simd/blocks.h"
#include "kernels/simd/rank.h"

typedef struct fit_context {
    const lns_fit_job *jobs;
    lns_method method;
    void *work;
    int64_t segments_each, work_each;
    int bad[LNS_MAX_THREADS];
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

#define LNS_BODY "kernels/transport_body.h"
#include "kernels/simd/variants.h"

static const lns_loop_body FIT[LNS_CPU_COUNT][2] = LNS_TABLE(fit_units);

static int64_t work_each(const lns_fit_job *jobs, int64_t count, int64_t *segments_each)
{
    int64_t most = 0;
    *segments_each = 0;
    for (int64_t k = 0; k < count; k++) {
        const int64_t n = jobs[k].source.n, m = jobs[k].target.n;
        if (!lns_sample_ok(&jobs[k].source) || !lns_sample_ok(&jobs[k].target) ||
            jobs[k].source.d != jobs[k].target.d || n < 2 || m < 2 || n > UINT32_MAX || m > UINT32_MAX) {
            return -1;
        }
        const lns_ranks ranks = fit_ranks(&jobs[k]);
        const int64_t tiles = fit_panel(&jobs[k], INT64_MAX);
        const int64_t segments = lns_pad((n + m) * (int64_t)sizeof(lns_segment));
        const int64_t panels = tiles * (lns_tile_bytes(n) + lns_tile_bytes(m));
        const int64_t rest = panels + lns_order_bytes(n, ranks) + lns_order_bytes(m, ranks) + segments;
        *segments_each = segments > *segments_each ? segments : *segments_each;
        most = rest > most ? rest : most;
    }
    return lns_pad(*segments_each + most);
}

static int threads_for(const lns_fit_job *jobs, int64_t count, int threads, int64_t *units)
{
    int64_t cost = 0;
    *units = 0;
    for (int64_t k = 0; k < count; k++) {
        cost += lns_sort_cost(jobs[k].source.n, jobs[k].source.d) + lns_sort_cost(jobs[k].target.n, jobs[k].target.d);
        *units += lns_sample_tiles(&jobs[k].source);
    }
    return lns_thread_count(*units, cost, threads);
}

int64_t lns_fit_worksize(const lns_fit_job *jobs, int64_t count, int threads)
{
    int64_t units, segments;
    const int64_t each = work_each(jobs, count, &segments);
    return each < 0 ? -1 : lns_mul(each, threads_for(jobs, count, threads, &units));
}

lns_status lns_fit(const lns_fit_job *jobs, int64_t count, lns_method method, int threads, void *work, lns_place *place)
{
    lns_place found = {0};
    int64_t units;
    lns_status status = LNS_OK;
    fit_context c = {.jobs = jobs, .method = method, .work = work};
    c.work_each = work_each(jobs, count, &c.segments_each);
    if (c.work_each < 0) {
        return LNS_BAD_SIZE;
    }
    for (int64_t k = 0; k < 2 * count && status == LNS_OK; k++) {
        found.entry = k / 2;
        found.argument = (int)(k % 2);
        status = lns_check_mass(k % 2 ? &jobs[k / 2].target : &jobs[k / 2].source, &found);
    }
    if (status == LNS_OK && count > 0) {
        int bad = 0;
        threads = threads_for(jobs, count, threads, &units);
        lns_parallel_for(units, threads, FIT[lns_cpu()][lns_is_double(jobs[0].source.dtype)], &c);
        for (int t = 0; t < threads; t++) {
            bad |= c.bad[t];
        }
        /* Which thread saw a bad value first is chance; the position reported is not. */
        for (int64_t k = 0; bad && k < 2 * count && status == LNS_OK; k++) {
            const lns_sample *s = k % 2 ? &jobs[k / 2].target : &jobs[k / 2].source;
            found.entry = k / 2;
            found.argument = (int)(k % 2);
            status = lns_find_not_finite(s, &found) ? LNS_NOT_FINITE : LNS_OK;
        }
    }
    if (status != LNS_OK && place != NULL) {
        *place = found;
    }
    return status;
}
