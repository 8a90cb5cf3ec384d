/* Checks of samples, the same for all kernels. */
#ifndef LNS_SAMPLES_H
#define LNS_SAMPLES_H

#include "lineas.h"

/* Whether the sizes are acceptable. */
int lns_sample_ok(const lns_sample *s);

/* Finds the first value of the sample, in row order, that is not finite; sets row, column and value of the place. */
int lns_find_not_finite(const lns_sample *s, lns_place *place);

/* Checks row weights; LNS_BAD_MASS with the row in place (row -1: the sum is not positive and finite). */
lns_status lns_check_mass(const lns_sample *s, lns_place *place);

/* Sum of the row weights; the number of rows where they are equal. */
double lns_total_mass(const lns_sample *s);

#endif
