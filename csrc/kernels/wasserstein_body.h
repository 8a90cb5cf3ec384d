/* Template body: squared W2 of a tile against its target, with gradients. */
#include "kernels/rank_body.h"

/* Adds a register's part of a float sum to its double total, and starts the next part. */
static inline void VNAME(fold)(VNAME(reals) * part, double *restrict total)
{
    for (int l = 0; l < VEC_LANES; l++) {
        total[l] += (double)(*part)[l];
    }
    *part = (VNAME(reals)){0};
}

/* Equal sizes and weights: row i of the sorted tiles meets row i alone. g may be NULL. */
static inline void VNAME(w2_equal)(const real *u, const real *v, int64_t n, real *g, double *restrict value)
{
    const real twice = (real)(2.0 / (double)n);
    for (int p = 0; p < LANES; p += VEC_LANES) {
        VNAME(reals) part = {0};
        for (int64_t i = 0; i < n; i++) {
            const VNAME(reals) difference = VNAME(reals_load)(u + i * LANES + p) - VNAME(reals_load)(v + i * LANES + p);
            part += difference * difference;
            if (g != NULL) {
                VNAME(reals_store)(g + i * LANES + p, twice * difference);
            }
            if (i % LNS_FOLD == LNS_FOLD - 1) {
                VNAME(fold)(&part, value + p);
            }
        }
        VNAME(fold)(&part, value + p);
    }
    for (int l = 0; l < LANES; l++) {
        value[l] /= (double)n;
    }
}

/* The same along segments that all columns share. */
static inline void VNAME(w2_segments)(const real *u, const real *v, const lns_segment *segments, int64_t count, real *g,
                                      double *restrict value)
{
    VNAME(reals) part[VEC_PARTS] = {0}, sum[VEC_PARTS] = {0};
    for (int64_t s = 0; s < count; s++) {
        const int64_t i = segments[s].i, k = segments[s].k;
        const real mass = (real)segments[s].mass, twice = (real)(2 * segments[s].mass);
        const int last = s + 1 == count || segments[s + 1].i != i;
        for (int p = 0; p < VEC_PARTS; p++) {
            const int64_t at = p * VEC_LANES;
            const VNAME(reals) difference =
                VNAME(reals_load)(u + i * LANES + at) - VNAME(reals_load)(v + k * LANES + at);
            part[p] += mass * (difference * difference);
            sum[p] += twice * difference;
            if (g != NULL && last) {
                VNAME(reals_store)(g + i * LANES + at, sum[p]);
                sum[p] = (VNAME(reals)){0};
            }
        }
        if (s % LNS_FOLD == LNS_FOLD - 1 || s + 1 == count) {
            for (int p = 0; p < VEC_PARTS; p++) {
                VNAME(fold)(&part[p], value + p * VEC_LANES);
            }
        }
    }
}

/* The same for one column with segments of its own. */
static inline void VNAME(w2_column)(const real *u, const real *v, const lns_segment *segments, int64_t count, real *g,
                                    double *value)
{
    double sum = 0, gradient = 0;
    for (int64_t s = 0; s < count; s++) {
        const int64_t i = segments[s].i;
        const double difference = (double)u[i * LANES] - (double)v[segments[s].k * LANES];
        const double weighted = segments[s].mass * difference;
        sum += weighted * difference;
        gradient += 2 * weighted;
        if (g != NULL && (s + 1 == count || segments[s + 1].i != i)) {
            g[i * LANES] = (real)gradient;
            gradient = 0;
        }
    }
    *value = sum;
}

/* Entries of u that are equal share the mean of their target quantiles: each gets its share by mass of their summed
 * gradient. u is sorted, g and mass (or NULL) in the same order. */
static inline void VNAME(share_ties)(const real *u, real *g, int64_t n, const double *mass)
{
    for (int64_t begin = 0, end; begin < n; begin = end) {
        double sum = 0, weight = 0;
        for (end = begin; end < n && u[end * LANES] == u[begin * LANES]; end++) {
            sum += (double)g[end * LANES];
            weight += mass != NULL ? mass[end] : 1;
        }
        for (int64_t i = begin; end - begin > 1 && i < end; i++) {
            const double own = mass != NULL ? mass[i] : 1;
            g[i * LANES] = weight > 0 ? (real)(sum * (own / weight)) : 0;
        }
    }
}

