#include "check.h"

static void fit(const lns_sample *source, const lns_sample *target, lns_method method, void *weight, void *bias)
{
    const lns_fit_job job = {.source = *source, .target = *target, .weight = weight, .bias = bias};
    void *work = memory(lns_fit_worksize(&job, 1, 1));
    CHECK(lns_fit(&job, 1, method, 1, work, NULL) == LNS_OK);
    free(work);
}

/* Where the target is an affine image of the source, shuffled, the linear and gaussian maps find it. */
static void affine_images_are_found(int64_t n)
{
    enum { D = 19 };
    double *u = normal_f64(n * D, 3), *v = memory(n * D * 8), weight[D], bias[D];
    for (int64_t i = 0; i < n; i++) {
        for (int j = 0; j < D; j++) {
            v[(i + j) % n * D + j] = (0.5 + j) * u[i * D + j] - j;
        }
    }
    const lns_sample source = {u, LNS_F64, n, D, NULL}, target = {v, LNS_F64, n, D, NULL};
    for (int method = LNS_GAUSSIAN; method <= LNS_LINEAR; method++) {
        fit(&source, &target, (lns_method)method, weight, bias);
        for (int j = 0; j < D; j++) {
            CHECK_NEAR(weight[j], 0.5 + j, 1e-11);
            CHECK_NEAR(bias[j], -j, 1e-11);
        }
    }
    free(u);
    free(v);
}

static void constant_source_gets_the_mean_shift(void)
{
    const float u[3] = {0.1f, 0.1f, 0.1f}, v[2] = {1, 4};
    const lns_sample source = {u, LNS_F32, 3, 1, NULL}, target = {v, LNS_F32, 2, 1, NULL};
    for (int method = LNS_MEAN; method <= LNS_LINEAR; method++) {
        float weight = 0, bias = 0;
        fit(&source, &target, (lns_method)method, &weight, &bias);
        CHECK(weight == 1);
        CHECK_NEAR(bias, 2.4, 1e-6);
    }
}

static void rows_without_mass_do_not_make_a_source_vary(void)
{
    const double u[4] = {-5, 0.1, 0.1, 7}, v[2] = {1, 4}, mass[4] = {0, 3, 0.7, 0};
    const lns_sample source = {u, LNS_F64, 4, 1, mass}, target = {v, LNS_F64, 2, 1, NULL};
    for (int method = LNS_MEAN; method <= LNS_LINEAR; method++) {
        double weight = 0, bias = 0;
        fit(&source, &target, (lns_method)method, &weight, &bias);
        CHECK(weight == 1);
        CHECK_NEAR(bias, 2.4, 1e-14);
    }
}

/* All but 1e-30 of the mass in one row, far from the middle one: around any other, the variance would be rounding.
 * (With a mean of 239 it is below the rounding of that mean: the source counts as constant.) */
static void weights_may_be_uneven(void)
{
    const double u[5] = {0, 1, 2, 3, 4}, far[5] = {239, 240, 241, 242, 243}, v[5] = {5, 5, 6, 6, 7};
    const double mass[5] = {1, 1e-30, 1e-30, 1e-30, 1e-30};
    lns_sample source = {u, LNS_F64, 5, 1, mass}, target = {v, LNS_F64, 5, 1, mass};
    double weight = 0, bias = 0;
    fit(&source, &target, LNS_LINEAR, &weight, &bias);
    CHECK_NEAR(weight, 13.0 / 30, 1e-14);
    CHECK_NEAR(bias, 5, 1e-14);
    source.data = far;
    fit(&source, &target, LNS_LINEAR, &weight, &bias);
    CHECK(weight == 1);
    CHECK_NEAR(bias, 5 - 239, 1e-12);
}

/* One step of its type apart, values are as good as equal: 1 / step would be the slope. */
static void a_source_of_rounding_is_constant(void)
{
    const float single[4] = {0.7f, 0.7f, 0.70000005f, 0.7f};
    const double twice[4] = {0.7, 0.7, 0.7000000000000001, 0.7};
    const uint16_t half[4] = {0x39ff, 0x3a00, 0x39ff, 0x39ff}, brain[4] = {0x3f33, 0x3f34, 0x3f33, 0x3f33};
    const void *const sources[] = {[LNS_F32] = single, [LNS_F64] = twice, [LNS_F16] = half, [LNS_BF16] = brain};
    const float v32[4] = {1, 2, 3, 4};
    const double v64[4] = {1, 2, 3, 4}, mass[4] = {1, 2, 1, 1};
    for (int dtype = LNS_F32; dtype <= LNS_BF16; dtype++) {
        for (int form = 0; form < 6; form++) {
            const lns_sample source = {sources[dtype], (lns_dtype)dtype, 4, 1, form % 2 ? mass : NULL};
            const lns_sample target = {dtype == LNS_F64 ? (const void *)v64 : v32, dtype == LNS_F64 ? LNS_F64 : LNS_F32,
                                       4, 1, NULL};
            double weight = 0, bias = 0;
            fit(&source, &target, (lns_method)(form / 2), &weight, &bias);
            CHECK(dtype == LNS_F64 ? weight == 1 : *(float *)&weight == 1);
        }
    }
}

