/* Fuzzing the sparse path: from moments of samples, and from numbers that are no moments. */
#include "fuzz.h"

enum { MOST_POINTS = 6 };

typedef struct path_call {
    lns_path_job jobs[3];
    int64_t count, points;
    const double *penalties;
    double ratio;
} path_call;

static lns_status call_path(void *context, int threads, lns_place *place)
{
    const path_call *c = context;
    (void)place;
    void *work = work_memory(lns_path_worksize(c->jobs, c->count, c->points, threads));
    const lns_status status = lns_path(c->jobs, c->count, c->penalties, c->points, c->ratio, threads, work);
    free(work);
    return status;
}

typedef struct largest_call {
    const double *moments;
    int64_t d;
    double ratio, *out;
} largest_call;

static lns_status call_largest(void *context, int threads, lns_place *place)
{
    const largest_call *c = context;
    const lns_path_job job = {.d = c->d, .stride = c->d};
    (void)threads;
    (void)place;
    void *work = work_memory(lns_path_worksize(&job, 1, 1, 1));
    *c->out = lns_path_largest(c->moments, c->d, c->ratio, work);
    free(work);
    return LNS_OK;
}

typedef struct moments_call {
    lns_fit_job job;
} moments_call;

static lns_status call_moments(void *context, int threads, lns_place *place)
{
    const moments_call *c = context;
    void *work = work_memory(lns_fit_worksize(&c->job, 1, threads));
    const lns_status status = lns_fit(&c->job, 1, LNS_MOMENTS, threads, work, place);
    free(work);
    return status;
}

/* Moments of two samples, or NULL where these are refused or their squares overflow. */
static double *sample_moments(int64_t d)
{
    const int is_double = byte() % 2;
    const int64_t n = 2 + byte() % 20, m = byte() % 2 ? n : 2 + byte() % 20;
    const lns_dtype dtype = some_dtype(is_double), other = some_dtype(is_double);
    moments_call c = {.job = {.moments = elements(OUTPUT, LNS_F64, 5 * d)}};
    c.job.source = (lns_sample){some_values(INPUT, dtype, n * d), dtype, n, d, some_masses(n)};
    c.job.target = (lns_sample){some_values(INPUT, other, m * d), other, m, d, NULL};
    if (everywhere(call_moments, &c) != LNS_OK) {
        return NULL;
    }
    for (int64_t i = 0; i < 5 * d; i++) {
        if (!(fabs(c.job.moments[i]) < 1e100)) {
            return NULL;
        }
    }
    return c.job.moments;
}

/* Means within a thousand standard deviations, and scales within a thousand of each other: then double is enough. */
static int is_tame(const double *moments, int64_t d)
{
    double low = INFINITY, high = 0;
    for (int64_t j = 0; j < d; j++) {
        const double size = fabs(moments[j]) + fabs(moments[d + j]), spread = sqrt(moments[2 * d + j]);
        if (spread < 1e-3 * size) {
            return 0;
        }
        low = fmin(low, spread);
        high = fmax(high, spread + size + sqrt(moments[4 * d + j]));
    }
    return high < 1e3 * low && high < 1e30 && low > 1e-30; /* slopes have no scale: penalties of both must be numbers */
}

/* Whether moments and penalties are numbers that a path may not be refused for. */
static int all_usual(const path_call *c, double largest)
{
    int usual = largest > 1e-80 && largest < 1e80;
    for (int64_t k = 0; k < c->count; k++) {
        for (int64_t i = 0; i < 5 * c->jobs[k].d; i++) {
            usual &= fabs(c->jobs[k].moments[i]) < 1e40;
        }
    }
    return usual;
}

void fuzz_path(void)
{
    static const double ratios[] = {0.5, 0, 1, 0.1, 0.99, 1e-9};
    const int made = byte() % 4 > 0;
    const lns_dtype dtype = real_dtype(byte() % 2);
    path_call c = {.count = few(), .points = 1 + byte() % MOST_POINTS, .ratio = ratios[byte() % 6]};
    double *penalties = elements(INPUT, LNS_F64, c.points), largest = 0;
    int64_t total = 0;
    for (int64_t k = 0; k < c.count; k++) {
        lns_path_job *job = &c.jobs[k];
        job->d = 1 + byte() % 40;
        job->dtype = dtype;
        job->moments = made ? sample_moments(job->d) : some_values(INPUT, LNS_F64, 5 * job->d);
        if (job->moments == NULL) {
            return;
        }
        largest_call one = {job->moments, job->d, c.ratio, elements(OUTPUT, LNS_F64, 1)};
        everywhere(call_largest, &one);
        largest = fmax(largest, *one.out);
        total += job->d;
    }
    largest = largest > 0 && isfinite(largest) ? largest : 1;
    for (int64_t i = 0; i < c.points; i++) {
        penalties[i] = largest * pow(10, -(double)i * (1 + byte() % 2) * 0.5);
    }
    c.penalties = penalties;
    char *weight = elements(OUTPUT, dtype, c.points * total), *bias = elements(OUTPUT, dtype, c.points * total);
    for (int64_t k = 0, offset = 0; k < c.count; k++) {
        lns_path_job *job = &c.jobs[k];
        job->weight = weight + offset * lns_element_size(dtype);
        job->bias = bias + offset * lns_element_size(dtype);
        job->stride = total;
        job->loss = elements(OUTPUT, LNS_F64, c.points);
        job->distance = elements(OUTPUT, LNS_F64, c.points);
        job->support = bytes_of(OUTPUT, c.points * 8);
        job->held_out = byte() % 2 ? job->moments : NULL;
        job->held_out_loss = job->held_out != NULL ? elements(OUTPUT, LNS_F64, c.points) : NULL;
        job->largest = largest;
        offset += job->d;
    }
    const lns_status status = everywhere(call_path, &c);
    REQUIRE(status == LNS_OK || (status == LNS_OUT_OF_RANGE && !all_usual(&c, largest)));
    if (status != LNS_OK) {
        return;
    }
    for (int64_t k = 0; made && k < c.count; k++) {
        const lns_path_job *job = &c.jobs[k];
        for (int64_t point = 0; point < c.points; point++) {
            for (int64_t j = 0; j < job->d; j++) {
                const double w = lns_value(job->weight, dtype, point * total + j);
                REQUIRE(w >= 0);
                REQUIRE(point > 0 || (w == 1 && lns_value(job->bias, dtype, j) == 0));
            }
            REQUIRE(job->held_out == NULL || job->held_out_loss[point] == job->loss[point]);
            REQUIRE(!is_tame(job->moments, job->d) || job->distance[point] <= 1e-8 * largest);
        }
    }
}
