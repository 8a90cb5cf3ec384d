/* Template body: sorting whole samples, and the sorting of tiles for all kernels.
 *
 * Included by sort.c through simd/variants.h, once per working type and CPU variant. */
#include "kernels/simd/tile_body.h"

#include "kernels/simd/network_body.h"

#include "kernels/simd/merge_body.h"

static void VNAME(sort_units)(void *context, int64_t begin, int64_t end, int thread)
{
    sort_context *c = context;
    char *work = (char *)c->work + thread * c->work_each;
    key *tiles = (key *)(void *)work;
    int64_t k = 0, first = 0; /* sample of the unit, and its first unit */
    for (int64_t unit = begin, count; unit < end; unit += count) {
        while (unit >= first + lns_sample_tiles(&c->samples[k])) {
            first += lns_sample_tiles(&c->samples[k++]);
        }
        lns_sample s = c->samples[k];
        s.mass = NULL; /* all rows are sorted */
        const int64_t column = (unit - first) * LANES, size = lns_tile_bytes(s.n);
        const int64_t left = first + lns_sample_tiles(&s) - unit;
        count = lns_panel(s.n, left < end - unit ? left : end - unit);
        VNAME(load_tiles)(&s, column, count, tiles, 1);
        for (int64_t t = 0; t < count; t++) {
            key *tile = tiles + t * size / (int64_t)sizeof(key);
            VNAME(lns_sort_tile)(tile, s.n);
            c->bad[thread] |= !VNAME(sorted_finite)(tile, s.n);
        }
        VNAME(store_tiles)(tiles, &s, column, count, c->out[k], 1);
    }
}
