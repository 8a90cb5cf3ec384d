/* The only file that knows how CBLAS and LAPACK are spelled. */
#ifndef LNS_BLAS_H
#define LNS_BLAS_H

#include <cblas.h>

/* The scipy-openblas wheels prefix every symbol with scipy_; their cblas.h already declares it that way. */
#ifdef LNS_BLAS_SCIPY
#define LNS_CBLAS(f) scipy_cblas_##f
#define LNS_LAPACK(f) scipy_##f##_
#define LNS_OPENBLAS(f) scipy_openblas_##f
#else
#define LNS_CBLAS(f) cblas_##f
#define LNS_LAPACK(f) f##_
#define LNS_OPENBLAS(f) openblas_##f
#endif

/* LAPACK: eigenvalues and -vectors of a symmetric matrix by divide and conquer (Fortran interface). */
extern void LNS_LAPACK(dsyevd)(const char *jobz, const char *uplo, const int *n, double *a, const int *lda, double *w,
                               double *work, const int *lwork, int *iwork, const int *liwork, int *info);

#endif
