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
/* e4m3 as float16 of a 256th: its exponents' biases are 7 and 15; all ones are NaN. */
static inline __m512 floats_of_fp8s(const uint8_t *p) {
    const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
    const __m256i size = _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(0x3f80));
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi16(x, 8), _mm256_set1_epi16((short)0x8000));
    const __m256i nan = _mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x3f80));
    const __m256i half = _mm256_or_si256(_mm256_or_si256(size, sign),
                                         _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
}

#define KVC_WIDTH 16
#define KVC_FLOATS_OF_FP8S floats_of_fp8s
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

/* 64 rows of nibbles, or fewer, as rows of bytes in the order of the channels; with a table, as it has
 * them. */
static inline __attribute__((always_inline)) void unpack_nibbles(const kvc_codes *c, int64_t first, int64_t count,
                                                                 int look_up, __m512i table,
                                                                 uint8_t *restrict out) {
    const int part = c->dim / 2;
    const __m512i nibble = _mm512_set1_epi8(15);
    const uint8_t *row = (const uint8_t *)c->data + first * c->row_bytes;
    int64_t t = 0;
    for (; part == 32 && t + 2 <= count; t += 2, row += 64) { /* two rows at a time */
        const __m512i x = _mm512_loadu_si512(row);
        __m512i low = _mm512_and_si512(x, nibble), high = _mm512_and_si512(_mm512_srli_epi16(x, 4), nibble);
        if (look_up) low = _mm512_shuffle_epi8(table, low), high = _mm512_shuffle_epi8(table, high);
        _mm512_storeu_si512(out + t * 64, _mm512_shuffle_i64x2(low, high, 0x44));
        _mm512_storeu_si512(out + t * 64 + 64, _mm512_shuffle_i64x2(low, high, 0xee));
    }
    for (; t < count; t++, row += c->row_bytes) {
        uint8_t *to = out + t * c->dim;
        for (int i = 0; i < part; i += 64) {
            const __mmask64 some = first_bytes(part - i);
            const __m512i x = _mm512_maskz_loadu_epi8(some, row + i);
            __m512i low = _mm512_and_si512(x, nibble), high = _mm512_and_si512(_mm512_srli_epi16(x, 4), nibble);
            if (look_up) low = _mm512_shuffle_epi8(table, low), high = _mm512_shuffle_epi8(table, high);
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

/* 64 rows of levels, or fewer, as rows of the bytes of `kvc_levels` in the order of the channels. */
static void unpack_levels(const kvc_codes *c, int64_t first, int64_t count, uint8_t *restrict out) {
    const int dim = c->dim, part = dim / (c->dtype == KVC_ROT4 ? 2 : 4);
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)kvc_levels[c->dtype - KVC_ROT4]));
    const uint8_t *row = (const uint8_t *)c->data + first * c->row_bytes;
    const __m512i pair = _mm512_set1_epi8(3), four = _mm512_set1_epi8(4);
    if (c->dtype == KVC_ROT4) {
        unpack_nibbles(c, first, count, 1, table, out);
        return;
    }
    if (part != 16 && part != 32) {
        for (int64_t t = 0; t < count; t++) levels_of(c, row + t * c->row_bytes, out + t * dim);
        return;
    }
    const __m512i quarters = _mm512_set_epi64(6, 6, 4, 4, 2, 2, 0, 0);
    const __m512i low_halves = _mm512_set_epi64(2, 2, 2, 2, 0, 0, 0, 0);
    const __m512i high_halves = _mm512_set_epi64(6, 6, 6, 6, 4, 4, 4, 4);
    for (int64_t t = 0; t < count; t++, row += c->row_bytes)
        for (int i = 0; i < dim; i += 64) {
            __m512i x;
            if (part == 16)
                x = _mm512_srlv_epi64(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)row)), quarters);
            else
                x = _mm512_srlv_epi64(_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)row)),
                                      i ? high_halves : low_halves);
            x = _mm512_and_si512(x, pair);
            if (c->dtype == KVC_ROT3) {
                uint64_t third;
                memcpy(&third, row + part + i / 8, 8);
                x = _mm512_or_si512(x, _mm512_maskz_mov_epi8((__mmask64)third, four));
            }
            _mm512_storeu_si512(out + t * dim + i, _mm512_shuffle_epi8(table, x));
        }
}

