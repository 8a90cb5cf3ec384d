/* Fuzzing what runs over its data once: affine maps, pooling, moments, prox and steps; and covariances. */
#include "fuzz.h"

#include <float.h>

/* Relative error of one rounding to a type. */
static double rounding(lns_dtype dtype)
{
    return dtype == LNS_F64 ? 1e-15 : dtype == LNS_F32 ? 2e-7 : dtype == LNS_F16 ? 1.0 / 1024 : 1.0 / 128;
}

/* Errors that no type is too narrow for, and magnitudes that every sum can hold. */
static double least(lns_dtype dtype)
{
    return dtype == LNS_F64 ? 1e-300 : dtype == LNS_F16 ? 1e-7 : 1e-37;
}

static double most(lns_dtype dtype)
{
    return dtype == LNS_F64 ? 1e150 : dtype == LNS_F16 ? 6e4 : 1e18;
}

/* ---- affine ------------------------------------------------------------------------------------------------------ */

typedef struct affine_call {
    const void *z, *weight, *bias, *grad_out;
    lns_dtype dtype;
    int64_t outer, d, inner;
    double strength;
    void *out, *grad_weight, *grad_bias;
} affine_call;

static affine_call some_affine(lns_dtype *real)
{
    const int is_double = byte() % 2, by_channel = byte() % 3 == 0;
    affine_call c = {.dtype = some_dtype(is_double), .outer = some_rows() - byte() % 2, .inner = 1};
    c.d = some_columns(c.outer + 1);
    if (by_channel) {
        c.inner = some_columns((c.outer + 1) * c.d) - byte() % 2;
    }
    *real = real_dtype(is_double);
    c.strength = some_rate() * (byte() % 8 == 7 ? -1 : 1);
    c.z = some_values(INPUT, c.dtype, c.outer * c.d * c.inner);
    c.weight = some_values(INPUT, *real, c.d);
    return c;
}

/* As the working type holds it. */
static double rounded(double x, lns_dtype real)
{
    return real == LNS_F64 ? x : (double)(float)x;
}

static double scale_of(const affine_call *c, lns_dtype real, int64_t j)
{
    const double weight = lns_value(c->weight, real, j);
    return rounded(weight == 1 ? 1 : (1 - c->strength) + c->strength * weight, real);
}

static lns_status call_affine(void *context, int threads, lns_place *place)
{
    const affine_call *c = context;
    void *work = work_memory(lns_affine_worksize(c->outer, c->d, c->inner));
    (void)place;
    const lns_status status =
        lns_affine(c->z, c->dtype, c->outer, c->d, c->inner, c->weight, c->bias, c->strength, threads, work, c->out);
    free(work);
    return status;
}

void fuzz_affine(void)
{
    lns_dtype real;
    affine_call c = some_affine(&real);
    c.bias = some_values(INPUT, real, c.d);
    c.out = elements(OUTPUT, c.dtype, c.outer * c.d * c.inner);
    REQUIRE(everywhere(call_affine, &c) == LNS_OK);
    for (int64_t i = 0; i < c.outer * c.d * c.inner; i++) {
        const int64_t j = i / c.inner % c.d;
        const double z = lns_value(c.z, c.dtype, i), shift = rounded(c.strength * lns_value(c.bias, real, j), real);
        const double product = scale_of(&c, real, j) * z, size = fabs(product) + fabs(shift);
        if (size < most(c.dtype)) {
            REQUIRE(near(lns_value(c.out, c.dtype, i), product + shift, rounding(c.dtype) * size + least(c.dtype)));
        }
    }
}

static lns_status call_affine_backward(void *context, int threads, lns_place *place)
{
    const affine_call *c = context;
    void *work = work_memory(lns_affine_worksize(c->outer, c->d, c->inner));
    (void)place;
    const lns_status status = lns_affine_backward(c->z, c->dtype, c->outer, c->d, c->inner, c->weight, c->strength,
                                                  c->grad_out, threads, work, c->out, c->grad_weight, c->grad_bias);
    free(work);
    return status;
}

