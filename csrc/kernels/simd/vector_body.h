/* Template body: a register of keys or reals, VEC_BYTES wide, and what a comparator does to a pair of them.
 *
 * Included by   sorting_body.h and strip_body.h: once per working type and CPU variant of a kernel.
 * Expects       what real.h sets, and load.h.
 * Leaves        VEC_LANES, reals in a register, and VEC_PARTS, registers in a cache line, until real.h undefines them.
 *
 * Written with the compilers' vector extensions, which lower any width on any target; intrinsics where gcc 12 finds no
 * minimum in a compare and a select. Loads and stores go through memcpy, which makes no claim about alignment or
 * aliasing.
 *
 * VNAME(mask) is the record of one comparator: which lanes it swapped. AVX-512 compares into a bit a lane; the others
 * keep the vector of the comparison. */
#define VEC_LANES ((int)(VEC_BYTES / sizeof(key)))
#define VEC_PARTS (LANES / VEC_LANES)

typedef key VNAME(vec) __attribute__((vector_size(VEC_BYTES)));
typedef real VNAME(reals) __attribute__((vector_size(VEC_BYTES)));

#if VEC_BYTES == 64 && REAL_IS_DOUBLE
typedef uint8_t VNAME(mask);
#elif VEC_BYTES == 64
typedef uint16_t VNAME(mask);
#else
typedef VNAME(vec) VNAME(mask);
#endif

static inline VNAME(vec) VNAME(vec_load)(const void *from)
{
    VNAME(vec) v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline void VNAME(vec_store)(void *to, VNAME(vec) v)
{
    memcpy(to, &v, sizeof v);
}

static inline VNAME(reals) VNAME(reals_load)(const real *from)
{
    return (VNAME(reals))VNAME(vec_load)(from);
}

static inline void VNAME(reals_store)(real *to, VNAME(reals) v)
{
    VNAME(vec_store)(to, (VNAME(vec))v);
}

/* Adds a register's part of a float sum to its double total, and starts the next part. */
static inline void VNAME(fold)(VNAME(reals) * part, double *restrict total)
{
    for (int l = 0; l < VEC_LANES; l++) {
        total[l] += (double)(*part)[l];
    }
    *part = (VNAME(reals)){0};
}

/* The bits of a real as a key, and back: the magnitude of negative ones is reversed. */
static inline VNAME(vec) VNAME(vec_flip)(VNAME(vec) k)
{
#if VEC_BYTES == 32 && REAL_IS_DOUBLE /* no arithmetic shift of 64 bits before AVX-512 */
    const VNAME(vec) sign = (VNAME(vec))_mm256_cmpgt_epi64(_mm256_setzero_si256(), (__m256i)k);
#else
    const VNAME(vec) sign = k >> (KEY_BITS - 1);
#endif
    return k ^ (sign & (key)((ukey)-1 >> 1));
}

static inline key VNAME(flip)(key k)
{
    return k ^ (key)((ukey)(k >> (KEY_BITS - 1)) >> 1);
}

/* Whether any lane of a comparison is set. */
static inline int VNAME(vec_any)(VNAME(vec) lanes)
{
#if VEC_BYTES == 64
    return _mm512_test_epi64_mask((__m512i)lanes, (__m512i)lanes) != 0;
#elif VEC_BYTES == 32
    return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes);
#else
    key any = 0;
    for (int l = 0; l < VEC_LANES; l++) {
        any |= lanes[l];
    }
    return any != 0;
#endif
}

/* Where a > b. */
static inline VNAME(mask) VNAME(vec_greater)(VNAME(vec) a, VNAME(vec) b)
{
#if VEC_BYTES == 64 && REAL_IS_DOUBLE
    return _mm512_cmpgt_epi64_mask((__m512i)a, (__m512i)b);
#elif VEC_BYTES == 64
    return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b);
#else
    return (VNAME(vec))(a > b);
#endif
}

