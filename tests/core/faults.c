/* Stands before the C library in the child process of test_faults.py (LD_PRELOAD): makes chosen requests for memory or
 * threads fail, and counts the blocks of memory in use. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

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

/* The functions that stand behind this library. Until they are found, which may itself ask for memory, there is none.
 */
static struct {
    __typeof__(malloc) *malloc;
    __typeof__(calloc) *calloc;
    __typeof__(realloc) *realloc;
    __typeof__(free) *free;
    __typeof__(pthread_create) *pthread_create;
} next;

static void find_next(void)
{
    static int begun;
    if (!begun) {
        begun = 1;
        *(void **)&next.malloc = dlsym(RTLD_NEXT, "malloc");
        *(void **)&next.calloc = dlsym(RTLD_NEXT, "calloc");
        *(void **)&next.realloc = dlsym(RTLD_NEXT, "realloc");
        *(void **)&next.pthread_create = dlsym(RTLD_NEXT, "pthread_create");
        *(void **)&next.free = dlsym(RTLD_NEXT, "free");
    }
}

void *malloc(size_t size)
{
    find_next();
    void *block = next.malloc == NULL || fails(MEMORY) ? NULL : next.malloc(size);
    blocks += block != NULL;
    return block;
}

void *calloc(size_t count, size_t size)
{
    find_next();
    void *block = next.calloc == NULL || fails(MEMORY) ? NULL : next.calloc(count, size);
    blocks += block != NULL;
    return block;
}

void *realloc(void *old, size_t size)
{
    find_next();
    void *block = next.realloc == NULL || fails(MEMORY) ? NULL : next.realloc(old, size);
    blocks += block != NULL && old == NULL;
    return block;
}

void free(void *block)
{
    find_next();
    if (next.free != NULL) {
        blocks -= block != NULL;
        next.free(block);
    }
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*body)(void *), void *argument)
{
    find_next();
    return fails(THREADS) ? EAGAIN : next.pthread_create(thread, attributes, body, argument);
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
