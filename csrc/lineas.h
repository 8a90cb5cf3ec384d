/* lineas: the C contract of the engine.
 *
 * Activation statistics, quantile Wasserstein losses and gradients, affine maps, proximal steps and closed-form maps.
 * Plain C11, to be included from C or C++; this header needs no other of the engine. Nothing here knows Python. No
 * function allocates memory, and none keeps state but lns_cpu_init; all may be called from any thread at the same time.
 *
 * Conventions
 *   real      the working type: double for LNS_F64, else float. Arrays described as "real" have the working type of the
 *             samples that they belong to and are passed as void *.
 *   sizes     int64_t; n, m rows (samples), d columns (neurons). All matrices are row-major without gaps.
 *   work      memory of at least lns_..._worksize(...) bytes for the same sizes and threads, 64-byte aligned; no
 *             meaning on return. A worksize of -1 says that the sizes are not acceptable (LNS_BAD_SIZE) or do not fit
 *             into memory.
 *   threads   upper bound of threads, >= 1. Results never depend on it, nor on the CPU variant in use.
 *   outputs   written only on LNS_OK unless said otherwise; they must not overlap the inputs unless "in place" is said.
 *   status    LNS_BAD_SIZE, and LNS_BAD_TYPE from functions that take types or options, can come from every function
 *             that returns a status; the others are named at each function.
 *   place     may be NULL; where given, it tells the position of the offending value for LNS_NOT_FINITE,
 *             LNS_BAD_MASS and LNS_EMPTY_ROW.
 *   subnormal numbers keep their value, also where the caller has told the processor to take them for zero (FTZ and
 * DAZ, or FZ); that mode is in place again on return.
 */
#ifndef LINEAS_H
#define LINEAS_H

#include <stdint.h>

/* Public functions stay visible where -fvisibility=hidden hides all others. Who compiles the engine into a library of
 * their own, and does not want to hand its functions on, defines LNS_API as nothing, as the Python extension does. */
#ifndef LNS_API
#ifdef __GNUC__
#define LNS_API __attribute__((visibility("default")))
#else
#define LNS_API
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- version and status ---- */

#define LNS_VERSION_MAJOR 0
#define LNS_VERSION_MINOR 1
#define LNS_VERSION_PATCH 0
#define LNS_VERSION "0.1.0"

/* LNS_VERSION of the library in use, which can be another one than that of the header. */
LNS_API const char *lns_version(void);

/* What a function returns: anything but LNS_OK is a refusal. */
typedef enum lns_status {
    LNS_OK = 0,
    LNS_NOT_FINITE,     /* a sample holds a NaN or an infinity; the place is reported */
    LNS_BAD_SIZE,       /* a size is zero, negative or too large to address */
    LNS_BAD_MASS,       /* row weights: negative, not finite, or without a positive sum */
    LNS_EMPTY_ROW,      /* a row of the mask keeps no token */
    LNS_NO_CONVERGENCE, /* the eigenvalue solver of LAPACK gave up */
    LNS_BAD_TYPE,       /* an element type or an option that the function does not take */
    LNS_OUT_OF_RANGE,   /* numbers so large or small that a result does not fit into its type */
    LNS_STATUS_COUNT
} lns_status;

/* An English sentence without a final full stop; never NULL, also for codes that do not exist. */
LNS_API const char *lns_status_text(lns_status status);

/* ---- samples ---- */

typedef enum lns_dtype { LNS_F32, LNS_F64, LNS_F16, LNS_BF16 } lns_dtype;

/* A sample of n activations of d neurons. */
typedef struct lns_sample {
    const void *data; /* [n, d] of dtype, not modified */
    lns_dtype dtype;
    int64_t n, d;       /* both >= 1 */
    const double *mass; /* [n] weight of each row, >= 0, any finite positive sum (normalised inside); NULL = equal */
} lns_sample;

/* Where something was found. */
typedef struct lns_place {
    int64_t entry; /* index in the batch */
    int argument;  /* 0: first array argument (u, source, weight gradient), 1: second (v, target, bias gradient) */
    int64_t row, column;
    double value;
} lns_place;

/* ---- processor ---- */

/* Chooses the kernel variant: "portable", "avx2" or "avx512"; NULL or "" = the best this CPU runs. Returns 0, or -1
 * where `forced` is unknown or the CPU cannot run it (the choice then stays as it was). Until it is called, kernels are
 * the portable ones. It may be called again and by several threads at once, also while kernels run: the last choice
 * holds for the calls that follow, and results are the same bits in every variant. */
