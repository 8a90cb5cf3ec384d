/* Sorting networks as lists of comparators: X(i, j) puts the smaller of rows i and j into row i. What runs them is
 * network_body.h.
 *
 * LNS_SORT16 is Green's network of 60 comparators (Knuth, The Art of Computer Programming 3, 5.3.4); LNS_MERGE16 is
 * Batcher's odd-even merge of rows 0-7 with rows 8-15 (25). Written out, so that a compiler keeps the 16 rows in the 16
 * vector registers. The UN forms are the same lists backwards: they undo a recorded sort.
 *
 * 32 rows: sort rows 0-15 and rows 16-31, merge the even rows, merge the odd rows, and compare rows 1 and 2, 3 and 4,
 * ... (the odd-even merge of 16 with 16, in pieces of 16 rows).
 *
 * Included by   tile.h.
 * Leaves        LNS_RUN, the networks as X-macros, and their numbers of comparators. */
#ifndef LNS_NETWORK_H
#define LNS_NETWORK_H

#include <stdint.h>

/* Rows of a run: what a network sorts at once, and what longer tiles are merged from. */
#define LNS_RUN 32
#define LNS_SORT16_COMPARATORS 60
#define LNS_MERGE16_COMPARATORS 25
#define LNS_RUN_COMPARATORS (2 * LNS_SORT16_COMPARATORS + 2 * LNS_MERGE16_COMPARATORS + LNS_RUN / 2 - 1)

/* What a network does with its comparators' decisions, and the networks of 16 rows. */
enum lns_network_mode { LNS_PLAIN, LNS_RECORD, LNS_UNDO };
enum lns_network_kind { LNS_SORT, LNS_MERGE, LNS_MERGE_ODD };

/* Rows of the network for n rows: 16, or whole runs, filled up with keys above all others. */
static inline int64_t lns_network_rows(int64_t n)
{
    return n <= 16 ? 16 : (n + LNS_RUN - 1) / LNS_RUN * LNS_RUN;
}

/* Comparators of the network for n <= LNS_RUN rows. */
static inline int64_t lns_network_size(int64_t n)
{
    return n <= 16 ? LNS_SORT16_COMPARATORS : LNS_RUN_COMPARATORS;
}

/* clang-format off */
#define LNS_SORT16(X)                                                                                                 \
    X(0, 1) X(2, 3) X(4, 5) X(6, 7) X(8, 9) X(10, 11) X(12, 13) X(14, 15) X(0, 2) X(4, 6) X(8, 10) X(12, 14)          \
    X(1, 3) X(5, 7) X(9, 11) X(13, 15) X(0, 4) X(8, 12) X(1, 5) X(9, 13) X(2, 6) X(10, 14) X(3, 7) X(11, 15)          \
    X(0, 8) X(1, 9) X(2, 10) X(3, 11) X(4, 12) X(5, 13) X(6, 14) X(7, 15) X(5, 10) X(6, 9) X(3, 12) X(13, 14)         \
    X(4, 8) X(7, 11) X(1, 2) X(1, 4) X(7, 13) X(2, 8) X(11, 14) X(2, 4) X(5, 6) X(9, 10) X(11, 13) X(3, 8)            \
    X(7, 12) X(6, 8) X(10, 12) X(3, 5) X(7, 9) X(3, 4) X(5, 6) X(7, 8) X(9, 10) X(11, 12) X(6, 7) X(8, 9)

#define LNS_UNSORT16(X)                                                                                               \
    X(8, 9) X(6, 7) X(11, 12) X(9, 10) X(7, 8) X(5, 6) X(3, 4) X(7, 9) X(3, 5) X(10, 12) X(6, 8) X(7, 12)             \
    X(3, 8) X(11, 13) X(9, 10) X(5, 6) X(2, 4) X(11, 14) X(2, 8) X(7, 13) X(1, 4) X(1, 2) X(7, 11) X(4, 8)            \
    X(13, 14) X(3, 12) X(6, 9) X(5, 10) X(7, 15) X(6, 14) X(5, 13) X(4, 12) X(3, 11) X(2, 10) X(1, 9) X(0, 8)         \
    X(11, 15) X(3, 7) X(10, 14) X(2, 6) X(9, 13) X(1, 5) X(8, 12) X(0, 4) X(13, 15) X(9, 11) X(5, 7) X(1, 3)          \
    X(12, 14) X(8, 10) X(4, 6) X(0, 2) X(14, 15) X(12, 13) X(10, 11) X(8, 9) X(6, 7) X(4, 5) X(2, 3) X(0, 1)

#define LNS_MERGE16(X)                                                                                                \
    X(0, 8) X(1, 9) X(2, 10) X(3, 11) X(4, 12) X(5, 13) X(6, 14) X(7, 15) X(4, 8) X(5, 9) X(6, 10) X(7, 11)           \
    X(2, 4) X(3, 5) X(6, 8) X(7, 9) X(10, 12) X(11, 13) X(1, 2) X(3, 4) X(5, 6) X(7, 8) X(9, 10) X(11, 12)            \
    X(13, 14)

#define LNS_UNMERGE16(X)                                                                                              \
    X(13, 14) X(11, 12) X(9, 10) X(7, 8) X(5, 6) X(3, 4) X(1, 2) X(11, 13) X(10, 12) X(7, 9) X(6, 8) X(3, 5)          \
    X(2, 4) X(7, 11) X(6, 10) X(5, 9) X(4, 8) X(7, 15) X(6, 14) X(5, 13) X(4, 12) X(3, 11) X(2, 10) X(1, 9)           \
    X(0, 8)
/* clang-format on */

#endif
