/* Template body: soft threshold and group shrinkage of one group, after an optional optimiser step. */

typedef struct VNAME(group_sums) {
    double l1, squares;
} VNAME(group_sums);

/* y = sign(y) max(|y| - threshold, 0) in place; sums of |y| and y^2 afterwards, in eight interleaved parts. */
static VNAME(group_sums) VNAME(soft_threshold)(real *restrict y, int64_t d, real threshold)
{
    double l1[8] = {0}, squares[8] = {0};
    VNAME(group_sums) sums = {0, 0};
    for (int64_t begin = 0; begin < d; begin += 8) {
        const int64_t count = d - begin < 8 ? d - begin : 8;
        for (int64_t l = 0; l < count; l++) {
            const real x = y[begin + l];
            const real magnitude = (x < 0 ? -x : x) - threshold;
            const real shrunk = magnitude > 0 ? magnitude : 0;
            y[begin + l] = x < 0 ? -shrunk : shrunk;
            l1[l] += (double)shrunk;
            squares[l] += (double)shrunk * (double)shrunk;
        }
    }
    for (int l = 0; l < 8; l++) {
        sums.l1 += l1[l];
        sums.squares += squares[l];
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
    const double cut = tau_group * sqrt((double)d);
    return norm > cut ? 1 - cut / norm : 0;
}

static void VNAME(prox)(const void *x, int64_t d, double tau, double l1, double group, void *out)
{
    real *y = out;
    memmove(y, x, (size_t)d * sizeof(real));
    const VNAME(group_sums) sums = VNAME(soft_threshold)(y, d, (real)(tau * l1));
    const double factor = VNAME(shrinkage)(sums, d, tau * group);
    for (int64_t j = 0; j < d; j++) {
        y[j] = factor > 0 ? y[j] * (real)factor : 0;
    }
}

/* p -= step, by plain SGD or by Adam with its moments m and v. */
static void VNAME(descend)(real *restrict p, const real *restrict grad, int64_t d, double lr, const lns_adam *adam,
                           real *restrict m, real *restrict v)
{
    if (adam == NULL) {
        const real rate = (real)lr;
        for (int64_t j = 0; j < d; j++) {
            p[j] -= rate * grad[j];
        }
        return;
    }
    const real beta1 = (real)adam->beta1, rest1 = (real)(1 - adam->beta1);
    const real beta2 = (real)adam->beta2, rest2 = (real)(1 - adam->beta2), eps = (real)adam->eps;
    const real rate = (real)(lr / (1 - pow(adam->beta1, (double)adam->step)));
    const real root = (real)sqrt(1 - pow(adam->beta2, (double)adam->step));
    for (int64_t j = 0; j < d; j++) {
        m[j] = beta1 * m[j] + rest1 * grad[j];
        v[j] = beta2 * v[j] + rest2 * (grad[j] * grad[j]);
        p[j] -= rate * (m[j] / (VNAME(sqrt)(v[j]) / root + eps));
    }
}

/* One module: both parameters, from gradient to prox. Writes its penalty and support. */
static void VNAME(step_module)(const lns_step_problem *s, int64_t k, double *result)
{
    const int64_t begin = s->offsets[k], d = s->offsets[k + 1] - begin;
    const lns_adam *a = s->adam;
    real *w = (real *)s->weight + begin, *b = (real *)s->bias + begin;
    VNAME(descend)(w, (const real *)s->grad_weight + begin, d, s->lr, a, a ? (real *)a->m_weight + begin : NULL,
                   a ? (real *)a->v_weight + begin : NULL);
    VNAME(descend)(b, (const real *)s->grad_bias + begin, d, s->lr, a, a ? (real *)a->m_bias + begin : NULL,
                   a ? (real *)a->v_bias + begin : NULL);
    for (int64_t j = 0; j < d; j++) {
        w[j] -= 1;
    }
    const VNAME(group_sums) sums_w = VNAME(soft_threshold)(w, d, (real)(s->lr * s->l1));
    const VNAME(group_sums) sums_b = VNAME(soft_threshold)(b, d, (real)(s->lr * s->l1_bias));
    const double factor_w = VNAME(shrinkage)(sums_w, d, s->lr * s->group);
    const double factor_b = VNAME(shrinkage)(sums_b, d, s->lr * s->group_bias);
    const real shrink_w = (real)factor_w, shrink_b = (real)factor_b;
    int64_t support = 0;
    for (int64_t j = 0; j < d; j++) {
        w[j] = 1 + shrink_w * w[j];
        b[j] = shrink_b * b[j] + 0; /* + 0 turns -0 into 0 */
        support += w[j] != 1 || b[j] != 0;
    }
    result[0] = factor_w * (s->l1 * sums_w.l1 + s->group * sqrt((double)d * sums_w.squares)) +
                factor_b * (s->l1_bias * sums_b.l1 + s->group_bias * sqrt((double)d * sums_b.squares));
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

/* First module whose gradient is not finite, or -1. */
static int64_t VNAME(find_bad_gradient)(const lns_step_problem *s, lns_place *place)
{
    for (int64_t k = 0; k < s->modules; k++) {
        for (int argument = 0; argument < 2; argument++) {
            const real *grad = argument == 0 ? s->grad_weight : s->grad_bias;
            real zero = 0;
            for (int64_t j = s->offsets[k]; j < s->offsets[k + 1]; j++) {
                zero += grad[j] * 0;
            }
            for (int64_t j = s->offsets[k]; zero != 0 && j < s->offsets[k + 1]; j++) {
                if (!isfinite(grad[j])) {
                    *place = (lns_place){k, argument, 0, j - s->offsets[k], (double)grad[j]};
                    return k;
                }
            }
        }
    }
    return -1;
}
