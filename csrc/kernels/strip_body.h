/* Template body: rows of a sample a strip of columns at a time, converted to the working type. */
/* `count` elements from `index` on in the working type: where they lie, or converted into buffer. */
static inline const real *VNAME(strip)(const void *data, lns_dtype dtype, int64_t index, int64_t count, real *buffer)
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
static inline void VNAME(store_strip)(const real *from, int64_t count, void *data, lns_dtype dtype, int64_t index)
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
