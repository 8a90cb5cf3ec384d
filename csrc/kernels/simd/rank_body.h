/* Template body: sorting a tile and remembering the order, and taking it back to that order.
 *
 * Included by   wasserstein_body.h, transport_body.h and quantiles_body.h: once per working type and CPU variant.
 * Expects       what real.h sets, and rank.h.
 * Leaves        no macro of its own.
 *
 * Few rows go through a network that records what it swaps. Many rows, and rows that carry weights, are sorted by
 * packed keys: as much of the value as fits above the row's number. The values then follow by their rows, and where
 * packed keys could not tell neighbours apart, neighbours are put right. */
#include "kernels/simd/tile_body.h"

#define MANTISSA_BITS (REAL_IS_DOUBLE ? 52 : 23)
#define KEY_SIGN ((ukey)1 << (KEY_BITS - 1))

typedef struct VNAME(pair) {
    ukey bits;
    uint32_t row;
} VNAME(pair);

/* Work memory for one tile, and its ranks once VNAME(rank_tile) has run. */
typedef struct VNAME(order) {
    VNAME(mask) * masks; /* what each comparator of the network swapped; NULL where rows are wanted instead */
    key *rows;           /* [lns_network_rows(n), LANES] source row of each sorted row */
    key *source;         /* [lns_network_rows(n), LANES] the keys as they came */
    VNAME(pair) * pairs; /* [2, n] */
    double *mass;        /* [n] weights of one column's rows in its order */
} VNAME(order);

static inline VNAME(order) VNAME(order_at)(char **work, int64_t n, lns_ranks ranks)
{
    VNAME(order) o = {0};
    if (lns_records(n, ranks)) {
        o.masks = (VNAME(mask) *)(void *)*work;
    } else if (ranks != LNS_NO_RANKS) {
        char *at = *work;
        o.rows = (key *)(void *)at;
        o.source = (key *)(void *)(at += lns_tile_bytes(n));
        o.pairs = (VNAME(pair) *)(void *)(at += lns_tile_bytes(n));
        o.mass = (double *)(void *)(at + lns_pad(n * 32));
    }
    *work += lns_order_bytes(n, ranks);
    return o;
}

/* Copies the keys, -0 as 0 since these may take each other's places; smallest and largest of every column. Returns the
 * bits that any of the values has set. */
static inline ukey VNAME(copy_range)(const key *keys, int64_t n, key *copy, key *low, key *high)
{
    ukey bits = 0;
    for (int p = 0; p < LANES; p += VEC_LANES) {
        VNAME(vec) least = VNAME(vec_load)(keys + p), most = least, any = {0};
        for (int64_t i = 0; i < n; i++) {
            VNAME(vec) k = VNAME(vec_load)(keys + i * LANES + p);
            k -= (VNAME(vec))(k == -1);
            VNAME(vec_store)(copy + i * LANES + p, k);
            any |= VNAME(vec_flip)(k);
            VNAME(vec_exchange)(&least, &k);
            VNAME(vec_exchange)(&k, &most);
        }
        VNAME(vec_store)(low + p, least);
        VNAME(vec_store)(high + p, most);
        for (int l = 0; l < VEC_LANES; l++) {
            bits |= (ukey)any[l];
        }
    }
    return bits;
}

/* Packs steps of 1 / scale above `low`. A sum with 2^MANTISSA_BITS has the number of steps in its last bits. */
static inline void VNAME(pack)(const key *keys, int64_t n, const real *low, const real *scale, int row_bits,
                               key *packed)
{
    for (int p = 0; p < LANES; p += VEC_LANES) {
        const VNAME(reals) base = VNAME(reals_load)(low + p), factor = VNAME(reals_load)(scale + p);
        for (int64_t i = 0; i < n; i++) {
            const VNAME(reals) x = (VNAME(reals))VNAME(vec_flip)(VNAME(vec_load)(keys + i * LANES + p));
            const VNAME(reals) steps = (x - base) * factor + (real)((ukey)1 << MANTISSA_BITS);
            VNAME(vec_store)(packed + i * LANES + p, ((VNAME(vec))steps << row_bits) ^ (key)((ukey)i | KEY_SIGN));
        }
    }
}

