#include "core/cpu.h"

#include <stdatomic.h>
#include <string.h>

#include "lineas.h"

static const char *const NAMES[LNS_CPU_COUNT] = {
    [LNS_CPU_PORTABLE] = "portable", [LNS_CPU_AVX2] = "avx2", [LNS_CPU_AVX512] = "avx512"};

/* An lns_cpu_variant. Atomic, since threads may choose while others read; no order with other memory is needed, as
 * nothing else is written along with it. */
static atomic_int chosen = LNS_CPU_PORTABLE;

static int runs_here(lns_cpu_variant variant)
{
#if LNS_HAVE_X86
    if (variant == LNS_CPU_AVX2) {
        return __builtin_cpu_supports("avx2") != 0;
    }
    if (variant == LNS_CPU_AVX512) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
#endif
    return variant == LNS_CPU_PORTABLE;
}

int lns_cpu_init(const char *forced)
{
    const int any = forced == NULL || forced[0] == '\0';
    for (int variant = LNS_CPU_COUNT - 1; variant >= 0; variant--) {
        if (runs_here((lns_cpu_variant)variant) && (any || strcmp(forced, NAMES[variant]) == 0)) {
            atomic_store_explicit(&chosen, variant, memory_order_relaxed);
            return 0;
        }
    }
    return -1;
}

lns_cpu_variant lns_cpu(void)
{
    return (lns_cpu_variant)atomic_load_explicit(&chosen, memory_order_relaxed);
}

const char *lns_cpu_name(void)
{
    return NAMES[lns_cpu()];
}
