/* The sparse path: exact minima of W2 plus a sparse group lasso, from moments of paired quantiles. path_body.h says how
 * a module falls apart into neurons once the norms of its two groups are given; finding these stands here. */
#include "lineas.h"

#include <math.h>

#include "core/sizes.h"
#include "core/subnormals.h"
#include "core/threads.h"
#include "kernels/simd/blocks.h"
#include "kernels/simd/tile.h"

/* Rows of a block, a tile of doubles: what the lassos of its neurons need. */
enum { PATH_A2, PATH_M2, PATH_G1, PATH_G2, PATH_V4, PATH_ROWS };

/* What a module takes of work: its blocks, then their solution (two rows each), then x and b. */
enum { PATH_WORK_ROWS = PATH_ROWS + 4 };

enum { PATH_SUMS = 5 };

/* How close to optimal a module is solved, relative to the largest penalty. */
#define TOLERANCE 5e-10

/* Where products of moments and penalties fit into a double: no samples of float32 are outside but
 * those of subnormal numbers only. A scale that is further off
 * cannot be divided out, since the same penalties are for slopes, which have no scale, and for shifts. */
#define LARGEST_MEAN 0x1p150
#define LARGEST_SQUARE 0x1p300
#define SMALLEST_PENALTY 0x1p-300

/* Norms of the groups x = weight - 1 and b, over tau; `grouped` (1 or 0) as in path_body.h. */
typedef struct path_scale {
    double sx, sb, grouped;
} path_scale;

/* Sums y^2, c^2, ky y^2, kc c^2, cross over all neurons, and y and c of each: see path_body.h. */
typedef void (*path_function)(const double *blocks, int64_t count, const path_scale *scale, double l1, double *solution,
                              double *sums);

typedef struct path_problem {
    path_function pass;
    const double *blocks;
    double *solution; /* of the last pass */
    int64_t count;
    double l1, tau, tolerance;
} path_problem;

typedef struct path_context {
    const lns_path_job *jobs;
    const double *penalties;
    int64_t points;
    double l1_ratio;
    char *work;
    int64_t work_each;
} path_context;

/* What a pass tells: the norms of y and c, how they change, by how much each misses tau, and the norm of that. */
typedef struct path_state {
    double norms[2], sums[PATH_SUMS], residual[2], residual_norm;
} path_state;

static path_state path_evaluate(const path_problem *problem, const path_scale *scale)
{
    const double scales[2] = {scale->sx, scale->sb};
    path_state s;
    problem->pass(problem->blocks, problem->count, scale, problem->l1, problem->solution, s.sums);
    for (int g = 0; g < 2; g++) {
        s.norms[g] = sqrt(s.sums[g]);
        s.residual[g] = s.norms[g] - problem->tau;
        if (!(scales[g] > 0) && s.residual[g] <= 1e-12 * problem->tau) {
            s.residual[g] = 0; /* a group at zero may have any norm up to tau */
        }
    }
    s.residual_norm = sqrt(s.residual[0] * s.residual[0] + s.residual[1] * s.residual[1]);
    return s;
}

/* Newton's step on 1 / ||y|| = 1 / tau and 1 / ||c|| = 1 / tau, which are nearly linear in the scales. The matrix is
 * that of the second derivatives of a convex function of the scales (norms written as minima over sx and sb), so it has
 * no negative eigenvalue. */
static path_scale path_step(const path_problem *problem, const path_scale *scale, const path_state *s)
{
    const double tau = problem->tau, yd = s->sums[2], cd = s->sums[3], cross = s->sums[4];
    const int free_x = s->residual[0] != 0 && yd > 0, free_b = s->residual[1] != 0 && cd > 0;
    const double want_x = s->sums[0] * s->residual[0] / tau, want_b = s->sums[1] * s->residual[1] / tau;
    const double determinant = yd * cd - cross * cross;
    double dx = free_x ? want_x / yd : 0, db = free_b ? want_b / cd : 0;
    if ((free_x || scale->sx > 0) && (free_b || scale->sb > 0) && determinant > 1e-14 * yd * cd) {
        dx = (want_x * cd - want_b * cross) / determinant;
        db = (want_b * yd - want_x * cross) / determinant;
    }
    path_scale to = {scale->sx + dx, scale->sb + db, scale->grouped};
    /* Nothing of a group is left above the soft threshold, or it is on its way to zero. */
    to.sx = to.sx > 0 && (yd > 0 || scale->sx == 0) ? to.sx : 0;
    to.sb = to.sb > 0 && (cd > 0 || scale->sb == 0) ? to.sb : 0;
    return to;
}

static double path_root(const path_problem *problem, path_scale *scale, int group);

/* How far the norm of a group is above tau; for x with b optimal. */
static double path_residual(const path_problem *problem, path_scale *scale, int group)
{
    if (group == 0) {
        scale->sb = path_root(problem, scale, 1);
    }
    return path_evaluate(problem, scale).residual[group];
}

/* The scale of a group at which its norm is tau: for b with that of x given, for x with b optimal, which is then in
 * place. The norm falls with the scale: what the scales minimise is convex, in both and in one with the other optimal.
 */
static double path_root(const path_problem *problem, path_scale *scale, int group)
{
    double *const at = group == 0 ? &scale->sx : &scale->sb;
    double low = 0, high = *at > 0 ? *at : 1;
    *at = 0;
    if (path_residual(problem, scale, group) <= 0) {
        return 0;
    }
    for (*at = high; path_residual(problem, scale, group) > 0 && high < 1e200; *at = high) {
        low = high;
        high *= 4;
    }
    for (int k = 0; k < 200; k++) {
        *at = low + (high - low) / 2;
        if (!(*at > low && *at < high)) {
            break;
        }
        if (path_residual(problem, scale, group) > 0) {
            low = *at;
        } else {
            high = *at;
        }
    }
    *at = high;
    if (group == 0) {
        scale->sb = path_root(problem, scale, 1);
    }
    return high;
}

