/* Blocks that sums and streams are cut into. The bits of a sum depend on its blocks, so these follow from the sizes of
 * the data alone: never from the width of a vector register, nor from the number of threads.
 *
 * Included by   kernels' .c files, before variants.h.
 * Leaves        LNS_FOLD, LNS_STRIP, LNS_ROW_BLOCK. */
#ifndef LNS_BLOCKS_H
#define LNS_BLOCKS_H

#include <stdint.h>

/* Rows after which a sum in the working type is added to its total in double, and starts again from 0. */
#define LNS_FOLD 32

/* Columns that a streaming loop handles at once: the accumulators of a strip stay in the first-level cache. */
#define LNS_STRIP 512

/* Rows that a streaming loop handles at once: it touches its accumulators so many times less often. */
#define LNS_ROW_BLOCK 8

/* Rows of a chunk, the unit of threads where sums run over rows: at least `least`, and so many that there are at most
 * 64 chunks. */
static inline int64_t lns_chunk_rows(int64_t rows, int64_t least)
{
    enum { MOST_CHUNKS = 64 };
    const int64_t share = (rows + MOST_CHUNKS - 1) / MOST_CHUNKS;
    return share < least ? least : share;
}

#endif
