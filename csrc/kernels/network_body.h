/* Template body: sorting networks over the rows of a tile of keys, all columns in step. A network can record what its
 * comparators did, and be undone: whatever stands in the sorted rows then goes back to where they came from. */
#include "kernels/simd_body.h"
#include "kernels/tile.h"

#define VEC_PARTS (LANES / VEC_LANES) /* registers in a row of a tile */

/* The next comparator of a network; undoing, the previous one. */
static LNS_INLINE void VNAME(comparator)(VNAME(vec) * a, VNAME(vec) * b, VNAME(mask) * *mask, const int mode)
{
    if (mode == LNS_PLAIN) {
        VNAME(vec_exchange)(a, b);
    } else if (mode == LNS_RECORD) {
        VNAME(vec_exchange_recorded)(a, b, (*mask)++);
    } else {
        VNAME(vec_exchange_masked)(a, b, --*mask);
    }
}

/* 16 rows, `step` apart, through the network that sorts them or merges their halves. In the last step of merging 32
 * rows these are the odd ones, each then compared with the row below it. Returns where the next record goes or,
 * undoing, where this one began. */
static LNS_INLINE VNAME(mask) *
    VNAME(block16)(key *keys, int step, VNAME(mask) * mask, const int mode, const int network)
{
#define COMPARATOR(i, j) VNAME(comparator)(&r[i], &r[j], &mask, mode);
    for (int p = 0; p < VEC_PARTS; p++) {
        key *const at = keys + (mode == LNS_UNDO ? VEC_PARTS - 1 - p : p) * VEC_LANES;
        VNAME(vec) r[16];
        for (int i = 0; i < 16; i++) {
            r[i] = VNAME(vec_load)(at + i * step * LANES);
        }
        for (int i = 14; network == LNS_MERGE_ODD && mode == LNS_UNDO && i >= 0; i--) {
            VNAME(vec) below = VNAME(vec_load)(at + (i * step + 1) * LANES);
            VNAME(comparator)(&r[i], &below, &mask, mode);
            VNAME(vec_store)(at + (i * step + 1) * LANES, below);
        }
        if (network == LNS_SORT && mode == LNS_UNDO) {
            LNS_UNSORT16(COMPARATOR)
        } else if (network == LNS_SORT) {
            LNS_SORT16(COMPARATOR)
        } else if (mode == LNS_UNDO) {
            LNS_UNMERGE16(COMPARATOR)
        } else {
            LNS_MERGE16(COMPARATOR)
        }
        for (int i = 0; network == LNS_MERGE_ODD && mode != LNS_UNDO && i < 15; i++) {
            VNAME(vec) below = VNAME(vec_load)(at + (i * step + 1) * LANES);
            VNAME(comparator)(&r[i], &below, &mask, mode);
            VNAME(vec_store)(at + (i * step + 1) * LANES, below);
        }
        for (int i = 0; i < 16; i++) {
            VNAME(vec_store)(at + i * step * LANES, r[i]);
        }
    }
#undef COMPARATOR
    return mask;
}

/* Sorts LNS_RUN rows, or undoes that. */
static LNS_INLINE VNAME(mask) * VNAME(run)(key *keys, VNAME(mask) * mask, const int mode)
{
    if (mode != LNS_UNDO) {
        mask = VNAME(block16)(keys, 1, mask, mode, LNS_SORT);
        mask = VNAME(block16)(keys + 16 * LANES, 1, mask, mode, LNS_SORT);
        mask = VNAME(block16)(keys, 2, mask, mode, LNS_MERGE);
        return VNAME(block16)(keys + LANES, 2, mask, mode, LNS_MERGE_ODD);
    }
    mask = VNAME(block16)(keys + LANES, 2, mask, mode, LNS_MERGE_ODD);
    mask = VNAME(block16)(keys, 2, mask, mode, LNS_MERGE);
    mask = VNAME(block16)(keys + 16 * LANES, 1, mask, mode, LNS_SORT);
    return VNAME(block16)(keys, 1, mask, mode, LNS_SORT);
}

