/* Array arguments: checks, references, error messages. Every function that takes a PyObject * returns 0 or NULL with an
 * exception set on failure.
 *
 * Order matters in a wrapper: first everything whose conversion may run Python code (numbers, flags, sequences), then
 * the arrays. Code that runs after an array was looked at could change its shape under the pointer taken from it. */
#ifndef LNS_ARGS_H
#define LNS_ARGS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define PY_ARRAY_UNIQUE_SYMBOL lineas_ARRAY_API
#ifndef LNS_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "lineas.h"

/* dtypes that an argument may have, as bits. bfloat16 comes as its bits in uint16. */
enum { LNS_TAKE_F32 = 1, LNS_TAKE_F64 = 2, LNS_TAKE_HALF = 4, LNS_TAKE_I32 = 8, LNS_TAKE_I64 = 16, LNS_TAKE_U8 = 32 };

#define LNS_TAKE_REAL (LNS_TAKE_F32 | LNS_TAKE_F64)
#define LNS_TAKE_ANY (LNS_TAKE_REAL | LNS_TAKE_HALF)

/* The number of positional arguments; returns 1 where it is right. */
int lns_expect(const char *function, Py_ssize_t seen, Py_ssize_t expected);

/* Borrowed: the argument as an array of `ndim` dimensions (-1: any) of one of the dtypes, C-contiguous, aligned, in
 * native byte order, and writeable where asked. */
PyArrayObject *lns_array(PyObject *object, const char *name, int ndim, int dtypes, int writeable);

/* The same, of exactly this shape and engine dtype (LNS_F32 or LNS_F64). */
PyArrayObject *lns_vector(PyObject *object, const char *name, int64_t d, lns_dtype dtype, int writeable);

lns_dtype lns_dtype_of(PyArrayObject *array);

/* LNS_F64 for LNS_F64, else LNS_F32: what results have. */
lns_dtype lns_working(lns_dtype dtype);
int lns_typenum(lns_dtype dtype);

PyArrayObject *lns_new(int ndim, const npy_intp *shape, int typenum);

/* A private copy, for what bounds the engine's writes: with the GIL released, somebody could change the array given. */
PyArrayObject *lns_copy(PyArrayObject *array);
PyArrayObject *lns_new_vector(int64_t d, lns_dtype dtype);

/* A batch of samples and what keeps them alive while the GIL is released. */
typedef struct lns_batch {
    const char *argument;
    PyObject *arrays, *names, *masses; /* tuples; masses may be NULL */
    lns_sample *samples;
    Py_ssize_t count;
} lns_batch;

/* Takes the sequences of a batch, which may run Python code; masses may be Py_None. Release the batch with
 * lns_batch_clear in any case. */
int lns_batch_open(lns_batch *batch, PyObject *arrays, PyObject *names, PyObject *masses, const char *argument);

/* Then checks the arrays and fills in the samples. All must have the working type of the first of `like` (or, where
 * `like` is NULL or empty, of each other). */
int lns_batch_fill(lns_batch *batch, const lns_batch *like);
void lns_batch_clear(lns_batch *batch);

/* One array as a batch of one; fill it as well. */
int lns_batch_open_one(lns_batch *batch, PyObject *array, PyObject *name, PyObject *mass);

/* New: a sequence as a tuple. */
PyObject *lns_tuple(PyObject *object, const char *name);

/* Whether the first `written` of `count` arrays overlap no other of them; what an engine updates in place must not be
 * its input as well. */
int lns_apart(PyArrayObject *const *arrays, const char *const *names, int written, int count);

/* A list of new arrays: [d], or [n, d], for each sample of the batch. */
PyObject *lns_new_list(const lns_batch *like, int ndim);
void *lns_list_data(PyObject *list, Py_ssize_t k);

/* Work memory of `size` bytes on a cache line; free it with lns_work_free. NULL with MemoryError, or ValueError where
 * size is -1. */
void *lns_work_new(int64_t size);
void lns_work_free(void *work);

/* Index of the str `object` among `count` choices; `expected` is how a message lists them. */
int lns_choice(PyObject *object, const char *name, const char *expected, const char *const *choices, int count,
               int *out);
int lns_int(PyObject *object, const char *name, int64_t least, int64_t most, int64_t *out);
int lns_threads(PyObject *object, int *out);
int lns_double(PyObject *object, const char *name, double *out);

/* The number of rows that a state has seen after `more` of them, made before the state is changed: afterwards memory
 * must not run out. (Where the sum overflows, the engine refuses and the number is not used.) */
PyObject *lns_count_after(int64_t count, int64_t more);

/* Sets the exception that a status stands for. u and v are the batches of place->argument 0 and 1 (v may be NULL).
 * Returns NULL. */
PyObject *lns_raise(lns_status status, const lns_place *place, const lns_batch *u, const lns_batch *v);

#endif
