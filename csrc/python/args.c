#include "python/args.h"

int lns_expect(const char *function, Py_ssize_t seen, Py_ssize_t expected)
{
    if (seen != expected) {
        PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", function, expected, seen);
        return 0;
    }
    return 1;
}

static int dtype_bit(int typenum)
{
    switch (typenum) {
    case NPY_FLOAT:
        return LNS_TAKE_F32;
    case NPY_DOUBLE:
        return LNS_TAKE_F64;
    case NPY_HALF:
    case NPY_UINT16:
        return LNS_TAKE_HALF;
    case NPY_INT32:
        return LNS_TAKE_I32;
    case NPY_INT64:
        return LNS_TAKE_I64;
    case NPY_UINT8:
        return LNS_TAKE_U8;
    default:
        return 0;
    }
}

/* English for the dtypes accepted; float16 stands for bfloat16 bits too. */
static const char *dtype_names(int dtypes)
{
    switch (dtypes) {
    case LNS_TAKE_ANY:
        return "float32, float64, float16 or bfloat16 bits (uint16)";
    case LNS_TAKE_REAL:
        return "float32 or float64";
    case LNS_TAKE_F32:
        return "float32";
    case LNS_TAKE_F64:
        return "float64";
    case LNS_TAKE_I32:
        return "int32";
    case LNS_TAKE_I64:
        return "int64";
    case LNS_TAKE_U8:
        return "uint8";
    case LNS_TAKE_I32 | LNS_TAKE_I64:
        return "int32 or int64";
    default:
        return "another dtype";
    }
}

/* The name of a dtype's scalar type, without its module. Its str() would run Python code. */
static const char *dtype_name(const PyArray_Descr *descr)
{
    const char *name = descr->typeobj->tp_name, *dot = strrchr(name, '.');
    return dot == NULL ? name : dot + 1;
}

PyArrayObject *lns_array(PyObject *object, const char *name, int ndim, int dtypes, int writeable)
{
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be a NumPy array, got %s", name, Py_TYPE(object)->tp_name);
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    const PyArray_Descr *descr = PyArray_DESCR(array);
    if (!(dtype_bit(PyArray_TYPE(array)) & dtypes)) {
        PyErr_Format(PyExc_TypeError, "%s must have dtype %s, got %s", name, dtype_names(dtypes), dtype_name(descr));
        return NULL;
    }
    if (ndim >= 0 && PyArray_NDIM(array) != ndim) {
        PyErr_Format(PyExc_ValueError, "%s must have %d dimensions, got %d", name, ndim, PyArray_NDIM(array));
        return NULL;
    }
    if (!PyArray_ISNOTSWAPPED(array)) {
        PyErr_Format(PyExc_TypeError, "%s must be in native byte order, got %c%c%zd", name, descr->byteorder,
                     descr->kind, (Py_ssize_t)PyArray_ITEMSIZE(array));
        return NULL;
    }
    if (!PyArray_IS_C_CONTIGUOUS(array) || !PyArray_ISALIGNED(array)) {
        PyErr_Format(PyExc_ValueError, "%s must be C-contiguous and aligned", name);
        return NULL;
    }
    if (writeable && !PyArray_ISWRITEABLE(array)) {
        PyErr_Format(PyExc_ValueError, "%s must be writeable", name);
        return NULL;
    }
    return array;
}

PyArrayObject *lns_vector(PyObject *object, const char *name, int64_t d, lns_dtype dtype, int writeable)
{
    PyArrayObject *array = lns_array(object, name, 1, dtype == LNS_F64 ? LNS_TAKE_F64 : LNS_TAKE_F32, writeable);
    if (array != NULL && PyArray_DIM(array, 0) != d) {
        PyErr_Format(PyExc_ValueError, "%s must have %lld entries, got %zd", name, (long long)d,
                     (Py_ssize_t)PyArray_DIM(array, 0));
        return NULL;
    }
    return array;
}

lns_dtype lns_dtype_of(PyArrayObject *array)
{
    switch (PyArray_TYPE(array)) {
    case NPY_DOUBLE:
        return LNS_F64;
    case NPY_HALF:
        return LNS_F16;
    case NPY_UINT16:
        return LNS_BF16;
    default:
        return LNS_F32;
    }
}

