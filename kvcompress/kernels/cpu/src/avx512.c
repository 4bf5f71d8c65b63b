/* The inner loops for AVX-512 with VNNI: codes are multiplied as integers.
 *
 * A query, or the weights of 64 values, become 16-bit integers in two parts of 8 bits; `dpbusd`
 * multiplies each part with the codes as they lie in memory, four products to a sum. The error is
 * that of a 16-bit rounding of the query, far below that of 8-bit codes.
 */
#if defined(__x86_64__)
#include <immintrin.h>

#include "kvc.h"

KVC_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2")
#define KVC_WIDTH 16
#define KVC_INTS_OF_BYTES(p) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define KVC_INTS_OF_HALVES(p) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p)))
#define KVC_FLOATS_OF_HALVES(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#include "inner.inc.h"

/* The first `count` of 64 bytes. */
static inline __mmask64 first_bytes(int count) {
    return count >= 64 ? ~0ull : (1ull << count) - 1;
}

/* sum + products of unsigned with signed bytes, four to a lane. The intrinsic copies its sum into
 * another register each time (GCC 12). */
static inline __attribute__((always_inline)) __m512i multiply_add(__m512i sum, __m512i bytes, __m512i with) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "vm"(with));
    return sum;
}

/* 64 rows of nibbles, or fewer, as rows of bytes in the order of the channels. */
static void unpack_nibbles(const kvc_codes *c, int64_t first, int64_t count, uint8_t *restrict out) {
    const int part = c->dim / 2;
    const __m512i nibble = _mm512_set1_epi8(15);
    const uint8_t *row = (const uint8_t *)c->data + first * c->row_bytes;
    int64_t t = 0;
    for (; part == 32 && t + 2 <= count; t += 2, row += 64) { /* two rows at a time */
        const __m512i x = _mm512_loadu_si512(row), low = _mm512_and_si512(x, nibble);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(x, 4), nibble);
        _mm512_storeu_si512(out + t * 64, _mm512_shuffle_i64x2(low, high, 0x44));
        _mm512_storeu_si512(out + t * 64 + 64, _mm512_shuffle_i64x2(low, high, 0xee));
    }
    for (; t < count; t++, row += c->row_bytes) {
        uint8_t *to = out + t * c->dim;
        for (int i = 0; i < part; i += 64) {
            const __mmask64 some = first_bytes(part - i);
            const __m512i x = _mm512_maskz_loadu_epi8(some, row + i);
            const __m512i low = _mm512_and_si512(x, nibble);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(x, 4), nibble);
            if (some == ~0ull) { /* a plain store is several times faster than a masked one */
                _mm512_storeu_si512(to + i, low);
                _mm512_storeu_si512(to + part + i, high);
            } else {
                _mm512_mask_storeu_epi8(to + i, some, low);
                _mm512_mask_storeu_epi8(to + part + i, some, high);
            }
        }
    }
}

/* The 4 × 4 blocks of 32 bits in each quarter, transposed: lane t of quarter L of vector j is the
 * channels 16 L + 4 j to 16 L + 4 j + 3 of token t, which `dpbusd` multiplies and adds. */
typedef struct {
    __m512i v[4];
} four_rows;

static inline four_rows by_channels(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
    const __m512i AB = _mm512_unpackhi_epi32(a, b), CD = _mm512_unpackhi_epi32(c, d);
    four_rows f = {{_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd),
                    _mm512_unpacklo_epi64(AB, CD), _mm512_unpackhi_epi64(AB, CD)}};
    return f;
}

/* Lane 4 g + t: the sum over the quarters of lane t of a[g]. */
static inline __m512i over_quarters(const __m512i *a) {
    const __m512i x = _mm512_add_epi32(_mm512_shuffle_i32x4(a[0], a[1], 0x88),
                                       _mm512_shuffle_i32x4(a[0], a[1], 0xdd));
    const __m512i y = _mm512_add_epi32(_mm512_shuffle_i32x4(a[2], a[3], 0x88),
                                       _mm512_shuffle_i32x4(a[2], a[3], 0xdd));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
}

