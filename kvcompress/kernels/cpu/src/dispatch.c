/* Which instruction set is used. */
#include <string.h>

#include "kvc.h"

static const kvc_isa *chosen;

static int runs(const kvc_isa *isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == &kvc_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
    if (isa == &kvc_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("bmi2");
#endif
    return isa == &kvc_portable;
}

static const kvc_isa *const known[] = {
#if defined(__x86_64__)
    &kvc_avx512, &kvc_avx2,
#endif
    &kvc_portable,
};
enum { KNOWN = sizeof known / sizeof *known };

const kvc_isa *kvc_current(void) {
    for (int i = 0; !chosen && i < KNOWN; i++)
        if (runs(known[i])) chosen = known[i];
    return chosen;
}

KVC_EXPORT int32_t kvc_multiplies_bf16(void) {
#if defined(__x86_64__)
    return kvc_current() == &kvc_avx512 && __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 0;
#endif
}

/* Name of the instruction set in use. */
KVC_EXPORT const char *kvc_isa_name(void) { return kvc_current()->name; }

/* Use another one; 0 if this processor has it. For tests and measurements. */
KVC_EXPORT int32_t kvc_use_isa(const char *name) {
    for (int i = 0; i < KNOWN; i++)
        if (!strcmp(known[i]->name, name) && runs(known[i])) {
            chosen = known[i];
            return 0;
        }
    return -1;
}
