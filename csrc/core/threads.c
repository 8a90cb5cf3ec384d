#include "core/threads.h"

#include <pthread.h>

#include "core/subnormals.h"

typedef struct {
    lns_loop_body body;
    void *context;
    int64_t begin, end;
    int thread;
} part;

static void *run_part(void *argument)
{
    LNS_KEEP_SUBNORMALS;
    const part *p = argument;
    p->body(p->context, p->begin, p->end, p->thread);
    return NULL;
}

int lns_thread_count(int64_t units, int64_t cost_ns, int threads)
{
    int64_t count = threads < LNS_MAX_THREADS ? threads : LNS_MAX_THREADS;
    if (count > units) {
        count = units;
    }
    if (count > cost_ns / LNS_MIN_SHARE_NS) {
        count = cost_ns / LNS_MIN_SHARE_NS;
    }
    return count < 1 ? 1 : (int)count;
}

void lns_parallel_for(int64_t units, int threads, lns_loop_body body, void *context)
{
    part parts[LNS_MAX_THREADS];
    pthread_t ids[LNS_MAX_THREADS];
    int started[LNS_MAX_THREADS] = {0};
    if (units <= 0) {
        return;
    }
    if (threads > LNS_MAX_THREADS) {
        threads = LNS_MAX_THREADS;
    }
    if (threads < 1) {
        threads = 1;
    }
    for (int t = 0; t < threads; t++) {
        const int64_t share = units / threads, rest = units % threads;
        const int64_t begin = t * share + (t < rest ? t : rest);
        parts[t] = (part){body, context, begin, begin + share + (t < rest), t};
    }
    for (int t = 1; t < threads; t++) {
        started[t] = pthread_create(&ids[t], NULL, run_part, &parts[t]) == 0;
    }
    run_part(&parts[0]);
    for (int t = 1; t < threads; t++) {
        if (started[t]) {
            pthread_join(ids[t], NULL);
        } else {
            run_part(&parts[t]);
        }
    }
}
