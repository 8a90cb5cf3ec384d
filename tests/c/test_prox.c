#include "check.h"

static void known_prox(void)
{
    const double x[4] = {3, -0.5, -4, 0};
    double out[4];
    CHECK(lns_prox(x, LNS_F64, 4, 1, 1, 0, out) == LNS_OK);
    CHECK(out[0] == 2 && out[1] == 0 && out[2] == -3 && out[3] == 0);
    /* norm of (2, -3) is root 13, the group penalty takes 0.5 root 4 = 1 off it */
    CHECK(lns_prox(x, LNS_F64, 4, 1, 1, 0.5, out) == LNS_OK);
    CHECK_NEAR(out[0], 2 * (1 - 1 / sqrt(13)), 1e-15);
    CHECK(lns_prox(x, LNS_F64, 4, 1, 0, 10, out) == LNS_OK);
    CHECK(out[0] == 0 && out[2] == 0);
    CHECK(lns_prox(x, LNS_F16, 4, 1, 1, 0, out) == LNS_BAD_TYPE);
    /* NaN is neither lost nor taken for a group that is switched off */
    const double bad[4] = {3, NAN, -4, 0};
    CHECK(lns_prox(bad, LNS_F64, 4, 1, 1, 0, out) == LNS_OK);
    CHECK(out[0] == 2 && isnan(out[1]) && out[2] == -3);
    CHECK(lns_prox(bad, LNS_F64, 4, 1, 1, 0.5, out) == LNS_OK);
    CHECK(isnan(out[0]) && isnan(out[1]) && isnan(out[2]));
}

static void steps(void)
{
    const int64_t offsets[3] = {0, 2, 3};
    double weight[3] = {1, 1, 1}, bias[3] = {0, 0, 0}, per_module[4], grad_weight[3] = {-1, 0.05, 0},
           grad_bias[3] = {0, 0, 2};
    double moments[4][3] = {{0}};
    lns_step_problem problem = {.dtype = LNS_F64,
                                .modules = 2,
                                .offsets = offsets,
                                .weight = weight,
                                .bias = bias,
                                .grad_weight = grad_weight,
                                .grad_bias = grad_bias,
                                .lr = 0.1,
                                .l1 = 0.1,
                                .l1_bias = 0.5};
    lns_adam adam = {moments[0], moments[1], moments[2], moments[3], 1, 0.9, 0.999, 1e-8};
    lns_place place = {0};
    CHECK(lns_step(&problem, 1, per_module, NULL) == LNS_OK);
    CHECK_NEAR(weight[0], 1.09, 1e-15);
    CHECK(weight[1] == 1 && weight[2] == 1 && bias[0] == 0);
    CHECK_NEAR(bias[2], -0.15, 1e-15);
    CHECK_NEAR(per_module[0], 0.1 * 0.09, 1e-15);
    CHECK_NEAR(per_module[2], 0.5 * 0.15, 1e-15);
    CHECK(per_module[1] == 1 && per_module[3] == 1);
    /* The first step of Adam moves by the rate along the sign of the gradient. */
    problem.adam = &adam;
    problem.l1 = problem.l1_bias = 0;
    weight[0] = weight[1] = 1;
    CHECK(lns_step(&problem, 1, per_module, NULL) == LNS_OK);
    CHECK_NEAR(weight[0], 1.1, 1e-8);
    CHECK_NEAR(weight[1], 0.9, 1e-7);
    grad_bias[1] = NAN;
    weight[0] = 7;
    CHECK(lns_step(&problem, 1, per_module, &place) == LNS_NOT_FINITE);
    CHECK(place.entry == 0 && place.argument == 1 && place.column == 1 && weight[0] == 7);
}

void test_prox(void)
{
    known_prox();
    steps();
}
