/* One fuzzing harness over every function of the engine: the first byte of the input picks the function, the rest its
 * sizes, types, options and values. */
#define _POSIX_C_SOURCE 200112L
#include "fuzz.h"

#include <float.h>

enum { MOST_BLOCKS = 64, MOST_CELLS = 6000 };

typedef struct block {
    role part;
    int dtype; /* an lns_dtype, or -1: bytes */
    size_t size;
    unsigned char *base, *data, *before;
} block;

static const uint8_t *next_byte, *end_byte;
static block blocks[MOST_BLOCKS];
static int block_count;
lns_place last_place;

/* ---- choices ------------------------------------------------------------------------------------------------ */

unsigned byte(void)
{
    return next_byte < end_byte ? *next_byte++ : 0;
}

int64_t below(int64_t limit)
{
    const int64_t low = byte(), high = byte();
    return (low + 256 * high) % limit;
}

int64_t few(void)
{
    const unsigned kind = byte();
    return kind < 200 ? 1 : 1 + kind % 3;
}

int64_t some_rows(void)
{
    const unsigned kind = byte();
    return kind < 160 ? 1 + kind % 70 : 1 + below(kind < 248 ? 1100 : 5000);
}

int64_t some_columns(int64_t rows)
{
    const unsigned kind = byte();
    const int64_t columns = kind < 200 ? 1 + kind % 40 : 1 + below(600), most = MOST_CELLS / rows;
    return columns <= most ? columns : most;
}

int64_t any_size(void)
{
    const unsigned kind = byte();
    uint64_t bits = 0;
    if (kind < 63) { /* a power of two, or beside it */
        return (int64_t)(UINT64_C(1) << kind) + (int64_t)(byte() % 3) - 1;
    }
    for (int k = 0; k < 8; k++) {
        bits = bits << 8 | byte();
    }
    return kind < 128 ? -(int64_t)(bits >> 1) : kind < 192 ? (int64_t)(bits >> 1) : (int64_t)(bits >> 60);
}

double some_rate(void)
{
    static const double rates[] = {0, 0.1, 1, 1e-3, 0.5, 30, 1e-30, 1e30};
    return rates[byte() % 8];
}

lns_dtype some_dtype(int is_double)
{
    static const lns_dtype narrow[] = {LNS_F32, LNS_F16, LNS_BF16};
    const unsigned choice = byte() % 3;
    return is_double ? LNS_F64 : narrow[choice];
}

lns_dtype real_dtype(int is_double)
{
    return is_double ? LNS_F64 : LNS_F32;
}

/* ---- memory --------------------------------------------------------------------------------------------------- */

static void *new_block(role part, int dtype, int64_t size, int64_t shift)
{
    REQUIRE(block_count < MOST_BLOCKS);
    block *b = &blocks[block_count++];
    b->part = part;
    b->dtype = dtype;
    b->size = (size_t)size;
    b->base = calloc(1, (size_t)(size + shift));
    b->data = b->base + shift;
    b->before = NULL;
    if (b->base == NULL) {
        exit(2);
    }
    return b->data;
}

void *elements(role part, lns_dtype dtype, int64_t count)
{
    const int64_t size = lns_element_size(dtype);
    return new_block(part, (int)dtype, count * size, size * (byte() % 4));
}

void *bytes_of(role part, int64_t size)
{
    return new_block(part, -1, size, 0);
}

static void release_blocks(void)
{
    for (int k = 0; k < block_count; k++) {
        free(blocks[k].base);
        free(blocks[k].before);
    }
    block_count = 0;
}

void *work_memory(int64_t size)
{
    static int rubbish;
    void *block = NULL;
    REQUIRE(size >= 0);
    if (posix_memalign(&block, LNS_ALIGN, (size_t)size) != 0) {
        exit(2);
    }
    rubbish += 37;
    memset(block, rubbish & 255, (size_t)size);
    return block;
}

static void put(void *data, lns_dtype dtype, int64_t index, double value)
{
    switch (dtype) {
    case LNS_F64:
        ((double *)data)[index] = value;
        break;
    case LNS_F32:
        ((float *)data)[index] = (float)value;
        break;
    case LNS_F16:
        ((uint16_t *)data)[index] = lns_f32_to_f16((float)value);
        break;
    case LNS_BF16:
        ((uint16_t *)data)[index] = lns_f32_to_bf16((float)value);
        break;
    }
}

