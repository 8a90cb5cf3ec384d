/* Template body: sparse group lasso of one module, from the moments of its paired quantiles.
 *
 * Included by path.c through simd/variants.h, once per CPU variant: in double only, whatever the type of the maps.
 *
 * With x = w - 1 the loss of a neuron is a quadratic in (x, b) whose gradient is (a2 x + m2 b + g1, m2 x + 2 b + g2);
 * the penalties are l1 (|x| + |b|) in each neuron and tau (||x|| + ||b||) over all of them; x >= -1. Where the norms
 * ||x|| = tau sx and ||b|| = tau sb are given, neurons no longer depend on each other: in y = x / sx and c = b / sb
 *
 *     (grouped + a2 sx) y + m2 sb c + g1 + l1 sign(y) = 0      grouped = 1, or 0 where there is no group penalty
 *     m2 sx y + (grouped + 2 sb) c + g2 + l1 sign(c) = 0
 *
 * a lasso in two variables with a closed form; it stays finite at sx = 0, where ||y|| <= tau says that x is 0. */
#if REAL_IS_DOUBLE
#include "kernels/simd/tile_body.h"

typedef struct VNAME(path_lasso) {
    VNAME(reals) y, c;
    VNAME(reals) ky, kc, cross; /* -dy/dsx / y, -dc/dsb / c, and -dy/dsb * y = -dc/dsx * c */
} VNAME(path_lasso);

static LNS_INLINE VNAME(reals) VNAME(reals_where)(VNAME(vec) mask, VNAME(reals) a)
{
    return (VNAME(reals))((VNAME(vec))a & mask);
}

static LNS_INLINE VNAME(reals) VNAME(reals_abs)(VNAME(reals) a)
{
    return (VNAME(reals))((VNAME(vec))a & (key)((ukey)-1 >> 1));
}

/* size >= 0 with the sign of a. */
static LNS_INLINE VNAME(reals) VNAME(reals_sign)(double size, VNAME(reals) a)
{
    const VNAME(reals) all = (VNAME(reals)){0} + size;
    return (VNAME(reals))((VNAME(vec))all | ((VNAME(vec))a & (key)((ukey)1 << (KEY_BITS - 1))));
}

static LNS_INLINE VNAME(reals) VNAME(reals_soft)(VNAME(reals) a, double l1)
{
    return VNAME(reals_where)((VNAME(vec))(VNAME(reals_abs)(a) > l1), a - VNAME(reals_sign)(l1, a));
}

/* Solves the lassos of VEC_LANES neurons. Each coordinate solved alone tells the other's sign, or that it is zero, by
 * the gradient that it leaves there. Nothing is divided before the end. */