void fuzz_affine_backward(void)
{
    lns_dtype real;
    affine_call c = some_affine(&real);
    c.grad_out = some_values(INPUT, c.dtype, c.outer * c.d * c.inner);
    c.out = byte() % 2 ? elements(OUTPUT, c.dtype, c.outer * c.d * c.inner) : NULL;
    c.grad_weight = elements(OUTPUT, real, c.d);
    c.grad_bias = elements(OUTPUT, real, c.d);
    REQUIRE(everywhere(call_affine_backward, &c) == LNS_OK);
    for (int k = 0; k < 3; k++) {
        const int64_t j = column_to_check(k, c.d);
        double sum = 0, sum_z = 0, size = 0, size_z = 0;
        for (int64_t i = 0; i < c.outer * c.inner; i++) {
            const int64_t at = (i / c.inner * c.d + j) * c.inner + i % c.inner;
            const double g = lns_value(c.grad_out, c.dtype, at), gz = g * lns_value(c.z, c.dtype, at);
            const double grad_z = g * scale_of(&c, real, j);
            if (c.out != NULL && fabs(grad_z) < most(c.dtype)) {
                REQUIRE(near(lns_value(c.out, c.dtype, at), grad_z, rounding(c.dtype) * fabs(grad_z) + least(c.dtype)));
            }
            sum += g;
            sum_z += gz;
            size += fabs(g);
            size_z += fabs(gz);
        }
        if (size * (1 + fabs(c.strength)) < most(real) && size_z * (1 + fabs(c.strength)) < most(real)) {
            const double tolerance = 40 * rounding(real);
            REQUIRE(near(lns_value(c.grad_bias, real, j), c.strength * sum,
                         tolerance * fabs(c.strength) * size + least(real)));
            REQUIRE(near(lns_value(c.grad_weight, real, j), c.strength * sum_z,
                         tolerance * fabs(c.strength) * size_z + (double)c.outer * least(real)));
        }
    }
}

/* ---- pool -------------------------------------------------------------------------------------------------------- */

typedef struct pool_call {
    const void *x;
    lns_dtype dtype;
    int64_t batch, tokens, d;
    const uint8_t *mask;
    lns_pooling mode;
    void *out;
    int32_t *index;
} pool_call;

static lns_status call_pool(void *context, int threads, lns_place *place)
{
    const pool_call *c = context;
    return lns_pool(c->x, c->dtype, c->batch, c->tokens, c->d, c->mask, c->mode, threads, c->out, c->index, place);
}

static lns_status call_pool_backward(void *context, int threads, lns_place *place)
{
    const pool_call *c = context;
    return lns_pool_backward(c->x, c->dtype, c->batch, c->tokens, c->d, c->mask, c->mode, c->index, threads, c->out,
                             place);
}

/* One column of one sequence, token by token; `to` is the row of the result that the sequence begins at. */
static void check_pool(const pool_call *c, lns_dtype real, int64_t row, int64_t to, int64_t j)
{
    long double sum = 0, size = 0;
    double best = 0;
    int64_t kept = 0, won = 0, lost = 0;
    for (int64_t t = 0; t < c->tokens; t++) {
        const double x = lns_value(c->x, c->dtype, (row * c->tokens + t) * c->d + j);
        if (c->mask != NULL && c->mask[row * c->tokens + t] == 0) {
            continue;
        }
        sum += x;
        size += fabsl(x);
        const int better = c->mode == LNS_POOL_MIN ? x < best : x > best;
        if (kept == 0 || c->mode == LNS_POOL_LAST || (!lost && (better || isnan(x)))) {
            best = x;
            won = t;
        }
        lost |= isnan(x);
        if (c->mode == LNS_POOL_ALL) {
            const double out = lns_value(c->out, real, (to + kept) * c->d + j);
            REQUIRE(out == x || (isnan(out) && isnan(x)));
        }
        kept++;
    }
    if (c->mode == LNS_POOL_ALL) {
        return;
    }
    const double out = lns_value(c->out, real, row * c->d + j);
    if (c->mode == LNS_POOL_MEAN) {
        const double mean = (double)(sum / kept);
        REQUIRE(isfinite(mean) ? near_wide(out, sum / kept, 40 * rounding(real) * size / kept + least(real))
                               : out == mean || (isnan(out) && isnan(mean)));
    } else {
        REQUIRE(out == best || (isnan(out) && isnan(best)));
        REQUIRE(c->index == NULL || c->index[row * c->d + j] == won);
    }
}

