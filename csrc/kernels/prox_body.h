/* Template body: soft threshold and group shrinkage of one group, after an optional optimiser step.
 *
 * Included by prox.c through simd/variants.h, once per working type and CPU variant. */
#include "kernels/simd/strip_body.h"

/* Sums of |p| and p^2: in each lane of a block of LANES parameters, and of the whole group. */
typedef struct VNAME(lane_sums) {
    VNAME(reals) l1[VEC_PARTS], squares[VEC_PARTS];
} VNAME(lane_sums);

/* Of p / scale, a power of two: 1 unless the squares of p leave the range. */
typedef struct VNAME(group_sums) {
    double l1, squares, scale;
} VNAME(group_sums);

/* What happens to a parameter p before its group is shrunk: soft threshold of p - rate * gradient - centre. */
typedef struct VNAME(update) {
    real rate, centre, threshold;
} VNAME(update);

/* The sums of p [d] in double, scaled by the largest entry. */
static VNAME(group_sums) VNAME(add_exactly)(const real *p, int64_t d)
{
    VNAME(group_sums) sums = {0, 0, 1};
    double most = 0;
    for (int64_t j = 0; j < d; j++) {
        most = fabs((double)p[j]) > most ? fabs((double)p[j]) : most;
    }
    if (most < INFINITY) {
        int exponent;
        frexp(most, &exponent);
        sums.scale = ldexp(1, exponent - 1);
    }
    for (int64_t j = 0; j < d; j++) {
        const double scaled = (double)p[j] / sums.scale;
        sums.l1 += fabs(scaled);
        sums.squares += scaled * scaled;
    }
    return sums;
}

/* Updates LANES parameters p in place, and adds |p| and p^2 of the results to the sums of the lanes; grad may be NULL:
 * rate is then not used. */
static LNS_INLINE void VNAME(update_lanes)(real *p, const real *grad, VNAME(update) u, VNAME(lane_sums) * sums)
{
    const VNAME(reals) high = (VNAME(reals)){0} + u.threshold, low = -high;
    for (int k = 0; k < VEC_PARTS; k++) {
        VNAME(reals) x = VNAME(reals_load)(p + k * VEC_LANES);
        if (grad != NULL) {
            x -= u.rate * VNAME(reals_load)(grad + k * VEC_LANES);
        }
        x -= u.centre;
        x -= VNAME(reals_min)(VNAME(reals_max)(x, low), high);
        VNAME(reals_store)(p + k * VEC_LANES, x);
        sums->l1[k] += (VNAME(reals))((VNAME(vec))x & (key)((ukey)-1 >> 1));
        sums->squares[k] += x * x;
    }
}

/* Updates the parameters p [d] of a group in place. Returns the sums of the results: in the working type over LNS_STRIP
 * numbers, apart for each place in a block of LANES, and in double over the strips. The order is the same on every
 * machine. */
static LNS_INLINE VNAME(group_sums) VNAME(update_group)(real *p, const real *grad, int64_t d, VNAME(update) u)
{
    double total_l1[LANES] = {0}, total_squares[LANES] = {0};
    VNAME(group_sums) sums = {0, 0, 1};
    for (int64_t at = 0; at < d; at += LNS_STRIP) {
        const int64_t count = d - at < LNS_STRIP ? d - at : LNS_STRIP, whole = count - count % LANES;
        VNAME(lane_sums) lanes = {0};
        for (int64_t j = at; j < at + whole; j += LANES) {
            VNAME(update_lanes)(p + j, grad != NULL ? grad + j : NULL, u, &lanes);
        }
        if (whole < count) { /* the rest among parameters that stay at 0 */
            const size_t size = (size_t)(count - whole) * sizeof(real);
            real rest[LANES], rest_grad[LANES] = {0};
            for (int l = 0; l < LANES; l++) {
                rest[l] = u.centre;
            }
            memcpy(rest, p + at + whole, size);
            if (grad != NULL) {
                memcpy(rest_grad, grad + at + whole, size);
            }
            VNAME(update_lanes)(rest, grad != NULL ? rest_grad : NULL, u, &lanes);
            memcpy(p + at + whole, rest, size);
        }
        for (int l = 0; l < LANES; l++) {
            total_l1[l] += (double)lanes.l1[l / VEC_LANES][l % VEC_LANES];
            total_squares[l] += (double)lanes.squares[l / VEC_LANES][l % VEC_LANES];
        }
    }
    for (int l = 0; l < LANES; l++) {
        sums.l1 += total_l1[l];
        sums.squares += total_squares[l];
    }
    if (sums.l1 != 0 && !(sums.squares > 0x1p-90 && sums.squares < INFINITY)) { /* squares left the range */
        sums = VNAME(add_exactly)(p, d);
    }
    return sums;
}