/* Sorts column l by radix. */
static void VNAME(rank_column)(key *keys, int64_t n, int l, const VNAME(order) * o)
{
    VNAME(pair) *pairs = o->pairs, *spare = o->pairs + n;
    for (int64_t i = 0; i < n; i++) {
        pairs[i] = (VNAME(pair)){(ukey)o->source[i * LANES + l] ^ KEY_SIGN, (uint32_t)i};
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
    for (int64_t i = 0; i < n; i++) {
        keys[i * LANES + l] = (key)(pairs[i].bits ^ KEY_SIGN);
        o->rows[i * LANES + l] = (key)pairs[i].row;
    }
}

/* Moves the entry of column l at `row` up to where it belongs among those above; returns by how much. */
static inline int64_t VNAME(insert)(key *keys, key *rows, int64_t row, int l)
{
    key *at = keys + row * LANES + l, *from = rows + row * LANES + l;
    const key k = *at, source = *from;
    int64_t i = 0;
    for (; i < row && at[-LANES] > k; i++, at -= LANES, from -= LANES) {
        *at = at[-LANES];
        *from = from[-LANES];
    }
    *at = k;
    *from = source;
    return i;
}

/* Puts nearly sorted columns right by insertion. A column that takes more moves than a radix sort is worth is given up.
 */
static inline void VNAME(repair)(key *keys, int64_t n, const VNAME(order) * o)
{
    enum { BLOCK = 4, MOST_MOVES = 4 /* a row */ };
    int64_t moves[LANES] = {0};
    for (int64_t begin = 0; begin < n - 1; begin += BLOCK) {
        const int64_t end = begin + BLOCK < n - 1 ? begin + BLOCK : n - 1;
        VNAME(vec) wrong = {0};
        for (int64_t i = begin * LANES; i < end * LANES; i += VEC_LANES) {
            wrong |= (VNAME(vec))(VNAME(vec_load)(keys + i) > VNAME(vec_load)(keys + i + LANES));
        }
        const int any = VNAME(vec_any)(wrong);
        for (int64_t i = begin + 1; any && i <= end; i++) {
            for (int l = 0; l < LANES; l++) {
                if (keys[(i - 1) * LANES + l] <= keys[i * LANES + l]) {
                    continue;
                }
                moves[l] += VNAME(insert)(keys, o->rows, i, l);
                if (moves[l] > MOST_MOVES * (i + LNS_RUN)) {
                    VNAME(rank_column)(keys, n, l, o);
                }
            }
        }
    }
}

/* Ranks values whose bits under the mask are all zero, as those of 16-bit samples are: a packed key holds all of them.
 */
static void VNAME(rank_exact)(key *keys, int64_t n, key row_mask, const VNAME(order) * o)
{
    for (int64_t i = 0; i < n; i++) {
        for (int l = 0; l < LANES; l += VEC_LANES) {
            const VNAME(vec) k = VNAME(vec_load)(o->source + i * LANES + l);
            VNAME(vec_store)(o->rows + i * LANES + l, (k & ~row_mask) | (key)i);
        }
    }
    VNAME(lns_sort_tile)(o->rows, n);
    for (int64_t i = 0; i < n * LANES; i += VEC_LANES) {
        const VNAME(vec) packed = VNAME(vec_load)(o->rows + i), bits = VNAME(vec_flip)(packed & ~row_mask) & ~row_mask;
        VNAME(vec_store)(o->rows + i, packed & row_mask);
        VNAME(vec_store)(keys + i, VNAME(vec_flip)(bits));
    }
}

/* Sorts every column of a tile of keys and remembers each sorted row's source row. */
static void VNAME(rank_rows)(key *keys, int64_t n, const VNAME(order) * o)
{
    key low[LANES], high[LANES];
    real base[LANES], scale[LANES];
    int by_radix[LANES], row_bits = KEY_BITS - MANTISSA_BITS;
    const ukey bits = VNAME(copy_range)(keys, n, o->source, low, high);
    while ((INT64_C(1) << row_bits) < n) {
        row_bits++;
    }
    if (row_bits > KEY_BITS / 2) { /* too little room for values */
        for (int l = 0; l < LANES; l++) {
            VNAME(rank_column)(keys, n, l, o);
        }
        return;
    }
    const key row_mask = (key)(((ukey)1 << row_bits) - 1);
    if ((bits & (ukey)row_mask) == 0) {
        VNAME(rank_exact)(keys, n, row_mask, o);
        return;
    }
    VNAME(flip_tile)(low, 1);
    VNAME(flip_tile)(high, 1);
    memcpy(base, low, sizeof base);
    for (int l = 0; l < LANES; l++) {
        real top;
        memcpy(&top, &high[l], sizeof top);
        const real range = top - base[l], scaled = (real)(((ukey)1 << (KEY_BITS - row_bits)) - 4) / range;
        scale[l] = range > 0 && isfinite(scaled) ? scaled : 0;
        by_radix[l] = !isfinite(range);
    }
    VNAME(pack)(o->source, n, base, scale, row_bits, o->rows);
    VNAME(lns_sort_tile)(o->rows, n);
    for (int64_t i = 0; i < n; i++) {
        for (int l = 0; l < LANES; l++) {
            o->rows[i * LANES + l] &= row_mask;
        }
        for (int l = 0; l < LANES; l++) {
            keys[i * LANES + l] = o->source[(int64_t)o->rows[i * LANES + l] * LANES + l];
        }
    }
    for (int l = 0; l < LANES; l++) {
        if (by_radix[l]) {
            VNAME(rank_column)(keys, n, l, o);
        }
    }
    VNAME(repair)(keys, n, o);
}

/* Sorts every column of a tile of keys and remembers the order. */
static inline void VNAME(rank_tile)(key *keys, int64_t n, const VNAME(order) * o)
{
    if (o->masks != NULL) {
        VNAME(lns_sort_recorded)(keys, n, o->masks);
    } else {
        VNAME(rank_rows)(keys, n, o);
    }
}

/* Puts the rows of a tile, of lns_network_rows(n) rows, back into the order from before VNAME(rank_tile). */
static inline void VNAME(unrank_tile)(real *tile, int64_t n, const VNAME(order) * o)
{
    if (o->masks != NULL) {
        VNAME(lns_sort_undo)((key *)(void *)tile, n, o->masks);
        return;
    }
    real *sorted = (real *)(void *)o->source;
    memcpy(sorted, tile, (size_t)n * LNS_TILE_ROW);
    for (int64_t i = 0; i < n; i++) {
        for (int l = 0; l < LANES; l++) {
            tile[(int64_t)o->rows[i * LANES + l] * LANES + l] = sorted[i * LANES + l];
        }
    }
}

/* The weights of the rows in the order of column l; NULL stays NULL. */
static inline const double *VNAME(column_mass)(const double *mass, int64_t n, int64_t l, const VNAME(order) * o)
{
    for (int64_t i = 0; mass != NULL && i < n; i++) {
        o->mass[i] = mass[o->rows[i * LANES + l]];
    }
    return mass != NULL ? o->mass : NULL;
}

#undef MANTISSA_BITS
#undef KEY_SIGN
