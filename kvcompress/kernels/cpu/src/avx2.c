/* The inner loops for AVX2 with FMA and F16C. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

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

/* 16 levels as floats. */
static inline void store_levels(__m128i table, __m128i place, float *out) {
    const __m128i level = _mm_shuffle_epi8(table, place);
    _mm256_storeu_ps(out, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(level)));
    _mm256_storeu_ps(out + 8, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(level, 8))));
}

/* A row of levels as floats; 0 where its channels do not fill whole registers. */
static int floats_of_levels(const kvc_codes *c, const uint8_t *row, float *out) {
    const int dim = c->dim, part = c->dtype == KVC_ROT4 ? dim / 2 : dim / 4;
    const __m128i biased = _mm_loadu_si128((const __m128i *)kvc_levels[c->dtype - KVC_ROT4]);
    const __m128i table = _mm_xor_si128(biased, _mm_set1_epi8((char)0x80));
    if (part % 16) return 0;
    if (c->dtype == KVC_ROT4) {
        const __m128i nibble = _mm_set1_epi8(15);
        for (int i = 0; i < part; i += 16) {
            const __m128i x = _mm_loadu_si128((const __m128i *)(row + i));
            store_levels(table, _mm_and_si128(x, nibble), out + i);
            store_levels(table, _mm_and_si128(_mm_srli_epi16(x, 4), nibble), out + part + i);
        }
        return 1;
    }
    const __m128i pair = _mm_set1_epi8(3), four = _mm_set1_epi8(4);
    const __m128i bit = _mm_set1_epi64x((long long)0x8040201008040201ull);
    const __m128i spread = _mm_set_epi8(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    for (int i = 0; i < part; i += 16) {
        __m128i x = _mm_loadu_si128((const __m128i *)(row + i));
        for (int k = 0; k < 4; k++, x = _mm_srli_epi16(x, 2)) {
            __m128i place = _mm_and_si128(x, pair);
            if (c->dtype == KVC_ROT3) {
                uint16_t third;
                memcpy(&third, row + part + (k * part + i) / 8, 2);
                const __m128i bits = _mm_shuffle_epi8(_mm_cvtsi32_si128(third), spread);
                const __m128i set = _mm_cmpeq_epi8(_mm_and_si128(bits, bit), bit);
                place = _mm_or_si128(place, _mm_and_si128(set, four));
            }
            store_levels(table, place, out + k * part + i);
        }
    }
    return 1;
}

#define KVC_WIDTH 8
#define KVC_FLOATS_OF_LEVELS floats_of_levels
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
