/* Which instruction sets there are here, and the kernels of each. */
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "qk.h"

const qk_kernels *qk_kernels_of(int level) {
#if defined(__x86_64__)
    if (level == QK_AVX512) return &qk_avx512;
    if (level == QK_AVX2) return &qk_avx2;
#endif
    (void)level;
    return &qk_plain;
}

#if defined(__x86_64__)
/* Compilers learned to ask for F16C by name late; virtual machines may hide it alone. */
static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

/* The best instruction set of this processor and operating system. */
int32_t qk_best_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        return QK_AVX512;
    if (avx2) return QK_AVX2;
#endif
    return QK_PLAIN;
}
