#include <pthread.h>

#include "check.h"
#include "core/threads.h"

static void mark(void *context, int64_t begin, int64_t end, int thread)
{
    int *seen = context;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        seen[i]++;
    }
}

static void every_unit_runs_once(void)
{
    for (int threads = 1; threads <= 100; threads += 33) {
        int seen[130] = {0}, wrong = 0;
        lns_parallel_for(130, threads, mark, seen);
        for (int i = 0; i < 130; i++) {
            wrong += seen[i] != 1;
        }
        CHECK(wrong == 0);
    }
    lns_parallel_for(0, 4, mark, NULL);
}

static void thread_counts(void)
{
    CHECK(lns_thread_count(100, 2 * LNS_MIN_SHARE_NS - 1, 8) == 1); /* too little work */
    CHECK(lns_thread_count(100, INT64_C(1) << 40, 8) == 8);
    CHECK(lns_thread_count(3, INT64_C(1) << 40, 8) == 3); /* too few units */
    CHECK(lns_thread_count(1000, INT64_C(1) << 40, 1000) == LNS_MAX_THREADS);
    CHECK(lns_thread_count(0, 0, 4) == 1);
}

static void *choose(void *name)
{
    return lns_cpu_init(name) == 0 && strcmp(lns_cpu_name(), name) == 0 ? name : NULL;
}

/* Choosing a variant at once with others that choose it is no race. */
static void cpu_init_at_once(void)
{
    enum { CHOOSERS = 4 };
    char name[16];
    pthread_t ids[CHOOSERS];
    snprintf(name, sizeof name, "%s", lns_cpu_name());
    for (int t = 0; t < CHOOSERS; t++) {
        CHECK(pthread_create(&ids[t], NULL, choose, name) == 0);
    }
    for (int t = 0; t < CHOOSERS; t++) {
        void *result = NULL;
        CHECK(pthread_join(ids[t], &result) == 0 && result == name);
    }
}

static void version(void)
{
    char numbers[32];
    snprintf(numbers, sizeof numbers, "%d.%d.%d", LNS_VERSION_MAJOR, LNS_VERSION_MINOR, LNS_VERSION_PATCH);
    CHECK(strcmp(LNS_VERSION, numbers) == 0);
    CHECK(strcmp(lns_version(), LNS_VERSION) == 0);
}

void test_core(void)
{
    cpu_init_at_once();
    version();
    every_unit_runs_once();
    thread_counts();
    for (int status = 0; status < LNS_STATUS_COUNT; status++) {
        CHECK(lns_status_text((lns_status)status)[0] != '\0');
    }
    CHECK(strcmp(lns_status_text((lns_status)999), "unknown status") == 0);
}
