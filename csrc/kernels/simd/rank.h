/* Ranks: what remembering the order of a sorted tile takes of work memory. The arithmetic is in rank_body.h.
 *
 * Included by   kernels' .c files, before variants.h. */
#ifndef LNS_RANK_H
#define LNS_RANK_H

#include "kernels/simd/tile.h"

/* What a sorted tile tells of its order: nothing; enough to undo it; the source row of every sorted row. */
typedef enum lns_ranks { LNS_NO_RANKS, LNS_RANKS, LNS_ROWS } lns_ranks;

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

#endif