lns_dtype lns_working(lns_dtype dtype)
{
    return dtype == LNS_F64 ? LNS_F64 : LNS_F32;
}

int lns_typenum(lns_dtype dtype)
{
    static const int typenums[] = {
        [LNS_F32] = NPY_FLOAT, [LNS_F64] = NPY_DOUBLE, [LNS_F16] = NPY_HALF, [LNS_BF16] = NPY_UINT16};
    return typenums[dtype];
}

PyArrayObject *lns_new(int ndim, const npy_intp *shape, int typenum)
{
    return (PyArrayObject *)PyArray_SimpleNew(ndim, shape, typenum);
}

PyArrayObject *lns_copy(PyArrayObject *array)
{
    PyArrayObject *copy = lns_new(PyArray_NDIM(array), PyArray_DIMS(array), PyArray_TYPE(array));
    if (copy != NULL) { /* not PyArray_NewCopy, which may release the GIL or run a subclass's code */
        memcpy(PyArray_DATA(copy), PyArray_DATA(array), (size_t)PyArray_NBYTES(copy));
    }
    return copy;
}

PyArrayObject *lns_new_vector(int64_t d, lns_dtype dtype)
{
    const npy_intp shape[1] = {(npy_intp)d};
    return lns_new(1, shape, lns_typenum(dtype));
}

/* The name of entry k as UTF-8, borrowed from the tuple of names. */
static const char *name_at(const lns_batch *batch, Py_ssize_t k)
{
    return PyUnicode_AsUTF8(PyTuple_GET_ITEM(batch->names, k));
}

static int take_sample(lns_batch *batch, Py_ssize_t k)
{
    const char *name = name_at(batch, k);
    lns_sample *sample = &batch->samples[k];
    if (name == NULL) {
        return 0;
    }
    PyArrayObject *array = lns_array(PyTuple_GET_ITEM(batch->arrays, k), name, 2, LNS_TAKE_ANY, 0);
    if (array == NULL) {
        return 0;
    }
    sample->data = PyArray_DATA(array);
    sample->dtype = lns_dtype_of(array);
    sample->n = PyArray_DIM(array, 0);
    sample->d = PyArray_DIM(array, 1);
    if (sample->n < 1 || sample->d < 1) {
        PyErr_Format(PyExc_ValueError, "%s must have at least one row and one column, got shape (%lld, %lld)", name,
                     (long long)sample->n, (long long)sample->d);
        return 0;
    }
    if (batch->masses != NULL && PyTuple_GET_ITEM(batch->masses, k) != Py_None) {
        PyArrayObject *mass = lns_vector(PyTuple_GET_ITEM(batch->masses, k), "row weights", sample->n, LNS_F64, 0);
        if (mass == NULL) {
            return 0;
        }
        sample->mass = PyArray_DATA(mass);
    }
    return 1;
}

PyObject *lns_tuple(PyObject *object, const char *name)
{
    if (Py_TYPE(object)->tp_iter == NULL && !PySequence_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be a sequence, got %s", name, Py_TYPE(object)->tp_name);
        return NULL;
    }
    return PySequence_Tuple(object);
}

int lns_batch_open(lns_batch *batch, PyObject *arrays, PyObject *names, PyObject *masses, const char *argument)
{
    batch->argument = argument;
    if ((batch->arrays = lns_tuple(arrays, argument)) == NULL || (batch->names = lns_tuple(names, "names")) == NULL ||
        (masses != Py_None && (batch->masses = lns_tuple(masses, "row weights")) == NULL)) {
        return 0;
    }
    batch->count = PyTuple_GET_SIZE(batch->arrays);
    if (PyTuple_GET_SIZE(batch->names) != batch->count ||
        (batch->masses != NULL && PyTuple_GET_SIZE(batch->masses) != batch->count)) {
        PyErr_Format(PyExc_ValueError, "%s: arrays, names and row weights must have one entry a module", argument);
        return 0;
    }
    for (Py_ssize_t k = 0; k < batch->count; k++) {
        if (!PyUnicode_Check(PyTuple_GET_ITEM(batch->names, k))) {
            PyErr_Format(PyExc_TypeError, "%s: names must be str", argument);
            return 0;
        }
    }
    return 1;
}

