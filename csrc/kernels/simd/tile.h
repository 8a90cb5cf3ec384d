/* Tiles: LANES neighbouring columns of a sample, n rows of exactly one cache line each. All sorting happens in tiles.
 * Sizes and costs, which no working type changes, stand here; the arithmetic in tile_body.h.
 *
 * Included by   kernels' .c files, before variants.h, and by rank.h.
 * Leaves        LNS_TILE_ROW, LNS_PANEL_BYTES. */
#ifndef LNS_TILE_H
#define LNS_TILE_H

#include <assert.h>
#include <stdint.h>

#include "core/sizes.h"
#include "core/threads.h"
#include "kernels/samples.h"
#include "kernels/simd/load.h"
#include "kernels/simd/network.h"

#define LNS_TILE_ROW 64 /* bytes in a row of a tile */

/* Bytes of the tiles that are loaded together. */
#define LNS_PANEL_BYTES 8192

/* Bytes of a tile of n rows, with room for those that fill its network up. */
static inline int64_t lns_tile_bytes(int64_t n)
{
    return lns_mul(lns_network_rows(n), LNS_TILE_ROW);
}

/* Neighbouring tiles of n rows that are loaded and stored together, where `left` are left: as many as stay in the
 * first-level cache. */
static inline int64_t lns_panel(int64_t n, int64_t left)
{
    const int64_t bytes = lns_tile_bytes(n);
    assert(bytes > 0); /* such sizes were refused */
    const int64_t most = LNS_PANEL_BYTES / bytes;
    return most < 1 ? 1 : most < left ? most : left;
}

/* Columns are handled in whole tiles: how many there are of d columns. */
static inline int64_t lns_tiles(int64_t d, lns_dtype dtype)
{
    const int64_t lanes = LNS_TILE_ROW / (lns_is_double(dtype) ? 8 : 4);
    return (d + lanes - 1) / lanes;
}

/* Tiles of a sample: its units of work. The units of a batch are those of its samples, one sample after the other. */
static inline int64_t lns_sample_tiles(const lns_sample *s)
{
    return lns_tiles(s->d, s->dtype);
}

/* Rough cost in nanoseconds of sorting n * d values, to choose the number of threads. */
static inline int64_t lns_sort_cost(int64_t n, int64_t d)
{
    int bits = 1;
    while ((INT64_C(1) << bits) < n && bits < 30) {
        bits++;
    }
    return lns_cost(0.03 * (double)n * (double)d * bits * (bits + 1));
}

#endif
