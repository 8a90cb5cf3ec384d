/* Includes the body for one working type.
 *
 * Included by   reals.h, twice per CPU variant; so without an include guard.
 * Expects       LNS_BODY, LNS_VARIANT, VEC_BYTES (bytes of a vector register), REAL_IS_DOUBLE.
 * Sets          for the body, and undefines again: real, the working type; key, the signed integer of its size, ukey,
 *               the unsigned one, KEY_BITS; LANES, reals in a cache line; VNAME(f), f with the type and variant behind
 *               it.
 * Undefines     VEC_LANES and VEC_PARTS, which vector_body.h defines. */
#if REAL_IS_DOUBLE
#define real double
#define key int64_t
#define ukey uint64_t
#define KEY_BITS 64
#define LANES 8
#define VNAME(f) LNS_JOIN(f, _f64, LNS_VARIANT)
#else
#define real float
#define key int32_t
#define ukey uint32_t
#define KEY_BITS 32
#define LANES 16
#define VNAME(f) LNS_JOIN(f, _f32, LNS_VARIANT)
#endif

#include LNS_BODY

#undef real
#undef key
#undef ukey
#undef KEY_BITS
#undef LANES
#undef VNAME
#undef VEC_LANES
#undef VEC_PARTS
