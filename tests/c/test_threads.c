/* Every threaded kernel under load: several callers at once, each asking for threads of its own, all reading the same
 * inputs. The results must be those of one thread, to the bit; ThreadSanitizer looks for races meanwhile. */
#include <pthread.h>

#include "check.h"

enum { N = 70, M = 50, D = 133, TOKENS = 9, MODULES = 3, CALLERS = 4, ROUNDS = 3, OUTPUTS = 32 };

typedef struct load {
    float *u, *v, *weight, *bias; /* [N, D], [M, D], [D], [D] */
    double *wide;                 /* [N, D] */
    uint8_t *mask;                /* [N / TOKENS, TOKENS] */
} load;

/* One caller's results, in the order in which the kernels ran. */
typedef struct caller {
    const load *in;
    int threads, count, failed;
    void *outputs[OUTPUTS];
    size_t sizes[OUTPUTS];
} caller;

static void *output(caller *c, size_t size)
{
    c->sizes[c->count] = size;
    c->outputs[c->count] = memory((int64_t)size);
    return c->outputs[c->count++];
}

static void sort_and_fit(caller *c)
{
    const load *in = c->in;
    const lns_sample samples[2] = {{in->u, LNS_F32, N, D, NULL}, {in->v, LNS_F32, M, D, NULL}};
    void *const sorted[2] = {output(c, N * D * 4), output(c, M * D * 4)};
    void *work = memory(lns_sort_worksize(samples, 2, c->threads));
    c->failed |= lns_sort(samples, 2, c->threads, work, sorted, NULL);
    free(work);
    const lns_fit_job fit = {samples[0], samples[1], output(c, D * 4), output(c, D * 4), NULL};
    work = memory(lns_fit_worksize(&fit, 1, c->threads));
    c->failed |= lns_fit(&fit, 1, LNS_LINEAR, c->threads, work, NULL);
    free(work);
}

static void distances(caller *c)
{
    const load *in = c->in;
    lns_w2_job jobs[MODULES];
    for (int k = 0; k < MODULES; k++) {
        jobs[k] = (lns_w2_job){.u = {in->u, LNS_F32, N - k, D, NULL},
                               .v = {in->v, LNS_F32, M, D, NULL},
                               .weight = in->weight,
                               .bias = in->bias,
                               .value = output(c, D * 4),
                               .grad_u = output(c, (size_t)(N - k) * D * 4),
                               .grad_weight = output(c, D * 4),
                               .grad_bias = output(c, D * 4)};
    }
    void *work = memory(lns_wasserstein_worksize(jobs, MODULES, c->threads));
    c->failed |= lns_wasserstein(jobs, MODULES, 0, c->threads, work, NULL);
    free(work);
}

static void streams(caller *c)
{
    const load *in = c->in;
    void *work = memory(lns_affine_worksize(N, D, 1)), *out = output(c, N * D * 4);
    c->failed |= lns_affine(in->u, LNS_F32, N, D, 1, in->weight, in->bias, 0.4, c->threads, work, out);
    float *grad_z = output(c, N * D * 4), *grad_weight = output(c, D * 4), *grad_bias = output(c, D * 4);
    c->failed |= lns_affine_backward(in->u, LNS_F32, N, D, 1, in->weight, 0.4, out, c->threads, work, grad_z,
                                     grad_weight, grad_bias);
    free(work);
    const int64_t batch = N / TOKENS;
    float *pooled = output(c, N / TOKENS * D * 4);
    int32_t *index = output(c, N / TOKENS * D * 4);
    c->failed |= lns_pool(in->u, LNS_F32, batch, TOKENS, D, in->mask, LNS_POOL_MAX, c->threads, pooled, index, NULL);
    c->failed |= lns_pool_backward(pooled, LNS_F32, batch, TOKENS, D, in->mask, LNS_POOL_MAX, index, c->threads,
                                   output(c, N / TOKENS * TOKENS * D * 4), NULL);
    const lns_sample sample = {in->wide, LNS_F64, N * D, 1, NULL}; /* long and narrow: many chunks of rows */
    double *state = output(c, 4 * sizeof *state);
    state[0] = state[1] = 0;
    state[2] = INFINITY;
    state[3] = -INFINITY;
    lns_moments moments = {0, state, state + 1, state + 2, state + 3};
    work = memory(lns_moments_worksize(N * D, 1));
    c->failed |= lns_moments_update(&sample, c->threads, work, &moments, NULL);
    free(work);
}