/* Factor that the group penalty leaves of a group with these sums. */
static double VNAME(shrinkage)(VNAME(group_sums) sums, int64_t d, double tau_group)
{
    const double norm = sqrt(sums.squares);
    if (tau_group == 0) {
        return 1;
    }
    const double cut = tau_group / sums.scale * sqrt((double)d);
    return norm <= cut ? 0 : 1 - cut / norm; /* what is not a number shows */
}

/* Of a group with these sums, times the factor. */
static double VNAME(penalty)(VNAME(group_sums) sums, int64_t d, double factor, double l1, double group)
{
    return factor == 0 ? 0 : factor * (l1 * sums.l1 + group * sqrt((double)d * sums.squares)) * sums.scale;
}

static void VNAME(prox)(const void *x, int64_t d, double tau, double l1, double group, void *out)
{
    real *y = out;
    memmove(y, x, (size_t)d * sizeof(real));
    const VNAME(update) threshold = {0, 0, (real)(tau * l1)};
    const VNAME(group_sums) sums = VNAME(update_group)(y, NULL, d, threshold);
    const double factor = VNAME(shrinkage)(sums, d, tau * group);
    for (int64_t j = 0; j < d; j++) {
        y[j] = factor == 0 ? 0 : y[j] * (real)factor;
    }
}

/* p -= the step of Adam, with its moments m and v. */
static void VNAME(adam)(real *restrict p, const real *restrict grad, int64_t d, double lr, const lns_adam *adam,
                        real *restrict m, real *restrict v)
{
    const real beta1 = (real)adam->beta1, rest1 = (real)(1 - adam->beta1);
    const real beta2 = (real)adam->beta2, rest2 = (real)(1 - adam->beta2), eps = (real)adam->eps;
    const real rate = (real)(lr / (1 - pow(adam->beta1, (double)adam->step)));
    const real root = (real)sqrt(1 - pow(adam->beta2, (double)adam->step));
    for (int64_t j = 0; j < d; j++) {
        m[j] = beta1 * m[j] + rest1 * grad[j];
        v[j] = beta2 * v[j] + rest2 * (grad[j] * grad[j]);
        p[j] -= rate * (m[j] / ((real)sqrt((double)v[j]) / root + eps));
    }
}

/* Gradient step and soft threshold of one group of d parameters from `begin` on, the weights or the biases of a module.
 * Leaves weight - 1 or bias, not yet shrunk. */
static VNAME(group_sums) VNAME(step_group)(const lns_step_problem *s, int64_t begin, int64_t d, int bias)
{
    real *p = (real *)(bias ? s->bias : s->weight) + begin;
    const real *grad = (const real *)(bias ? s->grad_bias : s->grad_weight) + begin;
    const VNAME(update) u = {(real)s->lr, bias ? 0 : 1, (real)(s->lr * (bias ? s->l1_bias : s->l1))};
    if (s->adam == NULL) {
        return VNAME(update_group)(p, grad, d, u);
    }
    VNAME(adam)(p, grad, d, s->lr, s->adam, (real *)(bias ? s->adam->m_bias : s->adam->m_weight) + begin,
                (real *)(bias ? s->adam->v_bias : s->adam->v_weight) + begin);
    return VNAME(update_group)(p, NULL, d, u);
}

