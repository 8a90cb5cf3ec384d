#include "kernels/pairs.h"

#include "core/sizes.h"
#include "kernels/samples.h"
#include "kernels/segments.h"
#include "kernels/simd/tile.h"

static int sizes_ok(const lns_pair *p, int64_t least_rows)
{
    return lns_sample_ok(p->u) && lns_sample_ok(p->v) && p->u->d == p->v->d && p->u->n >= least_rows &&
           p->v->n >= least_rows && p->u->n <= UINT32_MAX && p->v->n <= UINT32_MAX;
}

/* Kernels are chosen by the first sample: all samples share its working type. */
static int types_ok(const lns_pair_kernel *kernel, const void *jobs, int64_t count)
{
    for (int64_t k = 0; k < count; k++) {
        const lns_pair p = kernel->pair(jobs, k), first = kernel->pair(jobs, 0);
        if (!lns_sample_typed(p.u, first.u) || !lns_sample_typed(p.v, first.u)) {
            return 0;
        }
    }
    return 1;
}

/* Bytes of work that a thread takes: enough for any of the jobs. -1 where sizes are not acceptable. */
static int64_t thread_bytes(const lns_pair_kernel *kernel, const void *jobs, int64_t count, int64_t *segment_bytes)
{
    int64_t most = 0;
    *segment_bytes = 0;
    for (int64_t k = 0; k < count; k++) {
        const lns_pair p = kernel->pair(jobs, k);
        if (!sizes_ok(&p, kernel->least_rows)) {
            return -1;
        }
        const int64_t segments = lns_pad((p.u->n + p.v->n) * (int64_t)sizeof(lns_segment));
        const int64_t bytes = kernel->tile_bytes(jobs, k) + segments;
        *segment_bytes = segments > *segment_bytes ? segments : *segment_bytes;
        most = bytes > most ? bytes : most;
    }
    return lns_pad(*segment_bytes + most);
}

static int threads_for(const lns_pair_kernel *kernel, const void *jobs, int64_t count, int threads, int64_t *units)
{
    int64_t cost = 0;
    *units = 0;
    for (int64_t k = 0; k < count; k++) {
        cost += kernel->cost(jobs, k);
        *units += lns_sample_tiles(kernel->pair(jobs, k).u);
    }
    return lns_thread_count(*units, cost, threads);
}

int64_t lns_pairs_worksize(const lns_pair_kernel *kernel, const void *jobs, int64_t count, int threads)
{
    int64_t units, segments;
    const int64_t each = types_ok(kernel, jobs, count) ? thread_bytes(kernel, jobs, count, &segments) : -1;
    return each < 0 ? -1 : lns_mul(each, threads_for(kernel, jobs, count, threads, &units));
}

static lns_status check_masses(const lns_pair_kernel *kernel, const lns_pair_call *call, lns_place *place)
{
    lns_status status = LNS_OK;
    for (int64_t k = 0; k < call->count && status == LNS_OK; k++) {
        const lns_pair p = kernel->pair(call->jobs, k);
        *place = (lns_place){.entry = k, .argument = 0};
        status = lns_check_mass(p.u, place);
        if (status == LNS_OK) {
            place->argument = 1;
            status = lns_check_mass(p.v, place);
        }
    }
    return status;
}

/* Which thread saw a bad value first is chance; the position reported is not: the first in the order of the batch. */
static void find_not_finite(const lns_pair_kernel *kernel, const lns_pair_call *call, lns_place *place)
{
    *place = (lns_place){0};
    for (place->entry = 0; place->entry < call->count; place->entry++) {
        place->argument = 0;
        if (kernel->find_not_finite_u(call->jobs, place->entry, place)) {
            return;
        }
        place->argument = 1;
        if (lns_find_not_finite_counted(kernel->pair(call->jobs, place->entry).v, place)) {
            return;
        }
    }
}

lns_status lns_pairs_run(const lns_pair_kernel *kernel, lns_pair_call *call, int threads, lns_place *place)
{
    lns_place found = {0};
    if (!types_ok(kernel, call->jobs, call->count)) {
        return LNS_BAD_TYPE;
    }
    call->thread_bytes = thread_bytes(kernel, call->jobs, call->count, &call->segment_bytes);
    if (call->thread_bytes < 0) {
        return LNS_BAD_SIZE;
    }
    lns_status status = check_masses(kernel, call, &found);
    if (status == LNS_OK && call->count > 0) {
        const int is_double = kernel->pair(call->jobs, 0).u->dtype == LNS_F64;
        int64_t units;
        int bad = 0;
        threads = threads_for(kernel, call->jobs, call->count, threads, &units);
        lns_parallel_for(units, threads, kernel->units[lns_cpu()][is_double], call);
        for (int t = 0; t < threads; t++) {
            bad |= call->not_finite[t];
        }
        if (bad) {
            find_not_finite(kernel, call, &found);
            status = LNS_NOT_FINITE;
        }
    }
    if (status != LNS_OK && place != NULL) {
        *place = found;
    }
    return status;
}