/* The codes of a tile, a byte each. */
static inline const uint8_t *bytes_of(const kvc_codes *c, int64_t slot, int64_t count, uint8_t *tile,
                                      int64_t *row_bytes) {
    *row_bytes = c->dim;
    if (c->dtype == KVC_INT8) return (const uint8_t *)c->data + slot * c->row_bytes;
    if (c->dtype == KVC_INT4) unpack_nibbles(c, slot, count, 0, _mm512_setzero_si512(), tile);
    else unpack_levels(c, slot, count, tile);
    return tile;
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

enum { AHEAD_BYTES = 6144 }; /* memory is asked for this far ahead of where it is read */

/* Ask for 64 channels of 4 rows that lie ahead; all at once they would wait for one another. */
static inline __attribute__((always_inline)) void fetch_rows(const uint8_t *p, int64_t row_bytes) {
    for (int i = 0; i < 4; i++) _mm_prefetch((const char *)p + i * row_bytes + AHEAD_BYTES, _MM_HINT_T1);
}

/* Query row r and, if `pair`, r + 1 over up to 64 rows of bytes. A query's 64 channels stay in
 * registers while they meet all rows. */
static inline __attribute__((always_inline)) void sums_of_tile(const uint8_t *rows, int64_t count, int dim,
                                                               int fetch, const kvc_query *q, int r, int pair,
                                                               __m512i sum[2][KVC_TILE / 4]) {
    __m512i high[2][4], low[2][4];
    const __m512i zero = _mm512_setzero_si512();
    const int64_t groups = (count + 3) / 4, whole = count / 4;
    if (count % 16) memset(sum, 0, 2 * sizeof sum[0]);
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
}

/* The first of up to 16 numbers. */
static inline __mmask16 first_of_16(int64_t count) {
    return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1);
}

/* Products of query r + k with 16 rows from t on, whose sums are given. */
static inline __m512 product(const __m512i sum[2][KVC_TILE / 4], const kvc_query *q, int r, int k, int64_t t) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(over_quarters(sum[k] + t / 4)), _mm512_set1_ps(q->unit[r + k]),
                           _mm512_set1_ps(q->rest[r + k]));
}

static inline __attribute__((always_inline)) void dots_of_tile(const uint8_t *rows, int64_t count, int dim,
                                                               const kvc_query *q, int r, int pair,
                                                               float *out, int64_t stride) {
    __m512i sum[2][KVC_TILE / 4];
    sums_of_tile(rows, count, dim, 0, q, r, pair, sum);
    for (int k = 0; k <= pair; k++)
        for (int64_t t = 0; t < count; t += 16)
            _mm512_mask_storeu_ps(out + k * stride + t, first_of_16(count - t), product(sum, q, r, k, t));
}

static inline __m512 halves_or(const uint16_t *x, __mmask16 some, float otherwise) {
    return x ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, x)) : _mm512_set1_ps(otherwise);
}

/* The tile from token `from` on, as logits; `top` [2] takes the largest. */
static inline __attribute__((always_inline)) void keys_of_tile(const uint8_t *rows, int64_t from, int64_t count,
                                                               int dim, int fetch, const kvc_query *q,
                                                               const kvc_sight *s, int r, int pair, float *out,
                                                               int64_t stride, __m512 *top) {
    __m512i sum[2][KVC_TILE / 4];
    const __m512i first = _mm512_set1_epi32(s->first < 0 ? 0 : s->first);
    const __m512 hidden = _mm512_set1_ps(-INFINITY);
    sums_of_tile(rows, count, dim, fetch, q, r, pair, sum);
    for (int64_t t = 0; t < count; t += 16) {
        const __mmask16 some = first_of_16(count - t);
        const __m512 scale = halves_or(s->scale ? s->scale + from + t : NULL, some, 1.0f);
        const __m512 minimum = halves_or(s->minimum ? s->minimum + from + t : NULL, some, 0.0f);
        const __m512i position = _mm512_maskz_loadu_epi32(some, s->position + from + t);
        const __mmask16 seen = _mm512_mask_cmpge_epi32_mask(some, position, first);
        for (int k = 0; k <= pair; k++) {
            const __m512 shift = _mm512_fmadd_ps(minimum, _mm512_set1_ps(q->sum[r + k]),
                                                 _mm512_set1_ps(s->offset[r + k]));
            __m512 x = _mm512_fmadd_ps(product(sum, q, r, k, t), scale, shift);
            if (s->softcap > 0) x = (__m512)capped((vf)x, s->softcap);
            x = _mm512_mask_blend_ps(seen, hidden, x);
            _mm512_mask_storeu_ps(out + k * stride + from + t, some, x);
            top[k] = _mm512_max_ps(top[k], x);
        }
    }
}