static void summaries(caller *c)
{
    enum { SLOTS = 8, ROWS = 32, TILES = (D + 15) / 16 };
    double *moments = output(c, 4 * D * sizeof *moments);
    lns_quantiles q = {.dtype = LNS_F32, .d = D, .slots = SLOTS, .rows = ROWS};
    q.keys = output(c, TILES * SLOTS * ROWS * 64);
    memset(q.keys, 0, TILES * SLOTS * ROWS * 64);
    q.moments = (lns_moments){0, moments, moments + D, moments + 2 * D, moments + 3 * D};
    for (int j = 0; j < D; j++) {
        moments[j] = moments[D + j] = 0;
        moments[2 * D + j] = INFINITY;
        moments[3 * D + j] = -INFINITY;
    }
    const lns_sample sample = {c->in->u, LNS_F32, N, D, NULL};
    for (int k = 0; k < 5; k++) {
        void *work = memory(lns_quantiles_worksize(&q, N, c->threads));
        c->failed |= lns_quantiles_update(&sample, c->threads, work, &q, NULL);
        free(work);
    }
    void *work = memory(lns_quantiles_read_worksize(&q, c->threads));
    c->failed |= lns_quantiles_read(&q, NULL, N, c->threads, work, output(c, N * D * 4));
    free(work);
}

static void steps(caller *c)
{
    static const int64_t offsets[] = {0, 1, 40, 41, D};
    enum { L = sizeof offsets / sizeof *offsets - 1 };
    const load *in = c->in;
    float *weight = output(c, D * 4), *bias = output(c, D * 4);
    double *per_module = output(c, 2 * L * sizeof *per_module);
    memcpy(weight, in->weight, D * 4);
    memcpy(bias, in->bias, D * 4);
    const lns_step_problem problem = {.dtype = LNS_F32,
                                      .modules = L,
                                      .offsets = offsets,
                                      .weight = weight,
                                      .bias = bias,
                                      .grad_weight = in->u,
                                      .grad_bias = in->v,
                                      .lr = 0.1,
                                      .l1 = 0.5,
                                      .group = 0.1};
    c->failed |= lns_step(&problem, c->threads, per_module, NULL);
}

static void *run(void *argument)
{
    caller *c = argument;
    sort_and_fit(c);
    distances(c);
    streams(c);
    summaries(c);
    steps(c);
    return NULL;
}

static void release(caller *c)
{
    for (int k = 0; k < c->count; k++) {
        free(c->outputs[k]);
    }
    c->count = 0;
}

void test_threads(void)
{
    load in = {normal_f32(N * D, 1), normal_f32(M * D, 2), normal_f32(D, 3),
               normal_f32(D, 4),     normal_f64(N * D, 5), memory(N)};
    caller alone = {.in = &in, .threads = 1};
    for (int i = 0; i < N; i++) {
        in.mask[i] = i % TOKENS == 0 || i % 3 != 0;
    }
    run(&alone);
    CHECK(!alone.failed);
    for (int round = 0; round < ROUNDS; round++) {
        caller callers[CALLERS];
        pthread_t ids[CALLERS];
        for (int t = 0; t < CALLERS; t++) {
            callers[t] = (caller){.in = &in, .threads = t + 1 + round};
            CHECK(pthread_create(&ids[t], NULL, run, &callers[t]) == 0);
        }
        for (int t = 0; t < CALLERS; t++) {
            int same = pthread_join(ids[t], NULL) == 0 && !callers[t].failed && callers[t].count == alone.count;
            for (int k = 0; same && k < alone.count; k++) {
                same = memcmp(callers[t].outputs[k], alone.outputs[k], alone.sizes[k]) == 0;
            }
            CHECK(same);
            release(&callers[t]);
        }
    }
    release(&alone);
    free(in.u);
    free(in.v);
    free(in.weight);
    free(in.bias);
    free(in.wide);
    free(in.mask);
}
