/* Template body: sorting a tile. Keys are the bits of the reals with the magnitude of negative ones reversed, so that
 * integer order is numerical order: the multiset survives exactly, -0 comes before +0, and whatever is not finite shows
 * in the first or last row. */
#include "kernels/tile.h"

typedef struct VNAME(pair) {
    ukey bits;
    uint32_t row;
} VNAME(pair);

/* Work memory for one tile, and its ranks once VNAME(rank_tile) has run. */
typedef struct VNAME(order) {
    key *keys;           /* [lns_network_rows(n), LANES] */
    VNAME(pair) * pairs; /* [2, n] */
    uint32_t *rows;      /* [LANES, n] source row of each sorted row; NULL where ranks are not wanted */
    key *masks;          /* [comparators, LANES] all bits set where the comparator swapped */
} VNAME(order);

static inline VNAME(order) VNAME(order_at)(char **work, int64_t n, int ranked)
{
    VNAME(order) o = {0};
    o.keys = (key *)(void *)*work;
    *work += lns_network_rows(n) * LNS_TILE_ROW;
    o.pairs = (VNAME(pair) *)(void *)*work;
    *work += lns_pad(n * 32);
    if (ranked) {
        o.rows = (uint32_t *)(void *)*work;
        *work += n * LNS_TILE_ROW;
        o.masks = (key *)(void *)*work;
        *work += n <= LNS_RECORD_ROWS ? lns_network_size(n) * LNS_TILE_ROW : 0;
    }
    return o;
}

static inline key VNAME(flip)(key k)
{
    return k ^ (key)((ukey)(k >> (KEY_BITS - 1)) >> 1);
}

static inline void VNAME(to_keys)(const real *restrict tile, key *restrict keys, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        key k;
        memcpy(&k, &tile[i], sizeof k);
        keys[i] = VNAME(flip)(k);
    }
}

static inline void VNAME(from_keys)(const key *restrict keys, real *restrict tile, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        const key k = VNAME(flip)(keys[i]);
        memcpy(&tile[i], &k, sizeof k);
    }
}

/* Columns [column, column + LANES) of the sample as a tile; lanes beyond d are zero. Whole rows in the working type are
 * the common case, and copies of a constant size. */