static int integer(const kvc_codes *c) {
    return c->dtype >= KVC_INT8 && c->dtype != KVC_FP8 && c->dim <= 256;
}

static void dots_vnni(const kvc_codes *c, int64_t first, int64_t n, const kvc_query *q, float *out,
                      int64_t stride, uint8_t *tile) {
    if (!integer(c)) {
        dots(c, first, n, q, out, stride, tile);
        return;
    }
    for (int64_t from = 0; from < n; from += KVC_TILE) {
        const int64_t count = n - from < KVC_TILE ? n - from : KVC_TILE;
        int64_t row_bytes;
        const uint8_t *rows = bytes_of(c, first + from, count, tile, &row_bytes);
        for (int r = 0; r < q->rows; r += 2) {
            float *to = out + r * stride + from;
            if (r + 1 < q->rows) dots_of_tile(rows, count, c->dim, q, r, 1, to, stride);
            else dots_of_tile(rows, count, c->dim, q, r, 0, to, stride);
        }
    }
}

static void keys_vnni(const kvc_codes *c, int64_t first, int64_t n, const kvc_query *q, const kvc_sight *s,
                      float *out, int64_t stride, const kvc_part *m, uint8_t *tile) {
    if (!integer(c)) {
        keys(c, first, n, q, s, out, stride, m, tile);
        return;
    }
    __m512 top[KVC_MAX_ROWS + 1];
    for (int r = 0; r < q->rows; r++) top[r] = _mm512_set1_ps(-INFINITY);
    for (int64_t from = 0; from < n; from += KVC_TILE) {
        const int64_t count = n - from < KVC_TILE ? n - from : KVC_TILE;
        int64_t row_bytes;
        const uint8_t *rows = bytes_of(c, first + from, count, tile, &row_bytes);
        for (int r = 0; r < q->rows; r += 2) {
            const int fetch = r == 0 && c->dtype == KVC_INT8;
            float *to = out + r * stride;
            if (r + 1 < q->rows) keys_of_tile(rows, from, count, c->dim, fetch, q, s, r, 1, to, stride, top + r);
            else keys_of_tile(rows, from, count, c->dim, fetch, q, s, r, 0, to, stride, top + r);
        }
    }
    for (int r = 0; r < q->rows; r++) m->top[r] = _mm512_reduce_max_ps(top[r]);
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

/* The parts of a tile's weights for one or two query rows. */
typedef struct {
    int32_t high[2][KVC_TILE / 4], low[2][KVC_TILE / 4];
    float unit[2];
} weight_parts;

/* Add 64 tokens, or fewer, of up to 64 channels to the sums of one or two query rows. */
static inline __attribute__((always_inline)) void weigh_tile(const uint8_t *rows, int64_t row_bytes,
                                                             int64_t count, int fetch, __mmask64 some,
                                                             const weight_parts *w, int pair, float *sum,
                                                             int64_t sum_stride) {
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
            const __m512i wh = _mm512_set1_epi32(w->high[r][t / 4]);
            const __m512i wl = _mm512_set1_epi32(w->low[r][t / 4]);
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
            _mm512_storeu_ps(to, _mm512_fmadd_ps(x, _mm512_set1_ps(w->unit[r]), _mm512_loadu_ps(to)));
        }
}

/* 64 weights, none of them negative, as 15-bit integers: unit · (256 high + low); gives the unit.
 * `rest` takes what they leave out, or with `levels` what they hold, less than zero. */
static inline __attribute__((always_inline)) float split(const __m512 *x, int levels, int8_t *high,
                                                         int8_t *low, __m512 *rest) {
    const __m512 top = _mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3]));
    const float most = _mm512_reduce_max_ps(top), unit = most / 32639.0f;
    const __m512 factor = _mm512_set1_ps(most > 0 ? 32639.0f / most : 0.0f);
    __m512i held = _mm512_setzero_si512();
    for (int i = 0; i < 4; i++) {
        const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(x[i], factor));
        held = _mm512_add_epi32(held, v);
        const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
        const __m512i l = _mm512_sub_epi32(v, _mm512_slli_epi32(h, 8));
        _mm_storeu_si128((__m128i *)(high + 16 * i), _mm512_cvtepi32_epi8(h));
        _mm_storeu_si128((__m128i *)(low + 16 * i), _mm512_cvtepi32_epi8(l));
    }
    const __m512 sum = levels ? _mm512_setzero_ps()
                              : _mm512_add_ps(_mm512_add_ps(x[0], x[1]), _mm512_add_ps(x[2], x[3]));
    *rest = _mm512_add_ps(*rest, _mm512_fnmadd_ps(_mm512_cvtepi32_ps(held), _mm512_set1_ps(unit), sum));
    return unit;
}

