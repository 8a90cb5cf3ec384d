#include "lineas.h"

static const char *const TEXT[LNS_STATUS_COUNT] = {
    [LNS_OK] = "no error",
    [LNS_NOT_FINITE] = "a value is not finite",
    [LNS_BAD_SIZE] = "a size is zero, negative or too large",
    [LNS_BAD_MASS] = "row weights must be finite, not negative, and have a positive sum",
    [LNS_EMPTY_ROW] = "a row of the mask keeps no token",
    [LNS_NO_CONVERGENCE] = "the eigenvalue solver did not converge",
    [LNS_BAD_TYPE] = "an element type or an option that the function does not take",
    [LNS_OUT_OF_RANGE] = "numbers so large or small that a result is out of range: scale the data",
};

const char *lns_status_text(lns_status status)
{
    if ((int)status < 0 || status >= LNS_STATUS_COUNT) {
        return "unknown status";
    }
    return TEXT[status];
}