/* 64 bits in no apparent order (splitmix64). */
static uint64_t scramble(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

/* Element `index` gets `bits`, as many as it has. */
static void put_bits(void *data, lns_dtype dtype, int64_t index, uint64_t bits)
{
    const int64_t size = lns_element_size(dtype);
    const uint32_t half = (uint32_t)bits;
    const uint16_t quarter = (uint16_t)bits;
    const void *from = size == 8 ? (const void *)&bits : size == 4 ? (const void *)&half : (const void *)&quarter;
    memcpy((char *)data + index * size, from, (size_t)size);
}

void *some_values(role part, lns_dtype dtype, int64_t count)
{
    static const double special[] = {0.0,      -0.0,    INFINITY, -INFINITY, NAN,     -NAN, 5e-324, 1e-45,
                                     -FLT_MAX, FLT_MAX, DBL_MAX,  -DBL_MAX,  6.1e-05, 1,    -1e-40, 65504};
    static const int64_t one[] = {
        [LNS_F32] = 0x3f800000, [LNS_F64] = INT64_C(0x3ff0000000000000), [LNS_F16] = 0x3c00, [LNS_BF16] = 0x3f80};
    static const int exponents[][4] = {/* from usual numbers to the ends of the range, and to subnormal numbers */
                                       [LNS_F32] = {100, 60, -100, -145},
                                       [LNS_F64] = {1000, 500, -500, -1060},
                                       [LNS_F16] = {7, 4, -14, -22},
                                       [LNS_BF16] = {100, 60, -100, -130}};
    void *data = elements(part, dtype, count);
    const unsigned choice = byte(), pattern = choice % 9, scale = byte();
    const int exponent = choice / 9 % 8 >= 4 ? exponents[dtype][choice / 9 % 4] : 0;
    uint64_t state = (uint64_t)below(65536);
    for (int64_t i = 0; i < count; i++) {
        const uint64_t bits = scramble(&state);
        const double uniform = (double)(bits >> 11) * 0x1p-53 - 0.5;
        switch (pattern) {
        case 0: /* usual */
            put(data, dtype, i, uniform * (1 + scale));
            break;
        case 1: /* many ties */
            put(data, dtype, i, (double)(bits % (2 + scale % 8)) - 2);
            break;
        case 2: /* neighbours that differ in their last bits, of both signs */
            put_bits(data, dtype, i, (uint64_t)one[dtype] + bits % (1 + scale));
            put(data, dtype, i, lns_value(data, dtype, i) * (bits >> 40 & 1 && scale & 1 ? -1 : 1));
            break;
        case 3:
            put(data, dtype, i, (double)scale - 100);
            break;
        case 4:
            put(data, dtype, i, (double)i - scale);
            break;
        case 5:
            put(data, dtype, i, (double)scale - (double)i * 0.5);
            break;
        case 6: /* far from zero */
            put(data, dtype, i, uniform + 25 * (1 + scale));
            break;
        case 7: /* any bits */
            put_bits(data, dtype, i, bits);
            break;
        case 8: /* bits of all magnitudes, none of them infinite, most of them small */
            put_bits(data, dtype, i, bits);
            put(data, dtype, i, isfinite(lns_value(data, dtype, i)) ? lns_value(data, dtype, i) : 0);
            break;
        }
    }
    for (int64_t i = 0; exponent != 0 && pattern < 7 && i < count; i++) {
        put(data, dtype, i, ldexp(lns_value(data, dtype, i), exponent));
    }
    for (unsigned pokes = byte() % 4; pokes > 0; pokes--) {
        const int64_t index = below(count > 0 ? count : 1);
        const double value = special[byte() % 16];
        if (count > 0) {
            put(data, dtype, index, value);
        }
    }
    return data;
}

double *some_masses(int64_t n)
{
    static const double wrong[] = {-1, NAN, INFINITY, -0.0, 1e308, 5e-324};
    const unsigned choice = byte(), kind = choice % 8;
    const int exponent = choice / 8 % 4 == 3 ? (choice & 128 ? 900 : -1060) : 0;
    uint64_t state = kind;
    if (kind < 3) {
        return NULL;
    }
    double *mass = elements(INPUT, LNS_F64, n);
    for (int64_t i = 0; i < n; i++) {
        const uint64_t bits = scramble(&state);
        const double usual = (double)(bits >> 11) * 0x1p-53;
        mass[i] = kind == 3 ? 1 : kind == 4 ? (double)(bits % 3) : kind == 5 ? ldexp(usual, (int)(bits % 40)) : usual;
    }
    for (int64_t i = 0; i < n; i++) {
        mass[i] = ldexp(mass[i], exponent);
    }
    if (kind == 7) {
        mass[below(n)] = wrong[byte() % 6];
    }
    return mass;
}

/* ---- calls ------------------------------------------------------------------------------------------------------ */

static uint64_t mix(uint64_t hash, uint64_t word)
{
    hash = (hash ^ word) * UINT64_C(0x9e3779b97f4a7c15);
    return hash ^ hash >> 29;
}

static uint64_t value_bits(double value)
{
    uint64_t bits = 1; /* of no number */
    if (!isnan(value)) {
        memcpy(&bits, &value, sizeof bits);
    }
    return bits;
}

static uint64_t hash_block(const block *b)
{
    const size_t size = b->dtype < 0 ? 1 : (size_t)lns_element_size((lns_dtype)b->dtype);
    uint64_t hash = b->size;
    for (size_t i = 0; i < b->size / size; i++) {
        hash = mix(hash, b->dtype < 0 ? b->data[i] : value_bits(lns_value(b->data, (lns_dtype)b->dtype, (int64_t)i)));
    }
    return hash;
}

static void prepare_blocks(int rubbish)
{
    for (int k = 0; k < block_count; k++) {
        block *b = &blocks[k];
        if (b->part == OUTPUT) {
            memset(b->data, rubbish, b->size);
        } else if (b->before == NULL) {
            b->before = malloc(b->size + 1);
            memcpy(b->before, b->data, b->size);
        } else {
            memcpy(b->data, b->before, b->size);
        }
    }
}

static uint64_t hash_result(lns_status status, const lns_place *place)
{
    uint64_t hash = status;
    for (int k = 0; k < block_count; k++) {
        const block *b = &blocks[k];
        if (b->part == INPUT || (b->part == IN_OUT && status != LNS_OK)) {
            REQUIRE(memcmp(b->data, b->before, b->size) == 0);
        } else if (status == LNS_OK) {
            hash = mix(hash, hash_block(b));
        }
    }
    if (status == LNS_NOT_FINITE || status == LNS_BAD_MASS || status == LNS_EMPTY_ROW) {
        hash = mix(hash, (uint64_t)place->entry);
        hash = mix(hash, (uint64_t)place->argument);
        hash = mix(hash, (uint64_t)place->row);
        hash = mix(hash, (uint64_t)place->column);
        hash = mix(hash, value_bits(place->value));
    }
    return hash;
}

lns_status everywhere(lns_status (*f)(void *context, int threads, lns_place *place), void *context)
{
    static const char *const variants[] = {"portable", "avx2", "avx512"};
    const unsigned choice = byte();
    const int several = choice % 8 == 7 ? 2 + (int)(choice >> 3) % 7 : 0;
    lns_status first = LNS_OK;
    uint64_t hash = 0;
    for (int call = 0; call < 6; call++) {
        const int threads = call % 2 ? several : 1;
        if (threads == 0 || lns_cpu_init(variants[call / 2]) != 0) {
            continue;
        }
        lns_place place = {0};
        prepare_blocks(0x55 + 29 * call);
        const lns_status status = f(context, threads, &place);
        const uint64_t result = hash_result(status, &place);
        if (call == 0) {
            first = status;
            hash = result;
        }
        REQUIRE(status == first);
        REQUIRE(result == hash);
        last_place = place;
    }
    for (int k = 0; k < block_count; k++) { /* to a further call, results are inputs */
        blocks[k].part = INPUT;
        free(blocks[k].before);
        blocks[k].before = NULL;
    }
    return first;
}

int64_t column_to_check(int k, int64_t d)
{
    return k == 0 ? 0 : k == 1 ? d - 1 : d / 2;
}

int near(double a, double b, double tolerance)
{
    return !isfinite(tolerance) || fabs(a - b) <= tolerance;
}

int near_wide(double a, long double b, long double tolerance)
{
    return !isfinite((double)b) || (isfinite(a) && fabsl(a - b) <= tolerance);
}

/* ---- the functions ---------------------------------------------------------------------------------------------- */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const functions[])(void) = {
        fuzz_sort,        fuzz_wasserstein, fuzz_fit,       fuzz_affine, fuzz_affine_backward, fuzz_pool,
        fuzz_moments,     fuzz_covariance,  fuzz_prox,      fuzz_step,   fuzz_sizes,           fuzz_bures_map,
        fuzz_wasserstein, fuzz_path,        fuzz_quantiles, fuzz_fit,
    };
    next_byte = data;
    end_byte = data + size;
    functions[byte() % 16]();
    release_blocks();
    return 0;
}