/* Add the channels from i on of 4 rows, whose loads are given, to the sums of one or two query rows. */
static inline __attribute__((always_inline)) void add_group(__m512i a, __m512i b, __m512i c, __m512i d, const __m512i high[2][4],
                             const __m512i low[2][4], int pair, int first, int group,
                             __m512i sum[2][KVC_TILE / 4]) {
    const four_rows f = by_channels(a, b, c, d);
    for (int k = 0; k <= pair; k++) {
        __m512i h = _mm512_setzero_si512(), l = h;
        for (int j = 0; j < 4; j++) {
            h = multiply_add(h, f.v[j], high[k][j]);
            l = multiply_add(l, f.v[j], low[k][j]);
        }
        l = _mm512_add_epi32(_mm512_slli_epi32(h, 8), l);
        sum[k][group] = first ? l : _mm512_add_epi32(sum[k][group], l);
    }
}

enum { AHEAD_BYTES = 2048 }; /* memory is asked for this far ahead of where it is read */

/* Ask for 64 channels of 4 rows that lie ahead; all at once they would wait for one another. */
static inline __attribute__((always_inline)) void fetch_rows(const uint8_t *p, int64_t row_bytes) {
    for (int i = 0; i < 4; i++) _mm_prefetch((const char *)p + i * row_bytes + AHEAD_BYTES, _MM_HINT_T0);
}

/* Query row r and, if `pair`, r + 1 over up to 64 rows of bytes. A query's 64 channels stay in
 * registers while they meet all rows. */
static inline __attribute__((always_inline)) void dots_of_tile(const uint8_t *rows, int64_t count, int dim, int fetch,
                                                               const kvc_query *q, int r, int pair,
                                                               float *out, int64_t stride) {
    __m512i high[2][4], low[2][4], sum[2][KVC_TILE / 4];
    const __m512i zero = _mm512_setzero_si512();
    const int64_t groups = (count + 3) / 4, whole = count / 4;
    if (count % 16) memset(sum, 0, sizeof sum);
    for (int i = 0; i < dim; i += 64) {
        const __mmask64 some = first_bytes(dim - i);
        for (int k = 0; k <= pair; k++)
            for (int j = 0; j < 4; j++) {
                const int64_t at = (int64_t)(r + k) * 4 * q->padded + 4 * i + 64 * j;
                high[k][j] = _mm512_load_si512(q->high + at);
                low[k][j] = _mm512_load_si512(q->low + at);
            }
        const uint8_t *p = rows + i;
        for (int64_t g = 0; g < whole; g++, p += 4 * dim) {
            if (fetch) fetch_rows(p, dim);
            add_group(_mm512_maskz_loadu_epi8(some, p), _mm512_maskz_loadu_epi8(some, p + dim),
                      _mm512_maskz_loadu_epi8(some, p + 2 * dim),
                      _mm512_maskz_loadu_epi8(some, p + 3 * dim), high, low, pair, i == 0, (int)g, sum);
        }
        if (whole < groups)
            add_group(_mm512_maskz_loadu_epi8(some, p),
                      count % 4 > 1 ? _mm512_maskz_loadu_epi8(some, p + dim) : zero,
                      count % 4 > 2 ? _mm512_maskz_loadu_epi8(some, p + 2 * dim) : zero, zero, high, low,
                      pair, i == 0, (int)whole, sum);
    }
    for (int k = 0; k <= pair; k++)
        for (int64_t t = 0; t < count; t += 16) {
            const __m512 x = _mm512_cvtepi32_ps(over_quarters(sum[k] + t / 4));
            _mm512_mask_storeu_ps(out + k * stride + t,
                                  count - t >= 16 ? 0xffff : (__mmask16)((1u << (count - t)) - 1),
                                  _mm512_fmadd_ps(x, _mm512_set1_ps(q->unit[r + k]),
                                                  _mm512_set1_ps(q->rest[r + k])));
        }
}

static int integer(const kvc_codes *c) {
    return (c->dtype == KVC_INT8 || c->dtype == KVC_INT4) && c->dim <= 256;
}

static void dots_vnni(const kvc_codes *c, int64_t first, int64_t n, const kvc_query *q, float *out,
                      int64_t stride, uint8_t *tile) {
    if (!integer(c)) {
        dots(c, first, n, q, out, stride, tile);
        return;
    }
    for (int64_t from = 0; from < n; from += KVC_TILE) {
        const int64_t count = n - from < KVC_TILE ? n - from : KVC_TILE;
        const uint8_t *rows = (const uint8_t *)c->data + (first + from) * c->row_bytes;
        if (c->dtype == KVC_INT4) {
            unpack_nibbles(c, first + from, count, tile);
            rows = tile;
        }
        for (int r = 0; r < q->rows; r += 2) {
            float *to = out + r * stride + from;
            const int fetch = r == 0 && c->dtype == KVC_INT8;
            if (r + 1 < q->rows) dots_of_tile(rows, count, c->dim, fetch, q, r, 1, to, stride);
            else dots_of_tile(rows, count, c->dim, fetch, q, r, 0, to, stride);
        }
    }
}

