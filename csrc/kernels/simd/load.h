/* Elements of the four dtypes, one by one or a run of them, and their conversion to and from the working type. The
 * functions are inline, to be compiled anew for every CPU variant that calls them.
 *
 * Included by   kernels' .c files, before variants.h.
 * Leaves        LNS_INLINE, LNS_NOINLINE, LNS_CALL_WITH_DTYPE. */
#ifndef LNS_LOAD_H
#define LNS_LOAD_H

#include <stdint.h>
#include <string.h>

#include "lineas.h"

/* For functions whose constant arguments choose the code. */
#define LNS_INLINE inline __attribute__((always_inline))

/* For functions whose loops need all vector registers: inside a larger function, some would be kept in memory. */
#define LNS_NOINLINE __attribute__((noinline))

/* Calls f(data, dtype, ...), of a template body, with each dtype as a constant of its own. */
#define LNS_CALL_WITH_DTYPE(f, data, dtype, ...)                                                                       \
    do {                                                                                                               \
        if ((dtype) == LNS_BF16) {                                                                                     \
            f(data, LNS_BF16, __VA_ARGS__);                                                                            \
        } else if ((dtype) == LNS_F16) {                                                                               \
            f(data, LNS_F16, __VA_ARGS__);                                                                             \
        } else {                                                                                                       \
            f(data, REAL_IS_DOUBLE ? LNS_F64 : LNS_F32, __VA_ARGS__);                                                  \
        }                                                                                                              \
    } while (0)

static inline int lns_is_double(lns_dtype dtype)
{
    return dtype == LNS_F64;
}

static inline int64_t lns_element_size(lns_dtype dtype)
{
    return dtype == LNS_F64 ? 8 : dtype == LNS_F32 ? 4 : 2;
}

/* Whether it is one of the four; of the two that results have. */
static inline int lns_is_dtype(lns_dtype dtype)
{
    return (unsigned)dtype <= (unsigned)LNS_BF16;
}

static inline int lns_is_real(lns_dtype dtype)
{
    return dtype == LNS_F32 || dtype == LNS_F64;
}

static inline const void *lns_element(const void *data, lns_dtype dtype, int64_t index)
{
    return (const char *)data + index * lns_element_size(dtype);
}

static inline float lns_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float lns_bf16_to_f32(uint16_t h)
{
    return lns_from_bits((uint32_t)h << 16);
}

/* IEEE binary16 to binary32, exact, without branches so that loops vectorise: shifting exponent and mantissa into place
 * leaves the exponent biased by 15 instead of 127, which the product with 2^112 mends, also for subnormals: these are
 * subnormal floats, so functions that get here begin with LNS_KEEP_SUBNORMALS. */
static inline float lns_f16_to_f32(uint16_t h)
{
    const uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13;
    const uint32_t special = (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
    const float scaled = lns_from_bits(magnitude) * 0x1p112f;
    uint32_t bits;
    memcpy(&bits, &scaled, sizeof bits);
    return lns_from_bits(bits | special | (uint32_t)(h & 0x8000u) << 16);
}

static inline uint16_t lns_f32_to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16; /* to nearest, ties to even */
    const uint32_t nan = (bits >> 16) | 0x40u;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

/* binary32 to binary16, to nearest with ties to even; without branches, as above. */
static inline uint16_t lns_f32_to_f16(float value)
{
    int32_t bits, subnormal;
    memcpy(&bits, &value, sizeof bits);
    const int32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const float shifted = lns_from_bits((uint32_t)magnitude) + 0.5f; /* lines up with binary16's subnormals */
    memcpy(&subnormal, &shifted, sizeof subnormal);
    int32_t half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    half = magnitude < 0x38800000 ? subnormal - 0x3f000000 : half; /* below 2^-14 */
    half = magnitude >= 0x477ff000 ? 0x7c00 : half;                /* 65520 and above round to infinity */
    half = magnitude > 0x7f800000 ? 0x7e00 : half;
    return (uint16_t)(sign | half);
}

/* `count` elements from `index` on, as float. dtype is not LNS_F64. */
static LNS_INLINE void lns_load_f32(float *restrict out, const void *data, lns_dtype dtype, int64_t index,
                                    int64_t count)
{
    const void *from = lns_element(data, dtype, index);
    if (dtype == LNS_F32) {
        memcpy(out, from, (size_t)count * sizeof(float));
    } else if (dtype == LNS_BF16) {
        const uint16_t *h = from;
        for (int64_t i = 0; i < count; i++) {
            out[i] = lns_bf16_to_f32(h[i]);
        }
    } else {
        const uint16_t *h = from;
        for (int64_t i = 0; i < count; i++) {
            out[i] = lns_f16_to_f32(h[i]);
        }
    }
}

static inline void lns_load_f64(double *out, const void *data, lns_dtype dtype, int64_t index, int64_t count)
{
    (void)dtype;
    memcpy(out, lns_element(data, LNS_F64, index), (size_t)count * sizeof(double));
}

/* One element of any dtype. */
static inline double lns_value(const void *data, lns_dtype dtype, int64_t index)
{
    if (dtype == LNS_F64) {
        return ((const double *)data)[index];
    }
    float value;
    lns_load_f32(&value, data, dtype, index, 1);
    return value;
}

#endif