void fuzz_pool(void)
{
    const unsigned options = byte();
    const int is_double = options & 1;
    const lns_dtype real = real_dtype(is_double);
    pool_call c = {.dtype = some_dtype(is_double), .batch = byte() % 6, .tokens = byte() % 100};
    c.d = some_columns((c.batch + 1) * (c.tokens + 1));
    c.mode = (lns_pooling)(byte() % 5);
    uint8_t *mask = options & 2 ? bytes_of(INPUT, c.batch * c.tokens) : NULL;
    int64_t kept = 0, empty = 0;
    for (int64_t row = 0; row < c.batch; row++) {
        const unsigned kind = mask != NULL ? byte() : 0, edge = mask != NULL ? byte() : 0;
        int64_t own = 0;
        for (int64_t t = 0; t < c.tokens; t++) {
            if (mask != NULL) {
                const int keeps = kind % 4 == 0 ? 1 : kind % 4 == 1 ? t >= edge : kind % 4 == 2 ? t < edge : t % 3 != 0;
                mask[row * c.tokens + t] = (uint8_t)(keeps ? 1 + kind / 4 : 0); /* any value but 0 keeps */
            }
            own += mask == NULL || mask[row * c.tokens + t] != 0;
        }
        kept += own;
        empty += own == 0;
    }
    const int indexed = c.mode == LNS_POOL_MIN || c.mode == LNS_POOL_MAX;
    const int64_t rows = c.mode == LNS_POOL_ALL ? kept : c.batch;
    c.mask = mask;
    c.x = some_values(INPUT, c.dtype, c.batch * c.tokens * c.d);
    c.out = elements(OUTPUT, real, rows * c.d);
    c.index = indexed ? bytes_of(OUTPUT, c.batch * c.d * (int64_t)sizeof *c.index) : NULL;
    const lns_status status = everywhere(call_pool, &c);
    REQUIRE(status == (empty > 0 && c.mode != LNS_POOL_ALL ? LNS_EMPTY_ROW : LNS_OK));
    if (status != LNS_OK) {
        return;
    }
    for (int64_t row = 0, to = 0; row < c.batch; row++) {
        for (int k = 0; k < 3; k++) {
            check_pool(&c, real, row, to, column_to_check(k, c.d));
        }
        for (int64_t t = 0; t < c.tokens; t++) {
            to += c.mask == NULL || c.mask[row * c.tokens + t] != 0;
        }
    }
    /* Backwards: what a token gets is what it gave, so per column the gradients add up to those of the pooled rows. */
    pool_call back = c;
    int32_t *index = indexed ? bytes_of(INPUT, c.batch * c.d * (int64_t)sizeof *index) : NULL;
    if (indexed) {
        memcpy(index, c.index, (size_t)(c.batch * c.d) * sizeof *index);
        if (byte() % 8 == 7 && c.batch > 0) {
            index[below(c.batch * c.d)] = (int32_t)any_size();
        }
    }
    back.dtype = real;
    back.x = some_values(INPUT, real, rows * c.d);
    back.out = elements(OUTPUT, real, c.batch * c.tokens * c.d);
    back.index = index;
    int wrong = 0;
    for (int64_t i = 0; indexed && i < c.batch * c.d; i++) {
        wrong |= index[i] < 0 || index[i] >= c.tokens;
    }
    REQUIRE(everywhere(call_pool_backward, &back) == (wrong ? LNS_BAD_SIZE : LNS_OK));
    for (int k = 0; !wrong && k < 3; k++) {
        const int64_t j = column_to_check(k, c.d);
        double in = 0, out = 0, size = 0;
        for (int64_t row = 0; row < rows; row++) {
            in += lns_value(back.x, real, row * c.d + j);
            size += fabs(lns_value(back.x, real, row * c.d + j));
        }
        for (int64_t row = 0; row < c.batch * c.tokens; row++) {
            out += lns_value(back.out, real, row * c.d + j);
        }
        REQUIRE(!(size < most(real)) || near(in, out, 200 * rounding(real) * size + 500 * least(real)));
    }
}

/* ---- moments ----------------------------------------------------------------------------------------------------- */

typedef struct moments_call {
    lns_sample first, second;
    lns_moments state;
    int64_t start;
    double *memory;
} moments_call;

static lns_moments empty_moments(double *memory, int64_t d)
{
    for (int64_t j = 0; j < d; j++) {
        memory[j] = memory[d + j] = 0;
        memory[2 * d + j] = INFINITY;
        memory[3 * d + j] = -INFINITY;
    }
    return (lns_moments){0, memory, memory + d, memory + 2 * d, memory + 3 * d};
}

