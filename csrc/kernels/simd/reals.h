/* Includes the template body twice, for float and for double, and forgets the variant. There is no include guard: that
 * is the point. */
#define REAL_IS_DOUBLE 0
#include "kernels/simd/real.h"
#undef REAL_IS_DOUBLE
#define REAL_IS_DOUBLE 1
#include "kernels/simd/real.h"
#undef REAL_IS_DOUBLE
#undef LNS_VARIANT
#undef VEC_BYTES