/* ---- values
 * 4 rows of 64 codes are interleaved so that each 32-bit lane holds one channel of 4 tokens; lane e
 * of quarter L of vector j is channel 16 L + 4 j + e, an order that `settle_vnni` undoes. */
static inline four_rows interleave(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
    const __m512i AB = _mm512_unpackhi_epi8(a, b), CD = _mm512_unpackhi_epi8(c, d);
    four_rows f = {{_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd),
                    _mm512_unpacklo_epi16(AB, CD), _mm512_unpackhi_epi16(AB, CD)}};
    return f;
}

/* Add 64 tokens, or fewer, of up to 64 channels to the sums of one or two query rows. */
static inline __attribute__((always_inline)) void weigh_tile(const uint8_t *rows, int64_t row_bytes, int64_t count, int fetch, __mmask64 some,
                              const int32_t *high, const int32_t *low, const float *unit,
                              const float *rest, int pair, float *sum, int64_t sum_stride) {
    __m512i h[2][4], l[2][4];
    for (int r = 0; r <= pair; r++)
        for (int j = 0; j < 4; j++) h[r][j] = l[r][j] = _mm512_setzero_si512();
    const __m512i zero = _mm512_setzero_si512();
    for (int64_t t = 0; t < count; t += 4) {
        const uint8_t *p = rows + t * row_bytes;
        const int64_t left = count - t;
        if (fetch) fetch_rows(p, row_bytes);
        const four_rows f = interleave(
            _mm512_maskz_loadu_epi8(some, p),
            left > 1 ? _mm512_maskz_loadu_epi8(some, p + row_bytes) : zero,
            left > 2 ? _mm512_maskz_loadu_epi8(some, p + 2 * row_bytes) : zero,
            left > 3 ? _mm512_maskz_loadu_epi8(some, p + 3 * row_bytes) : zero);
        for (int r = 0; r <= pair; r++) {
            const __m512i wh = _mm512_set1_epi32(high[r * (KVC_TILE / 4) + t / 4]);
            const __m512i wl = _mm512_set1_epi32(low[r * (KVC_TILE / 4) + t / 4]);
            for (int j = 0; j < 4; j++) {
                h[r][j] = multiply_add(h[r][j], f.v[j], wh);
                l[r][j] = multiply_add(l[r][j], f.v[j], wl);
            }
        }
    }
    for (int r = 0; r <= pair; r++)
        for (int j = 0; j < 4; j++) {
            float *to = sum + r * sum_stride + 16 * j;
            const __m512 x = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(h[r][j], 8), l[r][j]));
            const __m512 before = _mm512_add_ps(_mm512_loadu_ps(to), _mm512_set1_ps(rest[r]));
            _mm512_storeu_ps(to, _mm512_fmadd_ps(x, _mm512_set1_ps(unit[r]), before));
        }
}

/* 64 weights, or fewer, none of them negative, as 15-bit integers: unit · (256 high + low). `rest` is
 * what they leave out in sum, times the middle of the codes. */
static inline float split_weights(const float *weight, int64_t count, int8_t *high, int8_t *low,
                                  float middle, float *rest) {
    __m512 top = _mm512_setzero_ps(), sum = top, x[4];
    __m512i held = _mm512_setzero_si512();
    for (int i = 0; i < 4; i++) {
        const int64_t left = count - 16 * i;
        const __mmask16 some = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
        x[i] = _mm512_maskz_loadu_ps(some, weight + 16 * i);
        top = _mm512_max_ps(top, x[i]);
        sum = _mm512_add_ps(sum, x[i]);
    }
    const float most = _mm512_reduce_max_ps(top);
    const __m512 factor = _mm512_set1_ps(most > 0 ? 32639.0f / most : 0.0f);
    for (int i = 0; i < 4; i++) {
        const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(x[i], factor));
        held = _mm512_add_epi32(held, v);
        const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
        const __m512i l = _mm512_sub_epi32(v, _mm512_slli_epi32(h, 8));
        _mm_storeu_si128((__m128i *)(high + 16 * i), _mm512_cvtepi32_epi8(h));
        _mm_storeu_si128((__m128i *)(low + 16 * i), _mm512_cvtepi32_epi8(l));
    }
    const float unit = most / 32639.0f;
    *rest = middle * _mm512_reduce_add_ps(_mm512_fnmadd_ps(_mm512_cvtepi32_ps(held), _mm512_set1_ps(unit), sum));
    return unit;
}