LNS_API int lns_cpu_init(const char *forced);

/* Name of the variant in use. */
LNS_API const char *lns_cpu_name(void);

/* ---- sort.c: column sort ---- */

/* Work memory for lns_sort. */
LNS_API int64_t lns_sort_worksize(const lns_sample *samples, int64_t count, int threads);

/* out[k] [n_k, d_k] real, overwritten: the columns of samples[k], each ascending; -0 comes before +0. masses are not
 * looked at. All samples share one working type. LNS_NOT_FINITE: a NaN or infinity (out then has no meaning). */
LNS_API lns_status lns_sort(const lns_sample *samples, int64_t count, int threads, void *work, void *const *out,
                            lns_place *place);

/* ---- wasserstein.c: quantile W2 ---- */

/* One module: W_j = integral over (0, 1) of (F^-1_u(t) - F^-1_v(t))^2 dt for every neuron j, u = weight * z + bias. */
typedef struct lns_w2_job {
    lns_sample u;       /* z; identity map where weight is NULL */
    lns_sample v;       /* same d */
    const void *weight; /* [d] real, or NULL together with bias */
    const void *bias;   /* [d] real */
    void *value;        /* [d] real, overwritten: W_j */
    void *grad_u;       /* [n, d] real, overwritten: dW_j / dz_ij; NULL = not wanted */
    void *grad_weight;  /* [d] real, overwritten: dW_j / dweight_j; NULL = not wanted */
    void *grad_bias;    /* [d] real, overwritten: dW_j / dbias_j; NULL = not wanted */
} lns_w2_job;

LNS_API int64_t lns_wasserstein_worksize(const lns_w2_job *jobs, int64_t count, int threads);

/* v_sorted: the columns of every v ascend already (not checked; v has no mass then). Entries of u that are equal within
 * a column share the mean of their target quantiles in the gradient, so that it does not depend on their order. Rows of
 * weight 0 are not there, whatever they hold: their gradient is 0. For float samples, an entry of grad_u is within 64 *
 * 2^-24 of the sum over its share of (0, 1) of 2 |F^-1_u - F^-1_v|, whatever n and m; in double 64 * 2^-53 (n + m with
 * masses). A value or gradient that exceeds the working type is an infinity, and only then. LNS_NOT_FINITE: a NaN or
 * infinity in z, weight * z + bias or v. LNS_BAD_MASS. */
LNS_API lns_status lns_wasserstein(const lns_w2_job *jobs, int64_t count, int v_sorted, int threads, void *work,
                                   lns_place *place);

/* ---- transport.c: closed-form maps ---- */

typedef enum lns_method { LNS_MEAN, LNS_GAUSSIAN, LNS_LINEAR, LNS_MOMENTS } lns_method;

typedef struct lns_fit_job {
    lns_sample source, target; /* same d, at least 2 rows each */
    void *weight, *bias;       /* [d] real, overwritten: the map z -> weight * z + bias; not for LNS_MOMENTS */
    double *moments;           /* [5, d], overwritten, for LNS_MOMENTS alone */
} lns_fit_job;

LNS_API int64_t lns_fit_worksize(const lns_fit_job *jobs, int64_t count, int threads);

/* LNS_MEAN: weight 1, bias mean(v) - mean(u). LNS_GAUSSIAN: weight sd(v) / sd(u), the means matched; ddof = 1, with
 * masses the weighted population variance. LNS_LINEAR: least squares of the target quantiles on the source quantiles.
 * A constant column of the source gets weight 1 and the mean shift; constant up to rounding: the variance of the
 * population is at most n e var + (n e mean)^2 + (s mean)^2 with e = 2^-52, as scikit-learn has it for sums in double,
 * and s the step of the source's type (2^-23, 2^-52, 2^-10 for LNS_F16, 2^-7 for LNS_BF16). Shifts go with the weights
 * as they are stored. Rows of weight 0 are not there, whatever they hold, and not among the n. Samples may have any
 * scale: a map is an infinity only where it exceeds the working type. LNS_MOMENTS: no map, but what the linear one and
 * every sparse one depend on: mean u, mean v, var u, cov(u, v) and var v of the paired quantiles (of the population;
 * var u and cov exactly 0 for a constant column; infinities where squares exceed double, 0 where they are below it).
 * LNS_NOT_FINITE, LNS_BAD_MASS. */
