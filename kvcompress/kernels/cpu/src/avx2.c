/* The inner loops for AVX2 with FMA and F16C. */
#if defined(__x86_64__)
#include "kvc.h"

KVC_TARGET("avx2,fma,f16c,bmi2")
#define KVC_WIDTH 8
#include "inner.inc.h"
KVC_TARGET_END

const kvc_isa kvc_avx2 = {
    "avx2", 0,      dots,     weigh,    settle,     halves, logits, maximum,
    exponentials, scale_by, dot, add_scaled, seen, victim, linear8,
};
#endif
