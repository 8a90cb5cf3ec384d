/* Template body: a tile in and out, and whether it is finite. Keys are the bits of the reals with the magnitude of
 * negative ones reversed, so that integer order is numerical order: the multiset survives exactly, -0 comes before +0,
 * and whatever is not finite shows in the first or last row. */
#include "kernels/merge_body.h"

/* Columns [column, column + LANES) of the sample as a tile of reals, or of keys where `flipped`; lanes beyond d are
 * zero. Whole rows in the working type are the common case, and copies of a constant size: register by register, since
 * gcc copies a row in narrower pieces, for which the loads that follow would have to wait. */
static LNS_INLINE void VNAME(load)(const lns_sample *s, int64_t column, void *tile, const int flipped)
{
    const int64_t lanes = s->d - column < LANES ? s->d - column : LANES;
    const int direct = lanes == LANES && (s->dtype == LNS_F32 || s->dtype == LNS_F64);
    real values[LANES] = {0};
    for (int64_t i = 0; i < s->n; i++) {
        const real *from = (const real *)s->data + i * s->d + column;
        if (!direct) {
#if REAL_IS_DOUBLE
            lns_load_f64(values, s->data, s->dtype, i * s->d + column, lanes);
#else
            lns_load_f32(values, s->data, s->dtype, i * s->d + column, lanes);
#endif
            from = values;
        }
        for (int p = 0; p < VEC_PARTS; p++) {
            const VNAME(vec) v = VNAME(vec_load)(from + p * VEC_LANES);
            VNAME(vec_store)((real *)tile + i * LANES + p * VEC_LANES, flipped ? VNAME(vec_flip)(v) : v);
        }
    }
}

static inline void VNAME(load_tile)(const lns_sample *s, int64_t column, real *tile)
{
    VNAME(load)(s, column, tile, 0);
}

static inline void VNAME(load_keys)(const lns_sample *s, int64_t column, key *keys)
{
    VNAME(load)(s, column, keys, 1);
}

/* Turns the bits of reals into keys, or keys into the bits of reals, where they lie. */
static inline void VNAME(flip_tile)(void *tile, int64_t n)
{
    for (int64_t i = 0; i < n * VEC_PARTS; i++) {
        char *at = (char *)tile + i * VEC_BYTES;
        VNAME(vec_store)(at, VNAME(vec_flip)(VNAME(vec_load)(at)));
    }
}

/* Asks for a tile's rows ahead of their use: they lie d apart, where no hardware prefetcher looks. */
static inline void VNAME(prefetch_tile)(const lns_sample *s, int64_t column)
{
    const int64_t size = lns_element_size(s->dtype);
    const char *from = (const char *)s->data + column * size;
    for (int64_t i = 0; column < s->d && s->n <= LNS_PREFETCH_ROWS && i < s->n; i++) {
        __builtin_prefetch(from + i * s->d * size);
    }
}

/* The same for rows that are going to be written. */
static inline void VNAME(prefetch_out)(const real *out, int64_t n, int64_t d, int64_t column)
{
    for (int64_t i = 0; n <= LNS_PREFETCH_ROWS && i < n; i++) {
        __builtin_prefetch(out + i * d + column, 1);
    }
}

static inline void VNAME(store_tile)(const real *restrict tile, int64_t n, int64_t d, int64_t column,
                                     real *restrict out)
{
    const int64_t lanes = d - column < LANES ? d - column : LANES;
    for (int64_t i = 0; lanes == LANES && i < n; i++) {
        for (int p = 0; p < VEC_PARTS; p++) {
            VNAME(vec_store)(out + i * d + column + p * VEC_LANES, VNAME(vec_load)(tile + i * LANES + p * VEC_LANES));
        }
    }
    for (int64_t i = 0; lanes < LANES && i < n; i++) {
        memcpy(out + i * d + column, tile + i * LANES, (size_t)lanes * sizeof(real));
    }
}

/* Whether all lanes of rows [begin, end) are finite: the largest exponent marks what is not. */
static inline int VNAME(rows_finite)(const real *tile, int64_t begin, int64_t end)
{
    const key exponent = REAL_IS_DOUBLE ? (key)INT64_C(0x7ff0000000000000) : (key)0x7f800000;
    VNAME(vec) bad = {0};
    key any = 0;
    for (int64_t i = begin * VEC_PARTS; i < end * VEC_PARTS; i++) {
        const VNAME(vec) bits = VNAME(vec_load)(tile + i * VEC_LANES);
        bad |= (VNAME(vec))((bits & exponent) == exponent);
    }
    for (int l = 0; l < VEC_LANES; l++) {
        any |= bad[l];
    }
    return any == 0;
}

static inline int VNAME(sorted_finite)(const real *tile, int64_t n)
{
    return VNAME(rows_finite)(tile, 0, 1) && VNAME(rows_finite)(tile, n - 1, n);
}