LNS_API lns_status lns_fit(const lns_fit_job *jobs, int64_t count, lns_method method, int threads, void *work,
                           lns_place *place);

/* ---- gaussian.c: covariances and the map between Gaussians ---- */

LNS_API int64_t lns_covariance_worksize(int64_t n, int64_t d);

/* mean [d] and covariance [d, d] (symmetric), overwritten. ddof = 1 (n >= 2); with mass the weighted population
 * covariance. Products by BLAS. LNS_NOT_FINITE, LNS_BAD_MASS; LNS_OUT_OF_RANGE (outputs then have no meaning): a
 * covariance is too large for a double. One too small for a double is 0. */
LNS_API lns_status lns_covariance(const lns_sample *sample, void *work, double *mean, double *covariance,
                                  lns_place *place);

LNS_API int64_t lns_bures_map_worksize(int64_t d);

/* map [d, d], overwritten: the symmetric A with A (source + ridge I) A = target + ridge I (the optimal transport map
 * between Gaussians, Dowson and Landau 1982). Directions in which the source has no variance (eigenvalue at most
 * d * 2^-52 times the largest) are mapped to zero: of all A that take the others to the target, the one of least norm.
 * source, target [d, d] symmetric, not modified. LNS_NOT_FINITE, LNS_NO_CONVERGENCE; LNS_OUT_OF_RANGE (map then has no
 * meaning): an entry of A is too large for a double. */
LNS_API lns_status lns_bures_map(const double *source, const double *target, int64_t d, double ridge, void *work,
                                 double *map);

/* ---- path.c: the sparse path ---- */

/* One module. Point k holds the minimum over weight >= 0 and bias of
 *     sum_j W_j + penalty_k * (ratio * (|weight - 1|_1 + |bias|_1)
 *                              + (1 - ratio) * sqrt(d) * (|weight - 1|_2 + |bias|_2))
 * with W_j the squared W2 of weight * u + bias against v. */
typedef struct lns_path_job {
    int64_t d;
    const double *moments;  /* [5, d] of LNS_MOMENTS, finite, variances >= 0, not modified */
    const double *held_out; /* the same of held-out data, or NULL */
    lns_dtype dtype;        /* LNS_F32 or LNS_F64: of weight and bias */
    void *weight, *bias;    /* point k at [k * stride], d entries each, overwritten */
    int64_t stride;         /* >= d */
    double *loss;           /* [K], overwritten: sum_j W_j */
    double *held_out_loss;  /* [K], overwritten: of the held-out data; NULL where there are none */
    double *distance;       /* [K], overwritten: Euclidean distance of 0 to the subdifferential */
    int64_t *support;       /* [K], overwritten: neurons with weight != 1 or bias != 0 */
    double largest;         /* from lns_path_largest: scale of the tolerance */
} lns_path_job;

LNS_API int64_t lns_path_worksize(const lns_path_job *jobs, int64_t count, int64_t points, int threads);

/* The smallest penalty at which the map of the moments [5, d] is the identity; ratio in [0, 1]. work: as lns_path with
 * one job on one thread. */
LNS_API double lns_path_largest(const double *moments, int64_t d, double ratio, void *work);

/* penalties [points], finite and > 0, best in falling order: each point starts from the one before it. The distance is
 * below 1e-9 of the largest penalty unless rounding forbids it, as where means are 10^7 standard deviations.
 * LNS_OUT_OF_RANGE: a mean above 2^150, a variance above 2^300, a largest penalty not within 2^-300 and 2^300 (nor 0),
 * or, where ratio < 1, a penalty below 2^-300: products of them do not fit into a double. */
LNS_API lns_status lns_path(const lns_path_job *jobs, int64_t count, const double *penalties, int64_t points,
                            double ratio, int threads, void *work);

/* ---- affine.c: a map at a strength ---- */

LNS_API int64_t lns_affine_worksize(int64_t outer, int64_t d, int64_t inner);

/* out = scale * z + shift with scale = 1 where weight is 1, else (1 - s) + s * weight; shift = s * bias, on
 * z [outer, d, inner]. weight, bias [d] real. out: z's dtype and shape, overwritten, rounded once. */
