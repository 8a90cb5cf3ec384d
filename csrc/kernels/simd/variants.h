/* Builds a kernel's body for every CPU variant and working type, as static functions, and a table of them. README.md
 * beside this file has a map of what includes what.
 *
 * Included by   kernels/NAME.c, once, after all headers that have an include guard.
 * Expects       LNS_BODY, the quoted path of the body.
 * Sets          LNS_VARIANT and VEC_BYTES for each variant; reals.h undefines them.
 * Leaves        LNS_TABLE(f): an initialiser {{f32, f64} per variant} to be indexed [lns_cpu()][is_double];
 *               LNS_TABLE_F64(f): the same of functions in double alone, {f64 per variant}; LNS_JOIN(a, b, c). */
#include <float.h>

#include "core/cpu.h"

/* Floats kept in wider registers between operations would give other bits than the other builds. */
#if FLT_EVAL_METHOD != 0
#error "float must be computed as float: on s390x add -fexcess-precision=fast, on 32-bit x86 -msse2 -mfpmath=sse"
#endif

#ifdef __FAST_MATH__
#error "-ffast-math changes results, and the processor's mode for subnormal numbers: build without it"
#endif

#if LNS_HAVE_X86
#include <immintrin.h>
#endif

#define LNS_JOIN_(a, b, c) a##b##c
#define LNS_JOIN(a, b, c) LNS_JOIN_(a, b, c)
#define LNS_PAIR_(f, variant) {f##_f32##variant, f##_f64##variant}

#define LNS_VARIANT _portable
#define VEC_BYTES 16
#include "kernels/simd/reals.h"

#if LNS_HAVE_X86
LNS_TARGET_AVX2
#define LNS_VARIANT _avx2
#define VEC_BYTES 32
#include "kernels/simd/reals.h"
LNS_TARGET_END
LNS_TARGET_AVX512
#define LNS_VARIANT _avx512
#define VEC_BYTES 64
#include "kernels/simd/reals.h"
LNS_TARGET_END
#define LNS_TABLE(f) {LNS_PAIR_(f, _portable), LNS_PAIR_(f, _avx2), LNS_PAIR_(f, _avx512)}
#define LNS_TABLE_F64(f) {f##_f64_portable, f##_f64_avx2, f##_f64_avx512}
#else
#define LNS_TABLE(f) {LNS_PAIR_(f, _portable), LNS_PAIR_(f, _portable), LNS_PAIR_(f, _portable)}
#define LNS_TABLE_F64(f) {f##_f64_portable, f##_f64_portable, f##_f64_portable}
#endif
