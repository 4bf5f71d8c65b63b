/* The inner loops for AVX2 with FMA and F16C. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "kvc.h"

KVC_TARGET("avx2,fma,f16c,bmi2")
/* e4m3 as float16 of a 256th: its exponents' biases are 7 and 15; all ones are NaN. */
static inline __m256 floats_of_fp8s(const uint8_t *p) {
    const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)p));
    const __m128i size = _mm_and_si128(_mm_slli_epi16(x, 7), _mm_set1_epi16(0x3f80));
    const __m128i sign = _mm_and_si128(_mm_slli_epi16(x, 8), _mm_set1_epi16((short)0x8000));
    const __m128i nan = _mm_cmpeq_epi16(size, _mm_set1_epi16(0x3f80));
    const __m128i half = _mm_or_si128(_mm_or_si128(size, sign),
                                      _mm_and_si128(nan, _mm_set1_epi16(0x7e00)));
    return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}

#define KVC_WIDTH 8
#define KVC_FLOATS_OF_FP8S floats_of_fp8s
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
