/* Which rows of two samples meet, and over how much mass, once both are sorted: the pairing of their quantiles. */
#ifndef LNS_SEGMENTS_H
#define LNS_SEGMENTS_H

#include <stddef.h>

#include "kernels/samples.h"

/* Rows (i of the source, k of the target) whose quantile functions overlap over `mass` of (0, 1). */
typedef struct lns_segment {
    int64_t i, k;
    double mass;
} lns_segment;

/* The common refinement of {i / n} and {k / m}: at most n + m - 1 segments, for samples of equally weighted rows. */
static inline int64_t lns_segments(int64_t n, int64_t m, lns_segment *out)
{
    const double unit = 1.0 / ((double)n * (double)m);
    int64_t count = 0, i = 0, k = 0, left_i = m, left_k = n;
    while (i < n) {
        const int64_t step = left_i < left_k ? left_i : left_k;
        out[count++] = (lns_segment){i, k, (double)step * unit};
        left_i -= step;
        left_k -= step;
        if (left_i == 0) {
            i++;
            left_i = m;
        }
        if (left_k == 0) {
            k++;
            left_k = n;
        }
    }
    return count;
}

/* The same for the rows of one column in their order, with their weights > 0; a NULL mass means equal weights. The last
 * row of each side takes what rounding leaves over. */
static inline int64_t lns_weighted_segments(int64_t n, const double *mass_u, double total_u, int64_t m,
                                            const double *mass_v, double total_v, lns_segment *out)
{
    int64_t count = 0, i = 0, k = 0;
    double left_u = mass_u ? mass_u[0] / total_u : 1.0 / (double)n;
    double left_v = mass_v ? mass_v[0] / total_v : 1.0 / (double)m;
    for (;;) {
        const int last_u = i == n - 1, last_v = k == m - 1;
        const int take_u = last_v || (!last_u && left_u <= left_v);
        const double mass = take_u ? left_u : left_v;
        out[count++] = (lns_segment){i, k, mass > 0 ? mass : 0};
        if (last_u && last_v) {
            return count;
        }
        if (take_u) {
            left_v -= left_u;
            i++;
            left_u = mass_u ? mass_u[i] / total_u : 1.0 / (double)n;
        } else {
            left_u -= left_v;
            k++;
            left_v = mass_v ? mass_v[k] / total_v : 1.0 / (double)m;
        }
    }
}

/* The segment in which half of the mass is reached: the medians of both samples. */
static inline int64_t lns_middle_segment(const lns_segment *segments, int64_t count)
{
    double total = 0, sum = 0;
    int64_t s = 0;
    for (int64_t k = 0; k < count; k++) {
        total += segments[k].mass;
    }
    while (s < count - 1 && 2 * (sum += segments[s].mass) < total) {
        s++;
    }
    return s;
}

/* Whether rows of either sample carry weights: how the rows meet then differs from column to column. */
static inline int lns_is_weighted(const lns_sample *u, const lns_sample *v)
{
    return u->mass != NULL || v->mass != NULL;
}

/* How the rows of two samples meet: those that count. */
typedef struct lns_pairing {
    int weighted;
    int64_t n, m;                  /* rows of u and v that count */
    const double *mass_u, *mass_v; /* [n], [m] their weights; NULL = equal */
    double total_u, total_v;       /* of the weights */
    const lns_segment *segments;   /* [segment_count] shared by all columns; none where the rows are weighted */
    int64_t segment_count;
} lns_pairing;

/* The weights above 0, one after the other; returns how many. */
static inline int64_t lns_pack_mass(const lns_sample *s, double *out)
{
    int64_t count = 0;
    for (int64_t i = 0; i < s->n; i++) {
        if (lns_row_counts(s->mass, i)) {
            out[count++] = s->mass[i];
        }
    }
    return count;
}

/* `room` for u->n + v->n segments holds these, or weights. */
static inline lns_pairing lns_pair_rows(const lns_sample *u, const lns_sample *v, lns_segment *room)
{
    lns_pairing p = {.weighted = lns_is_weighted(u, v), .n = u->n, .m = v->n};
    double *mass = (double *)(void *)room;
    p.total_u = lns_total_mass(u);
    p.total_v = lns_total_mass(v);
    if (!p.weighted) {
        p.segments = room;
        p.segment_count = lns_segments(u->n, v->n, room);
    }
    if (u->mass != NULL) {
        p.mass_u = mass;
        p.n = lns_pack_mass(u, mass);
    }
    if (v->mass != NULL) {
        p.mass_v = mass + u->n;
        p.m = lns_pack_mass(v, mass + u->n);
    }
    return p;
}

#endif
