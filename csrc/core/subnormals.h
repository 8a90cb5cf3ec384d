/* Callers may have told the processor to take subnormal numbers for zero (torch.set_flush_denormal, -ffast-math at link
 * time). Kernels compute with them whatever the caller does: else a float16 could become 0 on its way to float32, and
 * results would depend on the thread that asks for them. */
#ifndef LNS_SUBNORMALS_H
#define LNS_SUBNORMALS_H

#include <stdint.h>

#if defined(__SSE2__)
#include <xmmintrin.h>
#define LNS_FLUSH_BITS UINT64_C(0x8040) /* MXCSR: FTZ, DAZ */

static inline uint64_t lns_float_mode(void)
{
    return _mm_getcsr();
}

static inline void lns_set_float_mode(uint64_t mode)
{
    _mm_setcsr((unsigned)mode);
}
#elif defined(__aarch64__)
#define LNS_FLUSH_BITS UINT64_C(0x1000000) /* FPCR: FZ */

static inline uint64_t lns_float_mode(void)
{
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}

static inline void lns_set_float_mode(uint64_t mode)
{
    __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory");
}
#else
#define LNS_FLUSH_BITS UINT64_C(0)

static inline uint64_t lns_float_mode(void)
{
    return 0;
}

static inline void lns_set_float_mode(uint64_t mode)
{
    (void)mode;
}
#endif

static inline uint64_t lns_keep_subnormals(void)
{
    const uint64_t before = lns_float_mode();
    if (before & LNS_FLUSH_BITS) {
        lns_set_float_mode(before & ~LNS_FLUSH_BITS);
    }
    return before;
}

static inline void lns_restore_float_mode(const uint64_t *before)
{
    if (*before & LNS_FLUSH_BITS) {
        lns_set_float_mode(*before);
    }
}

/* As the first line of a function: subnormals count until it returns, in whatever way. */
#define LNS_KEEP_SUBNORMALS                                                                                            \
    const uint64_t float_mode __attribute__((cleanup(lns_restore_float_mode), unused)) = lns_keep_subnormals()

#endif
