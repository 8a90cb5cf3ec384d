/* Template body: rows of a sample a strip of columns at a time, converted to the working type.
 *
 * Included by   affine_body.h, moments_body.h, pool_body.h and prox_body.h: once per working type and CPU variant.
 * Expects       what real.h sets, and load.h.
 * Leaves        no macro of its own. */
#include "kernels/simd/vector_body.h"

/* a compare b ? a : b in every lane, by the instruction for it where there is one. */
#if VEC_BYTES == 64 && REAL_IS_DOUBLE
#define PICK(op, a, compare, b) _mm512_##op##_pd(a, b)
#elif VEC_BYTES == 64
#define PICK(op, a, compare, b) _mm512_##op##_ps(a, b)
#elif VEC_BYTES == 32 && REAL_IS_DOUBLE
#define PICK(op, a, compare, b) _mm256_##op##_pd(a, b)
#elif VEC_BYTES == 32
#define PICK(op, a, compare, b) _mm256_##op##_ps(a, b)
#elif LNS_HAVE_X86 && REAL_IS_DOUBLE
#define PICK(op, a, compare, b) _mm_##op##_pd(a, b)
#elif LNS_HAVE_X86
#define PICK(op, a, compare, b) _mm_##op##_ps(a, b)
#else
#define PICK(op, a, compare, b)                                                                                        \
    (VNAME(reals))(((VNAME(vec))(a) & (VNAME(vec))((a)compare(b))) | ((VNAME(vec))(b) & ~(VNAME(vec))((a)compare(b))))
#endif

/* What is not a number in a does not win. */
static inline VNAME(reals) VNAME(reals_min)(VNAME(reals) a, VNAME(reals) b)
{
    return PICK(min, a, <, b);
}

static inline VNAME(reals) VNAME(reals_max)(VNAME(reals) a, VNAME(reals) b)
{
    return PICK(max, a, >, b);
}

#undef PICK

/* `count` elements from `index` on in the working type: where they lie, or converted into buffer. */
static inline const real *VNAME(strip)(const void *data, lns_dtype dtype, int64_t index, int64_t count,
                                       real *restrict buffer)
{
    if (dtype == LNS_F32 || dtype == LNS_F64) {
        return (const real *)data + index;
    }
#if !REAL_IS_DOUBLE
    lns_load_f32(buffer, data, dtype, index, count);
#else
    (void)count;
#endif
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
