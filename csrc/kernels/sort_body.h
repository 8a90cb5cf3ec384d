/* Template body: sorting whole samples. */
#include "kernels/tile_body.h"

static void VNAME(sort_units)(void *context, int64_t begin, int64_t end, int thread)
{
    sort_context *c = context;
    char *work = (char *)c->work + thread * c->work_each;
    key *tile = (key *)(void *)work;
    int64_t k = 0, first = 0; /* module of the unit, and its first unit */
    for (int64_t unit = begin; unit < end; unit++) {
        while (lns_is_past(&c->samples[k], unit, &first)) {
            k++;
        }
        const lns_sample *s = &c->samples[k];
        const int64_t column = (unit - first) * LANES;
        VNAME(load_keys)(s, column, tile);
        VNAME(prefetch_out)(c->out[k], s->n, s->d, column);
        VNAME(prefetch_tile)(s, column + LANES);
        VNAME(sort_tile)(tile, s->n);
        VNAME(flip_tile)(tile, s->n);
        c->bad[thread] |= !VNAME(sorted_finite)((const real *)(void *)tile, s->n);
        VNAME(store_tile)((const real *)(void *)tile, s->n, s->d, column, c->out[k]);
    }
}
