/* Column sort of whole samples; and, compiled once for all kernels, the sort of a tile (simd/sorting_body.h). */
#include "lineas.h"

#include "core/sizes.h"
#include "core/subnormals.h"
#include "core/threads.h"
#include "kernels/samples.h"
#include "kernels/simd/tile.h"

typedef struct sort_context {
    const lns_sample *samples;
    void *const *out;
    void *work;
    int64_t work_each;
    int bad[LNS_MAX_THREADS];
} sort_context;

#define LNS_BODY "kernels/sort_body.h"
#include "kernels/simd/variants.h"

static const lns_loop_body SORT[LNS_CPU_COUNT][2] = LNS_TABLE(sort_units);

static int64_t work_each(const lns_sample *samples, int64_t count)
{
    int64_t most = 0;
    for (int64_t k = 0; k < count; k++) {
        const int64_t tile = lns_tile_bytes(samples[k].n);
        if (!lns_sample_ok(&samples[k]) || tile < 0) {
            return -1;
        }
        const int64_t panel = lns_panel(samples[k].n, INT64_MAX) * tile;
        most = panel > most ? panel : most;
    }
    return lns_pad(most);
}

static int types_ok(const lns_sample *samples, int64_t count)
{
    for (int64_t k = 0; k < count; k++) {
        if (!lns_sample_typed(&samples[k], &samples[0])) {
            return 0;
        }
    }
    return 1;
}

static int threads_for(const lns_sample *samples, int64_t count, int threads, int64_t *units)
{
    int64_t cost = 0;
    *units = 0;
    for (int64_t k = 0; k < count; k++) {
        cost += lns_sort_cost(samples[k].n, samples[k].d);
        *units += lns_sample_tiles(&samples[k]);
    }
    return lns_thread_count(*units, cost, threads);
}

int64_t lns_sort_worksize(const lns_sample *samples, int64_t count, int threads)
{
    int64_t units;
    const int64_t each = types_ok(samples, count) ? work_each(samples, count) : -1;
    return each < 0 ? -1 : lns_mul(each, threads_for(samples, count, threads, &units));
}

lns_status lns_sort(const lns_sample *samples, int64_t count, int threads, void *work, void *const *out,
                    lns_place *place)
{
    LNS_KEEP_SUBNORMALS;
    lns_place found = {0};
    int64_t units;
    sort_context c = {.samples = samples, .out = out, .work = work, .work_each = work_each(samples, count)};
    if (!types_ok(samples, count)) {
        return LNS_BAD_TYPE;
    }
    if (c.work_each < 0) {
        return LNS_BAD_SIZE;
    }
    if (count == 0) {
        return LNS_OK;
    }
    threads = threads_for(samples, count, threads, &units);
    lns_parallel_for(units, threads, SORT[lns_cpu()][lns_is_double(samples[0].dtype)], &c);
    for (int t = 0; t < threads; t++) {
        if (!c.bad[t]) {
            continue;
        }
        /* Which thread saw it first is chance; the position reported is not. */
        for (found.entry = 0; found.entry < count; found.entry++) {
            if (lns_find_not_finite(&samples[found.entry], &found)) {
                break;
            }
        }
        if (place != NULL) {
            *place = found;
        }
        return LNS_NOT_FINITE;
    }
    return LNS_OK;
}
