/* Checks of samples, the same for all kernels. */
#ifndef LNS_SAMPLES_H
#define LNS_SAMPLES_H

#include <stddef.h>

#include "lineas.h"

/* Whether the sizes are acceptable. */
int lns_sample_ok(const lns_sample *s);

/* Whether the type is one of the four, with the working type of `like`. */
int lns_sample_typed(const lns_sample *s, const lns_sample *like);

/* Whether row i counts: one of weight 0 is not there, whatever it holds. */
static inline int lns_row_counts(const double *mass, int64_t i)
{
    return mass == NULL || mass[i] > 0;
}

/* Finds the first value of the sample, in row order, that is not finite; sets row, column and value of the place. */
int lns_find_not_finite(const lns_sample *s, lns_place *place);

/* The same among the rows that count. */
int lns_find_not_finite_counted(const lns_sample *s, lns_place *place);

/* Checks row weights; LNS_BAD_MASS with the row in place (row -1: the sum is not positive and finite). */
lns_status lns_check_mass(const lns_sample *s, lns_place *place);

/* Sum of the row weights; the number of rows where they are equal. */
double lns_total_mass(const lns_sample *s);

#endif