static void weigh_vnni(const kvc_codes *c, int64_t first, int64_t n, int32_t low, int32_t width,
                       const float *weight, int64_t stride, int32_t rows, float *sum,
                       int64_t sum_stride, uint8_t *tile) {
    if (!integer(c)) {
        weigh(c, first, n, low, width, weight, stride, rows, sum, sum_stride, tile);
        return;
    }
    int32_t high_parts[2 * KVC_TILE / 4], low_parts[2 * KVC_TILE / 4];
    for (int64_t from = 0; from < n; from += KVC_TILE) {
        const int64_t count = n - from < KVC_TILE ? n - from : KVC_TILE;
        const uint8_t *codes = (const uint8_t *)c->data + (first + from) * c->row_bytes;
        int64_t row_bytes = c->row_bytes;
        if (c->dtype == KVC_INT4) {
            unpack_nibbles(c, first + from, count, tile);
            codes = tile, row_bytes = c->dim;
        }
        for (int r = 0; r < rows; r += 2) {
            const int pair = r + 1 < rows, fetch = r == 0 && c->dtype == KVC_INT8;
            float unit[2] = {0, 0}, rest[2] = {0, 0};
            for (int j = 0; j <= pair; j++)
                unit[j] = split_weights(weight + (r + j) * stride + from, count,
                                        (int8_t *)(high_parts + j * (KVC_TILE / 4)),
                                        (int8_t *)(low_parts + j * (KVC_TILE / 4)), kvc_middle(c), rest + j);
            if (unit[0] == 0 && unit[1] == 0) continue;
            for (int i = 0; i < width; i += 64) {
                float *to = sum + r * sum_stride + 2 * low + i;
                const __mmask64 some = first_bytes(width - i);
                if (pair)
                    weigh_tile(codes + low + i, row_bytes, count, fetch, some, high_parts, low_parts, unit, rest,
                               1, to, sum_stride);
                else
                    weigh_tile(codes + low + i, row_bytes, count, fetch, some, high_parts, low_parts, unit, rest,
                               0, to, sum_stride);
            }
        }
    }
}

static void settle_vnni(const kvc_codes *c, int32_t low, int32_t width, int32_t rows, float *sum,
                        int64_t sum_stride) {
    if (!integer(c)) return;
    float ordered[KVC_MAX_DIM];
    for (int r = 0; r < rows; r++) {
        const float *from = sum + r * sum_stride + 2 * low;
        for (int i = 0; i < width; i++) {
            const int lane = i / 16 % 4, j = i / 4 % 4, e = i % 4;
            ordered[i] = from[i / 64 * 64 + 16 * j + 4 * lane + e];
        }
        memcpy(sum + r * sum_stride + low, ordered, (size_t)width * sizeof(float));
    }
}

/* ---- int8 weights: activations as 16-bit integers above an offset, in two parts of 8 bits */
enum { ROWS = 8 };

/* Lane r: the sum of the lanes of a[r], for 8 vectors. */
static inline __m256 sums_of_8(const __m512 *a) {
    __m512 b[4], c[2];
    for (int i = 0; i < 4; i++)
        b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]),
                             _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[2 * i]), _mm512_castps_pd(b[2 * i + 1]))),
            _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[2 * i]), _mm512_castps_pd(b[2 * i + 1]))));
    const __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                                   _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
    const __m512 y = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    return _mm512_castps512_ps256(_mm512_shuffle_f32x4(y, y, 0x08));
}

typedef struct {
    const int8_t *w;                            /* [rows, inner] */
    int64_t inner;
    int rows;
    const float *scale;                         /* [rows] */
    const int32_t *row_sum;                     /* [rows] */
} weight_rows;

static inline __m512 joined(__m512i high, __m512i low) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
}

