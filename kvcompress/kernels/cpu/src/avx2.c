/* The inner loops for AVX2 with FMA and F16C. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "kvc.h"

KVC_TARGET("avx2,fma,f16c,bmi2")
#define KVC_WIDTH 8
#define KVC_INTS_OF_BYTES(p) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define KVC_INTS_OF_HALVES(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define KVC_FLOATS_OF_HALVES(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#include "inner.inc.h"
KVC_TARGET_END

const kvc_isa kvc_avx2 = {
    "avx2", 0, dots, keys, values, weigh, settle, logits, maximum, exponentials, scale_by,
    dot, add_scaled, victim, linear8, linear16,
};
#endif