LNS_API lns_status lns_affine(const void *z, lns_dtype dtype, int64_t outer, int64_t d, int64_t inner,
                              const void *weight, const void *bias, double strength, int threads, void *work,
                              void *out);

/* Gradients of lns_affine. grad_out: z's dtype and shape, not modified. grad_z: the same, overwritten, or NULL = not
 * wanted. grad_weight, grad_bias [d] real, overwritten. */
LNS_API lns_status lns_affine_backward(const void *z, lns_dtype dtype, int64_t outer, int64_t d, int64_t inner,
                                       const void *weight, double strength, const void *grad_out, int threads,
                                       void *work, void *grad_z, void *grad_weight, void *grad_bias);

/* ---- pool.c: masked pooling over tokens ---- */

typedef enum lns_pooling { LNS_POOL_MEAN, LNS_POOL_MIN, LNS_POOL_MAX, LNS_POOL_LAST, LNS_POOL_ALL } lns_pooling;

/* x [batch, tokens, d] of dtype; mask [batch, tokens], nonzero = real token, or NULL = all real.
 * out [batch, d] real, for LNS_POOL_ALL [number of real tokens, d], overwritten. index [batch, d], overwritten for
 * LNS_POOL_MIN and _MAX (LNS_BAD_TYPE where it is NULL): the token that won, the first one at ties; a NaN wins.
 * LNS_EMPTY_ROW (place->row): a row without a real token, except for LNS_POOL_ALL. A mean is finite
 * where its tokens are. */
LNS_API lns_status lns_pool(const void *x, lns_dtype dtype, int64_t batch, int64_t tokens, int64_t d,
                            const uint8_t *mask, lns_pooling mode, int threads, void *out, int32_t *index,
                            lns_place *place);

/* Gradient of lns_pool. grad_out: out's shape, dtype LNS_F32 or LNS_F64. index: as lns_pool wrote it, each entry in
 * [0, tokens) (LNS_BAD_SIZE otherwise). grad_x [batch, tokens, d], grad_out's dtype, overwritten. LNS_EMPTY_ROW. */
LNS_API lns_status lns_pool_backward(const void *grad_out, lns_dtype dtype, int64_t batch, int64_t tokens, int64_t d,
                                     const uint8_t *mask, lns_pooling mode, const int32_t *index, int threads,
                                     void *grad_x, lns_place *place);

/* ---- moments.c: streaming statistics ---- */

typedef struct lns_moments {
    int64_t count;      /* rows seen */
    double *mean;       /* [d] */
    double *m2;         /* [d] sum of squared deviations from the mean */
    double *low, *high; /* [d] smallest and largest value; +inf and -inf at the start */
} lns_moments;

LNS_API int64_t lns_moments_worksize(int64_t n, int64_t d);

/* Merges the rows of the sample into the state (updated only on LNS_OK). Where 256 rows or more come at once, narrow
 * types are summed in float around the mean of their first rows: the variance is then exact to 1e-7 of itself (3e-7
 * where single values make it up) and the mean to 1e-7 standard deviations. Fewer rows, float64, squares that leave the
 * range of a float, and columns whose mean wanders off: in double. m2 is infinite where it is out of the range of a
 * double, and 0 where it is too small for one; the others are right all the same. LNS_NOT_FINITE. */
LNS_API lns_status lns_moments_update(const lns_sample *sample, int threads, void *work, lns_moments *state,
                                      lns_place *place);

/* Merges `other` (not modified) into the state (Chan, Golub and LeVeque 1979). */
LNS_API lns_status lns_moments_merge(lns_moments *state, const lns_moments *other, int64_t d);

/* ---- quantiles.c: streaming quantiles ---- */

enum { LNS_MOST_SLOTS = 64 };

/* A summary of the distribution of every column, in memory that does not grow with the rows seen. It keeps some of the
 * values in slots; what a slot's rows stand for is the same in all columns. At the start weight, open, filled and error
 * are 0, and the moments as lns_moments wants them; keys need no value. */
typedef struct lns_quantiles {
    lns_dtype dtype;                /* LNS_F32 or LNS_F64: of the values kept */
    int64_t d, slots;               /* columns >= 1; slots, 2 to LNS_MOST_SLOTS */
    int64_t rows;                   /* of a slot: a power of two from 32 to 2^20 */
    void *keys;                     /* [ceil(d / L), slots, rows, L], L = 16 (LNS_F32) or 8 (LNS_F64) */
    int64_t weight[LNS_MOST_SLOTS]; /* rows seen that each row of a slot stands for, a power of two; 0 = free */
    int64_t open, filled; /* the slot that takes new rows (its weight is 0) and how many it has; 0 = no slot */
    int64_t error;        /* below any value are at most so many rows more, or fewer, than told */
    lns_moments moments;  /* of all rows seen */
} lns_quantiles;