/* The scales at which both groups are optimal; norms [2]: of y and c there. The last pass is the one at these scales.
 */
static path_scale path_scales(const path_problem *problem, path_scale scale, double *norms)
{
    enum { STEPS = 60, HALVINGS = 6 };
    path_state now = path_evaluate(problem, &scale);
    for (int k = 0; k < STEPS && now.residual_norm > problem->tolerance; k++) {
        path_scale to = path_step(problem, &scale, &now);
        path_state next = path_evaluate(problem, &to);
        for (int h = 0; h < HALVINGS && !(next.residual_norm < now.residual_norm); h++) {
            to = (path_scale){(to.sx + scale.sx) / 2, (to.sb + scale.sb) / 2, scale.grouped};
            next = path_evaluate(problem, &to);
        }
        if (!(next.residual_norm < now.residual_norm)) {
            break;
        }
        scale = to;
        now = next;
    }
    /* Where Newton's method got stuck, bisection: slow, and certain. */
    if (now.residual_norm > problem->tolerance) {
        path_scale to = scale;
        path_root(problem, &to, 0);
        scale = path_evaluate(problem, &to).residual_norm < now.residual_norm ? to : scale;
        now = path_evaluate(problem, &scale);
    }
    memcpy(norms, now.norms, sizeof now.norms);
    return scale;
}

/* Where to begin at the next of a row of penalties, from the last three: in equal steps of their logarithms, a parabola
 * through the logarithms of the scales. */
static double path_guess(double now, double before, double earlier)
{
    if (!(now > 0 && before > 0)) {
        return now;
    }
    const double ratio = now / before, bend = earlier > 0 ? ratio * earlier / before : 1;
    const double guess = ratio > 0.25 && ratio < 4 ? now * ratio : now;
    return bend > 0.5 && bend < 2 ? guess * bend : guess;
}

#define LNS_BODY "kernels/path_body.h"
#include "kernels/simd/variants.h"

static const lns_loop_body UNITS[LNS_CPU_COUNT] = LNS_TABLE_F64(path_units);

typedef double (*largest_function)(const double *, int64_t, double, double *);

static const largest_function LARGEST[LNS_CPU_COUNT] = LNS_TABLE_F64(path_largest);

static int64_t work_each(const lns_path_job *jobs, int64_t count)
{
    int64_t most = 0;
    for (int64_t k = 0; k < count; k++) {
        const int64_t d = jobs[k].d;
        if (d < 1 || jobs[k].stride < d || lns_mul(d, PATH_WORK_ROWS * (int64_t)sizeof(double)) < 0) {
            return -1;
        }
        const int64_t bytes = lns_tiles(d, LNS_F64) * PATH_WORK_ROWS * LNS_TILE_ROW;
        most = bytes > most ? bytes : most;
    }
    return most;
}

static int moments_in_range(const double *moments, int64_t d)
{
    int good = 1;
    for (int64_t j = 0; j < 5 * d; j++) {
        good &= fabs(moments[j]) <= (j < 2 * d ? LARGEST_MEAN : LARGEST_SQUARE);
    }
    return good;
}

static lns_status check_jobs(const lns_path_job *jobs, int64_t count)
{
    for (int64_t k = 0; k < count; k++) {
        const lns_path_job *job = &jobs[k];
        if (!lns_is_real(job->dtype)) {
            return LNS_BAD_TYPE;
        }
        if (!moments_in_range(job->moments, job->d) ||
            (job->held_out != NULL && !moments_in_range(job->held_out, job->d)) ||
            (job->largest != 0 && !(job->largest >= SMALLEST_PENALTY && job->largest <= LARGEST_SQUARE))) {
            return LNS_OUT_OF_RANGE;
        }
    }
    return LNS_OK;
}

static int threads_for(const lns_path_job *jobs, int64_t count, int64_t points, int threads)
{
    double cost = 0;
    for (int64_t k = 0; k < count; k++) {
        cost += 10.0 * (double)jobs[k].d * (double)points;
    }
    return lns_thread_count(count, lns_cost(cost), threads);
}

int64_t lns_path_worksize(const lns_path_job *jobs, int64_t count, int64_t points, int threads)
{
    const int64_t each = work_each(jobs, count);
    return each < 0 ? -1 : lns_mul(each, threads_for(jobs, count, points, threads));
}

double lns_path_largest(const double *moments, int64_t d, double ratio, void *work)
{
    LNS_KEEP_SUBNORMALS;
    return LARGEST[lns_cpu()](moments, d, ratio, work);
}

lns_status lns_path(const lns_path_job *jobs, int64_t count, const double *penalties, int64_t points, double ratio,
                    int threads, void *work)
{
    LNS_KEEP_SUBNORMALS;
    path_context c = {.jobs = jobs, .penalties = penalties, .points = points, .l1_ratio = ratio, .work = work};
    c.work_each = work_each(jobs, count);
    if (c.work_each < 0 || points < 1) {
        return LNS_BAD_SIZE;
    }
    const lns_status status = check_jobs(jobs, count);
    if (status != LNS_OK) {
        return status;
    }
    for (int64_t k = 0; ratio < 1 && k < points; k++) { /* norms that are as small have no squares */
        if (!(penalties[k] >= SMALLEST_PENALTY)) {
            return LNS_OUT_OF_RANGE;
        }
    }
    if (count > 0) {
        lns_parallel_for(count, threads_for(jobs, count, points, threads), UNITS[lns_cpu()], &c);
    }
    return LNS_OK;
}
