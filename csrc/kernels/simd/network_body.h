/* Template body: sorting networks over the rows of a tile of keys, all columns in step. A network can record what its
 * comparators did, and be undone: whatever stands in the sorted rows then goes back to where they came from.
 *
 * Included by   kernels/sort_body.h: once per working type and CPU variant.
 * Expects       what real.h sets, and sorting_body.h.
 * Leaves        no macro of its own. */

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

/* Fills a tile of n rows up to lns_network_rows(n) with keys above all others. */
static inline void VNAME(fill_up)(key *keys, int64_t n)
{
    for (int64_t i = n * LANES; i < lns_network_rows(n) * LANES; i++) {
        keys[i] = (key)((ukey)-1 >> 1);
    }
}

void VNAME(lns_sort_recorded)(key *keys, int64_t n, VNAME(mask) * masks)
{
    VNAME(fill_up)(keys, n);
    if (n <= 16) {
        VNAME(block16)(keys, 1, masks, LNS_RECORD, LNS_SORT);
    } else {
        VNAME(run)(keys, masks, LNS_RECORD);
    }
}

void VNAME(lns_sort_undo)(key *keys, int64_t n, VNAME(mask) * masks)
{
    masks += lns_network_size(n) * VEC_PARTS;
    if (n <= 16) {
        VNAME(block16)(keys, 1, masks, LNS_UNDO, LNS_SORT);
    } else {
        VNAME(run)(keys, masks, LNS_UNDO);
    }
}
