/* The bits of every kernel's outputs, as hashes that stand in bits.h: a platform, compiler or CPU variant that computes
 * anything else fails. A change that is meant to move bits puts the lines there that this test then prints.
 *
 * The inputs are made by exact operations alone, so that they are the same everywhere. Left out is what comes from
 * OpenBLAS (covariances and their maps), whose bits differ between processors. */
#include "check.h"

static const struct {
    const char *name;
    uint64_t hash;
} known[] = {
#include "bits.h"
};

/* ---- numbers ---------------------------------------------------------------------------------------------------- */

static uint32_t draw(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

/* Bell-shaped, with ties, zeros of both signs and subnormal numbers among them. */
static double bell(uint32_t *state, double subnormal)
{
    double sum = 0;
    for (int k = 0; k < 6; k++) {
        sum += (double)draw(state) - 8388607.5;
    }
    const double x = sum / 8388608;
    switch (draw(state) % 64) {
    case 0:
        return 0;
    case 1:
        return -0.0;
    case 2:
        return subnormal;
    case 3:
        return -subnormal;
    default:
        return draw(state) % 4 ? x : floor(x * 8) / 8;
    }
}

static size_t item_size(lns_dtype dtype)
{
    return dtype == LNS_F64 ? 8 : dtype == LNS_F32 ? 4 : 2;
}

static size_t real_size(lns_dtype dtype)
{
    return dtype == LNS_F64 ? 8 : 4;
}

/* `count` items of dtype. Float16 is drawn as bits: exponents from 2^-5 to 2^2, subnormals, and any mantissa. */
static void *numbers(lns_dtype dtype, int64_t count, uint32_t seed)
{
    void *block = memory(count * (int64_t)item_size(dtype));
    for (int64_t i = 0; i < count; i++) {
        if (dtype == LNS_F64) {
            ((double *)block)[i] = bell(&seed, 0x1p-1060);
        } else if (dtype == LNS_F16) {
            const uint32_t sign_and_mantissa = draw(&seed) & 0x83ff, exponent = draw(&seed) % 9;
            ((uint16_t *)block)[i] = (uint16_t)(sign_and_mantissa | (exponent ? exponent + 9 : 0) << 10);
        } else {
            const float x = (float)bell(&seed, 0x1p-140);
            uint32_t bits;
            memcpy(&bits, &x, 4);
            if (dtype == LNS_F32) {
                ((float *)block)[i] = x;
            } else {
                ((uint16_t *)block)[i] = (uint16_t)(bits >> 16);
            }
        }
    }
    return block;
}

/* Weights of rows, some of them zero. */
static double *masses(int64_t n, uint32_t seed)
{
    double *mass = memory(n * 8);
    for (int64_t i = 0; i < n; i++) {
        mass[i] = i % 7 == 3 ? 0 : (double)(draw(&seed) + 1);
    }
    return mass;
}

/* ---- hashes ----------------------------------------------------------------------------------------------------- */

/* Mixes `count` items of `size` bytes into the hash, by value, so that the order of bytes in memory plays no part. */
static void mix(uint64_t *hash, const void *data, int64_t count, size_t size)
{
    const unsigned char *bytes = data;
    for (int64_t i = 0; i < count; i++, bytes += size) {
        uint64_t word = 0;
        uint32_t half;
        uint16_t quarter;
        if (size == 8) {
            memcpy(&word, bytes, 8);
        } else if (size == 4) {
            memcpy(&half, bytes, 4);
            word = half;
        } else {
            memcpy(&quarter, bytes, 2);
            word = quarter;
        }
        *hash = (*hash ^ word) * 0x9e3779b97f4a7c15u;
        *hash ^= *hash >> 29;
    }
}

static void expect(const char *kernel, lns_dtype dtype, uint64_t hash)
{
    static const char *const types[] = {[LNS_F32] = "f32", [LNS_F64] = "f64", [LNS_F16] = "f16", [LNS_BF16] = "bf16"};
    char name[32];
    int right = 0;
    snprintf(name, sizeof name, "%s %s", kernel, types[dtype]);
    for (size_t k = 0; k < sizeof known / sizeof *known; k++) {
        right |= strcmp(known[k].name, name) == 0 && known[k].hash == hash;
    }
    CHECK(right);
    if (!right) {
        fprintf(stderr, "{\"%s\", 0x%016llx}, on %s\n", name, (unsigned long long)hash, lns_cpu_name());
    }
}

/* ---- kernels ---------------------------------------------------------------------------------------------------- */

enum { THREADS = 3 };

static const int64_t shapes[][2] = {{1, 5},    {2, 33},  {7, 16},   {16, 20},   {32, 70},   {33, 17},
                                    {64, 130}, {100, 9}, {257, 18}, {1024, 16}, {1500, 20}, {4100, 6}};

#define COUNT(table) (sizeof(table) / sizeof *(table))

static void sort_bits(lns_dtype dtype)
{
    uint64_t hash = 0;
    for (size_t k = 0; k < COUNT(shapes); k++) {
        const int64_t n = shapes[k][0], d = shapes[k][1];
        void *x = numbers(dtype, n * d, (uint32_t)k), *out = memory(n * d * 8), *outs[] = {out};
        const lns_sample sample = {x, dtype, n, d, NULL};
        void *work = memory(lns_sort_worksize(&sample, 1, THREADS));
        CHECK(lns_sort(&sample, 1, THREADS, work, outs, NULL) == LNS_OK);
        mix(&hash, out, n * d, real_size(dtype));
        free(x);
        free(out);
        free(work);
    }
    expect("sort", dtype, hash);
}

/* One shape of the loss, in all its forms: plain, target sorted beforehand, other number of rows, weighted rows; each
 * without and with an affine map and with the gradients asked for singly or together. */
static void w2_shape(uint64_t *hash, lns_dtype dtype, int64_t n, int64_t d, uint32_t seed)
{
    const lns_dtype real = dtype == LNS_F64 ? LNS_F64 : LNS_F32;
    const size_t size = real_size(dtype);
    const int64_t m = n + 1 + n / 2;
    void *u = numbers(dtype, n * d, seed), *v = numbers(dtype, m * d, seed + 100), *sorted = memory(n * d * 8);
    void *weight = numbers(real, d, seed + 200), *bias = numbers(real, d, seed + 300), *outs[] = {sorted};
    void *value = memory(d * 8), *grad_u = memory(n * d * 8), *grad_weight = memory(d * 8), *grad_bias = memory(d * 8);
    double *mass_u = masses(n, seed + 400), *mass_v = masses(m, seed + 500);
    const lns_sample target = {v, dtype, n, d, NULL};
    void *work = memory(lns_sort_worksize(&target, 1, THREADS));
    CHECK(lns_sort(&target, 1, THREADS, work, outs, NULL) == LNS_OK);
    free(work);
    for (int form = 0; form < 16; form++) {
        const int kind = form & 3, mapped = form & 4, lone = form & 8;
        lns_w2_job job = {.u = {u, dtype, n, d, kind == 3 ? mass_u : NULL}, .v = target, .value = value};
        if (kind == 1) {
            job.v = (lns_sample){sorted, real, n, d, NULL};
        } else if (kind >= 2) {
            job.v = (lns_sample){v, dtype, m, d, kind == 3 ? mass_v : NULL};
        }
        if (mapped) {
            job.weight = weight;
            job.bias = bias;
            job.grad_weight = grad_weight;
            job.grad_bias = grad_bias;
        }
        job.grad_u = lone ? NULL : grad_u;
        work = memory(lns_wasserstein_worksize(&job, 1, THREADS));
        CHECK(lns_wasserstein(&job, 1, kind == 1, THREADS, work, NULL) == LNS_OK);
        mix(hash, value, d, size);
        if (!lone) {
            mix(hash, grad_u, n * d, size);
        }
        if (mapped) {
            mix(hash, grad_weight, d, size);
            mix(hash, grad_bias, d, size);
        }
        free(work);
    }
    void *const blocks[] = {u, v, sorted, weight, bias, value, grad_u, grad_weight, grad_bias, mass_u, mass_v};
    for (size_t k = 0; k < COUNT(blocks); k++) {
        free(blocks[k]);
    }
}

static void w2_bits(lns_dtype dtype)
{
    uint64_t hash = 0;
    for (size_t k = 0; k < COUNT(shapes); k++) {
        w2_shape(&hash, dtype, shapes[k][0], shapes[k][1], 1000 * (uint32_t)k);
    }
    expect("wasserstein", dtype, hash);
}

static void fit_bits(lns_dtype dtype)
{
    uint64_t hash = 0;
    for (size_t k = 0; k < COUNT(shapes); k++) {
        const int64_t n = shapes[k][0] + 1, d = shapes[k][1], m = n + 3;
        void *u = numbers(dtype, n * d, (uint32_t)k), *v = numbers(dtype, m * d, (uint32_t)k + 50);
        void *weight = memory(d * 8), *bias = memory(d * 8);
        double *mass = masses(n, (uint32_t)k);
        for (int form = 0; form < 9; form++) {
            const int weighted = form / 3 == 2;
            const lns_fit_job job = {{u, dtype, n, d, weighted ? mass : NULL},
                                     {v, dtype, form / 3 == 0 ? n : m, d, NULL},
                                     weight,
                                     bias,
                                     NULL};
            void *work = memory(lns_fit_worksize(&job, 1, THREADS));
            CHECK(lns_fit(&job, 1, (lns_method)(form % 3), THREADS, work, NULL) == LNS_OK);
            mix(&hash, weight, d, real_size(dtype));
            mix(&hash, bias, d, real_size(dtype));
            free(work);
        }
        free(u);
        free(v);
        free(weight);
        free(bias);
        free(mass);
    }
    expect("fit", dtype, hash);
}

static void affine_bits(lns_dtype dtype)
{
    static const int64_t sizes[][3] = {{1, 1, 1}, {5, 33, 1}, {64, 130, 1}, {3, 7, 19}, {2, 20, 64}, {700, 64, 1}};
    const lns_dtype real = dtype == LNS_F64 ? LNS_F64 : LNS_F32;
    uint64_t hash = 0;
    for (size_t k = 0; k < COUNT(sizes); k++) {
        const int64_t d = sizes[k][1], count = sizes[k][0] * d * sizes[k][2];
        void *z = numbers(dtype, count, (uint32_t)k), *grad = numbers(dtype, count, (uint32_t)k + 10);
        void *weight = numbers(real, d, (uint32_t)k + 20), *bias = numbers(real, d, (uint32_t)k + 30);
        void *out = memory(count * 8), *grad_weight = memory(d * 8), *grad_bias = memory(d * 8);
        void *work = memory(lns_affine_worksize(sizes[k][0], d, sizes[k][2]));
        for (int half = 0; half < 3; half++) {
            CHECK(lns_affine(z, dtype, sizes[k][0], d, sizes[k][2], weight, bias, half * 0.5, THREADS, work, out) ==
                  LNS_OK);
            mix(&hash, out, count, item_size(dtype));
            CHECK(lns_affine_backward(z, dtype, sizes[k][0], d, sizes[k][2], weight, half * 0.5, grad, THREADS, work,
                                      out, grad_weight, grad_bias) == LNS_OK);
            mix(&hash, out, count, item_size(dtype));
            mix(&hash, grad_weight, d, real_size(dtype));
            mix(&hash, grad_bias, d, real_size(dtype));
        }
        void *const blocks[] = {z, grad, weight, bias, out, grad_weight, grad_bias, work};
        for (size_t b = 0; b < COUNT(blocks); b++) {
            free(blocks[b]);
        }
    }
    expect("affine", dtype, hash);
}

static void pool_bits(lns_dtype dtype)
{
    static const int64_t sizes[][3] = {{1, 1, 3}, {3, 9, 33}, {5, 40, 70}, {2, 300, 16}};
    const lns_dtype real = dtype == LNS_F64 ? LNS_F64 : LNS_F32;
    uint64_t hash = 0;
    for (size_t k = 0; k < COUNT(sizes); k++) {
        const int64_t batch = sizes[k][0], tokens = sizes[k][1], d = sizes[k][2], count = batch * tokens * d;
        void *x = numbers(dtype, count, (uint32_t)k), *grad = numbers(real, count, (uint32_t)k + 10);
        void *out = memory(count * 8), *grad_x = memory(count * 8);
        int32_t *index = memory(batch * d * 4);
        uint8_t *mask = memory(batch * tokens);
        uint32_t seed = (uint32_t)k;
        int64_t kept = 0;
        for (int64_t i = 0; i < batch * tokens; i++) {
            mask[i] = i % tokens == tokens / 2 || draw(&seed) % 3 > 0;
            kept += mask[i];
        }
        for (int form = 0; form < 10; form++) {
            const lns_pooling mode = (lns_pooling)(form / 2);
            const uint8_t *const chosen = form % 2 ? mask : NULL;
            const int indexed = mode == LNS_POOL_MIN || mode == LNS_POOL_MAX;
            const int64_t rows = mode == LNS_POOL_ALL ? (chosen ? kept : batch * tokens) : batch;
            CHECK(lns_pool(x, dtype, batch, tokens, d, chosen, mode, THREADS, out, indexed ? index : NULL, NULL) ==
                  LNS_OK);
            mix(&hash, out, rows * d, real_size(dtype));
            if (indexed) {
                mix(&hash, index, batch * d, 4);
            }
            CHECK(lns_pool_backward(grad, real, batch, tokens, d, chosen, mode, indexed ? index : NULL, THREADS, grad_x,
                                    NULL) == LNS_OK);
            mix(&hash, grad_x, count, real_size(dtype));
        }
        void *const blocks[] = {x, grad, out, grad_x, index, mask};
        for (size_t b = 0; b < COUNT(blocks); b++) {
            free(blocks[b]);
        }
    }
    expect("pool", dtype, hash);
}

static void moments_bits(lns_dtype dtype)
{
    uint64_t hash = 0;
    for (size_t k = 0; k < COUNT(shapes); k++) {
        const int64_t n = shapes[k][0], d = shapes[k][1];
        void *x = numbers(dtype, n * d, (uint32_t)k);
        double *block = memory(8 * d * 8);
        lns_moments states[2];
        for (int s = 0; s < 2; s++) {
            double *const row = block + 4 * d * s;
            states[s] = (lns_moments){0, row, row + d, row + 2 * d, row + 3 * d};
            for (int64_t j = 0; j < d; j++) {
                row[j] = row[d + j] = 0;
                row[2 * d + j] = INFINITY;
                row[3 * d + j] = -INFINITY;
            }
        }
        const int64_t first = n / 3 + 1;
        const lns_sample head = {x, dtype, first, d, NULL};
        const lns_sample tail = {(char *)x + (size_t)(first * d) * item_size(dtype), dtype, n - first, d, NULL};
        const lns_sample *const parts[] = {&head, &tail, &head};
        void *work = memory(lns_moments_worksize(n, d));
        for (int p = 0; p < 3; p++) {
            if (parts[p]->n > 0) {
                CHECK(lns_moments_update(parts[p], THREADS, work, &states[p % 2], NULL) == LNS_OK);
            }
        }
        CHECK(lns_moments_merge(&states[0], &states[1], d) == LNS_OK);
        mix(&hash, block, 8 * d, 8);
        free(x);
        free(block);
        free(work);
    }
    expect("moments", dtype, hash);
}

/* A summary of so few slots that most values are means, merged with one of the same rows; and what is read from it. */
static void quantiles_bits(lns_dtype dtype)
{
    enum { SLOTS = 9, ROWS = 32, PARTS = 17 };
    const lns_dtype real = dtype == LNS_F64 ? LNS_F64 : LNS_F32;
    const int64_t lanes = 64 / (int64_t)real_size(dtype);
    uint64_t hash = 0;
    for (size_t k = 0; k < COUNT(shapes); k++) {
        const int64_t n = shapes[k][0] % 2000, d = shapes[k][1], keys = (d + lanes - 1) / lanes * SLOTS * ROWS;
        void *x = numbers(dtype, n * d, (uint32_t)k), *out = memory(PARTS * d * 8);
        double *moments = memory(8 * d * 8);
        lns_quantiles states[2];
        for (int s = 0; s < 2; s++) {
            double *const row = moments + 4 * d * s;
            states[s] = (lns_quantiles){.dtype = real, .d = d, .slots = SLOTS, .rows = ROWS, .keys = memory(keys * 64)};
            states[s].moments = (lns_moments){0, row, row + d, row + 2 * d, row + 3 * d};
            for (int64_t j = 0; j < d; j++) {
                row[j] = row[d + j] = 0;
                row[2 * d + j] = INFINITY;
                row[3 * d + j] = -INFINITY;
            }
            const lns_sample sample = {x, dtype, n, d, NULL};
            void *work = memory(lns_quantiles_worksize(&states[s], n, THREADS));
            CHECK(lns_quantiles_update(&sample, THREADS, work, &states[s], NULL) == LNS_OK);
            free(work);
        }
        const int64_t held = lns_quantiles_held(&states[1]);
        void *work = memory(lns_quantiles_worksize(&states[0], held, THREADS));
        CHECK(lns_quantiles_merge(&states[1], THREADS, work, &states[0]) == LNS_OK);
        free(work);
        work = memory(lns_quantiles_read_worksize(&states[0], THREADS));
        CHECK(lns_quantiles_read(&states[0], NULL, PARTS, THREADS, work, out) == LNS_OK);
        free(work);
        mix(&hash, out, PARTS * d, real_size(dtype));
        const int64_t rows = lns_quantiles_held(&states[0]);
        void *all = memory(rows * d * 8);
        double *weights = memory(rows * 8);
        CHECK(lns_quantiles_rows(&states[0], THREADS, all, weights) == LNS_OK);
        mix(&hash, all, rows * d, real_size(dtype));
        mix(&hash, weights, rows, 8);
        mix(&hash, &states[0].error, 1, 8);
        void *const blocks[] = {x, out, moments, states[0].keys, states[1].keys, all, weights};
        for (size_t b = 0; b < COUNT(blocks); b++) {
            free(blocks[b]);
        }
    }
    expect("quantiles", dtype, hash);
}

/* The rates make the powers of Adam's correction exact, so that the C library's pow plays no part. */
static void prox_bits(lns_dtype dtype)
{
    static const int64_t offsets[] = {0, 1, 34, 50, 300, 1400};
    enum { MODULES = 5, D = 1400 };
    uint64_t hash = 0;
    void *blocks[8];
    double per_module[2 * MODULES];
    for (uint32_t b = 0; b < 8; b++) {
        blocks[b] = numbers(dtype, D, b);
    }
    for (int64_t i = 0; i < D; i++) { /* second moments are not negative */
        for (int b = 6; b < 8; b++) {
            if (dtype == LNS_F64) {
                ((double *)blocks[b])[i] = fabs(((double *)blocks[b])[i]);
            } else {
                ((float *)blocks[b])[i] = fabsf(((float *)blocks[b])[i]);
            }
        }
    }
    lns_adam adam = {blocks[4], blocks[6], blocks[5], blocks[7], 3, 0.875, 0.96875, 0x1p-27};
    for (int form = 0; form < 3; form++) {
        const lns_step_problem problem = {.dtype = dtype,
                                          .modules = MODULES,
                                          .offsets = offsets,
                                          .weight = blocks[0],
                                          .bias = blocks[1],
                                          .grad_weight = blocks[2],
                                          .grad_bias = blocks[3],
                                          .lr = 0.125,
                                          .l1 = 0.3,
                                          .group = 0.2,
                                          .l1_bias = form ? 0.1 : 0,
                                          .group_bias = form ? 0.4 : 0,
                                          .adam = form == 2 ? &adam : NULL};
        CHECK(lns_step(&problem, THREADS, per_module, NULL) == LNS_OK);
        mix(&hash, per_module, 2 * MODULES, 8);
        for (int b = 0; b < 8; b++) {
            mix(&hash, blocks[b], D, real_size(dtype));
        }
    }
    for (size_t k = 0; k < COUNT(offsets); k++) {
        const int64_t d = offsets[k];
        if (d > 0) {
            CHECK(lns_prox(blocks[4], dtype, d, 0.5, 0.3, 0.02, blocks[0]) == LNS_OK);
            mix(&hash, blocks[0], d, real_size(dtype));
        }
    }
    for (int b = 0; b < 8; b++) {
        free(blocks[b]);
    }
    expect("prox", dtype, hash);
}

/* Moments and the paths that follow from them. */
static void path_bits(lns_dtype dtype)
{
    enum { POINTS = 12 };
    const lns_dtype real = dtype == LNS_F64 ? LNS_F64 : LNS_F32;
    uint64_t hash = 0;
    for (size_t k = 0; k < COUNT(shapes); k++) {
        const int64_t n = shapes[k][0] + 1, d = shapes[k][1], m = n + (int64_t)(k % 2);
        void *u = numbers(dtype, n * d, (uint32_t)k), *v = numbers(dtype, m * d, (uint32_t)k + 70);
        void *weight = memory(POINTS * d * 8), *bias = memory(POINTS * d * 8);
        double *moments = memory(5 * d * 8), *rows = memory(3 * POINTS * 8), penalties[POINTS];
        int64_t support[POINTS];
        const lns_fit_job fit = {
            .source = {u, dtype, n, d, NULL}, .target = {v, dtype, m, d, NULL}, .moments = moments};
        void *work = memory(lns_fit_worksize(&fit, 1, THREADS));
        CHECK(lns_fit(&fit, 1, LNS_MOMENTS, THREADS, work, NULL) == LNS_OK);
        free(work);
        mix(&hash, moments, 5 * d, 8);
        for (int half = 0; half < 3; half++) {
            const double ratio = half * 0.5;
            lns_path_job job = {.d = d, .moments = moments, .held_out = moments, .dtype = real, .weight = weight};
            job.bias = bias;
            job.stride = d;
            job.loss = rows;
            job.held_out_loss = rows + POINTS;
            job.distance = rows + 2 * POINTS;
            job.support = support;
            work = memory(lns_path_worksize(&job, 1, POINTS, THREADS));
            job.largest = penalties[0] = lns_path_largest(moments, d, ratio, work);
            for (int i = 1; i < POINTS; i++) {
                penalties[i] = penalties[i - 1] * 0.5;
            }
            if (job.largest > 0) {
                CHECK(lns_path(&job, 1, penalties, POINTS, ratio, THREADS, work) == LNS_OK);
                mix(&hash, weight, POINTS * d, real_size(dtype));
                mix(&hash, bias, POINTS * d, real_size(dtype));
                mix(&hash, rows, 3 * POINTS, 8);
                mix(&hash, support, POINTS, 8);
            }
            free(work);
        }
        void *const blocks[] = {u, v, weight, bias, moments, rows};
        for (size_t b = 0; b < COUNT(blocks); b++) {
            free(blocks[b]);
        }
    }
    expect("path", dtype, hash);
}

void test_bits(void)
{
    static const lns_dtype types[] = {LNS_F32, LNS_F64, LNS_F16, LNS_BF16};
    for (size_t k = 0; k < COUNT(types); k++) {
        sort_bits(types[k]);
        w2_bits(types[k]);
        fit_bits(types[k]);
        affine_bits(types[k]);
        pool_bits(types[k]);
        moments_bits(types[k]);
        quantiles_bits(types[k]);
        path_bits(types[k]);
        if (real_size(types[k]) == item_size(types[k])) {
            prox_bits(types[k]);
        }
    }
}
