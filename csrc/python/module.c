/* The extension lineas._core: slots and method table, nothing else. */
#define LNS_IMPORTS_NUMPY
#include "python/functions.h"

#include <pthread.h>

#include "core/blas.h"

static PyObject *py_cpu(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyUnicode_FromString(lns_cpu_name());
}

static PyObject *py_blas(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyUnicode_FromString(LNS_OPENBLAS(get_config)());
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    METHOD(sort_columns),
    METHOD(wasserstein),
    METHOD(fit_local),
    METHOD(quantile_moments),
    METHOD(covariance),
    METHOD(bures_map),
    METHOD(affine_apply),
    METHOD(affine_backward),
    METHOD(pool),
    METHOD(pool_backward),
    METHOD(moments_update),
    METHOD(moments_merge),
    METHOD(quantiles_update),
    METHOD(quantiles_merge),
    METHOD(quantiles_rows),
    METHOD(quantiles_read),
    METHOD(prox_sparse_group),
    METHOD(step),
    METHOD(largest_penalty),
    METHOD(sparse_path),
    {"cpu", py_cpu, METH_NOARGS, NULL},
    {"blas", py_blas, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

/* Chooses the variant of the kernels, once a process: on a second import other threads may be using the engine, so it
 * stays as it is. Returns 0 where LINEAS_CPU, handed in, names no variant that runs here. */
static int prepare_engine(const char *forced)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* two modules can be executed at once without a GIL */
    static int ready = 0;
    pthread_mutex_lock(&lock);
    if (!ready && lns_cpu_init(forced) == 0) {
        /* Two BLAS pools in one process spin against each other; the engine splits its work itself. */
        LNS_OPENBLAS(set_num_threads)(1);
        ready = 1;
    }
    const int done = ready;
    pthread_mutex_unlock(&lock);
    return done;
}

static int execute(PyObject *module)
{
    (void)module;
    const char *forced = getenv("LINEAS_CPU");
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
        PyErr_SetString(PyExc_ImportError, "lineas cannot be imported in a sub-interpreter");
        return -1;
    }
    if (PyArray_ImportNumPyAPI() < 0) {
        return -1;
    }
    if (!prepare_engine(forced)) {
        PyErr_Format(PyExc_ImportError,
                     "LINEAS_CPU must name a variant that this processor runs (portable, avx2 or avx512), got %s",
                     forced);
        return -1;
    }
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)(uintptr_t)execute}, /* by way of an integer: ISO C has no direct conversion */
#if PY_VERSION_HEX >= 0x030c0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#if PY_VERSION_HEX >= 0x030d0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "lineas._core",
    .m_doc = "The engine of lineas. Private: use the functions of the package.",
    .m_size = 0,
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&definition);
}
