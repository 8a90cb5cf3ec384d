/* The functions of the module, one wrapper file a kernel file. Signatures: lineas/_core.pyi. */
#ifndef LNS_FUNCTIONS_H
#define LNS_FUNCTIONS_H

#include "python/args.h"

#define LNS_FUNCTION(name) PyObject *py_##name(PyObject *module, PyObject *const *args, Py_ssize_t count)

LNS_FUNCTION(sort_columns);
LNS_FUNCTION(wasserstein);
LNS_FUNCTION(fit_local);
LNS_FUNCTION(quantile_moments);
LNS_FUNCTION(covariance);
LNS_FUNCTION(bures_map);
LNS_FUNCTION(affine_apply);
LNS_FUNCTION(affine_backward);
LNS_FUNCTION(pool);
LNS_FUNCTION(pool_backward);
LNS_FUNCTION(moments_update);
LNS_FUNCTION(moments_merge);
LNS_FUNCTION(quantiles_update);
LNS_FUNCTION(quantiles_merge);
LNS_FUNCTION(quantiles_rows);
LNS_FUNCTION(quantiles_read);
LNS_FUNCTION(prox_sparse_group);
LNS_FUNCTION(step);
LNS_FUNCTION(largest_penalty);
LNS_FUNCTION(sparse_path);

#endif