/* Swaps the lanes that the mask marks. */
static inline void VNAME(vec_swap)(VNAME(vec) * a, VNAME(vec) * b, VNAME(mask) mask)
{
    const VNAME(vec) x = *a, y = *b;
#if VEC_BYTES == 64 && REAL_IS_DOUBLE
    *a = (VNAME(vec))_mm512_mask_mov_epi64((__m512i)x, mask, (__m512i)y);
    *b = (VNAME(vec))_mm512_mask_mov_epi64((__m512i)y, mask, (__m512i)x);
#elif VEC_BYTES == 64
    *a = (VNAME(vec))_mm512_mask_mov_epi32((__m512i)x, mask, (__m512i)y);
    *b = (VNAME(vec))_mm512_mask_mov_epi32((__m512i)y, mask, (__m512i)x);
#else
    const VNAME(vec) difference = (x ^ y) & mask; /* on AVX2 no slower than two selections, which gcc 12 spoils */
    *a = x ^ difference;
    *b = y ^ difference;
#endif
}

/* A comparator: the smaller keys into a, the larger into b. With AVX-512 the larger is what is left of both when the
 * smaller is taken out: Intel's CPUs have one port for minima and maxima of 64 bytes, and two for logic. */
static inline void VNAME(vec_exchange)(VNAME(vec) * a, VNAME(vec) * b)
{
#if VEC_BYTES == 64 && REAL_IS_DOUBLE
    const __m512i x = (__m512i)*a, y = (__m512i)*b;
    const __m512i least = _mm512_min_epi64(x, y);
    *a = (VNAME(vec))least;
    *b = (VNAME(vec))_mm512_ternarylogic_epi64(x, y, least, 0x96);
#elif VEC_BYTES == 64
    const __m512i x = (__m512i)*a, y = (__m512i)*b;
    const __m512i least = _mm512_min_epi32(x, y);
    *a = (VNAME(vec))least;
    *b = (VNAME(vec))_mm512_ternarylogic_epi32(x, y, least, 0x96);
#elif VEC_BYTES == 32 && !REAL_IS_DOUBLE
    const __m256i x = (__m256i)*a, y = (__m256i)*b;
    *a = (VNAME(vec))_mm256_min_epi32(x, y);
    *b = (VNAME(vec))_mm256_max_epi32(x, y);
#else
    VNAME(vec_swap)(a, b, VNAME(vec_greater)(*a, *b));
#endif
}

/* The same, recorded. */
static inline void VNAME(vec_exchange_recorded)(VNAME(vec) * a, VNAME(vec) * b, VNAME(mask) * mask)
{
    const VNAME(mask) swapped = VNAME(vec_greater)(*a, *b);
    memcpy(mask, &swapped, sizeof swapped);
    VNAME(vec_exchange)(a, b);
}

/* What a recorded comparator did, again; twice is undone. */
static inline void VNAME(vec_exchange_masked)(VNAME(vec) * a, VNAME(vec) * b, const VNAME(mask) * mask)
{
    VNAME(mask) swapped;
    memcpy(&swapped, mask, sizeof swapped);
    VNAME(vec_swap)(a, b, swapped);
}

#if !REAL_IS_DOUBLE
/* VEC_LANES numbers of 16 bits as keys; the intrinsics are one instruction where gcc 12 makes five of a conversion. */
static inline VNAME(vec) VNAME(vec_widen)(const uint16_t *from)
{
    typedef uint16_t halves __attribute__((vector_size(VEC_BYTES / 2)));
    halves h;
    memcpy(&h, from, sizeof h);
#if VEC_BYTES == 64
    return (VNAME(vec))_mm512_cvtepu16_epi32((__m256i)h);
#elif VEC_BYTES == 32
    return (VNAME(vec))_mm256_cvtepu16_epi32((__m128i)h);
#else
    return __builtin_convertvector(h, VNAME(vec));
#endif
}
#endif

/* VEC_LANES elements from `index` on in the working type. dtype should be a constant. */
static LNS_INLINE VNAME(reals) VNAME(reals_at)(const void *data, lns_dtype dtype, int64_t index)
{
#if !REAL_IS_DOUBLE
    if (dtype != LNS_F32) {
        const VNAME(vec) bits = VNAME(vec_widen)((const uint16_t *)data + index);
        if (dtype == LNS_BF16) {
            return (VNAME(reals))(bits << 16);
        }
        /* As lns_f16_to_f32. */
        const VNAME(reals) scaled = (VNAME(reals))((bits & 0x7fff) << 13) * 0x1p112f;
        const VNAME(vec) special = ((bits & 0x7c00) == 0x7c00) & 0x7f800000;
        return (VNAME(reals))((VNAME(vec))scaled | special | (bits & 0x8000) << 16);
    }
#else
    (void)dtype;
#endif
    return VNAME(reals_load)((const real *)data + index);
}
