/* Tiles: LANES neighbouring columns of a sample, n rows of exactly one cache line each. All sorting happens in tiles.
 * What does not depend on the working type stands here, the rest in tile_body.h. */
#ifndef LNS_TILE_H
#define LNS_TILE_H

#include <assert.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "core/threads.h"
#include "kernels/simd/load.h"
#include "kernels/simd/network.h"

#define LNS_TILE_ROW 64 /* bytes in a row of a tile */

/* Bytes of the tiles that are loaded together. */
#define LNS_PANEL_BYTES 8192

/* What a sorted tile tells of its order: nothing; enough to undo it; the source row of every sorted row. */
typedef enum lns_ranks { LNS_NO_RANKS, LNS_RANKS, LNS_ROWS } lns_ranks;

/* Rows (i of the source, k of the target) whose quantile functions overlap over `mass` of (0, 1). */
typedef struct lns_segment {
    int64_t i, k;
    double mass;
} lns_segment;

/* Rows of the network for n rows: 16, or whole runs, filled up with keys above all others. */
static inline int64_t lns_network_rows(int64_t n)
{
    return n <= 16 ? 16 : (n + LNS_RUN - 1) / LNS_RUN * LNS_RUN;
}

/* Bytes of a tile that such a network sorts. */
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

/* Comparators of the network for n <= LNS_RUN rows. */
static inline int64_t lns_network_size(int64_t n)
{
    return n <= 16 ? LNS_SORT16_COMPARATORS : LNS_RUN_COMPARATORS;
}

/* Whether the order of n rows is remembered as a record of the network. */
static inline int lns_records(int64_t n, lns_ranks ranks)
{
    return ranks == LNS_RANKS && n <= LNS_RUN;
}

/* Bytes of work that remembering the order of a tile of n rows takes (struct order in rank_body.h). */
static inline int64_t lns_order_bytes(int64_t n, lns_ranks ranks)
{
    if (ranks == LNS_NO_RANKS) {
        return 0;
    }
    if (lns_records(n, ranks)) {
        return lns_network_size(n) * LNS_TILE_ROW;
    }
    return 2 * lns_tile_bytes(n) + lns_pad(n * 32) + lns_pad(n * 8);
}

/* The common refinement of {i / n} and {k / m}: at most n + m - 1 segments, for samples of equally weighted rows. */
static inline int64_t lns_segments(int64_t n, int64_t m, lns_segment *out)
{
    const double unit = 1.0 / ((double)n * (double)m);
    int64_t count = 0, i = 0, k = 0, left_i = m, left_k = n;
    while (i < n) {
        const int64_t step = left_i < left_k ? left_i : left_k;
        out[count++] = (lns_segment){i, k, (double)step * unit};
        left_i -= step;
        left_k -= step;
        if (left_i == 0) {
            i++;
            left_i = m;
        }
        if (left_k == 0) {
            k++;
            left_k = n;
        }
    }
    return count;
}

/* The same for the rows of one column in their order, with their weights; a NULL mass means equal weights. The last row
 * of each side takes what rounding leaves over. */
static inline int64_t lns_weighted_segments(int64_t n, const double *mass_u, double total_u, int64_t m,
                                            const double *mass_v, double total_v, lns_segment *out)
{
    int64_t count = 0, i = 0, k = 0;
    double left_u = mass_u ? mass_u[0] / total_u : 1.0 / (double)n;
    double left_v = mass_v ? mass_v[0] / total_v : 1.0 / (double)m;
    for (;;) {
        const int last_u = i == n - 1, last_v = k == m - 1;
        const int take_u = last_v || (!last_u && left_u <= left_v);
        const double mass = take_u ? left_u : left_v;
        out[count++] = (lns_segment){i, k, mass > 0 ? mass : 0};
        if (last_u && last_v) {
            return count;
        }
        if (take_u) {
            left_v -= left_u;
            i++;
            left_u = mass_u ? mass_u[i] / total_u : 1.0 / (double)n;
        } else {
            left_u -= left_v;
            k++;
            left_v = mass_v ? mass_v[k] / total_v : 1.0 / (double)m;
        }
    }
}

/* The segment in which half of the mass is reached: the medians of both samples. */
static inline int64_t lns_middle_segment(const lns_segment *segments, int64_t count)
{
    double total = 0, sum = 0;
    int64_t s = 0;
    for (int64_t k = 0; k < count; k++) {
        total += segments[k].mass;
    }
    while (s < count - 1 && 2 * (sum += segments[s].mass) < total) {
        s++;
    }
    return s;
}

/* Sum of the row weights; the number of rows where they are equal. */
static inline double lns_total_mass(const lns_sample *s)
{
    double sum = 0;
    for (int64_t i = 0; s->mass != NULL && i < s->n; i++) {
        sum += s->mass[i];
    }
    return s->mass != NULL ? sum : (double)s->n;
}

/* Whether ranks are wanted of both samples: rows that are weighted meet by their weights. */
static inline int lns_is_weighted(const lns_sample *u, const lns_sample *v)
{
    return u->mass != NULL || v->mass != NULL;
}

/* How the rows of two samples meet. */
typedef struct lns_pairing {
    int weighted;
    double total_u, total_v; /* of the weights */
    lns_segment *segments;   /* [segment_count] shared by all columns; none where the rows are weighted */
    int64_t segment_count;
} lns_pairing;

/* `segments` has room for u->n + v->n of them. */
static inline lns_pairing lns_pair(const lns_sample *u, const lns_sample *v, lns_segment *segments)
{
    const int weighted = lns_is_weighted(u, v);
    const int64_t count = weighted ? 0 : lns_segments(u->n, v->n, segments);
    return (lns_pairing){weighted, lns_total_mass(u), lns_total_mass(v), segments, count};
}

/* Columns are handled in whole tiles: how many a sample of d columns has. */
static inline int64_t lns_tiles(int64_t d, lns_dtype dtype)
{
    const int64_t lanes = LNS_TILE_ROW / (lns_is_double(dtype) ? 8 : 4);
    return (d + lanes - 1) / lanes;
}

/* Units of a batch are the tiles of its modules, one module after the other. Whether `unit` lies behind the module
 * whose first unit is *first; *first then becomes the next module's. */
static inline int lns_is_past(const lns_sample *module, int64_t unit, int64_t *first)
{
    const int64_t tiles = lns_tiles(module->d, module->dtype);
    const int past = unit - *first >= tiles;
    *first += past ? tiles : 0;
    return past;
}

/* A cost in nanoseconds that does not overflow, nor do sums of it. */
static inline int64_t lns_cost(double cost)
{
    return cost < 1e15 ? (int64_t)cost : INT64_C(1000000000000000);
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
