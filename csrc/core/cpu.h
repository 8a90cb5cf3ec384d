/* Which build of the vectorised kernels runs: chosen by lns_cpu_init, read at each call of a kernel. */
#ifndef LNS_CPU_H
#define LNS_CPU_H

typedef enum lns_cpu_variant { LNS_CPU_PORTABLE, LNS_CPU_AVX2, LNS_CPU_AVX512, LNS_CPU_COUNT } lns_cpu_variant;

lns_cpu_variant lns_cpu(void);

/* LNS_PORTABLE leaves the other variants out. */
#if !defined(LNS_PORTABLE) && defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define LNS_HAVE_X86 1
#else
#define LNS_HAVE_X86 0
#endif

/* Functions between one of these lines and LNS_TARGET_END are compiled for the instruction set. FMA stays off: all
 * variants give the same bits. */
#if LNS_HAVE_X86 && defined(__clang__)
#define LNS_TARGET_AVX2 _Pragma("clang attribute push(__attribute__((target(\"avx2\"))), apply_to = function)")
#define LNS_TARGET_AVX512                                                                                              \
    _Pragma(                                                                                                           \
        "clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl\"))), apply_to = function)")
#define LNS_TARGET_END _Pragma("clang attribute pop")
#elif LNS_HAVE_X86
#define LNS_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2\")")
#define LNS_TARGET_AVX512 _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl\")")
#define LNS_TARGET_END _Pragma("GCC pop_options")
#endif

#endif
