/* Fuzzing what sorts: lns_sort, lns_wasserstein and lns_fit, against the plainest form of each for some columns. */
#include "fuzz.h"

#include <float.h>

/* ---- one column in double: sorted, with weights, and what follows from it --------------------------------------- */

typedef struct entry {
    double value, mass;
    int64_t row;
} entry;

static int ascending(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    const int order = (x->value > y->value) - (x->value < y->value);
    return order != 0 ? order : (x->row > y->row) - (x->row < y->row);
}

static double mass_total(const lns_sample *s)
{
    double total = 0;
    for (int64_t i = 0; i < s->n; i++) {
        total += s->mass != NULL ? s->mass[i] : 1;
    }
    return total;
}

/* Column j in ascending order; through weight * z + bias where given, rounded as the working type does. *count rows:
 * those of weight 0 are not there. */
static entry *sorted_column(const lns_sample *s, int64_t j, const void *weight, const void *bias, int64_t *count)
{
    entry *column = malloc((size_t)s->n * sizeof *column);
    const double total = mass_total(s);
    *count = 0;
    for (int64_t i = 0; i < s->n; i++) {
        if (s->mass != NULL && s->mass[i] == 0) {
            continue;
        }
        double x = lns_value(s->data, s->dtype, i * s->d + j);
        if (weight != NULL && s->dtype == LNS_F64) {
            x = ((const double *)weight)[j] * x + ((const double *)bias)[j];
        } else if (weight != NULL) {
            const float product = ((const float *)weight)[j] * (float)x;
            x = (double)(product + ((const float *)bias)[j]);
        }
        column[(*count)++] = (entry){x, (s->mass != NULL ? s->mass[i] : 1) / total, i};
    }
    qsort(column, (size_t)*count, sizeof *column, ascending);
    return column;
}

/* Largest magnitude of a sorted column. */
static double extent(const entry *column, int64_t n)
{
    return fmax(fabs(column[0].value), fabs(column[n - 1].value));
}

typedef struct overlap {
    int64_t i, k;
    double mass;
} overlap;

/* Where the two quantile functions overlap; returns how many stretches. */
static int64_t overlaps(const entry *u, int64_t n, const entry *v, int64_t m, overlap *out)
{
    int64_t count = 0, i = 0, k = 0;
    double left_u = u[0].mass, left_v = v[0].mass;
    while (i < n && k < m) {
        const double mass = fmin(left_u, left_v);
        out[count++] = (overlap){i, k, mass};
        left_u -= mass;
        left_v -= mass;
        if (left_u <= 0) {
            i++;
            left_u = i < n ? u[i].mass : 0;
        } else {
            k++;
            left_v = k < m ? v[k].mass : 0;
        }
    }
    return count;
}

static double tolerance_of(lns_dtype dtype)
{
    return dtype == LNS_F64 ? 1e-11 : 1e-4;
}

/* Differences under this are of numbers too small for the working type's full precision. */
static double least(lns_dtype dtype)
{
    return dtype == LNS_F64 ? 1e-290 : 1e-34;
}

/* Squares of numbers over this are infinite in the working type. */
static double most(lns_dtype dtype)
{
    return dtype == LNS_F64 ? 1e150 : 1e18;
}

/* Whether the rows that count are. */
static int all_finite(const lns_sample *s)
{
    for (int64_t i = 0; i < s->n; i++) {
        for (int64_t j = 0; j < s->d && (s->mass == NULL || s->mass[i] != 0); j++) {
            if (!isfinite(lns_value(s->data, s->dtype, i * s->d + j))) {
                return 0;
            }
        }
    }
    return 1;
}

static lns_sample some_sample(int is_double, int64_t n, int64_t d, int weighted)
{
    const lns_dtype dtype = some_dtype(is_double);
    void *data = some_values(INPUT, dtype, n * d);
    return (lns_sample){data, dtype, n, d, weighted ? some_masses(n) : NULL};
}

/* ---- sort ------------------------------------------------------------------------------------------------------- */

typedef struct sort_call {
    lns_sample samples[3];
    void *out[3];
    int64_t count;
} sort_call;

static lns_status call_sort(void *context, int threads, lns_place *place)
{
    const sort_call *c = context;
    void *work = work_memory(lns_sort_worksize(c->samples, c->count, threads));
    const lns_status status = lns_sort(c->samples, c->count, threads, work, c->out, place);
    free(work);
    return status;
}

