/* Template body: squared W2 of a tile against its target, with gradients. A tile is sorted, compared with its target,
 * and its gradient taken back to the order of the source: VNAME(w2_of_tile) calls the three.
 *
 * Included by wasserstein.c through simd/variants.h, once per working type and CPU variant. */
#include "kernels/simd/rank_body.h"

/* ---- ties ----
 *
 * Entries of u that are equal share the mean of their target quantiles: their gradients are replaced by their mean. */

/* A running mean over the entries of u that are equal, up to the one at hand. Its sum is compensated where it can be
 * long: `lost` is what the last addition rounded away. */
typedef struct VNAME(tie_mean) {
    VNAME(reals) sum, lost, count;
} VNAME(tie_mean);

/* The mean including `slope`, whose entry is equal to the one before it in the lanes that `tied` marks. */
static LNS_INLINE VNAME(reals)
    VNAME(mean_so_far)(VNAME(tie_mean) * mean, VNAME(reals) slope, VNAME(vec) tied, int compensated)
{
    const VNAME(reals) earlier = (VNAME(reals))((VNAME(vec))mean->sum & tied);
    const VNAME(reals) term = slope - (VNAME(reals))((VNAME(vec))mean->lost & tied);
    mean->sum = earlier + term;
    if (compensated) {
        mean->lost = (mean->sum - earlier) - term;
    }
    mean->count = (real)1 + (VNAME(reals))((VNAME(vec))mean->count & tied);
    if (VNAME(vec_any)((VNAME(vec))(mean->count > (real)2))) {
        return mean->sum / mean->count;
    }
    return mean->sum * ((real)1.5 - (real)0.5 * mean->count); /* the same, without waiting for a division */
}

/* Gives all ties the mean that the last of them has. u holds keys, sorted. */
static LNS_NOINLINE void VNAME(spread_means)(const key *u, real *g, int64_t n)
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

/* The same where rows carry weights, or gradients that are sums: each tie gets its share by mass of their summed
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

/* Whether any column of sorted u has entries that are equal. */
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

/* ---- comparing sorted rows: value and, in sorted order, gradient ---- */

/* Equal sizes and weights: row i of u meets row i of v alone. u holds keys; g may be NULL. Returns whether u has ties.
 * With means, an entry of g is the mean over the ties up to it, for VNAME(spread_means). */
