/* Status codes of the engine and their English sentences, in one place. */
#ifndef LNS_STATUS_H
#define LNS_STATUS_H

typedef enum lns_status {
    LNS_OK = 0,
    LNS_NOT_FINITE,     /* a sample holds a NaN or an infinity; the place is reported */
    LNS_BAD_SIZE,       /* a size is zero, negative or too large to address */
    LNS_BAD_MASS,       /* row weights: negative, not finite, or without a positive sum */
    LNS_EMPTY_ROW,      /* a row of the mask keeps no token */
    LNS_NO_CONVERGENCE, /* the eigenvalue solver of LAPACK gave up */
    LNS_STATUS_COUNT
} lns_status;

/* An English sentence without a final full stop; never NULL, also for codes that do not exist. */
const char *lns_status_text(lns_status status);

#endif