static LNS_INLINE VNAME(path_lasso) VNAME(path_solve)(const double *block, const path_scale *scale, double l1)
{
    const double sx = scale->sx, sb = scale->sb, grouped = scale->grouped, s = grouped + 2 * sb;
    const VNAME(reals) a2 = VNAME(reals_load)(block + PATH_A2 * LANES), m2 = VNAME(reals_load)(block + PATH_M2 * LANES);
    const VNAME(reals) g1 = VNAME(reals_load)(block + PATH_G1 * LANES), g2 = VNAME(reals_load)(block + PATH_G2 * LANES);
    const VNAME(reals) v4 = VNAME(reals_load)(block + PATH_V4 * LANES);
    const VNAME(reals) p = grouped + a2 * sx;
    const VNAME(reals) gradient_c = g2 * p - m2 * sx * VNAME(reals_soft)(g1, l1); /* at c = 0, times p */
    const VNAME(vec) c_on = (VNAME(vec))(VNAME(reals_abs)(gradient_c) > l1 * p);
    const VNAME(reals) with_c = g1 * s - m2 * sb * VNAME(reals_soft)(g2, l1), without_c = g1 * s;
    const VNAME(reals) gradient_y = /* at y = 0, times s */
        (VNAME(reals))(((VNAME(vec))with_c & c_on) | ((VNAME(vec))without_c & ~c_on));
    VNAME(vec) y_on = (VNAME(vec))(VNAME(reals_abs)(gradient_y) > l1 * s);
    /* Slope and shift of a constant source do the same: where rounding takes both, one is enough. */
    if (grouped == 0) {
        y_on &= ~(c_on & (VNAME(vec))(v4 <= a2 * 0x1p-100));
    }
    const VNAME(reals) e1 = VNAME(reals_where)(y_on, g1 - VNAME(reals_sign)(l1, gradient_y));
    const VNAME(reals) e2 = VNAME(reals_where)(c_on, g2 - VNAME(reals_sign)(l1, gradient_c));
    const VNAME(reals) x_scale = VNAME(reals_where)(y_on, (VNAME(reals)){0} + sx);
    const VNAME(reals) b_scale = VNAME(reals_where)(c_on, (VNAME(reals)){0} + sb);
    /* A coordinate that is off has the diagonal entry 1. */
    const VNAME(reals) x_diagonal = 1 - VNAME(reals_where)(y_on, (VNAME(reals)){0} + (1 - grouped));
    const VNAME(reals) b_diagonal = 1 - VNAME(reals_where)(c_on, (VNAME(reals)){0} + (1 - grouped));
    const VNAME(reals) determinant =
        x_diagonal * (b_diagonal + 2 * b_scale) + a2 * x_scale * b_diagonal + v4 * (x_scale * b_scale);
    const VNAME(reals) inverse = 1 / determinant;
    VNAME(path_lasso) out;
    out.y = VNAME(reals_where)(y_on, (e2 * (m2 * b_scale) - e1 * (b_diagonal + 2 * b_scale)) * inverse);
    out.c = VNAME(reals_where)(c_on, (e1 * (m2 * x_scale) - e2 * (x_diagonal + a2 * x_scale)) * inverse);
    out.ky = (a2 * b_diagonal + v4 * b_scale) * inverse;
    out.kc = (2 * x_diagonal + v4 * x_scale) * inverse;
    out.cross = out.y * out.c * m2 * inverse;
    const VNAME(vec) bound = (VNAME(vec))(out.y * sx < -1.0);
    if (VNAME(vec_any)(bound)) { /* x = -1: the slope is zero */
        const VNAME(reals) c = -VNAME(reals_soft)(g2 - m2, l1) / s;
#define CHOOSE(bounded, free)                                                                                          \
    (free) = (VNAME(reals))((VNAME(vec))VNAME(reals_where)(bound, (bounded)) |                                         \
                            (VNAME(vec))VNAME(reals_where)(~bound, (free)))
        CHOOSE((VNAME(reals)){0} - 1 / sx, out.y);
        CHOOSE(c, out.c);
        CHOOSE((VNAME(reals)){0} + 1 / sx, out.ky);
        CHOOSE((VNAME(reals)){0} + 2 / s, out.kc);
        CHOOSE((VNAME(reals)){0}, out.cross);
#undef CHOOSE
    }
    return out;
}

/* The sum of all lanes of a row. */
static inline double VNAME(path_total)(const VNAME(reals) * row)
{
    double lanes[LANES], total = 0;
    memcpy(lanes, row, sizeof lanes);
    for (int l = 0; l < LANES; l++) {
        total += lanes[l];
    }
    return total;
}

/* Norms of y and c and how they change with sx and sb: sums of y^2, c^2, ky y^2, kc c^2, cross. solution: for each
 * block a row of y and a row of c. */
static void VNAME(path_pass)(const double *blocks, int64_t count, const path_scale *scale, double l1, double *solution,
                             double *sums)
{
    VNAME(reals) part[PATH_SUMS][VEC_PARTS] = {{{0}}};
    for (int64_t k = 0; k < count; k++, blocks += PATH_ROWS * LANES, solution += 2 * LANES) {
        for (int p = 0; p < VEC_PARTS; p++) {
            const VNAME(path_lasso) neuron = VNAME(path_solve)(blocks + p * VEC_LANES, scale, l1);
            const VNAME(reals) yy = neuron.y * neuron.y, cc = neuron.c * neuron.c;
            VNAME(reals_store)(solution + p * VEC_LANES, neuron.y);
            VNAME(reals_store)(solution + LANES + p * VEC_LANES, neuron.c);
            part[0][p] += yy;
            part[1][p] += cc;
            part[2][p] += yy * neuron.ky;
            part[3][p] += cc * neuron.kc;
            part[4][p] += neuron.cross;
        }
    }
    for (int k = 0; k < PATH_SUMS; k++) {
        sums[k] = VNAME(path_total)(part[k]);
    }
}

