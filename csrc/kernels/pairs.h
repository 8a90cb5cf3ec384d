/* Batches of pairs of samples: what lns_wasserstein and lns_fit have in common. A job is a pair of samples of one
 * module and what is wanted of it; its units of work are the tiles of its columns. */
#ifndef LNS_PAIRS_H
#define LNS_PAIRS_H

#include "core/cpu.h"
#include "core/threads.h"
#include "lineas.h"

/* u: source; v: target. */
typedef struct lns_pair {
    const lns_sample *u, *v;
} lns_pair;

/* What this file asks a kernel about job k of its array of jobs. */
typedef struct lns_pair_kernel {
    int64_t least_rows; /* of each sample */
    lns_pair (*pair)(const void *jobs, int64_t k);
    int64_t (*tile_bytes)(const void *jobs, int64_t k); /* what the tiles of a panel and their orders take of work */
    int64_t (*cost)(const void *jobs, int64_t k);       /* in nanoseconds, roughly */
    /* The first value of u, as the kernel sees it, that is not finite, in a row that counts; sets row, column and value
     * of the place. */
    int (*find_not_finite_u)(const void *jobs, int64_t k, lns_place *place);
    const lns_loop_body (*units)[2]; /* [LNS_CPU_COUNT]: LNS_TABLE of the loop over units */
} lns_pair_kernel;

/* One call. A kernel's context begins with it. A thread's work memory holds the segments that all columns of a job
 * share, then what tile_bytes counts, then the segments of one column. */
typedef struct lns_pair_call {
    const void *jobs;
    int64_t count;
    char *work;
    int64_t segment_bytes, thread_bytes; /* of the shared segments; of a thread in all */
    int not_finite[LNS_MAX_THREADS];     /* whether the thread saw a NaN or an infinity */
} lns_pair_call;

/* Work memory for a call; -1 where sizes or types are not acceptable. */
int64_t lns_pairs_worksize(const lns_pair_kernel *kernel, const void *jobs, int64_t count, int threads);

/* Checks types, sizes and weights, runs the kernel over all units of the call, and finds the place of what is not
 * finite. The caller has set jobs, count and work; `call` is handed to the units as their context. */
lns_status lns_pairs_run(const lns_pair_kernel *kernel, lns_pair_call *call, int threads, lns_place *place);

#endif