/* Rows `distance` apart through one comparator each. */
static LNS_INLINE VNAME(mask) * VNAME(row_pair)(key *keys, int64_t distance, VNAME(mask) * mask, const int mode)
{
    for (int p = 0; p < VEC_PARTS; p++) {
        key *const at = keys + (mode == LNS_UNDO ? VEC_PARTS - 1 - p : p) * VEC_LANES;
        VNAME(vec) a = VNAME(vec_load)(at), b = VNAME(vec_load)(at + distance * LANES);
        VNAME(comparator)(&a, &b, &mask, mode);
        VNAME(vec_store)(at, a);
        VNAME(vec_store)(at + distance * LANES, b);
    }
    return mask;
}

/* One stage of Batcher's odd-even merge of sorted stretches of p rows, or undoes that. */
static LNS_INLINE VNAME(mask) *
    VNAME(stage)(key *keys, int64_t rows, int64_t p, int64_t distance, VNAME(mask) * mask, const int mode)
{
    VNAME(mask) *begin = mask;
    if (mode == LNS_UNDO) { /* comparators of a stage touch different rows: only each one's record must be found */
        begin = mask = mask - lns_stage_size(rows, p, distance) * VEC_PARTS;
    }
    for (int64_t block = 0; block < rows; block += 2 * p) {
        const int64_t end = (block + 2 * p < rows ? block + 2 * p : rows) - distance;
        for (int64_t j = block + (distance == p ? 0 : distance); j < end; j += 2 * distance) {
            for (int64_t i = j; i < end && i < j + distance; i++) {
                if (mode == LNS_UNDO) {
                    VNAME(row_pair)(keys + i * LANES, distance, mask + VEC_PARTS, mode);
                    mask += VEC_PARTS;
                } else {
                    mask = VNAME(row_pair)(keys + i * LANES, distance, mask, mode);
                }
            }
        }
    }
    return mode == LNS_UNDO ? begin : mask;
}

/* The network for n rows, filled up with keys above all others to lns_network_rows(n). */
static LNS_INLINE void VNAME(network)(key *keys, int64_t n, VNAME(mask) * mask, const int mode)
{
    const int64_t rows = lns_network_rows(n);
    for (int64_t i = n * LANES; i < rows * LANES; i++) {
        keys[i] = (key)((ukey)-1 >> 1);
    }
    if (rows == 16) {
        VNAME(block16)(keys, 1, mask, mode, LNS_SORT);
        return;
    }
    for (int64_t i = 0; i < rows; i += LNS_RUN) {
        mask = VNAME(run)(keys + i * LANES, mask, mode);
    }
    for (int64_t p = LNS_RUN; p < rows; p *= 2) {
        for (int64_t distance = p; distance >= 1; distance /= 2) {
            mask = VNAME(stage)(keys, rows, p, distance, mask, mode);
        }
    }
}

/* Undoes a recorded network; what stands in the rows that filled it up does not matter. */
static inline void VNAME(network_undo)(key *keys, int64_t n, VNAME(mask) * mask)
{
    const int64_t rows = lns_network_rows(n);
    int64_t top = LNS_RUN;
    mask += lns_network_size(n) * VEC_PARTS;
    if (rows == 16) {
        VNAME(block16)(keys, 1, mask, LNS_UNDO, LNS_SORT);
        return;
    }
    while (2 * top < rows) {
        top *= 2;
    }
    for (int64_t p = top; p >= LNS_RUN && p < rows; p /= 2) {
        for (int64_t distance = 1; distance <= p; distance *= 2) {
            mask = VNAME(stage)(keys, rows, p, distance, mask, LNS_UNDO);
        }
    }
    for (int64_t i = rows - LNS_RUN; i >= 0; i -= LNS_RUN) {
        mask = VNAME(run)(keys + i * LANES, mask, LNS_UNDO);
    }
}
