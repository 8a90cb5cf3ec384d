#include "kernels/samples.h"

#include <math.h>

#include "core/sizes.h"
#include "kernels/simd/load.h"

int lns_sample_ok(const lns_sample *s)
{
    return s->n >= 1 && s->d >= 1 && lns_mul(lns_mul(s->n, s->d), 8) >= 0;
}

int lns_sample_typed(const lns_sample *s, const lns_sample *like)
{
    return (unsigned)s->dtype <= (unsigned)LNS_BF16 && lns_is_double(s->dtype) == lns_is_double(like->dtype);
}

static int find_not_finite(const lns_sample *s, const double *mass, lns_place *place)
{
    for (int64_t i = 0; i < s->n; i++) {
        for (int64_t j = 0; lns_row_counts(mass, i) && j < s->d; j++) {
            const double value = lns_value(s->data, s->dtype, i * s->d + j);
            if (!isfinite(value)) {
                place->row = i;
                place->column = j;
                place->value = value;
                return 1;
            }
        }
    }
    return 0;
}

int lns_find_not_finite(const lns_sample *s, lns_place *place)
{
    return find_not_finite(s, NULL, place);
}

int lns_find_not_finite_counted(const lns_sample *s, lns_place *place)
{
    return find_not_finite(s, s->mass, place);
}

lns_status lns_check_mass(const lns_sample *s, lns_place *place)
{
    double sum = 0;
    if (s->mass == NULL) {
        return LNS_OK;
    }
    for (int64_t i = 0; i < s->n; i++) {
        if (!(s->mass[i] >= 0) || !isfinite(s->mass[i])) {
            place->row = i;
            place->value = s->mass[i];
            return LNS_BAD_MASS;
        }
        sum += s->mass[i];
    }
    if (!(sum > 0) || !isfinite(sum)) {
        place->row = -1;
        place->value = sum;
        return LNS_BAD_MASS;
    }
    return LNS_OK;
}

double lns_total_mass(const lns_sample *s)
{
    double sum = 0;
    for (int64_t i = 0; s->mass != NULL && i < s->n; i++) {
        sum += s->mass[i];
    }
    return s->mass != NULL ? sum : (double)s->n;
}
