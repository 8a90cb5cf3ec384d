/* A parallel loop without state: threads are started and joined within the call. */
#ifndef LNS_THREADS_H
#define LNS_THREADS_H

#include <stdint.h>

/* Most threads one loop ever uses, whatever the caller asks for. */
#define LNS_MAX_THREADS 64

/* Starting and joining a thread costs about 70 microseconds; below this share a second thread does not pay. Tests build
 * with 1, so that threads start for the smallest work. */
#ifndef LNS_MIN_SHARE_NS
#define LNS_MIN_SHARE_NS 1000000
#endif

/* Handles the units [begin, end). `thread` in [0, threads) selects this thread's part of the work memory. */
typedef void (*lns_loop_body)(void *context, int64_t begin, int64_t end, int thread);

/* A cost in nanoseconds that does not overflow, nor do sums of it. */
static inline int64_t lns_cost(double cost)
{
    return cost < 1e15 ? (int64_t)cost : INT64_C(1000000000000000);
}

/* How many threads a loop of `units` units, `cost_ns` nanoseconds of work in all, runs on: at least 1, at most
 * `threads`, and never so many that a thread has less work than its start is worth. */
int lns_thread_count(int64_t units, int64_t cost_ns, int threads);

/* Runs body over [0, units) in `threads` contiguous parts (as lns_thread_count gave). A thread that cannot be started
 * is no error: the calling thread does its part. Bodies must not depend on which thread runs a unit. */
void lns_parallel_for(int64_t units, int threads, lns_loop_body body, void *context);

#endif