static inline int VNAME(any_ties)(const real *u, int64_t n)
{
    VNAME(vec) tied = {0};
    key any = 0;
    for (int p = 0; p < LANES; p += VEC_LANES) {
        for (int64_t i = 0; i + 1 < n; i++) {
            tied |= (VNAME(vec))(VNAME(reals_load)(u + i * LANES + p) == VNAME(reals_load)(u + (i + 1) * LANES + p));
        }
    }
    for (int l = 0; l < VEC_LANES; l++) {
        any |= tied[l];
    }
    return any != 0;
}

/* Gradients of the parameters, in source order, and of z: g is the gradient in weight * z + bias and becomes that in z.
 */
static inline void VNAME(w2_through_map)(real *g, const real *z, const real *weight, int64_t n,
                                         double *restrict grad_weight, double *restrict grad_bias)
{
    for (int p = 0; p < LANES; p += VEC_LANES) {
        const VNAME(reals) w = VNAME(reals_load)(weight + p);
        VNAME(reals) part_weight = {0}, part_bias = {0};
        for (int64_t i = 0; i < n; i++) {
            const VNAME(reals) here = VNAME(reals_load)(g + i * LANES + p);
            part_weight += here * VNAME(reals_load)(z + i * LANES + p);
            part_bias += here;
            VNAME(reals_store)(g + i * LANES + p, here * w);
            if (i % LNS_FOLD == LNS_FOLD - 1) {
                VNAME(fold)(&part_weight, grad_weight + p);
                VNAME(fold)(&part_bias, grad_bias + p);
            }
        }
        VNAME(fold)(&part_weight, grad_weight + p);
        VNAME(fold)(&part_bias, grad_bias + p);
    }
}

static inline void VNAME(store_row)(const double *from, int64_t lanes, void *out, int64_t column)
{
    for (int64_t l = 0; out != NULL && l < lanes; l++) {
        ((real *)out)[column + l] = (real)from[l];
    }
}