int lns_batch_open_one(lns_batch *batch, PyObject *array, PyObject *name, PyObject *mass)
{
    PyObject *arrays = PyTuple_Pack(1, array), *names = PyTuple_Pack(1, name), *masses = PyTuple_Pack(1, mass);
    const int done =
        arrays != NULL && names != NULL && masses != NULL && lns_batch_open(batch, arrays, names, masses, "sample");
    Py_XDECREF(arrays);
    Py_XDECREF(names);
    Py_XDECREF(masses);
    return done;
}

int lns_batch_fill(lns_batch *batch, const lns_batch *like)
{
    if (like != NULL && like->count != batch->count) {
        PyErr_Format(PyExc_ValueError, "%s must have %zd entries, one a module, got %zd", batch->argument, like->count,
                     batch->count);
        return 0;
    }
    batch->samples = PyMem_Calloc((size_t)batch->count + 1, sizeof(lns_sample));
    if (batch->samples == NULL) {
        PyErr_NoMemory();
        return 0;
    }
    for (Py_ssize_t k = 0; k < batch->count; k++) {
        if (!take_sample(batch, k)) {
            return 0;
        }
        const lns_sample *sample = &batch->samples[k], *first = like != NULL ? &like->samples[0] : &batch->samples[0];
        if (lns_working(sample->dtype) != lns_working(first->dtype)) {
            PyErr_Format(PyExc_TypeError, "%s: float64 cannot be mixed with other dtypes in one call",
                         name_at(batch, k));
            return 0;
        }
        if (like != NULL && sample->d != like->samples[k].d) {
            PyErr_Format(PyExc_ValueError, "%s has %lld columns, but %s has %lld", name_at(batch, k),
                         (long long)sample->d, name_at(like, k), (long long)like->samples[k].d);
            return 0;
        }
    }
    return 1;
}

void lns_batch_clear(lns_batch *batch)
{
    Py_CLEAR(batch->arrays);
    Py_CLEAR(batch->names);
    Py_CLEAR(batch->masses);
    PyMem_Free(batch->samples);
    batch->samples = NULL;
}

PyObject *lns_new_list(const lns_batch *like, int ndim)
{
    PyObject *list = PyList_New(like->count);
    for (Py_ssize_t k = 0; list != NULL && k < like->count; k++) {
        const lns_sample *s = &like->samples[k];
        const npy_intp shape[2] = {(npy_intp)(ndim == 2 ? s->n : s->d), (npy_intp)s->d};
        PyArrayObject *array = lns_new(ndim, shape, lns_typenum(lns_working(s->dtype)));
        if (array == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SET_ITEM(list, k, (PyObject *)array);
        }
    }
    return list;
}

void *lns_list_data(PyObject *list, Py_ssize_t k)
{
    return list == NULL ? NULL : PyArray_DATA((PyArrayObject *)PyList_GET_ITEM(list, k));
}