/* What rows without weight hold, NaN included, changes no bit; nor does whether they are there. */
static void rows_without_mass_are_not_seen(void)
{
    const double u[5] = {NAN, 1, 4, 9, 1e300}, v[4] = {-INFINITY, 2, 3, 1e12};
    const double mass_u[5] = {0, 1, 2, 3, 0}, mass_v[4] = {0, 1, 3, 0};
    const lns_sample all_u = {u, LNS_F64, 5, 1, mass_u}, all_v = {v, LNS_F64, 4, 1, mass_v};
    const lns_sample some_u = {u + 1, LNS_F64, 3, 1, mass_u + 1}, some_v = {v + 1, LNS_F64, 2, 1, mass_v + 1};
    for (int method = LNS_MEAN; method <= LNS_LINEAR; method++) {
        double a[2], b[2];
        fit(&all_u, &all_v, (lns_method)method, &a[0], &a[1]);
        fit(&some_u, &some_v, (lns_method)method, &b[0], &b[1]);
        CHECK(a[0] == b[0] && a[1] == b[1]);
    }
}

static void types_and_methods_are_checked(void)
{
    const float u[4] = {1, 2, 3, 5};
    const double v[4] = {1, 2, 3, 5};
    double weight[2] = {7, 7}, bias[2] = {7, 7};
    lns_fit_job jobs[2] = {{.source = {u, LNS_F32, 4, 1, NULL}, .target = {v, LNS_F64, 4, 1, NULL}}};
    jobs[0].weight = weight;
    jobs[0].bias = bias;
    CHECK(lns_fit_worksize(jobs, 1, 1) == -1);
    CHECK(lns_fit(jobs, 1, LNS_LINEAR, 1, NULL, NULL) == LNS_BAD_TYPE);
    jobs[0].target = jobs[0].source;
    jobs[1] = jobs[0];
    jobs[1].source = jobs[1].target = (lns_sample){v, LNS_F64, 4, 1, NULL}; /* not the type of the first job */
    CHECK(lns_fit_worksize(jobs, 2, 1) == -1);
    CHECK(lns_fit(jobs, 2, LNS_LINEAR, 1, NULL, NULL) == LNS_BAD_TYPE);
    jobs[0].source.dtype = (lns_dtype)4;
    CHECK(lns_fit(jobs, 1, LNS_LINEAR, 1, NULL, NULL) == LNS_BAD_TYPE);
    jobs[0].source.dtype = LNS_F32;
    void *work = memory(lns_fit_worksize(jobs, 1, 1));
    CHECK(lns_fit(jobs, 1, (lns_method)(LNS_MOMENTS + 1), 1, work, NULL) == LNS_BAD_TYPE);
    CHECK(lns_fit(jobs, 1, (lns_method)-1, 1, work, NULL) == LNS_BAD_TYPE);
    CHECK(weight[0] == 7 && bias[0] == 7);
    free(work);
}

static void weighted_means(void)
{
    const double u[2] = {0, 1}, v[3] = {0, 1, 2}, mass_u[2] = {3, 1}, mass_v[3] = {0, 1, 1};
    const lns_sample source = {u, LNS_F64, 2, 1, mass_u}, target = {v, LNS_F64, 3, 1, mass_v};
    double weight, bias;
    fit(&source, &target, LNS_MEAN, &weight, &bias);
    CHECK_NEAR(bias, 1.5 - 0.25, 1e-15);
    fit(&source, &target, LNS_GAUSSIAN, &weight, &bias);
    CHECK_NEAR(weight, sqrt(0.25 / 0.1875), 1e-15);
    fit(&source, &target, LNS_LINEAR, &weight, &bias);
    CHECK_NEAR(weight * 0.25 + bias, 1.5, 1e-15); /* least squares keeps the means */
}

static void gaussians(void)
{
    enum { D = 5, N = 40 };
    double *u = normal_f64(N * D, 8), *v = normal_f64(N * D, 9), mean[D], source[D * D], target[D * D], map[D * D];
    const lns_sample su = {u, LNS_F64, N, D, NULL}, sv = {v, LNS_F64, N, D, NULL};
    void *work = memory(lns_covariance_worksize(N, D));
    CHECK(lns_covariance(&su, work, mean, source, NULL) == LNS_OK);
    CHECK(lns_covariance(&sv, work, mean, target, NULL) == LNS_OK);
    free(work);
    work = memory(lns_bures_map_worksize(D));
    CHECK(lns_bures_map(source, target, D, 0, work, map) == LNS_OK);
    free(work);
    for (int i = 0; i < D; i++) {
        for (int j = 0; j < D; j++) {
            double image = 0;
            for (int k = 0; k < D; k++) {
                for (int l = 0; l < D; l++) {
                    image += map[i * D + k] * source[k * D + l] * map[l * D + j];
                }
            }
            CHECK_NEAR(image, target[i * D + j], 1e-12);
            CHECK(map[i * D + j] == map[j * D + i]);
        }
    }
    free(u);
    free(v);
}

void test_transport(void)
{
    affine_images_are_found(2);
    affine_images_are_found(33);
    affine_images_are_found(1100);
    constant_source_gets_the_mean_shift();
    rows_without_mass_do_not_make_a_source_vary();
    weights_may_be_uneven();
    a_source_of_rounding_is_constant();
    rows_without_mass_are_not_seen();
    types_and_methods_are_checked();
    weighted_means();
    gaussians();
}
