/* Template body: squared W2 of a tile against its target, with gradients. */
#include "kernels/simd/rank_body.h"

/* Equal sizes and weights: row i of the sorted tiles meets row i alone. u holds keys, g may be NULL. Returns whether u
 * has ties. With `so_far`, an entry of g is the mean over the ties up to it, for VNAME(spread_means); their sum is
 * compensated where they can be many. */
static LNS_INLINE int VNAME(w2_equal)(const key *u, const real *v, int64_t n, real *g, double *restrict value,
                                      const int so_far)
{
    const real twice = (real)(2.0 / (double)n);
    VNAME(vec) ties = {0};
    VNAME(reals) before[VEC_PARTS], sum[VEC_PARTS] = {0}, lost[VEC_PARTS] = {0}, count[VEC_PARTS] = {0};
    double total[LANES] = {0};
    for (int p = 0; p < VEC_PARTS; p++) {
        before[p] = (VNAME(reals))((VNAME(vec)){0} - 1); /* NaN: equal to nothing */
    }
    for (int64_t begin = 0; begin < n; begin += LNS_FOLD) {
        const int64_t end = n - begin < LNS_FOLD ? n : begin + LNS_FOLD;
        VNAME(reals) part[VEC_PARTS] = {0};
        for (int64_t i = begin; i < end; i++) {
            for (int p = 0; p < VEC_PARTS; p++) {
                const int64_t at = i * LANES + p * VEC_LANES;
                const VNAME(reals) here = (VNAME(reals))VNAME(vec_flip)(VNAME(vec_load)(u + at));
                const VNAME(reals) difference = here - VNAME(reals_load)(v + at);
                const VNAME(vec) tied = here == before[p];
                VNAME(reals) slope = twice * difference;
                part[p] += difference * difference;
                ties |= tied;
                before[p] = here;
                if (so_far) {
                    const VNAME(reals) earlier = (VNAME(reals))((VNAME(vec))sum[p] & tied);
                    const VNAME(reals) term = slope - (VNAME(reals))((VNAME(vec))lost[p] & tied);
                    sum[p] = earlier + term;
                    if (n > LNS_RUN) {
                        lost[p] = (sum[p] - earlier) - term;
                    }
                    count[p] = (real)1 + (VNAME(reals))((VNAME(vec))count[p] & tied);
                    if (VNAME(vec_any)((VNAME(vec))(count[p] > (real)2))) {
                        slope = sum[p] / count[p];
                    } else { /* the same, without waiting for a division */
                        slope = sum[p] * ((real)1.5 - (real)0.5 * count[p]);
                    }
                }
                if (g != NULL) {
                    VNAME(reals_store)(g + at, slope);
                }
            }
        }
        for (int p = 0; p < VEC_PARTS; p++) {
            VNAME(fold)(&part[p], total + p * VEC_LANES);
        }
    }
    for (int l = 0; l < LANES; l++) {
        value[l] = total[l] / (double)n;
    }
    return VNAME(vec_any)(ties);
}