/* The pointer that malloc gave stands just before the aligned block. */
void *lns_work_new(int64_t size)
{
    const int64_t align = 64;
    if (size < 0) {
        PyErr_SetString(PyExc_ValueError, "the arrays are too large, or empty");
        return NULL;
    }
    if (size > PY_SSIZE_T_MAX - 2 * align) {
        PyErr_NoMemory();
        return NULL;
    }
    char *base = PyMem_RawMalloc((size_t)(size + 2 * align));
    if (base == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    char *work = (char *)(((uintptr_t)base + 2 * (uintptr_t)align - 1) / (uintptr_t)align * (uintptr_t)align);
    memcpy(work - sizeof base, &base, sizeof base);
    return work;
}

void lns_work_free(void *work)
{
    if (work != NULL) {
        char *base;
        memcpy(&base, (char *)work - sizeof base, sizeof base);
        PyMem_RawFree(base);
    }
}

/* Says what was expected, where the conversion of `object` failed for its type; other errors stay as they are. */
static int wrong_type(PyObject *object, const char *name, const char *expected)
{
    if (PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Format(PyExc_TypeError, "%s must be %s, got %s", name, expected, Py_TYPE(object)->tp_name);
    }
    return 0;
}

int lns_choice(PyObject *object, const char *name, const char *expected, const char *const *choices, int count,
               int *out)
{
    if (!PyUnicode_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be a str, got %s", name, Py_TYPE(object)->tp_name);
        return 0;
    }
    for (int k = 0; k < count; k++) {
        if (PyUnicode_CompareWithASCIIString(object, choices[k]) == 0) {
            *out = k;
            return 1;
        }
    }
    PyErr_Format(PyExc_ValueError, "%s must be %s, got %R", name, expected, object);
    return 0;
}

int lns_int(PyObject *object, const char *name, int64_t least, int64_t most, int64_t *out)
{
    int overflow = 0;
    PyObject *index = PyNumber_Index(object);
    if (index == NULL) {
        return wrong_type(object, name, "an int");
    }
    const long long value = PyLong_AsLongLongAndOverflow(index, &overflow);
    const int fits = overflow == 0 && value >= least && value <= most;
    if (!fits) {
        PyErr_Format(PyExc_ValueError, "%s must be from %lld to %lld, got %S", name, (long long)least, (long long)most,
                     index);
    }
    Py_DECREF(index);
    *out = value;
    return fits;
}

int lns_threads(PyObject *object, int *out)
{
    int64_t value;
    if (!lns_int(object, "threads", 1, INT_MAX, &value)) {
        return 0;
    }
    *out = (int)value;
    return 1;
}

int lns_double(PyObject *object, const char *name, double *out)
{
    *out = PyFloat_AsDouble(object);
    const int failed = *out == -1 && PyErr_Occurred();
    if (failed && !PyErr_ExceptionMatches(PyExc_OverflowError)) { /* which an int beyond all doubles raises */
        return wrong_type(object, name, "a real number");
    }
    if (failed || !Py_IS_FINITE(*out)) {
        PyErr_Format(PyExc_ValueError, "%s must be finite, got %S", name, object);
        return 0;
    }
    return 1;
}

int lns_apart(PyArrayObject *const *arrays, const char *const *names, int written, int count)
{
    for (int i = 0; i < written; i++) {
        const char *begin = PyArray_BYTES(arrays[i]), *end = begin + PyArray_NBYTES(arrays[i]);
        for (int k = i + 1; k < count; k++) {
            const char *other = PyArray_BYTES(arrays[k]);
            if (begin < other + PyArray_NBYTES(arrays[k]) && other < end) {
                PyErr_Format(PyExc_ValueError, "%s and %s must not share memory", names[i], names[k]);
                return 0;
            }
        }
    }
    return 1;
}

PyObject *lns_count_after(int64_t count, int64_t more)
{
    return PyLong_FromLongLong((long long)((uint64_t)count + (uint64_t)more));
}

PyObject *lns_raise(lns_status status, const lns_place *place, const lns_batch *u, const lns_batch *v)
{
    const lns_batch *batch = place->argument == 0 ? u : v;
    const char *name =
        batch != NULL && place->entry < batch->count ? name_at(batch, (Py_ssize_t)place->entry) : "array";
    if (name == NULL) {
        return NULL;
    }
    if (status == LNS_NOT_FINITE || (status == LNS_BAD_MASS && place->row >= 0)) {
        PyObject *value = PyFloat_FromDouble(place->value);
        if (value != NULL && status == LNS_NOT_FINITE) {
            PyErr_Format(PyExc_ValueError, "%s: %S at row %lld, column %lld", name, value, (long long)place->row,
                         (long long)place->column);
        } else if (value != NULL) {
            PyErr_Format(PyExc_ValueError, "%s: %s, got %S for row %lld", name, lns_status_text(status), value,
                         (long long)place->row);
        }
        Py_XDECREF(value);
    } else if (status == LNS_EMPTY_ROW) {
        PyErr_Format(PyExc_ValueError, "mask: row %lld keeps no token", (long long)place->row);
    } else {
        PyErr_Format(PyExc_ValueError, "%s: %s", name, lns_status_text(status));
    }
    return NULL;
}