/* w = 1 + factor_w * w, b = factor_b * b on at most LNS_STRIP elements; returns how many are not the identity. */
static int64_t VNAME(shrink)(real *restrict w, real *restrict b, int64_t count, real factor_w, real factor_b)
{
    key support = 0;
    for (int64_t j = 0; j < count; j++) {
        const real weight = 1 + factor_w * w[j], bias = factor_b * b[j] + 0; /* + 0 turns -0 into 0 */
        w[j] = weight;
        b[j] = bias;
        support += (weight != 1) | (bias != 0);
    }
    return support;
}

/* One module: both parameters, from gradient to prox. Writes its penalty and support. */
static void VNAME(step_module)(const lns_step_problem *s, int64_t k, double *result)
{
    const int64_t begin = s->offsets[k], d = s->offsets[k + 1] - begin;
    const VNAME(group_sums) sums_w = VNAME(step_group)(s, begin, d, 0), sums_b = VNAME(step_group)(s, begin, d, 1);
    const double factor_w = VNAME(shrinkage)(sums_w, d, s->lr * s->group);
    const double factor_b = VNAME(shrinkage)(sums_b, d, s->lr * s->group_bias);
    real *w = (real *)s->weight + begin, *b = (real *)s->bias + begin;
    int64_t support = 0;
    for (int64_t j = 0; j < d; j += LNS_STRIP) {
        const int64_t count = d - j < LNS_STRIP ? d - j : LNS_STRIP;
        support += VNAME(shrink)(w + j, b + j, count, (real)factor_w, (real)factor_b);
    }
    result[0] = VNAME(penalty)(sums_w, d, factor_w, s->l1, s->group) +
                VNAME(penalty)(sums_b, d, factor_b, s->l1_bias, s->group_bias);
    result[1] = (double)support;
}

static void VNAME(step_units)(void *context, int64_t begin, int64_t end, int thread)
{
    const step_context *c = context;
    (void)thread;
    for (int64_t k = begin; k < end; k++) {
        VNAME(step_module)(c->problem, k, c->per_module + 2 * k);
    }
}

/* Whether one of the numbers is a NaN or an infinity: minus itself, such a number is a NaN, all others are 0. */
static int VNAME(any_not_finite)(const real *x, int64_t count)
{
    VNAME(vec) wrong[VEC_PARTS] = {{0}};
    int64_t j = 0;
    for (; count - j >= LANES; j += LANES) {
        for (int k = 0; k < VEC_PARTS; k++) {
            const VNAME(reals) v = VNAME(reals_load)(x + j + k * VEC_LANES);
            wrong[k] |= (VNAME(vec))(v - v);
        }
    }
    for (int k = 1; k < VEC_PARTS; k++) {
        wrong[0] |= wrong[k];
    }
    int any = VNAME(vec_any)(wrong[0]);
    for (; j < count; j++) {
        any |= !isfinite(x[j]);
    }
    return any;
}

/* First module whose gradient is not finite, or -1. Looks at the weights' gradients last, since the step begins with
 * them. */
static int64_t VNAME(find_bad_gradient)(const lns_step_problem *s, lns_place *place)
{
    const int64_t count = s->offsets[s->modules];
    const int any_bias = VNAME(any_not_finite)(s->grad_bias, count),
              any_weight = VNAME(any_not_finite)(s->grad_weight, count);
    for (int64_t k = 0; (any_bias || any_weight) && k < s->modules; k++) {
        const int64_t begin = s->offsets[k], d = s->offsets[k + 1] - begin;
        for (int argument = 0; argument < 2; argument++) {
            const real *grad = (const real *)(argument == 0 ? s->grad_weight : s->grad_bias) + begin;
            for (int64_t j = 0; j < d; j++) {
                if (!isfinite(grad[j])) {
                    *place = (lns_place){k, argument, 0, j, (double)grad[j]};
                    return k;
                }
            }
        }
    }
    return -1;
}
