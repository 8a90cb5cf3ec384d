/* Planted errors: `make asan` fails unless the sanitizers report each of them. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "overflow") == 0) {
        /* Through a volatile pointer, so that only AddressSanitizer can know the size behind it. */
        float *volatile row = malloc(4 * sizeof *row);
        if (row == NULL) {
            return 2;
        }
        row[4] = 1.0f;
        printf("not reported: %g\n", (double)row[4]);
        free(row);
    } else if (argc == 2 && strcmp(argv[1], "undefined") == 0) {
        int count = INT_MAX - 2;
        printf("not reported: %d\n", count + argc + 1);
    } else {
        fprintf(stderr, "usage: canary overflow|undefined\n");
        return 2;
    }
    return 0;
}