static void check_sorted(const lns_sample *s, const void *out, int64_t j)
{
    int64_t rows;
    entry *column = sorted_column(s, j, NULL, NULL, &rows);
    int64_t zeros = 0;
    for (int64_t i = 0; i < s->n; i++) {
        const double x = lns_value(out, real_dtype(s->dtype == LNS_F64), i * s->d + j);
        REQUIRE(x == column[i].value);
        zeros += column[i].value == 0 ? (signbit(column[i].value) ? 1 : 0) - (signbit(x) ? 1 : 0) : 0;
        REQUIRE(i == 0 || x != 0 || signbit(x) == 0 || column[i - 1].value != 0 ||
                signbit(lns_value(out, real_dtype(s->dtype == LNS_F64), (i - 1) * s->d + j)));
    }
    REQUIRE(zeros == 0); /* as many of each sign as before, and the negative ones first */
    free(column);
}

void fuzz_sort(void)
{
    const int is_double = byte() % 2;
    sort_call c = {.count = few()};
    for (int64_t k = 0; k < c.count; k++) {
        const int64_t n = some_rows(), d = some_columns(n);
        c.samples[k] = some_sample(is_double, n, d, 0);
        c.out[k] = elements(OUTPUT, real_dtype(is_double), n * d);
        if (n > 64 && getenv("LNS_FUZZ_CANARY") != NULL) { /* a planted error: here the result is a byte too short */
            c.out[k] = bytes_of(OUTPUT, n * d * (is_double ? 8 : 4) - 1);
        }
    }
    const lns_status status = everywhere(call_sort, &c);
    int bad = 0;
    for (int64_t k = 0; k < c.count; k++) {
        bad |= !all_finite(&c.samples[k]);
        for (int column = 0; status == LNS_OK && column < 3; column++) {
            check_sorted(&c.samples[k], c.out[k], column_to_check(column, c.samples[k].d));
        }
    }
    REQUIRE(status == (bad ? LNS_NOT_FINITE : LNS_OK));
    if (bad) {
        const lns_sample *s = &c.samples[last_place.entry];
        REQUIRE(!isfinite(lns_value(s->data, s->dtype, last_place.row * s->d + last_place.column)));
    }
}

/* ---- wasserstein ------------------------------------------------------------------------------------------------ */

typedef struct w2_call {
    lns_w2_job jobs[3];
    int64_t count;
    int v_sorted;
} w2_call;

static lns_status call_wasserstein(void *context, int threads, lns_place *place)
{
    const w2_call *c = context;
    void *work = work_memory(lns_wasserstein_worksize(c->jobs, c->count, threads));
    const lns_status status = lns_wasserstein(c->jobs, c->count, c->v_sorted, threads, work, place);
    free(work);
    return status;
}

/* Gradient in u of rank i.. of a column, into g by rank; ties share by mass. Returns the value. */
static double plain_w2(const entry *u, int64_t n, const entry *v, int64_t m, double *g)
{
    overlap *parts = malloc((size_t)(n + m) * sizeof *parts);
    const int64_t count = overlaps(u, n, v, m, parts);
    double value = 0;
    memset(g, 0, (size_t)n * sizeof *g);
    for (int64_t s = 0; s < count; s++) {
        const double difference = u[parts[s].i].value - v[parts[s].k].value;
        value += parts[s].mass * difference * difference;
        g[parts[s].i] += 2 * parts[s].mass * difference;
    }
    for (int64_t begin = 0, end; begin < n; begin = end) {
        double sum = 0, mass = 0;
        for (end = begin; end < n && u[end].value == u[begin].value; end++) {
            sum += g[end];
            mass += u[end].mass;
        }
        for (int64_t i = begin; i < end; i++) {
            g[i] = mass > 0 ? sum * (u[i].mass / mass) : 0;
        }
    }
    free(parts);
    return value;
}