/* e^x with a relative error below 2e-7, and 0 below −87; x ≤ 0. */
static inline __attribute__((always_inline)) __m512 weight_of(__m512 x) {
    const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
    x = _mm512_maskz_mov_ps(counts, x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    f = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), f);
    __m512 p = _mm512_set1_ps(1.98756915e-4f); /* as `exponential` */
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.39819995e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.33345191e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.16657959e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.66666655e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.00000012e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, f), f, _mm512_add_ps(f, _mm512_set1_ps(1.0f)));
    return _mm512_maskz_scalef_ps(counts, p, n);
}

/* Weights of up to 64 tokens, one query row: `x` [4] takes them times their scales. */
static inline __attribute__((always_inline)) void weights_of_tile(float *weight, int64_t count, float top,
                                                                  const kvc_sight *s, int64_t from, __m512 *x,
                                                                  __m512 *total, __m512 *shift) {
    const __m512 at = _mm512_set1_ps(top);
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_setzero_ps();
        if (count <= 16 * i) continue;
        const __mmask16 some = first_of_16(count - 16 * i);
        const int64_t t = from + 16 * i;
        const __m512 logit = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), some, weight + t);
        const __m512 e = weight_of(_mm512_sub_ps(logit, at));
        _mm512_mask_storeu_ps(weight + t, some, e);
        *total = _mm512_add_ps(*total, e);
        x[i] = _mm512_mul_ps(e, halves_or(s->scale ? s->scale + t : NULL, some, 1.0f));
        if (s->minimum) *shift = _mm512_fmadd_ps(e, halves_or(s->minimum + t, some, 0), *shift);
    }
}

/* The channels of a tile that one or two query rows weigh. */
static inline __attribute__((always_inline)) void weigh_width(const uint8_t *codes, int64_t row_bytes,
                                                              int64_t count, int fetch, int width,
                                                              const weight_parts *w, int pair, float *sum,
                                                              int64_t sum_stride) {
    for (int i = 0; i < width; i += 64)
        weigh_tile(codes + i, row_bytes, count, fetch, first_bytes(width - i), w, pair, sum + i, sum_stride);
}

static void values_vnni(const kvc_codes *c, int64_t first, int64_t n, int32_t width, const kvc_sight *s,
                        float *weight, int64_t stride, int32_t rows, const kvc_part *m, float *sum,
                        int64_t sum_stride, uint8_t *tile) {
    if (!integer(c)) {
        values(c, first, n, width, s, weight, stride, rows, m, sum, sum_stride, tile);
        return;
    }
    __m512 total[KVC_MAX_ROWS], shift[KVC_MAX_ROWS], rest[KVC_MAX_ROWS], x[4];
    const int levels = kvc_rotated(c);
    for (int r = 0; r < rows; r++) total[r] = shift[r] = rest[r] = _mm512_setzero_ps();
    weight_parts w;
    for (int64_t from = 0; from < n; from += KVC_TILE) {
        const int64_t count = n - from < KVC_TILE ? n - from : KVC_TILE;
        int64_t row_bytes;
        const uint8_t *codes = bytes_of(c, first + from, count, tile, &row_bytes);
        for (int r = 0; r < rows; r += 2) {
            const int pair = r + 1 < rows, fetch = r == 0 && c->dtype == KVC_INT8;
            for (int k = 0; k <= pair; k++) {
                const float top = m->top[r + k] == -INFINITY ? 0 : m->top[r + k];
                weights_of_tile(weight + (r + k) * stride, count, top, s, from, x, total + r + k, shift + r + k);
                w.unit[k] = split(x, levels, (int8_t *)w.high[k], (int8_t *)w.low[k], rest + r + k);
            }
            float *to = sum + r * sum_stride;
            if (pair) weigh_width(codes, row_bytes, count, fetch, width, &w, 1, to, sum_stride);
            else weigh_width(codes, row_bytes, count, fetch, width, &w, 0, to, sum_stride);
        }
    }
    for (int r = 0; r < rows; r++) {
        m->total[r] = _mm512_reduce_add_ps(total[r]);
        m->shift[r] = _mm512_reduce_add_ps(_mm512_fmadd_ps(rest[r], _mm512_set1_ps(kvc_middle(c)), shift[r]));
    }
}

