#include "check.h"

/* W2 of one module of one neuron, in double, with the gradient in u. */
static double w2(const double *u, const double *mass_u, int64_t n, const double *v, int64_t m, double *grad)
{
    const lns_w2_job shape = {.u = {u, LNS_F64, n, 1, mass_u}, .v = {v, LNS_F64, m, 1, NULL}};
    lns_w2_job job = shape;
    double value = NAN;
    job.value = &value;
    job.grad_u = grad;
    void *work = memory(lns_wasserstein_worksize(&job, 1, 1));
    CHECK(lns_wasserstein(&job, 1, 0, 1, work, NULL) == LNS_OK);
    free(work);
    return value;
}

static void known_values(void)
{
    const double u[] = {3, 1, 2}, v[] = {2, 4, 3}, single[] = {0}, pair[] = {-1, 1}, ties[] = {0, 0, 3};
    double grad[3];
    CHECK_NEAR(w2(u, NULL, 3, v, 3, grad), 1, 1e-15);
    for (int i = 0; i < 3; i++) {
        CHECK_NEAR(grad[i], -2.0 / 3, 1e-15);
    }
    CHECK_NEAR(w2(pair, NULL, 2, single, 1, grad), 1, 1e-15);
    CHECK_NEAR(grad[0], -1, 1e-15);
    CHECK_NEAR(grad[1], 1, 1e-15);
    /* Tied rows share the mean of their targets 2 and 3: both get 2/3 (0 - 2.5). */
    CHECK_NEAR(w2(ties, NULL, 3, v, 3, grad), (4 + 9 + 1) / 3.0, 1e-14);
    CHECK_NEAR(grad[0], -5.0 / 3, 1e-14);
    CHECK_NEAR(grad[1], -5.0 / 3, 1e-14);
}

/* A row of weight 2 is the same as the row twice. */
static void weights_are_repetitions(void)
{
    const double u[] = {0.5, -2, 1}, mass[] = {2, 1, 1}, twice[] = {0.5, 0.5, -2, 1}, v[] = {0, 1, 2, 3, 4};
    double grad[3], grad_twice[4];
    CHECK_NEAR(w2(u, mass, 3, v, 5, grad), w2(twice, NULL, 4, v, 5, grad_twice), 1e-14);
    CHECK_NEAR(grad[0], grad_twice[0] + grad_twice[1], 1e-14);
    CHECK_NEAR(grad[1], grad_twice[2], 1e-14);
}

/* The gradient in z, weight and bias against central differences of the value. */
static void gradient_is_the_slope(int64_t n, int64_t m)
{
    const double step = 1e-6;
    double *z = normal_f64(n, (unsigned)n), *v = normal_f64(m, (unsigned)(m + 7)), *grad = memory(n * 8);
    double weight = 1.3, bias = -0.2, value, grad_weight, grad_bias;
    lns_w2_job job = {.u = {z, LNS_F64, n, 1, NULL},
                      .v = {v, LNS_F64, m, 1, NULL},
                      .weight = &weight,
                      .bias = &bias,
                      .value = &value,
                      .grad_u = grad,
                      .grad_weight = &grad_weight,
                      .grad_bias = &grad_bias};
    void *work = memory(lns_wasserstein_worksize(&job, 1, 1));
    CHECK(lns_wasserstein(&job, 1, 0, 1, work, NULL) == LNS_OK);
    const double exact[3] = {grad_weight, grad_bias, grad[n / 2]};
    double *const moved[3] = {&weight, &bias, &z[n / 2]};
    job.grad_u = job.grad_weight = job.grad_bias = NULL;
    for (int k = 0; k < 3; k++) {
        double high;
        *moved[k] += step;
        CHECK(lns_wasserstein(&job, 1, 0, 1, work, NULL) == LNS_OK);
        high = value;
        *moved[k] -= 2 * step;
        CHECK(lns_wasserstein(&job, 1, 0, 1, work, NULL) == LNS_OK);
        CHECK_NEAR((high - value) / (2 * step), exact[k], 1e-6);
        *moved[k] += step;
    }
    free(z);
    free(v);
    free(grad);
    free(work);
}

/* A batch of modules of different sizes on several threads gives the bits of each module alone on one. */
static void batches_and_threads_change_nothing(void)
{
    enum { N = 33, D = 3001, MODULES = 3 };
    float *u = normal_f32(N * D, 5), *v = normal_f32(N * D, 6), *alone = memory(N * D * 4);
    float *grads[MODULES], *values[MODULES], *value = memory(D * 4);
    lns_w2_job jobs[MODULES];
    for (int k = 0; k < MODULES; k++) {
        grads[k] = memory(N * D * 4);
        values[k] = memory(D * 4);
        jobs[k] = (lns_w2_job){.u = {u, LNS_F32, N - k, D, NULL},
                               .v = {v, LNS_F32, N - 2 * k, D, NULL},
                               .value = values[k],
                               .grad_u = grads[k]};
    }
    void *work = memory(lns_wasserstein_worksize(jobs, MODULES, 4));
    CHECK(lns_wasserstein(jobs, MODULES, 0, 4, work, NULL) == LNS_OK);
    free(work);
    for (int k = 0; k < MODULES; k++) {
        lns_w2_job job = jobs[k];
        job.value = value;
        job.grad_u = alone;
        work = memory(lns_wasserstein_worksize(&job, 1, 1));
        CHECK(lns_wasserstein(&job, 1, 0, 1, work, NULL) == LNS_OK);
        CHECK(memcmp(value, values[k], D * 4) == 0);
        CHECK(memcmp(alone, grads[k], (size_t)(N - k) * D * 4) == 0);
        free(work);
        free(grads[k]);
        free(values[k]);
    }
    free(u);
    free(v);
    free(alone);
    free(value);
}

