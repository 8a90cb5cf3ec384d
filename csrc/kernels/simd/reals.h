/* Includes the body for both working types.
 *
 * Included by   variants.h, once per CPU variant; so without an include guard.
 * Expects       LNS_BODY, LNS_VARIANT, VEC_BYTES.
 * Sets          REAL_IS_DOUBLE for each type, and undefines it.
 * Undefines     LNS_VARIANT, VEC_BYTES. */
#define REAL_IS_DOUBLE 0
#include "kernels/simd/real.h"
#undef REAL_IS_DOUBLE
#define REAL_IS_DOUBLE 1
#include "kernels/simd/real.h"
#undef REAL_IS_DOUBLE
#undef LNS_VARIANT
#undef VEC_BYTES