/* Both halves, one after the other. */
static lns_status call_moments(void *context, int threads, lns_place *place)
{
    moments_call *c = context;
    c->state.count = c->start;
    for (int k = 0; k < 2; k++) {
        const lns_sample *s = k == 0 ? &c->first : &c->second;
        void *work = work_memory(lns_moments_worksize(s->n, s->d));
        double *before = malloc((size_t)(4 * s->d) * sizeof *before);
        memcpy(before, c->memory, (size_t)(4 * s->d) * sizeof *before);
        const int64_t count = c->state.count;
        const lns_status status = lns_moments_update(s, threads, work, &c->state, place);
        free(work);
        if (status != LNS_OK) {
            REQUIRE(memcmp(before, c->memory, (size_t)(4 * s->d) * sizeof *before) == 0 && c->state.count == count);
            if (k == 1) { /* the first half is in: put back what the caller of this function expects */
                empty_moments(c->memory, s->d);
            }
            free(before);
            return status;
        }
        free(before);
    }
    return LNS_OK;
}

void fuzz_moments(void)
{
    const int is_double = byte() % 2;
    const int64_t n = some_rows(), m = some_rows(), d = some_columns(n > m ? n : m);
    const lns_dtype dtype = some_dtype(is_double);
    moments_call c = {.start = byte() % 16 == 15 ? INT64_MAX - below(300) : 0};
    c.first = (lns_sample){some_values(INPUT, dtype, n * d), dtype, n, d, NULL};
    c.second = (lns_sample){some_values(INPUT, dtype, m * d), dtype, m, d, NULL};
    c.memory = elements(IN_OUT, LNS_F64, 4 * d);
    c.state = empty_moments(c.memory, d);
    const lns_status status = everywhere(call_moments, &c);
    REQUIRE(c.start > 0 || status == LNS_OK || status == LNS_NOT_FINITE);
    for (int k = 0; c.start == 0 && status == LNS_OK && k < 3; k++) {
        const int64_t j = column_to_check(k, d);
        long double mean = 0, m2 = 0, low = INFINITY, high = -INFINITY;
        for (int pass = 0; pass < 3; pass++) {
            for (int64_t i = 0; i < n + m; i++) {
                const long double x = i < n ? lns_value(c.first.data, dtype, i * d + j)
                                            : lns_value(c.second.data, dtype, (i - n) * d + j);
                low = x < low ? x : low;
                high = x > high ? x : high;
                mean += pass == 1 ? (x - low) / (n + m) : 0; /* above the least: exact where all are equal */
                m2 += pass == 2 ? (x - low - mean) * (x - low - mean) : 0;
            }
        }
        mean += low;
        const long double size = fmaxl(fabsl(low), fabsl(high)), spread = high - low, rows = n + m;
        const double small = least(real_dtype(is_double));
        REQUIRE(c.state.count == n + m && c.state.low[j] == low && c.state.high[j] == high);
        REQUIRE(c.state.m2[j] >= 0 && (spread > 0 || c.state.m2[j] == 0));
        REQUIRE(isfinite(c.state.mean[j]));
        REQUIRE(near_wide(c.state.mean[j], mean, 1e-6 * spread + 1e-14 * size + small));
        /* The means of the halves are rounded as well: that is what their distance, and so m2, is off by. */
        const long double error =
            1e-5 * m2 + rows * (1e-12 * spread * spread + 4 * DBL_EPSILON * size * spread) + small;
        REQUIRE(m2 + error > DBL_MAX || near_wide(c.state.m2[j], m2, error));
    }
    /* An empty state changes nothing, and counts do not overflow. */
    lns_moments full = c.state, other = c.state;
    other.count = 0;
    REQUIRE(lns_moments_merge(&full, &other, d) == LNS_OK && full.count == c.state.count);
    full.count = INT64_MAX;
    other.count = 1;
    REQUIRE(lns_moments_merge(&full, &other, d) == LNS_BAD_SIZE);
}

/* ---- covariance and the map between Gaussians ---------------------------------------------------------------------
 */

typedef struct covariance_call {
    lns_sample sample;
    double *mean, *covariance, *target, *map;
    double ridge;
} covariance_call;

static lns_status call_covariance(void *context, int threads, lns_place *place)
{
    const covariance_call *c = context;
    void *work = work_memory(lns_covariance_worksize(c->sample.n, c->sample.d));
    (void)threads;
    const lns_status status = lns_covariance(&c->sample, work, c->mean, c->covariance, place);
    free(work);
    return status;
}