/* Gives all ties the mean that the last of them has. */
static inline void VNAME(spread_means)(const key *u, real *g, int64_t n)
{
    VNAME(vec) after[VEC_PARTS], mean[VEC_PARTS] = {0};
    for (int p = 0; p < VEC_PARTS; p++) {
        after[p] = (VNAME(vec)){0} - 1; /* NaN: equal to nothing */
    }
    for (int64_t i = n - 1; i >= 0; i--) {
        for (int p = 0; p < VEC_PARTS; p++) {
            const int64_t at = i * LANES + p * VEC_LANES;
            const VNAME(vec) here = VNAME(vec_flip)(VNAME(vec_load)(u + at)), own = VNAME(vec_load)(g + at);
            const VNAME(vec) tied = (VNAME(reals))here == (VNAME(reals))after[p];
            mean[p] = own ^ ((own ^ mean[p]) & tied);
            after[p] = here;
            VNAME(vec_store)(g + at, mean[p]);
        }
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
    for (int p = 0; p < LANES; p += VEC_LANES) {
        for (int64_t i = 0; i + 1 < n; i++) {
            tied |= (VNAME(vec))(VNAME(reals_load)(u + i * LANES + p) == VNAME(reals_load)(u + (i + 1) * LANES + p));
        }
    }
    return VNAME(vec_any)(tied);
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

/* Work for a panel of neighbouring tiles. Tile t of u stands in slot t + 1 until its gradient overwrites slot t. */
typedef struct VNAME(w2_work) {
    key *u, *v;
    real *z; /* in source order; only where a map is given */
    VNAME(order) order_u, order_v;
    lns_segment *own; /* of one column */
} VNAME(w2_work);

static inline VNAME(w2_work) VNAME(w2_work_at)(char *memory, const lns_w2_job *job, int weighted, int gradient)
{
    const int64_t n = job->u.n, m = job->v.n, tiles = lns_w2_panel(job, INT64_MAX);
    VNAME(w2_work) w;
    w.u = (key *)(void *)memory;
    memory += (tiles + 1) * lns_tile_bytes(n);
    w.v = (key *)(void *)memory;
    memory += tiles * lns_tile_bytes(m);
    w.z = (real *)(void *)memory;
    memory += job->weight != NULL ? tiles * lns_tile_bytes(n) : 0;
    w.order_u = VNAME(order_at)(&memory, n, weighted ? LNS_ROWS : gradient ? LNS_RANKS : LNS_NO_RANKS);
    w.order_v = VNAME(order_at)(&memory, m, weighted ? LNS_ROWS : LNS_NO_RANKS);
    w.own = (lns_segment *)(void *)memory;
    return w;
}

/* Keys of weight * z + bias. */
static inline void VNAME(map_tile)(const lns_w2_job *job, int64_t column, int64_t lanes, const real *z, key *u,
                                   real *weight)
{
    real bias[LANES] = {0};
    memset(weight, 0, LNS_TILE_ROW);
    memcpy(weight, (const real *)job->weight + column, (size_t)lanes * sizeof(real));
    memcpy(bias, (const real *)job->bias + column, (size_t)lanes * sizeof(real));
    for (int p = 0; p < LANES; p += VEC_LANES) {
        const VNAME(reals) w = VNAME(reals_load)(weight + p), b = VNAME(reals_load)(bias + p);
        for (int64_t i = 0; i < job->u.n; i++) {
            const VNAME(reals) mapped = w * VNAME(reals_load)(z + i * LANES + p) + b;
            VNAME(vec_store)(u + i * LANES + p, VNAME(vec_flip)((VNAME(vec))mapped));
        }
    }
}

/* Tile t of a panel; returns whether everything was finite. */
static int VNAME(w2_tile)(const lns_w2_job *job, const lns_pairing *pairing, int64_t column, int v_sorted, int64_t t,
                          const VNAME(w2_work) * work)
{
    const int64_t n = job->u.n, m = job->v.n, lanes = job->u.d - column < LANES ? job->u.d - column : LANES;
    const int64_t size = lns_tile_bytes(n) / (int64_t)sizeof(key);
    const int gradient = lns_w2_gradient(job), weighted = pairing->weighted;
    double value[LANES] = {0};
    real weight[LANES];
    int tied, finite = 1;

    key *u = work->u + (t + 1) * size, *v = work->v + t * lns_tile_bytes(m) / (int64_t)sizeof(key);
    const real *z = work->z + t * size, *reals_u = (const real *)(void *)u, *reals_v = (const real *)(void *)v;
    real *g = gradient ? (real *)(void *)(work->u + t * size) : NULL;
    if (job->weight != NULL) {
        VNAME(map_tile)(job, column, lanes, z, u, weight);
    }
    if (weighted || gradient) {
        VNAME(rank_tile)(u, n, &work->order_u);
    } else {
        VNAME(sort_tile)(u, n);
    }
    if (weighted) {
        VNAME(rank_tile)(v, m, &work->order_v);
    } else if (!v_sorted) {
        VNAME(sort_tile)(v, m);
    }
    /* A map with weight 0 hides a z that is not finite, except for the product 0 * inf = NaN, which shows. */
    if (!VNAME(sorted_finite)(u, n)) {
        return 0;
    }
    if (weighted || !v_sorted) {
        if (!VNAME(sorted_finite)(v, m)) {
            return 0;
        }
        VNAME(flip_tile)(v, m);
    }

    if (!weighted && n == m) {
        /* Values of 16 bits are often equal, others seldom. */
        const int likely = gradient && lns_element_size(job->u.dtype) == 2;
        tied = likely ? VNAME(w2_equal)(u, reals_v, n, g, value, 1) : VNAME(w2_equal)(u, reals_v, n, g, value, 0);
        if (gradient && tied) {
            if (!likely) {
                VNAME(w2_equal)(u, reals_v, n, g, value, 1);
            }
            VNAME(spread_means)(u, g, n);
            tied = 0;
        }
    } else {
        VNAME(flip_tile)(u, n);
        for (int64_t l = 0; weighted && l < lanes; l++) {
            const double *mass_u = VNAME(column_mass)(job->u.mass, n, l, &work->order_u);
            const double *mass_v = VNAME(column_mass)(job->v.mass, m, l, &work->order_v);
            const int64_t count =
                lns_weighted_segments(n, mass_u, pairing->total_u, m, mass_v, pairing->total_v, work->own);
            VNAME(w2_column)(reals_u + l, reals_v + l, work->own, count, gradient ? g + l : NULL, value + l);
        }
        if (!weighted) {
            VNAME(w2_segments)(reals_u, reals_v, pairing->segments, pairing->segment_count, g, value);
        }
        tied = gradient && VNAME(any_ties)(reals_u, n);
    }
    for (int l = 0; l < LANES; l++) {
        finite &= isfinite(value[l]) != 0;
    }
    if (!finite && v_sorted && !VNAME(rows_finite)(reals_v, 0, m)) { /* its ends told nothing; it can also overflow */
        return 0;
    }
    VNAME(store_row)(value, lanes, job->value, column);
    if (gradient && tied) {
        for (int64_t l = 0; l < LANES; l++) {
            const double *mass_u = VNAME(column_mass)(job->u.mass, n, l, &work->order_u);
            VNAME(share_ties)(reals_u + l, g + l, n, mass_u);
        }
    }
    if (gradient) {
        VNAME(unrank_tile)(g, n, &work->order_u);
    }
    if (gradient && job->weight != NULL) {
        double grad_weight[LANES] = {0}, grad_bias[LANES] = {0};
        VNAME(w2_through_map)(g, z, weight, n, grad_weight, grad_bias);
        VNAME(store_row)(grad_weight, lanes, job->grad_weight, column);
        VNAME(store_row)(grad_bias, lanes, job->grad_bias, column);
    }
    return 1;
}

static void VNAME(w2_units)(void *context, int64_t begin, int64_t end, int thread)
{
    w2_context *c = context;
    char *memory = (char *)c->work + thread * c->work_each;
    int64_t k = 0, first = 0, prepared = -1;
    lns_pairing pairing = {0};
    VNAME(w2_work) work = {0};
    for (int64_t unit = begin, count; unit < end; unit += count) {
        while (unit >= first + lns_sample_tiles(&c->jobs[k].u)) {
            first += lns_sample_tiles(&c->jobs[k++].u);
        }
        const lns_w2_job *job = &c->jobs[k];
        const int64_t column = (unit - first) * LANES, left = first + lns_sample_tiles(&job->u) - unit;
        if (prepared != k) {
            prepared = k;
            pairing = lns_pair(&job->u, &job->v, (lns_segment *)(void *)memory);
            work = VNAME(w2_work_at)(memory + c->segments_each, job, pairing.weighted, lns_w2_gradient(job));
        }
        count = lns_w2_panel(job, left < end - unit ? left : end - unit);
        if (job->weight != NULL) {
            VNAME(load_tiles)(&job->u, column, count, (key *)(void *)work.z, 0);
        } else {
            VNAME(load_tiles)(&job->u, column, count, work.u + lns_tile_bytes(job->u.n) / (int64_t)sizeof(key), 1);
        }
        if (c->v_sorted && !pairing.weighted) { /* with weights, the ranks of the target are wanted all the same */
            VNAME(load_tiles)(&job->v, column, count, work.v, 0);
        } else {
            VNAME(load_tiles)(&job->v, column, count, work.v, 1);
        }
        for (int64_t t = 0; t < count; t++) {
            c->bad[thread] |= !VNAME(w2_tile)(job, &pairing, column + t * LANES, c->v_sorted, t, &work);
        }
        if (job->grad_u != NULL) {
            VNAME(store_tiles)(work.u, job->u.n, job->u.d, column, count, job->grad_u, 0);
        }
    }
}
