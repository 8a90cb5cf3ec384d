/* Template body: a tile in and out, and whether it is finite.
 *
 * Included by   rank_body.h, sort_body.h and path_body.h: once per working type and CPU variant of a kernel.
 * Expects       what real.h sets, and tile.h.
 * Leaves        no macro of its own.
 *
 * Keys are the bits of the reals with the magnitude of negative ones reversed, so that integer order is numerical
 * order: the multiset survives exactly, -0 comes before +0, and whatever is not finite shows in the first or last row.
 */
#include "kernels/simd/sorting_body.h"

/* `count` neighbouring whole tiles of the rows that count, row by row over all of them: a row's cache lines follow each
 * other, the rows lie d apart, where no hardware prefetcher looks. Register by register, since gcc copies a row in
 * narrower pieces, for which the loads that follow would have to wait. dtype should be a constant. */
static LNS_INLINE void VNAME(load_whole)(const lns_sample *s, lns_dtype dtype, int64_t column, int64_t count,
                                         key *tiles, const int as_keys)
{
    const int64_t size = lns_tile_bytes(s->n) / (int64_t)sizeof(key);
    const double *const mass = s->mass;
    key *row = tiles;
    for (int64_t i = 0; i < s->n; i++) {
        if (!lns_row_counts(mass, i)) {
            continue;
        }
        int64_t from = i * s->d + column;
        key *to = row;
        row += LANES;
        for (int64_t t = 0; t < count; t++, from += LANES, to += size) {
            for (int p = 0; p < LANES; p += VEC_LANES) {
                const VNAME(vec) v = (VNAME(vec))VNAME(reals_at)(s->data, dtype, from + p);
                VNAME(vec_store)(to + p, as_keys ? VNAME(vec_flip)(v) : v);
            }
        }
    }
}

/* The last tile, of fewer columns: lanes beyond d are zero. */
static LNS_INLINE void VNAME(load_last)(const lns_sample *s, int64_t column, key *tile, const int as_keys)
{
    const int64_t lanes = s->d - column < LANES ? s->d - column : LANES;
    real values[LANES] = {0};
    for (int64_t i = 0; i < s->n; i++) {
        if (!lns_row_counts(s->mass, i)) {
            continue;
        }
#if REAL_IS_DOUBLE
        lns_load_f64(values, s->data, s->dtype, i * s->d + column, lanes);
#else
        lns_load_f32(values, s->data, s->dtype, i * s->d + column, lanes);
#endif
        for (int p = 0; p < LANES; p += VEC_LANES) {
            const VNAME(vec) v = VNAME(vec_load)(values + p);
            VNAME(vec_store)(tile + p, as_keys ? VNAME(vec_flip)(v) : v);
        }
        tile += LANES;
    }
}

/* `count` neighbouring tiles of the sample from `column` on: the bits of its values in the working type, or keys. Rows
 * of weight 0 are left out: nothing that follows sees them. */
static LNS_INLINE void VNAME(load_tiles)(const lns_sample *s, int64_t column, int64_t count, key *tiles,
                                         const int as_keys)
{
    const int64_t size = lns_tile_bytes(s->n) / (int64_t)sizeof(key);
    const int64_t whole = (s->d - column) / LANES < count ? (s->d - column) / LANES : count;
    LNS_CALL_WITH_DTYPE(VNAME(load_whole), s, s->dtype, column, whole, tiles, as_keys);
    if (whole < count) {
        VNAME(load_last)(s, column + whole * LANES, tiles + whole * size, as_keys);
    }
}

/* The other way: out [n, d], zero in the rows that were left out. */
static LNS_INLINE void VNAME(store_tiles)(const key *tiles, const lns_sample *s, int64_t column, int64_t count,
                                          real *out, const int as_keys)
{
    const int64_t d = s->d, size = lns_tile_bytes(s->n) / (int64_t)sizeof(key);
    const int64_t whole = (d - column) / LANES < count ? (d - column) / LANES : count;
    const int64_t columns = whole < count ? d - column : count * LANES;
    const double *const mass = s->mass;
    const key *row = tiles;
    for (int64_t i = 0; i < s->n; i++) {
        real *to = out + i * d + column;
        if (!lns_row_counts(mass, i)) {
            memset(to, 0, (size_t)columns * sizeof(real));
            continue;
        }
        const key *from = row;
        row += LANES;
        for (int64_t t = 0; t < whole; t++, from += size, to += LANES) {
            for (int p = 0; p < LANES; p += VEC_LANES) {
                const VNAME(vec) v = VNAME(vec_load)(from + p);
                VNAME(vec_store)(to + p, as_keys ? VNAME(vec_flip)(v) : v);
            }
        }
        if (whole < count) { /* the last columns */
            for (int64_t l = 0; l < d - column - whole * LANES; l++) {
                const key k = as_keys ? VNAME(flip)(from[l]) : from[l];
                memcpy(to + l, &k, sizeof k);
            }
        }
    }
}

/* Turns the bits of reals into keys, or keys into the bits of reals, where they lie. */
static inline void VNAME(flip_tile)(void *tile, int64_t n)
{
    for (int64_t i = 0; i < n * VEC_PARTS; i++) {
        char *at = (char *)tile + i * VEC_BYTES;
        VNAME(vec_store)(at, VNAME(vec_flip)(VNAME(vec_load)(at)));
    }
}

/* Whether all lanes of rows [begin, end) are finite: the largest exponent marks what is not. */
static inline int VNAME(rows_finite)(const real *tile, int64_t begin, int64_t end)
{
    const key exponent = REAL_IS_DOUBLE ? (key)INT64_C(0x7ff0000000000000) : (key)0x7f800000;
    VNAME(vec) bad = {0};
    for (int64_t i = begin * VEC_PARTS; i < end * VEC_PARTS; i++) {
        const VNAME(vec) bits = VNAME(vec_load)(tile + i * VEC_LANES);
        bad |= (VNAME(vec))((bits & exponent) == exponent);
    }
    return !VNAME(vec_any)(bad);
}

/* Whether sorted keys are those of finite values: what is not shows in the first or last row. */
static inline int VNAME(sorted_finite)(const key *keys, int64_t n)
{
    const key infinity = REAL_IS_DOUBLE ? (key)INT64_C(0x7ff0000000000000) : (key)0x7f800000;
    key bad = 0;
    for (int l = 0; l < LANES; l++) {
        bad |= (key)(keys[l] <= ~infinity) | (key)(keys[(n - 1) * LANES + l] >= infinity);
    }
    return bad == 0;
}