/* The covariance of columns j and k. */
static void check_covariance(const covariance_call *c, int64_t j, int64_t k)
{
    const lns_sample *s = &c->sample;
    long double total = 0, sum = 0, mean_j = 0, mean_k = 0, size_j = 0, size_k = 0;
    for (int pass = 0; pass < 3; pass++) {
        for (int64_t i = 0; i < s->n; i++) {
            const long double mass = s->mass != NULL ? s->mass[i] : 1;
            const long double x = lns_value(s->data, s->dtype, i * s->d + j),
                              y = lns_value(s->data, s->dtype, i * s->d + k);
            total += pass == 0 ? mass : 0;
            mean_j += pass == 1 ? mass / total * x : 0;
            mean_k += pass == 1 ? mass / total * y : 0;
            sum += pass == 2 ? mass / total * (x - mean_j) * (y - mean_k) : 0;
            size_j = fmaxl(size_j, fabsl(x));
            size_k = fmaxl(size_k, fabsl(y));
        }
    }
    sum *= s->mass != NULL ? 1 : total / (total - 1);
    REQUIRE(near_wide(c->mean[j], mean_j, 1e-13 * size_j + 1e-320));
    REQUIRE(near_wide(c->covariance[j * s->d + k], sum, 1e-12 * size_j * size_k + 1e-320));
}

void fuzz_covariance(void)
{
    const lns_dtype dtype = some_dtype(byte() % 2);
    const int64_t n = 1 + byte() % 60, d = 1 + byte() % 24;
    covariance_call c = {.sample = {some_values(INPUT, dtype, n * d), dtype, n, d, some_masses(n)}};
    c.mean = elements(OUTPUT, LNS_F64, d);
    c.covariance = elements(OUTPUT, LNS_F64, d * d);
    const lns_status status = everywhere(call_covariance, &c);
    REQUIRE(status == LNS_OK || status == LNS_NOT_FINITE || (status == LNS_BAD_SIZE && n == 1) ||
            (status == LNS_BAD_MASS && c.sample.mass != NULL) || (status == LNS_OUT_OF_RANGE && dtype == LNS_F64));
    for (int k = 0; status == LNS_OK && k < 3; k++) {
        check_covariance(&c, column_to_check(k, d), column_to_check(k + 1, d));
    }
    for (int64_t i = 0; status == LNS_OK && i < d * d; i++) {
        const double x = c.covariance[i], mirrored = c.covariance[i % d * d + i / d];
        REQUIRE(x == mirrored);
        REQUIRE(i % (d + 1) != 0 || !(x < 0));
    }
}

static lns_status call_bures_map(void *context, int threads, lns_place *place)
{
    const covariance_call *c = context;
    void *work = work_memory(lns_bures_map_worksize(c->sample.d));
    (void)threads;
    (void)place;
    const lns_status status = lns_bures_map(c->covariance, c->target, c->sample.d, c->ridge, work, c->map);
    free(work);
    return status;
}

void fuzz_bures_map(void)
{
    const int64_t d = 1 + byte() % 20;
    covariance_call c = {.sample = {.d = d}, .ridge = some_rate()};
    c.covariance = some_values(INPUT, LNS_F64, d * d);
    c.target = some_values(INPUT, LNS_F64, d * d);
    c.map = elements(OUTPUT, LNS_F64, d * d);
    for (int64_t i = 0; i < d; i++) {
        for (int64_t j = 0; j < i; j++) {
            c.covariance[i * d + j] = c.covariance[j * d + i];
            c.target[i * d + j] = c.target[j * d + i];
        }
    }
    const lns_status status = everywhere(call_bures_map, &c);
    REQUIRE(status == LNS_OK || status == LNS_NOT_FINITE || status == LNS_NO_CONVERGENCE || status == LNS_OUT_OF_RANGE);
    for (int64_t i = 0; status == LNS_OK && i < d * d; i++) {
        REQUIRE(isfinite(c.map[i]) && c.map[i] == c.map[i % d * d + i / d]);
    }
}

/* ---- prox and steps ------------------------------------------------------------------------------------------------
 */

typedef struct prox_call {
    const void *x;
    lns_dtype dtype;
    int64_t d;
    double tau, l1, group;
    void *out;
} prox_call;

static lns_status call_prox(void *context, int threads, lns_place *place)
{
    const prox_call *c = context;
    (void)threads;
    (void)place;
    return lns_prox(c->x, c->dtype, c->d, c->tau, c->l1, c->group, c->out);
}

