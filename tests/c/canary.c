/* Planted errors: a tool that is silently off reports nothing, so each check first has to report the one meant for it.
 */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/threads.h"

/* Through a volatile pointer, so that only a tool that watches memory can know the size behind it. */
static int overflow(void)
{
    float *volatile row = malloc(4 * sizeof *row);
    if (row == NULL) {
        return 2;
    }
    row[4] = 1.0f;
    printf("not reported: %g\n", (double)row[4]);
    free(row);
    return 0;
}

static int undefined(int argc)
{
    int count = INT_MAX - 2;
    printf("not reported: %d\n", count + argc + 1);
    return 0;
}

static int leak(void)
{
    char *lost = malloc(100);
    printf("not reported: %d\n", lost != NULL);
    return 0;
}

static void count_up(void *context, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    *(int64_t *)context += end - begin;
}

/* In the engine's own threads. */
static int race(void)
{
    int64_t units = 0;
    lns_parallel_for(100, 4, count_up, &units);
    printf("not reported: %d\n", (int)units);
    return 0;
}

int main(int argc, char **argv)
{
    const char *what = argc == 2 ? argv[1] : "";
    if (strcmp(what, "overflow") == 0) {
        return overflow();
    }
    if (strcmp(what, "undefined") == 0) {
        return undefined(argc);
    }
    if (strcmp(what, "leak") == 0) {
        return leak();
    }
    if (strcmp(what, "race") == 0) {
        return race();
    }
    fprintf(stderr, "usage: canary overflow|undefined|leak|race\n");
    return 2;
}