/* For lns_quantiles_update with n rows; for lns_quantiles_merge with n = the other's lns_quantiles_held, or 1 if that
 * is 0. */
LNS_API int64_t lns_quantiles_worksize(const lns_quantiles *state, int64_t n, int threads);

/* Takes the rows of the sample in. All values are kept while slots * rows rows or fewer have been seen. Afterwards,
 * whenever a slot is wanted, two of equal weight are merged and neighbours in the merged order replaced by their mean.
 * That changes the number of rows below a value by their weight at most: `error` adds it up. LNS_BAD_SIZE: the summary
 * would have seen more than (2^(slots - 1) - 1) * rows rows. LNS_BAD_TYPE: not the working type of the state.
 * LNS_NOT_FINITE. The state is updated only on LNS_OK. */
LNS_API lns_status lns_quantiles_update(const lns_sample *sample, int threads, void *work, lns_quantiles *state,
                                        lns_place *place);

/* Takes in what `other` (not modified, not the state itself; of the same dtype, d and rows) has seen; the errors of
 * both add up. LNS_BAD_SIZE and LNS_BAD_TYPE as above. */
LNS_API lns_status lns_quantiles_merge(const lns_quantiles *other, int threads, void *work, lns_quantiles *state);

/* Rows that the state holds; -1 where it is not a state. */
LNS_API int64_t lns_quantiles_held(const lns_quantiles *state);

/* The state as a weighted sample: out [held, d] of its dtype, in no order that columns share, and weights [held], their
 * sum the number of rows seen; both overwritten. */
LNS_API lns_status lns_quantiles_rows(const lns_quantiles *state, int threads, void *out, double *weights);

LNS_API int64_t lns_quantiles_read_worksize(const lns_quantiles *state, int threads);

/* out [count, d] of the state's dtype, overwritten. With ranks [count], ascending, from 1 to the number of rows seen:
 * the values of these ranks. Without (NULL): the means of the quantile function over `count` equal parts of [0, 1]. */
LNS_API lns_status lns_quantiles_read(const lns_quantiles *state, const int64_t *ranks, int64_t count, int threads,
                                      void *work, void *out);

/* ---- prox.c: sparse-group lasso ---- */

/* out [d] = prox of tau (l1 ||.||_1 + group sqrt(d) ||.||_2) at x [d], dtype LNS_F32 or LNS_F64. In place allowed.
 * NaN in x shows in out: everywhere where tau * group is not 0. */
LNS_API lns_status lns_prox(const void *x, lns_dtype dtype, int64_t d, double tau, double l1, double group, void *out);

typedef struct lns_adam {
    void *m_weight, *v_weight, *m_bias, *v_bias; /* [D] real, updated in place */
    int64_t step;                                /* number of this step, from 1 */
    double beta1, beta2, eps;
} lns_adam;

typedef struct lns_step_problem {
    lns_dtype dtype;                     /* LNS_F32 or LNS_F64: type of all arrays below */
    int64_t modules;                     /* L */
    const int64_t *offsets;              /* [L + 1], from 0, strictly ascending, to D */
    void *weight, *bias;                 /* [D], updated in place */
    const void *grad_weight, *grad_bias; /* [D], not modified */
    double lr;
    double l1, group;           /* penalties of weight - 1 */
    double l1_bias, group_bias; /* penalties of bias */
    const lns_adam *adam;       /* NULL = plain SGD */
} lns_step_problem;

/* A gradient step at rate lr, then the prox with tau = lr on each module's weight - 1 and bias. per_module [L, 2]
 * doubles, overwritten: the module's penalty after the step and its number of neurons with weight != 1 or bias != 0.
 * LNS_NOT_FINITE: a gradient that is not finite (place: module, argument 0 weight or 1 bias, column); nothing changed.
 */
LNS_API lns_status lns_step(const lns_step_problem *problem, int threads, double *per_module, lns_place *place);

#ifdef __cplusplus
}
#endif

#endif
