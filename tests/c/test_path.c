#include "check.h"

enum { D = 21, POINTS = 8 };

static void path(const double *moments, double ratio, double *penalties, double *weight, double *bias, double *rows,
                 int64_t *support)
{
    lns_path_job job = {.d = D, .moments = moments, .held_out = moments, .dtype = LNS_F64};
    job.weight = weight;
    job.bias = bias;
    job.stride = D;
    job.loss = rows;
    job.held_out_loss = rows + POINTS;
    job.distance = rows + 2 * POINTS;
    job.support = support;
    void *work = memory(lns_path_worksize(&job, 1, POINTS, 1));
    job.largest = lns_path_largest(moments, D, ratio, work);
    for (int k = 0; k < POINTS; k++) {
        penalties[k] = job.largest * pow(0.4, k);
    }
    CHECK(lns_path(&job, 1, penalties, POINTS, ratio, 1, work) == LNS_OK);
    free(work);
}

static double penalty(const double *weight, const double *bias, double l1, double group)
{
    double sum = 0, w2 = 0, b2 = 0;
    for (int j = 0; j < D; j++) {
        sum += fabs(weight[j] - 1) + fabs(bias[j]);
        w2 += (weight[j] - 1) * (weight[j] - 1);
        b2 += bias[j] * bias[j];
    }
    return l1 * sum + group * sqrt((double)D) * (sqrt(w2) + sqrt(b2));
}

static double loss(const double *moments, const double *weight, const double *bias)
{
    double sum = 0;
    for (int j = 0; j < D; j++) {
        const double w = weight[j], gap = moments[j] * w + bias[j] - moments[D + j];
        sum += moments[2 * D + j] * w * w - 2 * moments[3 * D + j] * w + moments[4 * D + j] + gap * gap;
    }
    return sum;
}

/* No map nearby is better than any of the path. */
static void points_are_minima(const double *moments, double ratio)
{
    double penalties[POINTS], weight[POINTS * D], bias[POINTS * D], rows[3 * POINTS];
    int64_t support[POINTS];
    path(moments, ratio, penalties, weight, bias, rows, support);
    double *const step = normal_f64(2 * D, 9);
    for (int k = 0; k < POINTS; k++) {
        double *const w = weight + k * D, *const b = bias + k * D;
        const double l1 = penalties[k] * ratio, group = penalties[k] * (1 - ratio);
        const double best = loss(moments, w, b) + penalty(w, b, l1, group);
        CHECK_NEAR(rows[k], loss(moments, w, b), 1e-10 * (1 + fabs(rows[k])));
        CHECK(rows[POINTS + k] == rows[k]);
        CHECK(rows[2 * POINTS + k] <= 1e-9 * penalties[0]);
        for (int j = 0; j < D; j++) {
            CHECK(w[j] >= 0);
            CHECK(k > 0 || (w[j] == 1 && b[j] == 0));
        }
        int64_t changed = 0;
        for (int j = 0; j < D; j++) {
            changed += w[j] != 1 || b[j] != 0;
        }
        CHECK(support[k] == changed);
        for (int try = 0; try < 8; try++) {
            double near_w[D], near_b[D];
            for (int j = 0; j < D; j++) {
                const double size = ldexp(1e-3, -try) * ((try + j) % 3 != 0);
                near_w[j] = fmax(w[j] + size * step[j], 0);
                near_b[j] = b[j] + size * step[D + j];
            }
            CHECK(loss(moments, near_w, near_b) + penalty(near_w, near_b, l1, group) >= best * (1 - 1e-12));
        }
    }
    free(step);
}

void test_path(void)
{
    const double ratios[] = {0, 0.5, 1};
    double *u = normal_f64(30 * D, 3), *v = normal_f64(25 * D, 4), moments[5 * D];
    for (int i = 0; i < 30 * D; i++) {
        u[i] = i % D == 5 ? 2 : u[i] + i % D;
    }
    const lns_fit_job job = {
        .source = {u, LNS_F64, 30, D, NULL}, .target = {v, LNS_F64, 25, D, NULL}, .moments = moments};
    void *work = memory(lns_fit_worksize(&job, 1, 1));
    CHECK(lns_fit(&job, 1, LNS_MOMENTS, 1, work, NULL) == LNS_OK);
    CHECK(moments[2 * D + 5] == 0 && moments[3 * D + 5] == 0);
    free(work);
    for (int k = 0; k < 3; k++) {
        points_are_minima(moments, ratios[k]);
    }
    const lns_path_job none = {.d = 0, .stride = 1}, narrow = {.d = 3, .stride = 2};
    CHECK(lns_path_worksize(&none, 1, 1, 1) == -1);
    CHECK(lns_path(&narrow, 1, NULL, 1, 1, 1, NULL) == LNS_BAD_SIZE);
    CHECK(lns_path(&(lns_path_job){.d = 3, .stride = 3}, 1, NULL, 0, 1, 1, NULL) == LNS_BAD_SIZE);
    CHECK(lns_path_worksize(NULL, 0, 1, 4) >= 0);
    free(u);
    free(v);
}