/* Blocks from moments [5, d]; lanes beyond d stay zero and change nothing. */
static void VNAME(path_blocks)(const double *moments, int64_t d, double *blocks)
{
    const double *mean_u = moments, *mean_v = mean_u + d, *var_u = mean_v + d, *cov = var_u + d;
    memset(blocks, 0, (size_t)(lns_tiles(d, LNS_F64) * PATH_ROWS * LANES) * sizeof *blocks);
    for (int64_t j = 0; j < d; j++) {
        double *at = blocks + j / LANES * PATH_ROWS * LANES + j % LANES;
        const double m = mean_u[j], gap = m - mean_v[j], a = var_u[j] + m * m;
        at[PATH_A2 * LANES] = a > 0 ? 2 * a : 1; /* a source of zeros: its slope is never moved */
        at[PATH_M2 * LANES] = 2 * m;
        at[PATH_G1 * LANES] = 2 * (var_u[j] - cov[j] + m * gap);
        at[PATH_G2 * LANES] = 2 * gap;
        at[PATH_V4 * LANES] = a > 0 ? 4 * var_u[j] : 2;
    }
}

/* Sums over a group at zero: of soft(h, l1)^2 and of |soft(h, l1)|; h in row PATH_G1 or PATH_G2. */
static void VNAME(path_group)(const double *blocks, int64_t count, int row, double l1, double *sums)
{
    VNAME(reals) part[2][VEC_PARTS] = {{{0}}};
    for (int64_t k = 0; k < count; k++, blocks += PATH_ROWS * LANES) {
        for (int p = 0; p < VEC_PARTS; p++) {
            const VNAME(reals) h = VNAME(reals_load)(blocks + row * LANES + p * VEC_LANES);
            const VNAME(reals) soft = VNAME(reals_soft)(h, l1);
            part[0][p] += soft * soft;
            part[1][p] += VNAME(reals_abs)(soft);
        }
    }
    for (int k = 0; k < 2; k++) {
        sums[k] = VNAME(path_total)(part[k]);
    }
}

/* VEC_LANES sums of a loss: W2 at slope w and shift b, from moments. */
static LNS_INLINE VNAME(reals)
    VNAME(path_loss)(const double *moments, int64_t d, int64_t j, VNAME(reals) w, VNAME(reals) b)
{
    const double *at = moments + j;
    const VNAME(reals) gap = VNAME(reals_load)(at) * w + b - VNAME(reals_load)(at + d);
    const VNAME(reals) var_u = VNAME(reals_load)(at + 2 * d), cov = VNAME(reals_load)(at + 3 * d);
    const VNAME(reals) var_v = VNAME(reals_load)(at + 4 * d);
    return (w * var_u - 2 * cov) * w + var_v + gap * gap;
}

/* The maps of a solution: x [padded], b [padded], and the squared distance of zero to the subdifferential of its groups
 * (x, then b), from x and b themselves. norms [2]: of x and b. */
