/* Includes the template body LNS_BODY once per CPU variant and working type, as static functions, and defines the table
 * macro LNS_TABLE(f): an initialiser {{f32, f64} per variant} to be indexed [lns_cpu()][is_double]. LNS_TABLE_F64(f) is
 * the same of functions in double alone, {f64 per variant}. */
#include <float.h>

#include "core/cpu.h"

/* Floats kept in wider registers between operations would give other bits than the other builds. */
#if FLT_EVAL_METHOD != 0
#error "float must be computed as float: on s390x add -fexcess-precision=fast, on 32-bit x86 -msse2 -mfpmath=sse"
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