static inline void VNAME(load_tile)(const lns_sample *s, int64_t column, real *restrict tile)
{
    const int64_t lanes = s->d - column < LANES ? s->d - column : LANES;
    if (lanes == LANES && (s->dtype == LNS_F32 || s->dtype == LNS_F64)) {
        const real *restrict from = (const real *)s->data + column;
        for (int64_t i = 0; i < s->n; i++) {
            for (int l = 0; l < LANES; l++) { /* not memcpy: its narrower stores would stall the loads that follow */
                tile[i * LANES + l] = from[i * s->d + l];
            }
        }
        return;
    }
    memset(tile, 0, (size_t)s->n * LNS_TILE_ROW);
    for (int64_t i = 0; i < s->n; i++) {
#if REAL_IS_DOUBLE
        lns_load_f64(tile + i * LANES, s->data, s->dtype, i * s->d + column, lanes);
#else
        lns_load_f32(tile + i * LANES, s->data, s->dtype, i * s->d + column, lanes);
#endif
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

static inline void VNAME(store_tile)(const real *restrict tile, int64_t n, int64_t d, int64_t column,
                                     real *restrict out)
{
    const int64_t lanes = d - column < LANES ? d - column : LANES;
    for (int64_t i = 0; lanes == LANES && i < n; i++) {
        for (int l = 0; l < LANES; l++) {
            out[i * d + column + l] = tile[i * LANES + l];
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
    key bad[LANES] = {0}, any = 0;
    for (int64_t i = begin; i < end; i++) {
        key bits[LANES];
        memcpy(bits, tile + i * LANES, sizeof bits);
        for (int l = 0; l < LANES; l++) {
            bad[l] |= (key)((bits[l] & exponent) == exponent);
        }
    }
    for (int l = 0; l < LANES; l++) {
        any |= bad[l];
    }
    return any == 0;
}

static inline int VNAME(sorted_finite)(const real *tile, int64_t n)
{
    return VNAME(rows_finite)(tile, 0, 1) && VNAME(rows_finite)(tile, n - 1, n);
}

static inline void VNAME(exchange)(key *restrict a, key *restrict b)
{
    for (int l = 0; l < LANES; l++) {
        const key x = a[l], y = b[l];
        a[l] = x < y ? x : y;
        b[l] = x < y ? y : x;
    }
}

static inline void VNAME(exchange_recorded)(key *restrict a, key *restrict b, key *restrict mask)
{
    for (int l = 0; l < LANES; l++) { /* a loop of its own: with the exchange in it, gcc 12 gives up vectorising */
        mask[l] = -(key)(a[l] > b[l]);
    }
    VNAME(exchange)(a, b);
}

static inline void VNAME(exchange_masked)(key *restrict a, key *restrict b, const key *restrict mask)
{
    for (int l = 0; l < LANES; l++) {
        const key difference = (a[l] ^ b[l]) & mask[l];
        a[l] ^= difference;
        b[l] ^= difference;
    }
}

/* A register of lanes. Loads and stores go through memcpy, which makes no claim about alignment or aliasing. */
#define VEC_LANES ((int)(VEC_BYTES / sizeof(key)))
typedef key VNAME(vec) __attribute__((vector_size(VEC_BYTES)));

static inline void VNAME(vec_exchange)(VNAME(vec) * a, VNAME(vec) * b)
{
    const VNAME(vec) x = *a, y = *b;
#if VEC_BYTES == 32 && !REAL_IS_DOUBLE /* gcc 12 makes no minimum out of compare and select here */
    *a = (VNAME(vec))_mm256_min_epi32((__m256i)x, (__m256i)y);
    *b = (VNAME(vec))_mm256_max_epi32((__m256i)x, (__m256i)y);
#else
    const VNAME(vec) difference = (x ^ y) & (VNAME(vec))(x > y);
    *a = x ^ difference;
    *b = y ^ difference;
#endif
}

static inline void VNAME(vec_exchange_recorded)(VNAME(vec) * a, VNAME(vec) * b, key *mask)
{
    const VNAME(vec) swapped = (VNAME(vec))(*a > *b);
    memcpy(mask, &swapped, sizeof swapped);
    VNAME(vec_exchange)(a, b);
}

static inline void VNAME(vec_exchange_masked)(VNAME(vec) * a, VNAME(vec) * b, const key *mask)
{
    VNAME(vec) swapped;
    memcpy(&swapped, mask, sizeof swapped);
    const VNAME(vec) difference = (*a ^ *b) & swapped;
    *a ^= difference;
    *b ^= difference;
}

/* One stage of odd-even merging, recorded where masks is not NULL; returns where the next stage records. */
static inline key *VNAME(stage)(key *keys, int64_t rows, int64_t p, int64_t distance, key *masks)
{
    for (int64_t block = 0; block < rows; block += 2 * p) {
        const int64_t end = (block + 2 * p < rows ? block + 2 * p : rows) - distance;
        for (int64_t j = block + (distance == p ? 0 : distance); j < end; j += 2 * distance) {
            for (int64_t i = j; i < end && i < j + distance; i++) {
                key *a = keys + i * LANES, *b = a + distance * LANES;
                if (masks == NULL) {
                    VNAME(exchange)(a, b);
                } else {
                    VNAME(exchange_recorded)(a, b, masks);
                    masks += LANES;
                }
            }
        }
    }
    return masks;
}

/* Undoes a stage; masks points behind its record, and the return value before it. */
static inline key *VNAME(unstage)(key *keys, int64_t rows, int64_t p, int64_t distance, key *masks)
{
    key *begin = masks - lns_stage_size(rows, p, distance) * LANES;
    masks = begin;
    for (int64_t block = 0; block < rows; block += 2 * p) {
        const int64_t end = (block + 2 * p < rows ? block + 2 * p : rows) - distance;
        for (int64_t j = block + (distance == p ? 0 : distance); j < end; j += 2 * distance) {
            for (int64_t i = j; i < end && i < j + distance; i++, masks += LANES) {
                key *a = keys + i * LANES;
                VNAME(exchange_masked)(a, a + distance * LANES, masks);
            }
        }
    }
    return begin;
}

/* 16 rows, `step` apart, through one of the networks of 16, a register of lanes at a time. */
#define BLOCK16(name, NETWORK, exchange)                                                                               \
    static inline void VNAME(name)(key * keys, int64_t step, key *masks)                                               \
    {                                                                                                                  \
        for (int part = 0; part < LANES; part += VEC_LANES) {                                                          \
            VNAME(vec) r[16];                                                                                          \
            key *mask = masks + part;                                                                                  \
            (void)mask;                                                                                                \
            for (int i = 0; i < 16; i++) {                                                                             \
                memcpy(&r[i], keys + i * step * LANES + part, sizeof r[i]);                                            \
            }                                                                                                          \
            NETWORK(exchange)                                                                                          \
            for (int i = 0; i < 16; i++) {                                                                             \
                memcpy(keys + i * step * LANES + part, &r[i], sizeof r[i]);                                            \
            }                                                                                                          \
        }                                                                                                              \
    }
#define PLAIN(i, j) VNAME(vec_exchange)(&r[i], &r[j]);
#define RECORDED(i, j) VNAME(vec_exchange_recorded)(&r[i], &r[j], mask), mask += LANES;
#define UNDONE(i, j) mask -= LANES, VNAME(vec_exchange_masked)(&r[i], &r[j], mask);

BLOCK16(sort16, LNS_SORT16, PLAIN)
BLOCK16(merge16, LNS_MERGE16, PLAIN)
BLOCK16(sort16_recorded, LNS_SORT16, RECORDED)
BLOCK16(merge16_recorded, LNS_MERGE16, RECORDED)
BLOCK16(unsort16, LNS_UNSORT16, UNDONE)
BLOCK16(unmerge16, LNS_UNMERGE16, UNDONE)

#undef BLOCK16
#undef PLAIN
#undef RECORDED
#undef UNDONE

/* Sorts LNS_RUN rows (network.h), recorded where masks is not NULL. */
static inline void VNAME(sort_run)(key *keys, key *masks)
{
    if (masks == NULL) {
        VNAME(sort16)(keys, 1, NULL);
        VNAME(sort16)(keys + 16 * LANES, 1, NULL);
        VNAME(merge16)(keys, 2, NULL);
        VNAME(merge16)(keys + LANES, 2, NULL);
        for (int i = 1; i < LNS_RUN - 1; i += 2) {
            VNAME(exchange)(keys + i * LANES, keys + (i + 1) * LANES);
        }
        return;
    }
    VNAME(sort16_recorded)(keys, 1, masks);
    masks += LNS_SORT16_COMPARATORS * LANES;
    VNAME(sort16_recorded)(keys + 16 * LANES, 1, masks);
    masks += LNS_SORT16_COMPARATORS * LANES;
    VNAME(merge16_recorded)(keys, 2, masks);
    masks += LNS_MERGE16_COMPARATORS * LANES;
    VNAME(merge16_recorded)(keys + LANES, 2, masks);
    masks += LNS_MERGE16_COMPARATORS * LANES;
    for (int i = 1; i < LNS_RUN - 1; i += 2, masks += LANES) {
        VNAME(exchange_recorded)(keys + i * LANES, keys + (i + 1) * LANES, masks);
    }
}

/* Undoes a recorded VNAME(sort_run); masks points behind its record. */
static inline void VNAME(unsort_run)(key *keys, key *masks)
{
    for (int i = LNS_RUN - 3; i >= 1; i -= 2) {
        masks -= LANES;
        VNAME(exchange_masked)(keys + i * LANES, keys + (i + 1) * LANES, masks);
    }
    VNAME(unmerge16)(keys + LANES, 2, masks);
    masks -= LNS_MERGE16_COMPARATORS * LANES;
    VNAME(unmerge16)(keys, 2, masks);
    masks -= LNS_MERGE16_COMPARATORS * LANES;
    VNAME(unsort16)(keys + 16 * LANES, 1, masks);
    masks -= LNS_SORT16_COMPARATORS * LANES;
    VNAME(unsort16)(keys, 1, masks);
}

/* The whole network, all lanes in step: sorted runs, then odd-even merges. */
static inline void VNAME(network)(key *keys, int64_t n, key *masks)
{
    const int64_t rows = lns_network_rows(n);
    for (int64_t i = n; i < rows; i++) {
        for (int l = 0; l < LANES; l++) {
            keys[i * LANES + l] = (key)((ukey)-1 >> 1);
        }
    }
    for (int64_t i = 0; n >= LNS_LEAST_RUN && i < rows; i += LNS_RUN) {
        VNAME(sort_run)(keys + i * LANES, masks);
        masks += masks == NULL ? 0 : LNS_RUN_COMPARATORS * LANES;
    }
    for (int64_t p = n < LNS_LEAST_RUN ? 1 : LNS_RUN; p < rows; p *= 2) {
        for (int64_t distance = p; distance >= 1; distance /= 2) {
            masks = VNAME(stage)(keys, rows, p, distance, masks);
        }
    }
}

/* The recorded network backwards: row i of the sorted tile goes back to the row it came from. */
static inline void VNAME(network_undo)(key *keys, int64_t n, key *masks)
{
    const int64_t rows = lns_network_rows(n), first = n < LNS_LEAST_RUN ? 1 : LNS_RUN;
    int64_t top = first;
    while (2 * top < rows) {
        top *= 2;
    }
    masks += lns_network_size(n) * LANES;
    for (int64_t p = top; p >= first && p < rows; p /= 2) {
        for (int64_t distance = 1; distance <= p; distance *= 2) {
            masks = VNAME(unstage)(keys, rows, p, distance, masks);
        }
    }
    for (int64_t i = rows - LNS_RUN; n >= LNS_LEAST_RUN && i >= 0; i -= LNS_RUN) {
        VNAME(unsort_run)(keys + i * LANES, masks);
        masks -= LNS_RUN_COMPARATORS * LANES;
    }
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

/* Sorts each column of the tile by radix; remembers the rows where o->rows is not NULL. */
static inline void VNAME(sort_by_column)(real *tile, int64_t n, const VNAME(order) * o)
{
    const ukey sign = (ukey)1 << (KEY_BITS - 1);
    VNAME(to_keys)(tile, o->keys, n * LANES);
    for (int l = 0; l < LANES; l++) {
        for (int64_t i = 0; i < n; i++) {
            o->pairs[i] = (VNAME(pair)){(ukey)o->keys[i * LANES + l] ^ sign, (uint32_t)i};
        }
        const VNAME(pair) *sorted = VNAME(sort_pairs)(o->pairs, o->pairs + n, n);
        for (int64_t i = 0; i < n; i++) {
            o->keys[i * LANES + l] = (key)(sorted[i].bits ^ sign);
            if (o->rows != NULL) {
                o->rows[l * n + i] = sorted[i].row;
            }
        }
    }
    VNAME(from_keys)(o->keys, tile, n * LANES);
}

/* Sorts every column of the tile. */
static inline void VNAME(sort_tile)(real *tile, int64_t n, const VNAME(order) * o)
{
    if (n > LNS_NETWORK_ROWS) {
        const VNAME(order) unranked = {o->keys, o->pairs, NULL, NULL};
        VNAME(sort_by_column)(tile, n, &unranked);
        return;
    }
    VNAME(to_keys)(tile, o->keys, n * LANES);
    VNAME(network)(o->keys, n, NULL);
    VNAME(from_keys)(o->keys, tile, n * LANES);
}

/* Sorts every column of the tile and remembers its order for VNAME(unrank_tile). */
static inline void VNAME(rank_tile)(real *tile, int64_t n, const VNAME(order) * o)
{
    if (n > LNS_RECORD_ROWS) {
        VNAME(sort_by_column)(tile, n, o);
        return;
    }
    VNAME(to_keys)(tile, o->keys, n * LANES);
    VNAME(network)(o->keys, n, o->masks);
    VNAME(from_keys)(o->keys, tile, n * LANES);
}

/* Sends row i of each column of the tile to the source row of the i-th smallest value, by the remembered rows. */
static inline void VNAME(unrank_by_column)(real *tile, int64_t n, const VNAME(order) * o)
{
    real *column = (real *)(void *)o->keys;
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

/* Undoes the order that VNAME(rank_tile) remembered. */
static inline void VNAME(unrank_tile)(real *tile, int64_t n, const VNAME(order) * o)
{
    if (n > LNS_RECORD_ROWS) {
        VNAME(unrank_by_column)(tile, n, o);
        return;
    }
    memcpy(o->keys, tile, (size_t)n * LNS_TILE_ROW); /* the bits of the reals; the rows that fill up never move */
    memset(o->keys + n * LANES, 0, (size_t)(lns_network_rows(n) - n) * LNS_TILE_ROW);
    VNAME(network_undo)(o->keys, n, o->masks);
    memcpy(tile, o->keys, (size_t)n * LNS_TILE_ROW);
}

#undef VEC_LANES
