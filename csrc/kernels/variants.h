/* Includes the template body LNS_BODY once per CPU variant and working type, as static functions, and defines the table
 * macro LNS_TABLE(f): an initialiser {{f32, f64} per variant} to be indexed [lns_cpu()][is_double]. With
 * LNS_ONE_VARIANT (loops that wait for memory, where another instruction set gains nothing) there is only the portable
 * one, and LNS_TABLE(f) is {f32, f64}. */
#include <float.h>

#include "core/cpu.h"

/* Floats kept in wider registers between operations would give other bits than the other builds. */
#if FLT_EVAL_METHOD != 0
#error "float must be computed as float: on s390x add -fexcess-precision=fast, on 32-bit x86 -msse2 -mfpmath=sse"
#endif

#if LNS_HAVE_AVX2
#include <immintrin.h>
#endif

#define LNS_JOIN_(a, b, c) a##b##c
#define LNS_JOIN(a, b, c) LNS_JOIN_(a, b, c)

#define LNS_VARIANT _portable
#define VEC_BYTES 16
#define REAL_IS_DOUBLE 0
#include "kernels/real.h"
#undef REAL_IS_DOUBLE
#define REAL_IS_DOUBLE 1
#include "kernels/real.h"
#undef REAL_IS_DOUBLE
#undef LNS_VARIANT
#undef VEC_BYTES

#if defined(LNS_ONE_VARIANT)
#define LNS_TABLE(f) {f##_f32_portable, f##_f64_portable}
#elif LNS_HAVE_AVX2
LNS_TARGET_AVX2
#define LNS_VARIANT _avx2
#define VEC_BYTES 32
#define REAL_IS_DOUBLE 0
#include "kernels/real.h"
#undef REAL_IS_DOUBLE
#define REAL_IS_DOUBLE 1
#include "kernels/real.h"
#undef REAL_IS_DOUBLE
#undef LNS_VARIANT
#undef VEC_BYTES
LNS_TARGET_END
#define LNS_TABLE(f)                                                                                                   \
    {                                                                                                                  \
        {f##_f32_portable, f##_f64_portable},                                                                          \
        {                                                                                                              \
            f##_f32_avx2, f##_f64_avx2                                                                                 \
        }                                                                                                              \
    }
#else
#define LNS_TABLE(f)                                                                                                   \
    {                                                                                                                  \
        {f##_f32_portable, f##_f64_portable},                                                                          \
        {                                                                                                              \
            f##_f32_portable, f##_f64_portable                                                                         \
        }                                                                                                              \
    }
#endif