void fuzz_prox(void)
{
    const lns_dtype dtype = real_dtype(byte() % 2);
    const int64_t d = some_columns(1);
    const int in_place = byte() % 2;
    void *x = some_values(in_place ? IN_OUT : INPUT, dtype, d), *copy = elements(INPUT, dtype, d);
    memcpy(copy, x, (size_t)(d * lns_element_size(dtype)));
    prox_call c = {x, dtype, d, some_rate(), some_rate(), some_rate(), in_place ? x : elements(OUTPUT, dtype, d)};
    REQUIRE(everywhere(call_prox, &c) == LNS_OK);
    long double norm = 0;
    for (int64_t i = 0; i < d; i++) {
        const long double before = lns_value(copy, dtype, i), shrunk = fmaxl(fabsl(before) - c.tau * c.l1, 0);
        norm += isnan(before) ? before : shrunk * shrunk; /* fmax would lose it */
    }
    norm = sqrtl(norm);
    const long double cut = c.tau * c.group * sqrt((double)d), factor = cut == 0 ? 1 : norm > cut ? 1 - cut / norm : 0;
    for (int64_t i = 0; i < d; i++) {
        REQUIRE(!isnan(norm) || cut == 0 || isnan(lns_value(c.out, dtype, i)));
    }
    for (int64_t i = 0; isfinite(norm) && i < d; i++) {
        const long double before = lns_value(copy, dtype, i), shrunk = fmaxl(fabsl(before) - c.tau * c.l1, 0) * factor;
        REQUIRE(near_wide(lns_value(c.out, dtype, i), before < 0 ? -shrunk : shrunk,
                          1e-5 * (fabsl(before) + norm * rounding(dtype)) + least(dtype)));
    }
}

typedef struct step_call {
    lns_step_problem problem;
    double *per_module;
} step_call;

static lns_status call_step(void *context, int threads, lns_place *place)
{
    const step_call *c = context;
    return lns_step(&c->problem, threads, c->per_module, place);
}

void fuzz_step(void)
{
    const unsigned options = byte();
    const lns_dtype dtype = real_dtype(options & 1);
    const int64_t modules = byte() % 20;
    int64_t *offsets = bytes_of(INPUT, (modules + 1) * (int64_t)sizeof *offsets), wrong = 0;
    for (int64_t k = 0; k < modules; k++) {
        offsets[k + 1] = offsets[k] + 1 + (byte() % 8 == 7 ? below(900) : byte() % 40);
    }
    if ((options >> 1 & 7) == 7 && modules > 0) { /* as they must not be */
        offsets[below(modules + 1)] = offsets[0] - byte();
    }
    const int64_t d = offsets[modules] > 0 ? offsets[modules] : 0;
    for (int64_t k = 0; k < modules; k++) {
        wrong += offsets[k + 1] <= offsets[k];
    }
    wrong += offsets[0] != 0;
    void *weight = some_values(IN_OUT, dtype, d), *bias = some_values(IN_OUT, dtype, d);
    const lns_adam adam = {elements(IN_OUT, dtype, d),
                           elements(IN_OUT, dtype, d),
                           elements(IN_OUT, dtype, d),
                           elements(IN_OUT, dtype, d),
                           1 + (int64_t)byte(),
                           0.9,
                           0.999,
                           1e-8};
    step_call c = {.problem = {.dtype = dtype,
                               .modules = modules,
                               .offsets = offsets,
                               .weight = weight,
                               .bias = bias,
                               .grad_weight = some_values(INPUT, dtype, d),
                               .grad_bias = some_values(INPUT, dtype, d),
                               .lr = some_rate(),
                               .l1 = some_rate(),
                               .group = some_rate(),
                               .l1_bias = some_rate(),
                               .group_bias = some_rate(),
                               .adam = options & 128 ? &adam : NULL},
                   .per_module = elements(OUTPUT, LNS_F64, 2 * modules)};
    const lns_status status = everywhere(call_step, &c);
    REQUIRE(wrong ? status == LNS_BAD_SIZE : status == LNS_OK || status == LNS_NOT_FINITE);
    for (int64_t k = 0; status == LNS_OK && k < modules; k++) {
        int64_t support = 0;
        for (int64_t j = offsets[k]; j < offsets[k + 1]; j++) {
            support += lns_value(weight, dtype, j) != 1 || lns_value(bias, dtype, j) != 0;
        }
        REQUIRE(c.per_module[2 * k + 1] == (double)support);
        REQUIRE(!(c.per_module[2 * k] < 0));
    }
}