static void VNAME(path_maps)(const double *blocks, int64_t count, const double *solution, const path_scale *scale,
                             double l1, double tau, const double *norms, double *x, double *b, double *distance)
{
    VNAME(reals) part[2][VEC_PARTS] = {{{0}}};
    const double pull_x = norms[0] > 0 ? tau / norms[0] : 0, pull_b = norms[1] > 0 ? tau / norms[1] : 0;
    for (int64_t k = 0; k < count; k++, blocks += PATH_ROWS * LANES, solution += 2 * LANES) {
        for (int p = 0; p < VEC_PARTS; p++) {
            const double *block = blocks + p * VEC_LANES;
            VNAME(reals) px = VNAME(reals_load)(solution + p * VEC_LANES) * scale->sx;
            const VNAME(reals) pb = VNAME(reals_load)(solution + LANES + p * VEC_LANES) * scale->sb;
            const VNAME(vec) bound = (VNAME(vec))(px <= -1.0 + 0x1p-52);
            px = VNAME(reals_where)(~bound, px) - VNAME(reals_where)(bound, (VNAME(reals)){0} + 1);
            VNAME(reals_store)(x + k * LANES + p * VEC_LANES, px);
            VNAME(reals_store)(b + k * LANES + p * VEC_LANES, pb);
            const VNAME(reals) a2 = VNAME(reals_load)(block + PATH_A2 * LANES);
            const VNAME(reals) m2 = VNAME(reals_load)(block + PATH_M2 * LANES);
            const VNAME(reals) slope_x = a2 * px + m2 * pb + VNAME(reals_load)(block + PATH_G1 * LANES) + px * pull_x;
            const VNAME(reals) slope_b = m2 * px + 2 * pb + VNAME(reals_load)(block + PATH_G2 * LANES) + pb * pull_b;
            const VNAME(vec) x_off = (VNAME(vec))(px == 0), b_off = (VNAME(vec))(pb == 0);
            VNAME(reals)
            subgradient_x = VNAME(reals_where)(x_off, VNAME(reals_soft)(slope_x, l1)) +
                            VNAME(reals_where)(~x_off, slope_x + VNAME(reals_sign)(l1, px));
            const VNAME(reals) subgradient_b = VNAME(reals_where)(b_off, VNAME(reals_soft)(slope_b, l1)) +
                                               VNAME(reals_where)(~b_off, slope_b + VNAME(reals_sign)(l1, pb));
            /* At the bound a slope that points out of it is allowed. */
            subgradient_x = VNAME(reals_where)(~(bound & (VNAME(vec))(subgradient_x > 0)), subgradient_x);
            part[0][p] += subgradient_x * subgradient_x;
            part[1][p] += subgradient_b * subgradient_b;
        }
    }
    for (int k = 0; k < 2; k++) {
        distance[k] = VNAME(path_total)(part[k]);
    }
}

/* Slopes and shifts of d neurons as dtype, and losses from moments and, unless NULL, held-out moments. */
static void VNAME(path_write)(const lns_path_job *job, const double *x, const double *b, int64_t point)
{
    enum { COUNTED = 1 << 30 }; /* in an int32_t, which is as wide as a float */
    const int64_t d = job->d, whole = d / LANES * LANES, at = point * job->stride;
    const double *moments[2] = {job->moments, job->held_out};
    double *losses[2] = {job->loss, job->held_out_loss};
    for (int64_t first = 0; first < d; first += COUNTED) {
        const int64_t end = d - first < COUNTED ? d : first + COUNTED;
        int32_t changed = 0;
        if (job->dtype == LNS_F64) {
            double *weight = (double *)job->weight + at, *bias = (double *)job->bias + at;
            for (int64_t j = first; j < end; j++) {
                weight[j] = 1 + x[j];
                bias[j] = b[j];
                changed += (weight[j] != 1) | (bias[j] != 0);
            }
        } else {
            float *weight = (float *)job->weight + at, *bias = (float *)job->bias + at;
            for (int64_t j = first; j < end; j++) {
                weight[j] = (float)(1 + x[j]);
                bias[j] = (float)b[j];
                changed += (weight[j] != 1) | (bias[j] != 0);
            }
        }
        job->support[point] = changed + (first > 0 ? job->support[point] : 0);
    }
    for (int k = 0; k < 2; k++) {
        if (moments[k] == NULL) {
            continue;
        }
        VNAME(reals) part[VEC_PARTS] = {{0}};
        double tail[5 * LANES] = {0};
        for (int64_t j = 0; j < whole; j += LANES) {
            for (int p = 0; p < VEC_PARTS; p++) {
                const int64_t l = j + p * VEC_LANES;
                part[p] += VNAME(path_loss)(moments[k], d, l, 1 + VNAME(reals_load)(x + l), VNAME(reals_load)(b + l));
            }
        }
        for (int row = 0; row < 5; row++) {
            memcpy(tail + row * LANES, moments[k] + row * d + whole, (size_t)(d - whole) * sizeof *tail);
        }
        for (int p = 0; whole < d && p < VEC_PARTS; p++) {
            const int64_t l = p * VEC_LANES;
            part[p] += VNAME(path_loss)(tail, LANES, l, 1 + VNAME(reals_load)(x + whole + l),
                                        VNAME(reals_load)(b + whole + l));
        }
        losses[k][point] = VNAME(path_total)(part);
    }
}

