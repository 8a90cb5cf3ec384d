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

/* All but 1e-30 of the mass in one row, far from the middle one: around any other, the variance would be rounding. */
static void weights_may_be_uneven(void)
{
    const double u[5] = {239, 240, 241, 242, 243}, v[5] = {5, 5, 6, 6, 7}, mass[5] = {1, 1e-30, 1e-30, 1e-30, 1e-30};
    const lns_sample source = {u, LNS_F64, 5, 1, mass}, target = {v, LNS_F64, 5, 1, mass};
    double weight = 0, bias = 0;
    fit(&source, &target, LNS_LINEAR, &weight, &bias);
    CHECK_NEAR(weight, 13.0 / 30, 1e-14);
    CHECK_NEAR(bias, 5 - 239 * 13.0 / 30, 1e-11);
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
    weighted_means();
    gaussians();
}
