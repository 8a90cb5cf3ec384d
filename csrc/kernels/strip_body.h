/* Template body: rows of a sample a strip of columns at a time, converted to the working type. */
#include "kernels/simd_body.h"

/* a < b ? a : b in every lane: what is not a number in a does not win. */
static inline VNAME(reals) VNAME(reals_min)(VNAME(reals) a, VNAME(reals) b)
{
#if VEC_BYTES == 64 && REAL_IS_DOUBLE
    return _mm512_min_pd(a, b);
#elif VEC_BYTES == 64
    return _mm512_min_ps(a, b);
#elif VEC_BYTES == 32 && REAL_IS_DOUBLE
    return _mm256_min_pd(a, b);
#elif VEC_BYTES == 32
    return _mm256_min_ps(a, b);
#elif LNS_HAVE_X86 && REAL_IS_DOUBLE
    return _mm_min_pd(a, b);
#elif LNS_HAVE_X86
    return _mm_min_ps(a, b);
#else
    const VNAME(vec) less = a < b;
    return (VNAME(reals))(((VNAME(vec))a & less) | ((VNAME(vec))b & ~less));
#endif
}

/* a > b ? a : b in every lane. */
static inline VNAME(reals) VNAME(reals_max)(VNAME(reals) a, VNAME(reals) b)
{
#if VEC_BYTES == 64 && REAL_IS_DOUBLE
    return _mm512_max_pd(a, b);
#elif VEC_BYTES == 64
    return _mm512_max_ps(a, b);
#elif VEC_BYTES == 32 && REAL_IS_DOUBLE
    return _mm256_max_pd(a, b);
#elif VEC_BYTES == 32
    return _mm256_max_ps(a, b);
#elif LNS_HAVE_X86 && REAL_IS_DOUBLE
    return _mm_max_pd(a, b);
#elif LNS_HAVE_X86
    return _mm_max_ps(a, b);
#else
    const VNAME(vec) more = a > b;
    return (VNAME(reals))(((VNAME(vec))a & more) | ((VNAME(vec))b & ~more));
#endif
}

/* `count` elements from `index` on in the working type: where they lie, or converted into buffer. The loops stand here,
 * and not in load.h, to be compiled for every variant. */
static inline const real *VNAME(strip)(const void *data, lns_dtype dtype, int64_t index, int64_t count,
                                       real *restrict buffer)
{
    const uint16_t *half = (const uint16_t *)data + index;
    if (dtype == LNS_F32 || dtype == LNS_F64) {
        return (const real *)data + index;
    }
    if (dtype == LNS_BF16) {
        for (int64_t i = 0; i < count; i++) {
            buffer[i] = (real)lns_bf16_to_f32(half[i]);
        }
    } else {
        for (int64_t i = 0; i < count; i++) {
            buffer[i] = (real)lns_f16_to_f32(half[i]);
        }
    }
    return buffer;
}

/* The other way, rounded once. */
static inline void VNAME(store_strip)(const real *restrict from, int64_t count, void *data, lns_dtype dtype,
                                      int64_t index)
{
    uint16_t *half = (uint16_t *)data + index;
    if (dtype == LNS_F32 || dtype == LNS_F64) {
        memcpy((real *)data + index, from, (size_t)count * sizeof(real));
    } else if (dtype == LNS_BF16) {
        for (int64_t i = 0; i < count; i++) {
            half[i] = lns_f32_to_bf16((float)from[i]);
        }
    } else {
        for (int64_t i = 0; i < count; i++) {
            half[i] = lns_f32_to_f16((float)from[i]);
        }
    }
}
