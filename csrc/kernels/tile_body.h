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
    key *keys;          /* [n, LANES] */
    VNAME(pair) *pairs; /* [2, n] */
    uint32_t *rows;     /* [LANES, n] source row of each sorted row; NULL where ranks are not wanted */
    key *masks;         /* [comparators, LANES] all bits set where the comparator swapped */
} VNAME(order);

static inline VNAME(order) VNAME(order_at)(char **work, int64_t n, int ranked)
{
    VNAME(order) o = {0};
    o.keys = (key *)(void *)*work;
    *work += n * LNS_TILE_ROW;
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

/* Columns [column, column + LANES) of the sample as a tile; lanes beyond d are zero. */
static inline void VNAME(load_tile)(const lns_sample *s, int64_t column, real *restrict tile)
{
    const int64_t lanes = s->d - column < LANES ? s->d - column : LANES;
    for (int64_t i = 0; i < s->n; i++) {
        real *row = tile + i * LANES;
#if REAL_IS_DOUBLE
        lns_load_f64(row, s->data, s->dtype, i * s->d + column, lanes);
#else
        lns_load_f32(row, s->data, s->dtype, i * s->d + column, lanes);
#endif
        for (int64_t l = lanes; l < LANES; l++) {
            row[l] = 0;
        }
    }
}

static inline void VNAME(store_tile)(const real *restrict tile, int64_t n, int64_t d, int64_t column, real *restrict out)
{
    const int64_t lanes = d - column < LANES ? d - column : LANES;
    for (int64_t i = 0; i < n; i++) {
        memcpy(out + i * d + column, tile + i * LANES, (size_t)lanes * sizeof(real));
    }
}

/* Whether all lanes of rows [begin, end) are finite: x * 0 is NaN where x is not. */
static inline int VNAME(rows_finite)(const real *tile, int64_t begin, int64_t end)
{
    real zero[LANES] = {0};
    int bad = 0;
    for (int64_t i = begin; i < end; i++) {
        for (int l = 0; l < LANES; l++) {
            zero[l] += tile[i * LANES + l] * 0;
        }
    }
    for (int l = 0; l < LANES; l++) {
        bad |= zero[l] != 0;
    }
    return !bad;
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
    for (int l = 0; l < LANES; l++) {
        const key x = a[l], y = b[l];
        a[l] = x < y ? x : y;
        b[l] = x < y ? y : x;
        mask[l] = x > y ? -1 : 0;
    }
}

static inline void VNAME(exchange_masked)(key *restrict a, key *restrict b, const key *restrict mask)
{
    for (int l = 0; l < LANES; l++) {
        const key difference = (a[l] ^ b[l]) & mask[l];
        a[l] ^= difference;
        b[l] ^= difference;
    }
}

/* One stage of the network, recorded where masks is not NULL; returns where the next stage records. */
static inline key *VNAME(stage)(key *keys, int64_t n, int64_t p, int64_t r, int64_t distance, key *masks)
{
    for (int64_t block = r; block < n - distance; block += 2 * p) {
        const int64_t end = block + p < n - distance ? block + p : n - distance;
        for (int64_t i = block; i < end; i++) {
            key *a = keys + i * LANES, *b = a + distance * LANES;
            if (masks == NULL) {
                VNAME(exchange)(a, b);
            } else {
                VNAME(exchange_recorded)(a, b, masks);
                masks += LANES;
            }
        }
    }
    return masks;
}

/* Undoes a stage; masks points behind its record, and the return value before it. */
static inline const key *VNAME(unstage)(key *keys, int64_t n, int64_t p, int64_t r, int64_t distance, const key *masks)
{
    const key *begin = masks - lns_network_stage_size(n, p, r, distance) * LANES;
    masks = begin;
    for (int64_t block = r; block < n - distance; block += 2 * p) {
        const int64_t end = block + p < n - distance ? block + p : n - distance;
        for (int64_t i = block; i < end; i++, masks += LANES) {
            key *a = keys + i * LANES;
            VNAME(exchange_masked)(a, a + distance * LANES, masks);
        }
    }
    return begin;
}

/* Batcher's merge exchange: any n, no padding, all lanes in step. */
static inline void VNAME(network)(key *keys, int64_t n, key *masks)
{
    const int64_t top = n < 2 ? 0 : lns_network_top(n);
    for (int64_t p = top; p >= 1; p /= 2) {
        masks = VNAME(stage)(keys, n, p, 0, p, masks);
        for (int64_t q = top; q > p; q /= 2) {
            masks = VNAME(stage)(keys, n, p, p, q - p, masks);
        }
    }
}

/* The recorded network backwards: row i of the sorted tile goes back to the row it came from. */
static inline void VNAME(network_undo)(key *keys, int64_t n, const key *masks)
{
    const int64_t top = n < 2 ? 0 : lns_network_top(n);
    masks += lns_network_size(n) * LANES;
    for (int64_t p = 1; p <= top; p *= 2) {
        for (int64_t q = 2 * p; q <= top; q *= 2) {
            masks = VNAME(unstage)(keys, n, p, p, q - p, masks);
        }
        masks = VNAME(unstage)(keys, n, p, 0, p, masks);
    }
}

/* Sorts pairs [n] by (bits, row) with the help of spare [n]; returns which of the two holds the result. */
static inline VNAME(pair) *VNAME(sort_pairs)(VNAME(pair) *pairs, VNAME(pair) *spare, int64_t n)
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
static inline void VNAME(sort_by_column)(real *tile, int64_t n, const VNAME(order) *o)
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
static inline void VNAME(sort_tile)(real *tile, int64_t n, const VNAME(order) *o)
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
static inline void VNAME(rank_tile)(real *tile, int64_t n, const VNAME(order) *o)
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
static inline void VNAME(unrank_by_column)(real *tile, int64_t n, const VNAME(order) *o)
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
static inline void VNAME(unrank_tile)(real *tile, int64_t n, const VNAME(order) *o)
{
    if (n > LNS_RECORD_ROWS) {
        VNAME(unrank_by_column)(tile, n, o);
        return;
    }
    memcpy(o->keys, tile, (size_t)n * LNS_TILE_ROW);
    VNAME(network_undo)(o->keys, n, o->masks);
    memcpy(tile, o->keys, (size_t)n * LNS_TILE_ROW);
}