static void check_w2(const lns_w2_job *job, int64_t j)
{
    int64_t n, m;
    const int64_t d = job->u.d;
    const lns_dtype real = real_dtype(job->u.dtype == LNS_F64);
    const double w = job->weight != NULL ? lns_value(job->weight, real, j) : 1;
    entry *u = sorted_column(&job->u, j, job->weight, job->bias, &n), *v = sorted_column(&job->v, j, NULL, NULL, &m);
    double *g = malloc((size_t)n * sizeof *g), grad_weight = 0, grad_bias = 0, sum_weight = 0;
    const double value = plain_w2(u, n, v, m, g), size = extent(u, n) + extent(v, m);
    const double got = lns_value(job->value, real, j);
    if (size < most(real) && fabs(w) < most(real)) {
        REQUIRE(got >= 0);
        REQUIRE(near(got, value, tolerance_of(real) * size * size + least(real)));
        for (int64_t i = 0; i < n; i++) {
            const double z = lns_value(job->u.data, job->u.dtype, u[i].row * d + j);
            if (job->grad_u != NULL) {
                /* A quantile of many targets is a sum in the working type, and sums of weights round. */
                const double summed = real == LNS_F64 ? 0 : 0.5 * FLT_EPSILON * (double)m;
                const double error = (tolerance_of(real) + summed) * u[i].mass + 1e-15 * (double)(n + m);
                REQUIRE(near(lns_value(job->grad_u, real, u[i].row * d + j), g[i] * w,
                             error * size * fabs(w) + least(real)));
            }
            grad_weight += g[i] * z;
            grad_bias += g[i];
            sum_weight = fmax(sum_weight, fabs(z));
        }
        if (job->grad_weight != NULL && sum_weight < most(real)) {
            REQUIRE(near(lns_value(job->grad_weight, real, j), grad_weight,
                         10 * tolerance_of(real) * size * sum_weight + least(real)));
        }
        if (job->grad_bias != NULL) {
            REQUIRE(near(lns_value(job->grad_bias, real, j), grad_bias, 10 * tolerance_of(real) * size + least(real)));
        }
    }
    free(u);
    free(v);
    free(g);
}

/* Puts sorted columns in v's place. */
static void sort_target(lns_sample *v)
{
    void *sorted = elements(INPUT, real_dtype(v->dtype == LNS_F64), v->n * v->d), *outs[1] = {sorted};
    void *work = work_memory(lns_sort_worksize(v, 1, 1));
    if (lns_sort(v, 1, 1, work, outs, NULL) == LNS_OK) {
        *v = (lns_sample){sorted, real_dtype(v->dtype == LNS_F64), v->n, v->d, NULL};
    }
    free(work);
}

void fuzz_wasserstein(void)
{
    const unsigned options = byte();
    const int is_double = options & 1, with_map = options >> 1 & 1, weighted = (options >> 2 & 3) == 3;
    const int sorted = !weighted && options >> 4 & 1, honest = options >> 5 & 1, equal = options >> 6 & 1;
    const lns_dtype real = real_dtype(is_double);
    w2_call c = {.count = few(), .v_sorted = sorted};
    int bad = 0;
    for (int64_t k = 0; k < c.count; k++) {
        const int64_t n = some_rows(), m = equal ? n : some_rows(), d = some_columns(n > m ? n : m);
        const unsigned wanted = byte();
        lns_w2_job *job = &c.jobs[k];
        *job = (lns_w2_job){.u = some_sample(is_double, n, d, weighted), .v = some_sample(is_double, m, d, weighted)};
        if (sorted && honest) {
            sort_target(&job->v);
        }
        if (with_map) {
            job->weight = some_values(INPUT, real, d);
            job->bias = some_values(INPUT, real, d);
        }
        job->value = elements(OUTPUT, real, d);
        job->grad_u = wanted & 1 ? elements(OUTPUT, real, n * d) : NULL;
        job->grad_weight = with_map && wanted & 2 ? elements(OUTPUT, real, d) : NULL;
        job->grad_bias = with_map && wanted & 4 ? elements(OUTPUT, real, d) : NULL;
        bad |= (!with_map && !all_finite(&job->u)) || !all_finite(&job->v);
    }
    const lns_status status = everywhere(call_wasserstein, &c);
    REQUIRE(!bad || status == LNS_NOT_FINITE || status == LNS_BAD_MASS);
    REQUIRE(bad || with_map || weighted || status == LNS_OK);
    for (int64_t k = 0; status == LNS_OK && (honest || !sorted) && k < c.count; k++) {
        for (int column = 0; column < 3; column++) {
            check_w2(&c.jobs[k], column_to_check(column, c.jobs[k].u.d));
        }
    }
}

/* ---- fit -------------------------------------------------------------------------------------------------------- */

typedef struct fit_call {
    lns_fit_job jobs[3];
    int64_t count;
    lns_method method;
} fit_call;

static lns_status call_fit(void *context, int threads, lns_place *place)
{
    const fit_call *c = context;
    void *work = work_memory(lns_fit_worksize(c->jobs, c->count, threads));
    const lns_status status = lns_fit(c->jobs, c->count, c->method, threads, work, place);
    free(work);
    return status;
}

