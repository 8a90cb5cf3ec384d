/* Template body: count, mean, squared deviations and range of a chunk of rows. */
#include "kernels/strip_body.h"

/* Sums are taken around the chunk's first row, in double: a large mean costs no digits. */
static void VNAME(moments_strip)(const moments_context *c, int64_t begin, int64_t end, int64_t at, int64_t count,
                                 double *state, int *bad)
{
    const lns_sample *s = c->sample;
    real buffer[LNS_STRIP], low[LNS_STRIP], high[LNS_STRIP], first[LNS_STRIP];
    double sum[LNS_STRIP] = {0}, squares[LNS_STRIP] = {0};
    const double rows = (double)(end - begin);
    const real *x = VNAME(strip)(s->data, s->dtype, begin * s->d + at, count, buffer);
    for (int64_t l = 0; l < count; l++) {
        first[l] = low[l] = high[l] = x[l];
    }
    for (int64_t i = begin; i < end; i++) {
        x = VNAME(strip)(s->data, s->dtype, i * s->d + at, count, buffer);
        for (int64_t l = 0; l < count; l++) {
            const double shifted = (double)x[l] - (double)first[l];
            sum[l] += shifted;
            squares[l] += shifted * shifted;
            low[l] = x[l] < low[l] ? x[l] : low[l];
            high[l] = x[l] > high[l] ? x[l] : high[l];
        }
    }
    for (int64_t l = 0; l < count; l++) {
        const double m2 = squares[l] - sum[l] * sum[l] / rows;
        *bad |= !isfinite(sum[l]);
        state[at + l] = (double)first[l] + sum[l] / rows;
        state[s->d + at + l] = m2 > 0 ? m2 : 0;
        state[2 * s->d + at + l] = (double)low[l];
        state[3 * s->d + at + l] = (double)high[l];
    }
}

static void VNAME(moments_units)(void *context, int64_t begin, int64_t end, int thread)
{
    moments_context *c = context;
    const lns_sample *s = c->sample;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t first = chunk * c->chunk_rows;
        const int64_t last = first + c->chunk_rows < s->n ? first + c->chunk_rows : s->n;
        for (int64_t at = 0; at < s->d; at += LNS_STRIP) {
            const int64_t count = s->d - at < LNS_STRIP ? s->d - at : LNS_STRIP;
            VNAME(moments_strip)(c, first, last, at, count, c->states + chunk * 4 * s->d, &c->bad[thread]);
        }
    }
}