static void weigh_vnni(const kvc_codes *c, int64_t first, int64_t n, int32_t low, int32_t width,
                       const float *weight, int64_t stride, int32_t rows, float *sum,
                       int64_t sum_stride, uint8_t *tile) {
    if (!integer(c)) {
        weigh(c, first, n, low, width, weight, stride, rows, sum, sum_stride, tile);
        return;
    }
    weight_parts w;
    const int levels = kvc_rotated(c);
    __m512 rest[KVC_MAX_ROWS], x[4];
    for (int r = 0; r < rows; r++) rest[r] = _mm512_setzero_ps();
    for (int64_t from = 0; from < n; from += KVC_TILE) {
        const int64_t count = n - from < KVC_TILE ? n - from : KVC_TILE;
        int64_t row_bytes;
        const uint8_t *codes = bytes_of(c, first + from, count, tile, &row_bytes) + low;
        for (int r = 0; r < rows; r += 2) {
            const int pair = r + 1 < rows;
            for (int k = 0; k <= pair; k++) {
                const float *own = weight + (r + k) * stride + from;
                for (int i = 0; i < 4; i++)
                    x[i] = count > 16 * i ? _mm512_maskz_loadu_ps(first_of_16(count - 16 * i), own + 16 * i)
                                          : _mm512_setzero_ps();
                w.unit[k] = split(x, levels, (int8_t *)w.high[k], (int8_t *)w.low[k], rest + r + k);
            }
            float *to = sum + r * sum_stride + 2 * low;
            if (pair) weigh_width(codes, row_bytes, count, 0, width, &w, 1, to, sum_stride);
            else weigh_width(codes, row_bytes, count, 0, width, &w, 0, to, sum_stride);
        }
    }
    for (int r = 0; r < rows; r++) {
        const vf more = all(kvc_middle(c) * _mm512_reduce_add_ps(rest[r]));
        float *to = sum + r * sum_stride + 2 * low;
        for (int i = 0; i < (width + 63) / 64 * 64; i += 16) store(to + i, load(to + i) + more);
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

/* ---- the rank: as `rank_of`, which the compiler turns into several times as many instructions */
static int64_t victim_wide(const int32_t *position, const float *score, int64_t n, const kvc_rules *u,
                           float *rank) {
    const __m512 hidden = _mm512_set1_ps(-INFINITY), local = _mm512_set1_ps(0x1p66f);
    const __m512i local_from = _mm512_set1_epi32(u->local_from), one = _mm512_set1_epi32(1);
    const __m512i first = _mm512_set1_epi32(u->first < 0 ? 0 : u->first);
    const __m512i voted = _mm512_set1_epi32((int32_t)(u->first_vote > u->now ? u->now : u->first_vote));
    const __m512i after = _mm512_set1_epi32((int32_t)u->now + 1);
    __m512 lowest = _mm512_set1_ps(INFINITY);
    __m512i place = _mm512_setzero_si512();
    __m512i here = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = 0; i < n; i += 16, here = _mm512_add_epi32(here, _mm512_set1_epi32(16))) {
        const __mmask16 some = first_of_16(n - i);
        const __m512i own = _mm512_maskz_loadu_epi32(some, position + i);
        const __m512 at = _mm512_cvtepi32_ps(own);
        const __m512 recency = _mm512_fmadd_ps(at, _mm512_set1_ps(0x1p-23f), _mm512_set1_ps(1.0f));
        __mmask16 special = u->in_class ? some : 0, punct = 0;
        __m512 value = at;
        if (score) {
            const __m512 x = _mm512_maskz_loadu_ps(some, score + i);
            punct = _mm512_cmp_ps_mask(x, _mm512_set1_ps(PUNCT_SCORE / 2), _CMP_GE_OQ);
            special = _mm512_cmp_ps_mask(x, _mm512_set1_ps(SPECIAL_SCORE / 2), _CMP_GE_OQ);
            if (u->by_score) value = _mm512_maskz_mov_ps(~punct, x);
            if (u->by_score && u->per_vote) {
                const __m512i votes = _mm512_sub_epi32(after, _mm512_max_epi32(own, voted));
                value = _mm512_div_ps(value, _mm512_cvtepi32_ps(_mm512_max_epi32(votes, one)));
            }
        }
        value = _mm512_mask_mul_ps(value, _mm512_cmpge_epi32_mask(own, local_from), local, recency);
        if (!u->keeps_rest) value = hidden;
        if (punct | special) {
            const __m512 kept = _mm512_mul_ps(_mm512_set1_ps(0x1p40f), recency);
            value = _mm512_mask_max_ps(value, punct, value, kept);
            value = _mm512_mask_mul_ps(value, special, _mm512_set1_ps(0x1p100f), recency);
        }
        value = _mm512_mask_mov_ps(value, _mm512_cmplt_epi32_mask(own, first), hidden);
        const __mmask16 lower = _mm512_mask_cmp_ps_mask(some, value, lowest, _CMP_LT_OQ);
        lowest = _mm512_mask_mov_ps(lowest, lower, value);
        place = _mm512_mask_mov_epi32(place, lower, here);
    }
    *rank = _mm512_reduce_min_ps(lowest);
    const __mmask16 equal = _mm512_cmp_ps_mask(lowest, _mm512_set1_ps(*rank), _CMP_EQ_OQ);
    return n ? _mm512_mask_reduce_min_epi32(equal, place) : 0;
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

/* Some rows of activations with 8 rows of weights, or fewer, by instructions that multiply and add
 * pairs of bfloat16 numbers. What comes after the weights is asked for in the order of memory. */
__attribute__((target("avx512bf16"))) static inline __attribute__((always_inline)) void
products_of_8(const uint16_t *w, int64_t inner, int rows, int count, int fetch, const uint16_t *x,
              int64_t x_stride, float *y, int64_t y_stride) {
    __m512 sum[3][ROWS];
    for (int i = 0; i < count; i++)
        for (int r = 0; r < ROWS; r++) sum[i][r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < inner; k += 32) {
        const __mmask32 some = inner - k >= 32 ? ~0u : (1u << (inner - k)) - 1;
        if (fetch)
            for (int r = 0; r < ROWS; r++)
                _mm_prefetch((const char *)(w + ROWS * inner + ROWS * k + 32 * r), _MM_HINT_T1);
        __m512bh own[3];
        for (int i = 0; i < count; i++) own[i] = (__m512bh)_mm512_loadu_si512(x + i * x_stride + k);
        for (int r = 0; r < ROWS; r++) {
            const int64_t row = r < rows ? r : rows - 1;
            const __m512bh other = (__m512bh)_mm512_maskz_loadu_epi16(some, w + row * inner + k);
            for (int i = 0; i < count; i++) sum[i][r] = _mm512_dpbf16_ps(sum[i][r], own[i], other);
        }
    }
    for (int i = 0; i < count; i++)
        _mm256_mask_storeu_ps(y + i * y_stride, (__mmask8)((1u << rows) - 1), sums_of_8(sum[i]));
}

__attribute__((target("avx512bf16"))) static void linear_bf16(const uint16_t *w, int64_t first, int64_t stop,
                                                              int64_t inner, const uint16_t *x,
                                                              int64_t x_stride, int64_t m, float *y,
                                                              int64_t y_stride) {
    for (int64_t n = first; n < stop; n += ROWS) {
        const int rows = stop - n < ROWS ? (int)(stop - n) : ROWS;
        const uint16_t *own = w + n * inner;
        for (int64_t i = 0; i < m; i += 3) {
            const uint16_t *a = x + i * x_stride;
            float *to = y + i * y_stride + n;
            if (m - i >= 3) products_of_8(own, inner, rows, 3, i == 0, a, x_stride, to, y_stride);
            else if (m - i == 2) products_of_8(own, inner, rows, 2, 0, a, x_stride, to, y_stride);
            else products_of_8(own, inner, rows, 1, 0, a, x_stride, to, y_stride);
        }
    }
}

static void linear16_wide(const uint16_t *w, int32_t dtype, int64_t first, int64_t stop, int64_t inner,
                          const float *x, const float *even, const float *odd, const uint16_t *narrow,
                          int64_t half_stride, int64_t m, float *y, int64_t y_stride) {
    if (kvc_multiplies_in_pairs(dtype, m)) {
        linear_bf16(w, first, stop, inner, narrow, 2 * half_stride, m, y, y_stride);
        return;
    }
    if (dtype != KVC_BF16) {
        linear16(w, dtype, first, stop, inner, x, even, odd, narrow, half_stride, m, y, y_stride);
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
    "avx512-vnni", 1, dots_vnni, keys_vnni, values_vnni, weigh_vnni, settle_vnni, logits, maximum,
    exponentials, scale_by, dot, add_scaled, victim_wide, linear8_vnni, linear16_wide,
};
#endif
