/* Template body: sorting a tile. Keys are the bits of the reals with the magnitude of negative ones reversed, so that
 * integer order is numerical order: the multiset survives exactly, -0 comes before +0, and whatever is not finite shows
 * in the first or last row. */
#include "kernels/network_body.h"

typedef struct VNAME(pair) {
    ukey bits;
    uint32_t row;
} VNAME(pair);

/* Work memory for one tile, and its ranks once VNAME(rank_tile) has run. */
typedef struct VNAME(order) {
    VNAME(pair) * pairs; /* [2, n] */
    uint32_t *rows;      /* [LANES, n] source row of each sorted row; NULL where ranks are not wanted */
    VNAME(mask) * masks; /* [comparators, VEC_PARTS] what each comparator swapped */
} VNAME(order);

static inline VNAME(order) VNAME(order_at)(char **work, int64_t n, int ranked)
{
    VNAME(order) o = {0};
    o.pairs = (VNAME(pair) *)(void *)*work;
    *work += lns_pad(n * 32);
    if (ranked) {
        o.rows = (uint32_t *)(void *)*work;
        *work += n * LNS_TILE_ROW;
        o.masks = (VNAME(mask) *)(void *)*work;
        *work += n <= LNS_RECORD_ROWS ? lns_network_size(n) * LNS_TILE_ROW : 0;
    }
    return o;
}

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

/* Sorts pairs [n] by (bits, row) with the help of spare [n]; returns which of the two holds the result. */
static inline VNAME(pair) * VNAME(sort_pairs)(VNAME(pair) * pairs, VNAME(pair) * spare, int64_t n)
{
    if (n <= 48) {
        for (int64_t i = 1; i < n; i++) {
            const VNAME(pair) p = pairs[i];
            int64_t k = i;
            for (; k > 0 && pairs[k - 1].bits > p.bits; k--) {
                pairs[k] = pairs[k - 1];
            }
            pairs[k] = p;
        }
        return pairs;
    }
    for (int shift = 0; shift < KEY_BITS; shift += 8) {
        int64_t start[256] = {0}, sum = 0;
        for (int64_t i = 0; i < n; i++) {
            start[pairs[i].bits >> shift & 255]++;
        }
        if (start[pairs[0].bits >> shift & 255] == n) {
            continue; /* all share this digit */
        }
        for (int digit = 0; digit < 256; digit++) {
            const int64_t size = start[digit];
            start[digit] = sum;
            sum += size;
        }
        for (int64_t i = 0; i < n; i++) {
            spare[start[pairs[i].bits >> shift & 255]++] = pairs[i];
        }
        VNAME(pair) *swap = pairs;
        pairs = spare;
        spare = swap;
    }
    return pairs;
}

/* Sorts each column of a tile of keys by radix; remembers the rows where o->rows is not NULL. */
static inline void VNAME(sort_by_column)(key *keys, int64_t n, const VNAME(order) * o)
{
    const ukey sign = (ukey)1 << (KEY_BITS - 1);
    for (int l = 0; l < LANES; l++) {
        for (int64_t i = 0; i < n; i++) {
            o->pairs[i] = (VNAME(pair)){(ukey)keys[i * LANES + l] ^ sign, (uint32_t)i};
        }
        const VNAME(pair) *sorted = VNAME(sort_pairs)(o->pairs, o->pairs + n, n);
        for (int64_t i = 0; i < n; i++) {
            keys[i * LANES + l] = (key)(sorted[i].bits ^ sign);
            if (o->rows != NULL) {
                o->rows[l * n + i] = sorted[i].row;
            }
        }
    }
}

/* Sorts every column of a tile of keys, which has room for lns_network_rows(n) rows. */
static inline void VNAME(sort_tile)(key *keys, int64_t n, const VNAME(order) * o)
{
    if (n > LNS_NETWORK_ROWS) {
        const VNAME(order) unranked = {o->pairs, NULL, NULL};
        VNAME(sort_by_column)(keys, n, &unranked);
    } else {
        VNAME(network)(keys, n, NULL, LNS_PLAIN);
    }
}

/* The same, and remembers the order for VNAME(unrank_tile). */
static inline void VNAME(rank_tile)(key *keys, int64_t n, const VNAME(order) * o)
{
    if (n > LNS_RECORD_ROWS) {
        VNAME(sort_by_column)(keys, n, o);
    } else {
        VNAME(network)(keys, n, o->masks, LNS_RECORD);
    }
}

/* Sends row i of each column of the tile to the source row of the i-th smallest value, by the remembered rows. */
static inline void VNAME(unrank_by_column)(real *tile, int64_t n, const VNAME(order) * o)
{
    real *column = (real *)(void *)o->pairs;
    for (int l = 0; l < LANES; l++) {
        const uint32_t *rows = o->rows + l * n;
        for (int64_t i = 0; i < n; i++) {
            column[rows[i]] = tile[i * LANES + l];
        }
        for (int64_t i = 0; i < n; i++) {
            tile[i * LANES + l] = column[i];
        }
    }
}

/* Undoes the order that VNAME(rank_tile) remembered, in a tile of lns_network_rows(n) rows. */
static inline void VNAME(unrank_tile)(real *tile, int64_t n, const VNAME(order) * o)
{
    if (n > LNS_RECORD_ROWS) {
        VNAME(unrank_by_column)(tile, n, o);
    } else {
        VNAME(network_undo)((key *)(void *)tile, n, o->masks);
    }
}
