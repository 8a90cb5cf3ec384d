/* Arithmetic of sizes that cannot overflow: -1 stands for a size that is not acceptable, and stays -1. */
#ifndef LNS_SIZES_H
#define LNS_SIZES_H

#include <stdint.h>

/* Work memory is cut into pieces that begin on a cache line. */
#define LNS_ALIGN 64

/* a * b for sizes; -1 where the product, or an argument, is negative or over 2^62. */
static inline int64_t lns_mul(int64_t a, int64_t b)
{
    const int64_t limit = INT64_C(1) << 62;
    if (a < 0 || b < 0 || (a > 0 && b > limit / a)) {
        return -1;
    }
    return a * b;
}

/* Rounds a byte count up to whole cache lines; -1 stays -1. */
static inline int64_t lns_pad(int64_t bytes)
{
    return bytes < 0 ? -1 : (bytes + LNS_ALIGN - 1) / LNS_ALIGN * LNS_ALIGN;
}

#endif