/* One tile of one job; returns whether everything was finite. */
static int VNAME(w2_tile)(const lns_w2_job *job, int64_t column, int v_sorted, const lns_segment *shared,
                          int64_t shared_count, double total_u, double total_v, char *work)
{
    const int64_t n = job->u.n, m = job->v.n, d = job->u.d, lanes = d - column < LANES ? d - column : LANES;
    const int weighted = job->u.mass != NULL || job->v.mass != NULL;
    const int gradient = job->grad_u != NULL || job->grad_weight != NULL || job->grad_bias != NULL;
    double value[LANES] = {0}, grad_weight[LANES] = {0}, grad_bias[LANES] = {0};
    real weight[LANES] = {0};

    real *u = (real *)(void *)work; /* keys until they are sorted */
    work += lns_tile_bytes(n);
    real *z = (real *)(void *)work; /* source order; only where a map is given */
    work += job->weight != NULL ? lns_tile_bytes(n) : 0;
    real *v = (real *)(void *)work;
    work += lns_tile_bytes(m);
    real *g = (real *)(void *)work;
    work += lns_tile_bytes(n);
    key *keys_u = (key *)(void *)u, *keys_v = (key *)(void *)v;
    const VNAME(order) order_u = VNAME(order_at)(&work, n, weighted ? LNS_ROWS : gradient ? LNS_RANKS : LNS_NO_RANKS);
    const VNAME(order) order_v = VNAME(order_at)(&work, m, weighted ? LNS_ROWS : LNS_NO_RANKS);
    lns_segment *own = (lns_segment *)(void *)work;

    if (job->weight != NULL) {
        real bias[LANES] = {0};
        memcpy(weight, (const real *)job->weight + column, (size_t)lanes * sizeof(real));
        memcpy(bias, (const real *)job->bias + column, (size_t)lanes * sizeof(real));
        VNAME(load_tile)(&job->u, column, z);
        for (int p = 0; p < LANES; p += VEC_LANES) {
            const VNAME(reals) w = VNAME(reals_load)(weight + p), b = VNAME(reals_load)(bias + p);
            for (int64_t i = 0; i < n; i++) {
                const VNAME(reals) mapped = w * VNAME(reals_load)(z + i * LANES + p) + b;
                VNAME(vec_store)(keys_u + i * LANES + p, VNAME(vec_flip)((VNAME(vec))mapped));
            }
        }
    } else {
        VNAME(load_keys)(&job->u, column, keys_u);
    }
    if (v_sorted) {
        VNAME(load_tile)(&job->v, column, v);
    } else {
        VNAME(load_keys)(&job->v, column, keys_v);
    }
    if (job->grad_u != NULL) {
        VNAME(prefetch_out)(job->grad_u, n, d, column);
    }
    VNAME(prefetch_tile)(&job->u, column + LANES);
    VNAME(prefetch_tile)(&job->v, column + LANES);

    if (weighted || gradient) {
        VNAME(rank_tile)(keys_u, n, &order_u);
    } else {
        VNAME(sort_tile)(keys_u, n);
    }
    VNAME(flip_tile)(u, n);
    if (weighted) { /* also a sorted target: the weights need its ranks */
        if (v_sorted) {
            VNAME(flip_tile)(v, m);
        }
        VNAME(rank_tile)(keys_v, m, &order_v);
    } else if (!v_sorted) {
        VNAME(sort_tile)(keys_v, m);
    }
    if (weighted || !v_sorted) {
        VNAME(flip_tile)(v, m);
    }
    /* A map with weight 0 hides a z that is not finite, except for the product 0 * inf = NaN, which shows. */
    if (!VNAME(sorted_finite)(u, n) || !(v_sorted ? VNAME(rows_finite)(v, 0, m) : VNAME(sorted_finite)(v, m))) {
        return 0;
    }

    if (weighted) {
        for (int64_t l = 0; l < lanes; l++) {
            const int64_t count = lns_weighted_segments(n, VNAME(column_mass)(job->u.mass, n, l, &order_u), total_u, m,
                                                        VNAME(column_mass)(job->v.mass, m, l, &order_v), total_v, own);
            VNAME(w2_column)(u + l, v + l, own, count, gradient ? g + l : NULL, value + l);
        }
    } else if (n == m) {
        VNAME(w2_equal)(u, v, n, gradient ? g : NULL, value);
    } else {
        VNAME(w2_segments)(u, v, shared, shared_count, gradient ? g : NULL, value);
    }
    VNAME(store_row)(value, lanes, job->value, column);
    if (!gradient) {
        return 1;
    }

    if (VNAME(any_ties)(u, n)) {
        for (int64_t l = 0; l < lanes; l++) {
            VNAME(share_ties)(u + l, g + l, n, VNAME(column_mass)(job->u.mass, n, l, &order_u));
        }
    }
    VNAME(unrank_tile)(g, n, &order_u);
    if (job->weight != NULL) {
        VNAME(w2_through_map)(g, z, weight, n, grad_weight, grad_bias);
        VNAME(store_row)(grad_weight, lanes, job->grad_weight, column);
        VNAME(store_row)(grad_bias, lanes, job->grad_bias, column);
    }
    if (job->grad_u != NULL) {
        VNAME(store_tile)(g, n, d, column, job->grad_u);
    }
    return 1;
}

static void VNAME(w2_units)(void *context, int64_t begin, int64_t end, int thread)
{
    w2_context *c = context;
    char *work = (char *)c->work + thread * c->work_each;
    lns_segment *segments = (lns_segment *)(void *)work;
    int64_t k = 0, first = 0, prepared = -1, count = 0;
    double total_u = 0, total_v = 0;
    for (int64_t unit = begin; unit < end; unit++) {
        while (lns_is_past(&c->jobs[k].u, unit, &first)) {
            k++;
        }
        const lns_w2_job *job = &c->jobs[k];
        if (prepared != k) {
            prepared = k;
            count = 0;
            if (job->u.mass != NULL || job->v.mass != NULL) {
                total_u = lns_total_mass(&job->u);
                total_v = lns_total_mass(&job->v);
            } else if (job->u.n != job->v.n) {
                count = lns_segments(job->u.n, job->v.n, segments);
            }
        }
        c->bad[thread] |= !VNAME(w2_tile)(job, (unit - first) * LANES, c->v_sorted, segments, count, total_u, total_v,
                                          work + c->segments_each);
    }
}
