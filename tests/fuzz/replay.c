/* Runs the fuzzing harness on files, one input each, without a fuzzer: for compilers that have none. */
#include "fuzz.h"

int main(int argc, char **argv)
{
    static uint8_t input[1 << 16];
    for (int k = 1; k < argc; k++) {
        FILE *file = fopen(argv[k], "rb");
        if (file == NULL) {
            perror(argv[k]);
            return 2;
        }
        const size_t size = fread(input, 1, sizeof input, file);
        fclose(file);
        /* A copy of exactly its size: reading past the input would show. */
        uint8_t *copy = malloc(size + (size == 0));
        if (copy == NULL) {
            return 2;
        }
        memcpy(copy, input, size);
        if (getenv("LNS_REPLAY_NAMES") != NULL) {
            fprintf(stderr, "%s\n", argv[k]);
        }
        LLVMFuzzerTestOneInput(copy, size);
        free(copy);
    }
    printf("%d inputs replayed\n", argc - 1);
    return argc > 1 ? 0 : 2;
}