static LNS_INLINE int VNAME(compare_rows_as)(const key *u, const real *v, int64_t n, real *g, double *restrict value,
                                             const int with_means)
{
    const real twice = (real)(2.0 / (double)n);
    VNAME(vec) ties = {0};
    VNAME(reals) before[VEC_PARTS];
    VNAME(tie_mean) means[VEC_PARTS] = {{{0}, {0}, {0}}};
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
                if (with_means) {
                    slope = VNAME(mean_so_far)(&means[p], slope, tied, n > LNS_RUN);
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

/* The same along segments that all columns share, in blocks. Where a row meets all of a block and more, its gradient is
 * folded as the value is: `carried` is what it has come to. */
static inline void VNAME(compare_segments)(const real *u, const real *v, const lns_segment *segments, int64_t count,
                                           real *g, double *restrict value)
{
    VNAME(reals) part[VEC_PARTS] = {0}, sum[VEC_PARTS] = {0};
    double carried[LANES] = {0};
    int carries = 0;
    for (int64_t begin = 0; begin < count; begin += LNS_FOLD) {
        const int64_t end = count - begin < LNS_FOLD ? count : begin + LNS_FOLD;
        for (int64_t s = begin; s < end; s++) {
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
        }
        for (int p = 0; p < VEC_PARTS; p++) {
            VNAME(fold)(&part[p], value + p * VEC_LANES);
        }
        const int64_t row = segments[begin].i;
        if (end < count && segments[end].i == row) {
            for (int p = 0; p < VEC_PARTS; p++) {
                VNAME(fold)(&sum[p], carried + p * VEC_LANES);
            }
            carries = 1;
        } else if (carries) { /* the row ended in this block: g has its last part */
            for (int l = 0; g != NULL && l < LANES; l++) {
                g[row * LANES + l] = (real)(carried[l] + (double)g[row * LANES + l]);
                carried[l] = 0;
            }
            carries = 0;
        }
    }
}

/* The same for one column with segments of its own, compared after division by 2^exponent. */
static inline void VNAME(compare_column)(const real *u, const real *v, const lns_segment *segments, int64_t count,
                                         int exponent, real *g, double *value)
{
    const double scale = ldexp(1, -exponent);
    double sum = 0, gradient = 0;
    for (int64_t s = 0; s < count; s++) {
        const int64_t i = segments[s].i;
        const double difference = scale * (double)u[i * LANES] - scale * (double)v[segments[s].k * LANES];
        const double weighted = segments[s].mass * difference;
        sum += weighted * difference;
        gradient += 2 * weighted;
        if (g != NULL && (s + 1 == count || segments[s + 1].i != i)) {
            g[i * LANES] = (real)(exponent != 0 ? ldexp(gradient, exponent) : gradient);
            gradient = 0;
        }
    }
    *value = ldexp(sum, 2 * exponent);
}

/* ---- one tile
 * -------------------------------------------------------------------------------------------------------- */

/* Work for a panel of neighbouring tiles. Tile t of u stands in slot t + 1 until its gradient overwrites slot t. */
typedef struct VNAME(w2_work) {
    key *u, *v;
    real *z; /* in source order; only where a map is given */
    VNAME(order) order_u, order_v;
    lns_segment *own; /* of one column */
} VNAME(w2_work);

static inline VNAME(w2_work) VNAME(w2_work_at)(char *memory, const lns_w2_job *job, int weighted, int gradient)
{
    const int64_t n = job->u.n, m = job->v.n, tiles = w2_panel(job, INT64_MAX);
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

/* A tile of the panel: columns [column, column + lanes) of the job. */
typedef struct VNAME(w2_tile) {
    const lns_w2_job *job;
    const lns_pairing *pairing;
    const VNAME(w2_work) * work;
    int64_t column, lanes;
    key *u, *v;
    const real *z; /* where a map is given */
    real *g;       /* NULL: no gradient is wanted */
    int v_sorted;  /* v holds sorted reals, not keys */
} VNAME(w2_tile);

/* Keys of weight * z + bias. */
static inline void VNAME(map_tile)(const lns_w2_job *job, int64_t n, int64_t column, int64_t lanes, const real *z,
                                   key *u, real *weight)
{
    real bias[LANES] = {0};
    memset(weight, 0, LNS_TILE_ROW);
    memcpy(weight, (const real *)job->weight + column, (size_t)lanes * sizeof(real));
    memcpy(bias, (const real *)job->bias + column, (size_t)lanes * sizeof(real));
    for (int p = 0; p < LANES; p += VEC_LANES) {
        const VNAME(reals) w = VNAME(reals_load)(weight + p), b = VNAME(reals_load)(bias + p);
        for (int64_t i = 0; i < n; i++) {
            const VNAME(reals) mapped = w * VNAME(reals_load)(z + i * LANES + p) + b;
            VNAME(vec_store)(u + i * LANES + p, VNAME(vec_flip)((VNAME(vec))mapped));
        }
    }
}

/* Sorts both samples, and remembers the order where it will be needed: of u for the gradient, of both where rows carry
 * weights. Leaves keys in u and reals in v. Returns whether all is finite, as far as sorting tells. */
static int VNAME(sort_pair)(const VNAME(w2_tile) * t)
{
    const int64_t n = t->pairing->n, m = t->pairing->m;
    if (t->pairing->weighted || t->g != NULL) {
        VNAME(rank_tile)(t->u, n, &t->work->order_u);
    } else {
        VNAME(lns_sort_tile)(t->u, n);
    }
    if (t->pairing->weighted) {
        VNAME(rank_tile)(t->v, m, &t->work->order_v);
    } else if (!t->v_sorted) {
        VNAME(lns_sort_tile)(t->v, m);
    }
    /* A map with weight 0 hides a z that is not finite, except for the product 0 * inf = NaN, which shows. */
    if (!VNAME(sorted_finite)(t->u, n)) {
        return 0;
    }
    if (!t->v_sorted) {
        if (!VNAME(sorted_finite)(t->v, m)) {
            return 0;
        }
        VNAME(flip_tile)(t->v, m);
    }
    return 1;
}

/* Samples of equal size without weights. */
static void VNAME(compare_rows)(const VNAME(w2_tile) * t, double *value)
{
    const key *u = t->u;
    const real *v = (const real *)(void *)t->v;
    const int64_t n = t->pairing->n;
    real *const g = t->g;
    if (g == NULL) {
        VNAME(compare_rows_as)(u, v, n, NULL, value, 0);
        return;
    }
    /* Values of 16 bits are often equal: means at once. Others seldom are: means in a second run, at ties alone. */
    const int often = lns_element_size(t->job->u.dtype) == 2;
    const int tied =
        often ? VNAME(compare_rows_as)(u, v, n, g, value, 1) : VNAME(compare_rows_as)(u, v, n, g, value, 0);
    if (tied && !often) {
        VNAME(compare_rows_as)(u, v, n, g, value, 1);
    }
    if (tied) {
        VNAME(spread_means)(u, g, n);
    }
}

/* Column l, along segments of its own where rows are weighted, in double. */
static void VNAME(compare_lane)(const VNAME(w2_tile) * t, int64_t l, int exponent, double *value)
{
    const lns_pairing *pairing = t->pairing;
    const VNAME(w2_work) *work = t->work;
    const int64_t n = pairing->n, m = pairing->m;
    const real *u = (const real *)(void *)t->u, *v = (const real *)(void *)t->v;
    const lns_segment *segments = pairing->segments;
    int64_t count = pairing->segment_count;
    if (pairing->weighted) {
        const double *mass_u = VNAME(column_mass)(pairing->mass_u, n, l, &work->order_u);
        const double *mass_v = VNAME(column_mass)(pairing->mass_v, m, l, &work->order_v);
        count = lns_weighted_segments(n, mass_u, pairing->total_u, m, mass_v, pairing->total_v, work->own);
        segments = work->own;
    }
    VNAME(compare_column)(u + l, v + l, segments, count, exponent, t->g != NULL ? t->g + l : NULL, value + l);
}

static void VNAME(share_lane)(const VNAME(w2_tile) * t, int64_t l)
{
    const double *mass = VNAME(column_mass)(t->pairing->mass_u, t->pairing->n, l, &t->work->order_u);
    VNAME(share_ties)((const real *)(void *)t->u + l, t->g + l, t->pairing->n, mass);
}

/* Samples of other sizes, or with weights: along the segments of their quantile functions. Turns u into reals. */
static void VNAME(compare_quantiles)(const VNAME(w2_tile) * t, double *value)
{
    const lns_pairing *pairing = t->pairing;
    const real *u = (const real *)(void *)t->u, *v = (const real *)(void *)t->v;
    VNAME(flip_tile)(t->u, pairing->n);
    for (int64_t l = 0; pairing->weighted && l < t->lanes; l++) {
        VNAME(compare_lane)(t, l, 0, value);
    }
    if (!pairing->weighted) {
        VNAME(compare_segments)(u, v, pairing->segments, pairing->segment_count, t->g, value);
    }
    if (t->g != NULL && VNAME(any_ties)(u, pairing->n)) {
        for (int64_t l = 0; l < LANES; l++) {
            VNAME(share_lane)(t, l);
        }
    }
}

/* Columns whose value came out as infinity, though a mean of squares may be finite where their sum is not: once more in
 * double, where that overflows as well at a size of about 1. u and v hold sorted reals. */
static LNS_NOINLINE void VNAME(compare_far)(const VNAME(w2_tile) * t, double *value)
{
    const real *u = (const real *)(void *)t->u, *v = (const real *)(void *)t->v;
    const int64_t n = t->pairing->n, m = t->pairing->m;
    for (int64_t l = 0; l < t->lanes; l++) {
        if (isfinite(value[l])) {
            continue;
        }
        const double most_u = fmax(fabs((double)u[l]), fabs((double)u[(n - 1) * LANES + l]));
        const double most_v = fmax(fabs((double)v[l]), fabs((double)v[(m - 1) * LANES + l]));
        int exponent = 0;
        if (REAL_IS_DOUBLE) {
            frexp(fmax(most_u, most_v), &exponent);
        }
        VNAME(compare_lane)(t, l, exponent, value);
        if (t->g != NULL) {
            VNAME(share_lane)(t, l);
        }
    }
}

/* ---- back to the source ---- */

/* Gradients of the parameters, in source order, and of z: g is the gradient in weight * z + bias and becomes that in z.
 */
static inline void VNAME(gradient_through_map)(real *g, const real *z, const real *weight, int64_t n,
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

/* Takes the gradient from sorted order to the order of the source and, where there is a map, through it. */
static void VNAME(gradient_to_source)(const VNAME(w2_tile) * t, const real *weight)
{
    const lns_w2_job *job = t->job;
    VNAME(unrank_tile)(t->g, t->pairing->n, &t->work->order_u);
    if (job->weight != NULL) {
        double grad_weight[LANES] = {0}, grad_bias[LANES] = {0};
        VNAME(gradient_through_map)(t->g, t->z, weight, t->pairing->n, grad_weight, grad_bias);
        VNAME(store_row)(grad_weight, t->lanes, job->grad_weight, t->column);
        VNAME(store_row)(grad_bias, t->lanes, job->grad_bias, t->column);
    }
}

/* ---- all of it ---- */

/* Value and gradient of a tile; returns whether everything was finite. */
static int VNAME(w2_of_tile)(const VNAME(w2_tile) * t)
{
    const lns_w2_job *job = t->job;
    const int equal = !t->pairing->weighted && job->u.n == job->v.n;
    double value[LANES] = {0};
    real weight[LANES];
    int finite = 1;
    if (job->weight != NULL) {
        VNAME(map_tile)(job, t->pairing->n, t->column, t->lanes, t->z, t->u, weight);
    }
    if (!VNAME(sort_pair)(t)) {
        return 0;
    }
    if (equal) {
        VNAME(compare_rows)(t, value);
    } else {
        VNAME(compare_quantiles)(t, value);
    }
    /* A value can overflow; else it tells that v, which came sorted and was not looked at, is not finite. */
    for (int l = 0; l < LANES; l++) {
        finite &= isfinite(value[l]) != 0;
    }
    if (!finite) {
        if (t->v_sorted && !VNAME(rows_finite)((const real *)(void *)t->v, 0, job->v.n)) {
            return 0;
        }
        if (equal) {
            VNAME(flip_tile)(t->u, t->pairing->n);
        }
        VNAME(compare_far)(t, value);
    }
    VNAME(store_row)(value, t->lanes, job->value, t->column);
    if (t->g != NULL) {
        VNAME(gradient_to_source)(t, weight);
    }
    return 1;
}

static void VNAME(w2_units)(void *context, int64_t begin, int64_t end, int thread)
{
    w2_context *c = context;
    const lns_w2_job *job = c->call.jobs, *prepared = NULL;
    char *memory = c->call.work + thread * c->call.thread_bytes;
    int64_t first = 0; /* unit of the job */
    lns_pairing pairing = {0};
    VNAME(w2_work) work = {0};
    for (int64_t unit = begin, count; unit < end; unit += count) {
        while (unit >= first + lns_sample_tiles(&job->u)) {
            first += lns_sample_tiles(&job->u);
            job++;
        }
        const int gradient = wants_gradient(job);
        if (prepared != job) {
            prepared = job;
            pairing = lns_pair_rows(&job->u, &job->v, (lns_segment *)(void *)memory);
            work = VNAME(w2_work_at)(memory + c->call.segment_bytes, job, pairing.weighted, gradient);
        }
        const int64_t column = (unit - first) * LANES, left = first + lns_sample_tiles(&job->u) - unit;
        const int64_t size_u = lns_tile_bytes(job->u.n) / (int64_t)sizeof(key);
        const int64_t size_v = lns_tile_bytes(job->v.n) / (int64_t)sizeof(key);
        /* With weights, the ranks of the target are wanted although its columns ascend. */
        const int v_sorted = c->v_sorted && !pairing.weighted;
        count = w2_panel(job, left < end - unit ? left : end - unit);
        if (job->weight != NULL) {
            VNAME(load_tiles)(&job->u, column, count, (key *)(void *)work.z, 0);
        } else {
            VNAME(load_tiles)(&job->u, column, count, work.u + size_u, 1);
        }
        if (v_sorted) {
            VNAME(load_tiles)(&job->v, column, count, work.v, 0);
        } else {
            VNAME(load_tiles)(&job->v, column, count, work.v, 1);
        }
        for (int64_t k = 0; k < count; k++) {
            const int64_t at = column + k * LANES;
            const VNAME(w2_tile) tile = {.job = job,
                                         .pairing = &pairing,
                                         .work = &work,
                                         .column = at,
                                         .lanes = job->u.d - at < LANES ? job->u.d - at : LANES,
                                         .u = work.u + (k + 1) * size_u,
                                         .v = work.v + k * size_v,
                                         .z = work.z + k * size_u,
                                         .g = gradient ? (real *)(void *)(work.u + k * size_u) : NULL,
                                         .v_sorted = v_sorted};
            c->call.not_finite[thread] |= !VNAME(w2_of_tile)(&tile);
        }
        if (job->grad_u != NULL) {
            VNAME(store_tiles)(work.u, &job->u, column, count, job->grad_u, 0);
        }
    }
}