/* Σ w x = unit (Σ w v − 32768 Σ w) + shift Σ w, from the lanes of Σ w v of each row. */
static inline void write_rows(const weight_rows *b, const __m512 *sum, float unit, float shift, float *y) {
    const __mmask8 some = (__mmask8)((1u << b->rows) - 1);
    const __m256 offset = _mm256_cvtepi32_ps(_mm256_maskz_loadu_epi32(some, b->row_sum));
    __m256 x = _mm256_fnmadd_ps(offset, _mm256_set1_ps(32768.0f), sums_of_8(sum));
    x = _mm256_fmadd_ps(x, _mm256_set1_ps(unit), _mm256_mul_ps(offset, _mm256_set1_ps(shift)));
    _mm256_mask_storeu_ps(y, some, _mm256_mul_ps(x, _mm256_maskz_loadu_ps(some, b->scale)));
}

/* One row of activations. The weights are read in the order in which they lie in memory, which is how
 * a processor reads memory fastest. */
static inline void linear8_in_order(const weight_rows *b, const uint8_t *high, const uint8_t *low,
                                    float unit, float shift, float *y) {
    __m512 sum[ROWS];
    const __m512i zero = _mm512_setzero_si512();
    const int8_t *w = b->w;
    const int64_t inner = b->inner, whole = inner / 128 * 128;
    for (int r = 0; r < ROWS; r++) sum[r] = _mm512_setzero_ps();
    for (int r = 0; r < b->rows; r++, w += inner) {
        __m512i h0 = zero, h1 = zero, l0 = zero, l1 = zero;
        int64_t k = 0;
        for (; k < whole; k += 128) {
            const __m512i p = _mm512_loadu_si512(w + k), q = _mm512_loadu_si512(w + k + 64);
            _mm_prefetch((const char *)w + k + AHEAD_BYTES, _MM_HINT_T0);
            _mm_prefetch((const char *)w + k + AHEAD_BYTES + 64, _MM_HINT_T0);
            h0 = multiply_add(h0, _mm512_load_si512(high + k), p);
            l0 = multiply_add(l0, _mm512_load_si512(low + k), p);
            h1 = multiply_add(h1, _mm512_load_si512(high + k + 64), q);
            l1 = multiply_add(l1, _mm512_load_si512(low + k + 64), q);
        }
        for (; k < inner; k += 64) {
            const __mmask64 some = first_bytes(inner - k < 64 ? (int)(inner - k) : 64);
            const __m512i p = _mm512_maskz_loadu_epi8(some, w + k);
            h0 = multiply_add(h0, _mm512_load_si512(high + k), p);
            l0 = multiply_add(l0, _mm512_load_si512(low + k), p);
        }
        sum[r] = joined(_mm512_add_epi32(h0, h1), _mm512_add_epi32(l0, l1));
    }
    write_rows(b, sum, unit, shift, y);
}

/* One or two rows of activations with 8 rows of weights, which the first-level cache holds by now. */
static inline __attribute__((always_inline)) void linear8_cached(const weight_rows *b, int pair,
                                                                 const uint8_t *high, const uint8_t *low,
                                                                 int64_t stride, const float *unit,
                                                                 const float *shift, float *y,
                                                                 int64_t y_stride) {
    __m512i h[2][ROWS], l[2][ROWS];
    const int64_t inner = b->inner;
    for (int i = 0; i <= pair; i++)
        for (int r = 0; r < ROWS; r++) h[i][r] = l[i][r] = _mm512_setzero_si512();
    for (int64_t k = 0; k < inner; k += 64) {
        __m512i xh[2], xl[2];
        for (int i = 0; i <= pair; i++) {
            xh[i] = _mm512_load_si512(high + i * stride + k);
            xl[i] = _mm512_load_si512(low + i * stride + k);
        }
        const __mmask64 some = first_bytes(inner - k < 64 ? (int)(inner - k) : 64);
        for (int r = 0; r < ROWS; r++) {
            const __m512i w = _mm512_maskz_loadu_epi8(some, b->w + r * inner + k);
            for (int i = 0; i <= pair; i++) {
                h[i][r] = multiply_add(h[i][r], xh[i], w);
                l[i][r] = multiply_add(l[i][r], xl[i], w);
            }
        }
    }
    for (int i = 0; i <= pair; i++) {
        __m512 sum[ROWS];
        for (int r = 0; r < ROWS; r++) sum[r] = joined(h[i][r], l[i][r]);
        write_rows(b, sum, unit[i], shift[i], y + i * y_stride);
    }
}

