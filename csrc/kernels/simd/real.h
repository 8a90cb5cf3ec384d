/* Names of the working type inside a template body. A body is included once per type and CPU variant (variants.h) and
 * sees: real, key (the signed integer of its size), ukey, LANES (reals in a cache line), VEC_BYTES (bytes of a vector
 * register), VNAME(f), REAL_IS_DOUBLE. There is no include guard: that is the point. */
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
