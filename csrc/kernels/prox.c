/* Sparse-group lasso: the prox of one group, and the optimiser step fused with it. */
#include "lineas.h"

#include <math.h>

#include "core/subnormals.h"
#include "core/threads.h"
#include "kernels/simd/blocks.h"
#include "kernels/simd/load.h"

typedef struct step_context {
    const lns_step_problem *problem;
    double *per_module;
} step_context;

#define LNS_BODY "kernels/prox_body.h"
#include "kernels/simd/variants.h"

static void (*const PROX[LNS_CPU_COUNT][2])(const void *, int64_t, double, double, double, void *) = LNS_TABLE(prox);
static const lns_loop_body STEP[LNS_CPU_COUNT][2] = LNS_TABLE(step_units);
static int64_t (*const FIND[LNS_CPU_COUNT][2])(const lns_step_problem *, lns_place *) = LNS_TABLE(find_bad_gradient);

lns_status lns_prox(const void *x, lns_dtype dtype, int64_t d, double tau, double l1, double group, void *out)
{
    LNS_KEEP_SUBNORMALS;
    if (d < 1) {
        return LNS_BAD_SIZE;
    }
    if (!lns_is_real(dtype)) {
        return LNS_BAD_TYPE;
    }
    PROX[lns_cpu()][lns_is_double(dtype)](x, d, tau, l1, group, out);
    return LNS_OK;
}

lns_status lns_step(const lns_step_problem *problem, int threads, double *per_module, lns_place *place)
{
    LNS_KEEP_SUBNORMALS;
    const int is_double = lns_is_double(problem->dtype);
    step_context c = {problem, per_module};
    lns_place found = {0};
    if (!lns_is_real(problem->dtype)) {
        return LNS_BAD_TYPE;
    }
    if (problem->modules < 0 || problem->offsets[0] != 0) {
        return LNS_BAD_SIZE;
    }
    for (int64_t k = 0; k < problem->modules; k++) {
        if (problem->offsets[k + 1] <= problem->offsets[k]) {
            return LNS_BAD_SIZE;
        }
    }
    if (FIND[lns_cpu()][is_double](problem, &found) >= 0) {
        if (place != NULL) {
            *place = found;
        }
        return LNS_NOT_FINITE;
    }
    threads = lns_thread_count(problem->modules, problem->offsets[problem->modules] * 2, threads);
    lns_parallel_for(problem->modules, threads, STEP[lns_cpu()][is_double], &c);
    return LNS_OK;
}
