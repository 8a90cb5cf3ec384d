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

void test_core(void)
{
    every_unit_runs_once();
    thread_counts();
    for (int status = 0; status < LNS_STATUS_COUNT; status++) {
        CHECK(lns_status_text((lns_status)status)[0] != '\0');
    }
    CHECK(strcmp(lns_status_text((lns_status)999), "unknown status") == 0);
}
