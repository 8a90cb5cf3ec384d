/* Stands before the C library in the child process of test_faults.py (LD_PRELOAD): makes chosen requests for memory or
 * threads fail, and counts the blocks of memory in use. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

enum { MEMORY, THREADS };

static atomic_long blocks;                  /* in use */
static atomic_int armed = -1;               /* MEMORY or THREADS, else -1 */
static atomic_long requests, first, failed; /* since armed; the first to fail; how many failed */
static long most;                           /* that fail */

static int fails(int kind)
{
    if (armed != kind) {
        return 0;
    }
    const long number = ++requests;
    if (number < first || number - first >= most) {
        return 0;
    }
    failed++;
    return 1;
}

/* The function of that name that stands behind this library. */
#define FIND_NEXT(name)                                                                                                \
    static __typeof__(name) *next;                                                                                     \
    if (next == NULL) {                                                                                                \
        *(void **)&next = dlsym(RTLD_NEXT, #name);                                                                     \
    }

void *malloc(size_t size)
{
    FIND_NEXT(malloc)
    void *block = fails(MEMORY) ? NULL : next(size);
    blocks += block != NULL;
    return block;
}

void *calloc(size_t count, size_t size)
{
    FIND_NEXT(calloc)
    void *block = fails(MEMORY) ? NULL : next(count, size);
    blocks += block != NULL;
    return block;
}

void *realloc(void *old, size_t size)
{
    FIND_NEXT(realloc)
    void *block = fails(MEMORY) ? NULL : next(old, size);
    blocks += block != NULL && old == NULL;
    return block;
}

void free(void *block)
{
    FIND_NEXT(free)
    blocks -= block != NULL;
    next(block);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*body)(void *), void *argument)
{
    FIND_NEXT(pthread_create)
    return fails(THREADS) ? EAGAIN : next(thread, attributes, body, argument);
}

/* ---- for the test, by ctypes ------------------------------------------------------------------------------------- */

extern void *PyObject_CallObject(void *function, void *arguments);

/* function(*arguments), while `count` requests of a kind fail from number `from` on. */
void *faults_call(void *function, void *arguments, int kind, long from, long count)
{
    first = from;
    most = count;
    requests = failed = 0;
    armed = kind;
    void *result = PyObject_CallObject(function, arguments);
    armed = -1;
    return result;
}

long faults_failed(void)
{
    return failed;
}

long faults_blocks(void)
{
    return blocks;
}