/* The smallest penalty at which a group is zero, by Newton's method from below on a convex function. */
static double VNAME(path_largest_of)(double *blocks, int64_t count, int row, int64_t d, double ratio)
{
    const double group = (1 - ratio) * sqrt((double)d);
    double penalty = 0, sums[2], lanes[LANES] = {0}, most = 0;
    int exponent = 0;
    for (int64_t k = 0; k < count; k++) {
        for (int l = 0; l < LANES; l++) {
            const double h = fabs(blocks[(k * PATH_ROWS + row) * LANES + l]);
            lanes[l] = h > lanes[l] ? h : lanes[l];
        }
    }
    for (int l = 0; l < LANES; l++) {
        most = lanes[l] > most ? lanes[l] : most;
    }
    if (most > 0 && most < INFINITY && !(most > 0x1p-450 && most < 0x1p450)) { /* squares would leave the range */
        frexp(most, &exponent);
        for (int64_t j = 0; j < count * LANES; j++) {
            double *h = &blocks[(j / LANES * PATH_ROWS + row) * LANES + j % LANES];
            *h = ldexp(*h, -exponent);
        }
    }
    for (int k = 0; k < 100; k++) {
        VNAME(path_group)(blocks, count, row, penalty * ratio, sums);
        const double norm = sqrt(sums[0]);
        const double excess = norm - penalty * group;
        const double slope = (norm > 0 ? ratio * sums[1] / norm : 0) + group;
        if (!(excess > 0) || !(penalty + excess / slope > penalty)) {
            break;
        }
        penalty += excess / slope;
    }
    return ldexp(penalty, exponent);
}

static double VNAME(path_largest)(const double *moments, int64_t d, double ratio, double *blocks)
{
    const int64_t count = lns_tiles(d, LNS_F64);
    VNAME(path_blocks)(moments, d, blocks);
    const double x = VNAME(path_largest_of)(blocks, count, PATH_G1, d, ratio);
    const double b = VNAME(path_largest_of)(blocks, count, PATH_G2, d, ratio);
    return x > b ? x : b;
}

/* All points of the modules [begin, end). */
static void VNAME(path_units)(void *context, int64_t begin, int64_t end, int thread)
{
    const path_context *c = context;
    for (int64_t k = begin; k < end; k++) {
        const lns_path_job *job = &c->jobs[k];
        const int64_t count = lns_tiles(job->d, LNS_F64);
        double *blocks = (double *)(void *)(c->work + thread * c->work_each);
        double *solution = blocks + count * PATH_ROWS * LANES;
        double *x = solution + 2 * count * LANES, *b = x + count * LANES;
        path_problem problem = {.pass = VNAME(path_pass), .blocks = blocks, .solution = solution, .count = count};
        path_scale previous[3] = {{0, 0, 1}, {0, 0, 1}, {0, 0, 1}}; /* of the penalties before this one, latest first */
        VNAME(path_blocks)(job->moments, job->d, blocks);
        for (int64_t point = 0; point < c->points; point++) {
            double norms[2], distance[2];
            problem.l1 = c->penalties[point] * c->l1_ratio;
            problem.tau = c->penalties[point] * (1 - c->l1_ratio) * sqrt((double)job->d);
            problem.tolerance = TOLERANCE * job->largest;
            path_scale now = {1, 1, 0};
            if (problem.tau > 0) {
                now = (path_scale){path_guess(previous[0].sx, previous[1].sx, previous[2].sx),
                                   path_guess(previous[0].sb, previous[1].sb, previous[2].sb), 1};
                now = path_scales(&problem, now, norms);
                previous[2] = previous[1];
                previous[1] = previous[0];
                previous[0] = now;
                norms[0] *= now.sx;
                norms[1] *= now.sb;
            } else { /* no groups: y is x */
                double sums[PATH_SUMS];
                VNAME(path_pass)(blocks, count, &now, problem.l1, solution, sums);
                norms[0] = norms[1] = 0;
            }
            VNAME(path_maps)(blocks, count, solution, &now, problem.l1, problem.tau, norms, x, b, distance);
            double squared = 0;
            for (int g = 0; g < 2; g++) {
                const double norm = sqrt(distance[g]);
                const double excess = norms[g] > 0 || problem.tau == 0 ? norm
                                      : norm > problem.tau             ? norm - problem.tau
                                                                       : 0;
                squared += excess * excess;
            }
            job->distance[point] = sqrt(squared);
            VNAME(path_write)(job, x, b, point);
        }
    }
}
#endif