static void bad_input(void)
{
    double u[4] = {1, 2, 3, 4}, v[4] = {1, 2, INFINITY, 4}, value[2], mass[2] = {1, -1};
    lns_place place = {0};
    lns_w2_job job = {.u = {u, LNS_F64, 2, 2, NULL}, .v = {v, LNS_F64, 2, 2, NULL}, .value = value};
    void *work = memory(lns_wasserstein_worksize(&job, 1, 1));
    CHECK(lns_wasserstein(&job, 1, 0, 1, work, &place) == LNS_NOT_FINITE);
    CHECK(place.argument == 1 && place.row == 1 && place.column == 0);
    free(work);
    job.v.data = u;
    job.u.mass = mass;
    work = memory(lns_wasserstein_worksize(&job, 1, 1));
    CHECK(lns_wasserstein(&job, 1, 0, 1, work, &place) == LNS_BAD_MASS);
    CHECK(place.argument == 0 && place.row == 1);
    free(work);
    job.v.d = 3;
    CHECK(lns_wasserstein_worksize(&job, 1, 1) == -1);
}

/* A row without weight is not there: its NaN is not seen, its gradient 0, and what is outside changes no bit. */
static void rows_without_mass_are_not_seen(void)
{
    const double u[] = {NAN, 3, 1, 1e12}, mass[] = {0, 1, 2, 0}, v[] = {2, 4, 3};
    double grad[4], grad_some[2];
    CHECK(w2(u, mass, 4, v, 3, grad) == w2(u + 1, mass + 1, 2, v, 3, grad_some));
    CHECK(grad[0] == 0 && grad[3] == 0 && grad[1] == grad_some[0] && grad[2] == grad_some[1]);
}

/* A mean of squares that is in range, where their sum, or even a difference, is not. */
static void sums_may_be_out_of_range(void)
{
    const double top = 0x1p511, u[] = {-top, -top, -top, -top, top, top, top, top}, zero[8] = {0};
    const double mass[] = {1, 1, 1, 1, 1, 1, 1, 1}, far[] = {-0x1p1023, 0, 0, 0}, near[] = {0x1p1023, 0x1p1023};
    double grad[8];
    CHECK(w2(u, NULL, 8, zero, 8, grad) == 0x1p1022 && grad[0] == -0x1p509 && grad[7] == 0x1p509);
    CHECK(w2(u, NULL, 8, zero, 5, grad) == 0x1p1022 && grad[0] == -0x1p509 && grad[7] == 0x1p509);
    CHECK(w2(u, mass, 8, zero, 8, grad) == 0x1p1022 && grad[0] == -0x1p509 && grad[7] == 0x1p509);
    CHECK(isinf(w2(far, NULL, 4, near, 2, grad)) && grad[0] == -0x1p1023 && grad[1] == -0x1p1022);
}

static void types_are_checked(void)
{
    const double u[4] = {1, 2, 3, 4};
    const float v[4] = {1, 2, 3, 4};
    double value[4];
    lns_w2_job jobs[2] = {{.u = {u, LNS_F64, 4, 1, NULL}, .v = {v, LNS_F32, 4, 1, NULL}, .value = value}};
    jobs[1] = (lns_w2_job){.u = jobs[0].u, .v = jobs[0].u, .value = value};
    CHECK(lns_wasserstein_worksize(jobs, 1, 1) == -1);
    CHECK(lns_wasserstein(jobs, 1, 0, 1, NULL, NULL) == LNS_BAD_TYPE);
    jobs[0].u = jobs[0].v; /* all in float, and the next job in double */
    CHECK(lns_wasserstein(jobs, 2, 0, 1, NULL, NULL) == LNS_BAD_TYPE);
    jobs[0].v.dtype = (lns_dtype)17;
    CHECK(lns_wasserstein(jobs, 1, 0, 1, NULL, NULL) == LNS_BAD_TYPE);
    CHECK(strcmp(lns_status_text(LNS_BAD_TYPE), "unknown status") != 0);
}

void test_wasserstein(void)
{
    static const int64_t sizes[] = {1, 2, 7, 8, 9, 32, 33, 64, 256, 257};
    known_values();
    weights_are_repetitions();
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        gradient_is_the_slope(sizes[k], sizes[k]);
        gradient_is_the_slope(sizes[k], sizes[k] + 5);
    }
    batches_and_threads_change_nothing();
    bad_input();
    rows_without_mass_are_not_seen();
    sums_may_be_out_of_range();
    types_are_checked();
}
