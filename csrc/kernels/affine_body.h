/* Template body: an affine map at a strength, forward and backward.
 *
 * Included by affine.c through simd/variants.h, once per working type and CPU variant. */
#include "kernels/simd/strip_body.h"

static inline double VNAME(scale)(const affine_context *c, int64_t j)
{
    const double weight = (double)((const real *)c->weight)[j];
    return weight == 1 ? 1 : (1 - c->strength) + c->strength * weight;
}

/* Scales, then shifts of all columns, once, into c->scale. */
static void VNAME(prepare)(const affine_context *c)
{
    real *scale = c->scale, *shift = scale + c->d;
    for (int64_t j = 0; j < c->d; j++) {
        scale[j] = (real)VNAME(scale)(c, j);
        shift[j] = c->bias != NULL ? (real)(c->strength * (double)((const real *)c->bias)[j]) : 0;
    }
}

/* out = scale * from + shift on a unit: one row [d] where inner is 1, else one channel [inner]. */
static inline void VNAME(apply_units)(const affine_context *c, const void *from, void *out, int64_t begin, int64_t end,
                                      int shifted)
{
    const real *scale = c->scale, *shift = scale + c->d;
    const int by_row = c->inner == 1;
    const int64_t length = by_row ? c->d : c->inner;
    real buffer[LNS_STRIP], result[LNS_STRIP];
    for (int64_t unit = begin; unit < end; unit++) {
        for (int64_t at = 0; at < length; at += LNS_STRIP) {
            const int64_t count = length - at < LNS_STRIP ? length - at : LNS_STRIP;
            const real *x = VNAME(strip)(from, c->dtype, unit * length + at, count, buffer);
            if (by_row && shifted) {
                for (int64_t l = 0; l < count; l++) {
                    result[l] = scale[at + l] * x[l] + shift[at + l];
                }
            } else if (by_row) {
                for (int64_t l = 0; l < count; l++) {
                    result[l] = scale[at + l] * x[l];
                }
            } else {
                const real a = scale[unit % c->d], b = shifted ? shift[unit % c->d] : 0;
                for (int64_t l = 0; l < count; l++) {
                    result[l] = shifted ? a * x[l] + b : a * x[l];
                }
            }
            VNAME(store_strip)(result, count, out, c->dtype, unit * length + at);
        }
    }
}

static void VNAME(affine_units)(void *context, int64_t begin, int64_t end, int thread)
{
    const affine_context *c = context;
    (void)thread;
    VNAME(apply_units)(c, c->z, c->out, begin, end, 1);
}

static void VNAME(grad_z_units)(void *context, int64_t begin, int64_t end, int thread)
{
    const affine_context *c = context;
    (void)thread;
    VNAME(apply_units)(c, c->grad_out, c->out, begin, end, 0);
}

/* Sums over rows [begin, end) of grad * z and of grad, per column, in float over LNS_FOLD rows, then in double. */
static void VNAME(sum_rows)(const affine_context *c, int64_t begin, int64_t end, double *sum_gz, double *sum_g)
{
    real buffer_g[LNS_STRIP], buffer_z[LNS_STRIP], part_gz[LNS_STRIP], part_g[LNS_STRIP];
    for (int64_t at = 0; at < c->d; at += LNS_STRIP) {
        const int64_t count = c->d - at < LNS_STRIP ? c->d - at : LNS_STRIP;
        for (int64_t l = 0; l < count; l++) {
            part_gz[l] = part_g[l] = 0;
            sum_gz[at + l] = sum_g[at + l] = 0;
        }
        for (int64_t row = begin; row < end; row++) {
            const real *g = VNAME(strip)(c->grad_out, c->dtype, row * c->d + at, count, buffer_g);
            const real *z = VNAME(strip)(c->z, c->dtype, row * c->d + at, count, buffer_z);
            for (int64_t l = 0; l < count; l++) {
                part_gz[l] += g[l] * z[l];
                part_g[l] += g[l];
            }
            if ((row - begin) % LNS_FOLD == LNS_FOLD - 1 || row == end - 1) {
                for (int64_t l = 0; l < count; l++) {
                    sum_gz[at + l] += (double)part_gz[l];
                    sum_g[at + l] += (double)part_g[l];
                    part_gz[l] = part_g[l] = 0;
                }
            }
        }
    }
}

/* The same where each channel is a run of `inner` elements. */
static void VNAME(sum_channels)(const affine_context *c, int64_t begin, int64_t end, double *sum_gz, double *sum_g)
{
    real buffer_g[LNS_STRIP], buffer_z[LNS_STRIP];
    memset(sum_gz, 0, (size_t)c->d * sizeof(double));
    memset(sum_g, 0, (size_t)c->d * sizeof(double));
    for (int64_t run = begin * c->d; run < end * c->d; run++) {
        double part_gz[8] = {0}, part_g[8] = {0};
        for (int64_t at = 0; at < c->inner; at += LNS_STRIP) {
            const int64_t count = c->inner - at < LNS_STRIP ? c->inner - at : LNS_STRIP;
            const real *g = VNAME(strip)(c->grad_out, c->dtype, run * c->inner + at, count, buffer_g);
            const real *z = VNAME(strip)(c->z, c->dtype, run * c->inner + at, count, buffer_z);
            for (int64_t l = 0; l < count; l++) {
                part_gz[l % 8] += (double)g[l] * (double)z[l];
                part_g[l % 8] += (double)g[l];
            }
        }
        for (int l = 0; l < 8; l++) {
            sum_gz[run % c->d] += part_gz[l];
            sum_g[run % c->d] += part_g[l];
        }
    }
}

static void VNAME(sum_units)(void *context, int64_t begin, int64_t end, int thread)
{
    const affine_context *c = context;
    (void)thread;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t first = chunk * c->chunk_rows;
        const int64_t last = first + c->chunk_rows < c->outer ? first + c->chunk_rows : c->outer;
        double *sum_gz = c->sums + chunk * 2 * c->d, *sum_g = sum_gz + c->d;
        if (c->inner == 1) {
            VNAME(sum_rows)(c, first, last, sum_gz, sum_g);
        } else {
            VNAME(sum_channels)(c, first, last, sum_gz, sum_g);
        }
    }
}

/* Gradients of the parameters: the sums of the chunks, added up in their order. */
static void VNAME(add_chunks)(const affine_context *c, int64_t chunks, void *grad_weight, void *grad_bias)
{
    for (int64_t j = 0; j < c->d; j++) {
        double gz = 0, g = 0;
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            gz += c->sums[chunk * 2 * c->d + j];
            g += c->sums[chunk * 2 * c->d + c->d + j];
        }
        ((real *)grad_weight)[j] = (real)(c->strength * gz);
        ((real *)grad_bias)[j] = (real)(c->strength * g);
    }
}