static void linear8_vnni(const int8_t *w, int64_t first, int64_t stop, int64_t inner,
                         const float *scale, const int32_t *row_sum, const float *x,
                         const uint8_t *high, const uint8_t *low, const float *unit,
                         const float *shift, int64_t m, float *y, int64_t y_stride) {
    (void)x;
    const int64_t stride = (inner + 63) / 64 * 64;
    for (int64_t n = first; n < stop; n += ROWS) {
        const int rows = stop - n < ROWS ? (int)(stop - n) : ROWS;
        const weight_rows b = {w + n * inner, inner, rows, scale + n, row_sum + n};
        linear8_in_order(&b, high, low, unit[0], shift[0], y + n);
        int64_t i = 1;
        for (; rows == ROWS && i + 1 < m; i += 2)
            linear8_cached(&b, 1, high + i * stride, low + i * stride, stride, unit + i, shift + i,
                           y + i * y_stride + n, y_stride);
        for (; i < m; i++)
            linear8_in_order(&b, high + i * stride, low + i * stride, unit[i], shift[i],
                             y + i * y_stride + n);
    }
}

/* ---- bfloat16 weights: of 32 in a vector those of odd channels are floats already, once the others'
 * bits are cleared, and those of even channels a shift away */
static inline __attribute__((always_inline)) void linear16_rows(const uint16_t *w, int64_t inner, int rows,
                                                                int pair, int fetch, const float *even,
                                                                const float *odd, int64_t stride, float *y,
                                                                int64_t y_stride) {
    __m512 sum[2][ROWS];
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    for (int i = 0; i <= pair; i++)
        for (int r = 0; r < ROWS; r++) sum[i][r] = _mm512_setzero_ps();
    for (int r = 0; r < rows; r++, w += inner) {
        __m512 a[2], b[2];
        for (int i = 0; i <= pair; i++) a[i] = b[i] = _mm512_setzero_ps();
        int64_t k = 0;
        for (; k + 32 <= inner; k += 32) {
            const __m512i x = _mm512_loadu_si512(w + k);
            if (fetch) _mm_prefetch((const char *)(w + k) + AHEAD_BYTES, _MM_HINT_T0);
            const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
            const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(x, upper));
            for (int i = 0; i <= pair; i++) {
                a[i] = _mm512_fmadd_ps(low, _mm512_loadu_ps(even + i * stride + k / 2), a[i]);
                b[i] = _mm512_fmadd_ps(high, _mm512_loadu_ps(odd + i * stride + k / 2), b[i]);
            }
        }
        if (k < inner) {
            const __m512i x = _mm512_maskz_loadu_epi16((__mmask32)((1ull << (inner - k)) - 1), w + k);
            const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
            const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(x, upper));
            for (int i = 0; i <= pair; i++) {
                a[i] = _mm512_fmadd_ps(low, _mm512_loadu_ps(even + i * stride + k / 2), a[i]);
                b[i] = _mm512_fmadd_ps(high, _mm512_loadu_ps(odd + i * stride + k / 2), b[i]);
            }
        }
        for (int i = 0; i <= pair; i++) sum[i][r] = _mm512_add_ps(a[i], b[i]);
    }
    for (int i = 0; i <= pair; i++)
        _mm256_mask_storeu_ps(y + i * y_stride, (__mmask8)((1u << rows) - 1), sums_of_8(sum[i]));
}

static void linear16_wide(const uint16_t *w, int32_t dtype, int64_t first, int64_t stop, int64_t inner,
                          const float *x, const float *even, const float *odd, int64_t half_stride,
                          int64_t m, float *y, int64_t y_stride) {
    if (dtype != KVC_BF16) {
        linear16(w, dtype, first, stop, inner, x, even, odd, half_stride, m, y, y_stride);
        return;
    }
    for (int64_t n = first; n < stop; n += ROWS) {
        const int rows = stop - n < ROWS ? (int)(stop - n) : ROWS;
        for (int64_t i = 0; i < m; i += 2) {
            const float *e = even + i * half_stride, *o = odd + i * half_stride;
            float *to = y + i * y_stride + n;
            if (i + 1 < m)
                linear16_rows(w + n * inner, inner, rows, 1, i == 0, e, o, half_stride, to, y_stride);
            else
                linear16_rows(w + n * inner, inner, rows, 0, i == 0, e, o, half_stride, to, y_stride);
        }
    }
}
KVC_TARGET_END

const kvc_isa kvc_avx512 = {
    "avx512-vnni", 1,   dots_vnni, weigh_vnni, settle_vnni, logits, maximum, exponentials,
    scale_by, dot, add_scaled, victim, linear8_vnni, linear16_wide,
};
#endif