static long double mean_of(const entry *column, int64_t n)
{
    long double mean = 0; /* subnormal numbers have too few digits for what is done with it */
    for (int64_t i = 0; i < n; i++) {
        mean += (long double)column[i].mass * column[i].value;
    }
    return mean;
}

static void check_fit(const lns_fit_job *job, lns_method method, int64_t j)
{
    int64_t n, m;
    const lns_dtype real = real_dtype(job->source.dtype == LNS_F64);
    entry *u = sorted_column(&job->source, j, NULL, NULL, &n), *v = sorted_column(&job->target, j, NULL, NULL, &m);
    overlap *parts = malloc((size_t)(n + m) * sizeof *parts);
    const long double exact_u = mean_of(u, n), exact_v = mean_of(v, m);
    const double mean_u = (double)exact_u, mean_v = (double)exact_v, size_u = extent(u, n), size_v = extent(v, m);
    const double slope = lns_value(job->weight, real, j), shift = lns_value(job->bias, real, j);
    if (size_u < most(real) && size_v < most(real)) {
        const double tolerance = 20 * tolerance_of(real);
        double both = 0, variance = 0, other = 0;
        const int64_t count = overlaps(u, n, v, m, parts);
        for (int64_t s = 0; s < count; s++) {
            const double x = u[parts[s].i].value - mean_u, y = v[parts[s].k].value - mean_v;
            both += parts[s].mass * x * y;
            variance += parts[s].mass * x * x;
            other += parts[s].mass * y * y;
        }
        REQUIRE(!(slope < -1e-6 * (1 + size_v / fmax(size_u, least(real)))));
        REQUIRE(method != LNS_MEAN || slope == 1);
        REQUIRE(u[0].value != u[n - 1].value || slope == 1);
        /* Means are doubles, the smallest of which a slope may make large. */
        REQUIRE(near((double)(slope * exact_u + shift - exact_v), 0,
                     tolerance * (fabs(slope) * size_u + size_v) + least(real) + fabs(slope) * DBL_TRUE_MIN));
        /* Well conditioned columns only: elsewhere two right answers may differ. */
        if (method == LNS_LINEAR && variance > 1e-4 * size_u * size_u && variance > 1e-10) {
            REQUIRE(near(slope, both / variance, tolerance * 1e4 * (size_v / size_u) + least(real)));
        }
        if (method == LNS_GAUSSIAN && variance > 1e-4 * size_u * size_u && variance > 1e-10 &&
            job->source.mass == NULL && job->target.mass == NULL) {
            const double ratio = other / variance * (double)m / (double)(m - 1) * (double)(n - 1) / (double)n;
            REQUIRE(near(slope * slope, ratio, tolerance * 1e4 * (size_v / size_u) * (size_v / size_u) + least(real)));
        }
    }
    free(u);
    free(v);
    free(parts);
}

void fuzz_fit(void)
{
    const unsigned options = byte();
    const int is_double = options & 1, weighted = options >> 1 & 1, equal = options >> 2 & 1;
    fit_call c = {.count = few(), .method = (lns_method)(options >> 3 & 3)};
    int bad = 0;
    c.method = c.method > LNS_LINEAR ? LNS_LINEAR : c.method;
    for (int64_t k = 0; k < c.count; k++) {
        const int64_t n = 1 + some_rows(), m = equal ? n : 1 + some_rows(), d = some_columns(n > m ? n : m);
        c.jobs[k] =
            (lns_fit_job){some_sample(is_double, n, d, weighted), some_sample(is_double, m, d, weighted),
                          elements(OUTPUT, real_dtype(is_double), d), elements(OUTPUT, real_dtype(is_double), d), NULL};
        bad |= !all_finite(&c.jobs[k].source) || !all_finite(&c.jobs[k].target);
    }
    const lns_status status = everywhere(call_fit, &c);
    REQUIRE(bad ? status == LNS_NOT_FINITE || status == LNS_BAD_MASS : status == LNS_OK || status == LNS_BAD_MASS);
    REQUIRE(weighted || status != LNS_BAD_MASS);
    for (int64_t k = 0; status == LNS_OK && k < c.count; k++) {
        for (int column = 0; column < 3; column++) {
            check_fit(&c.jobs[k], c.method, column_to_check(column, c.jobs[k].source.d));
        }
    }
}
