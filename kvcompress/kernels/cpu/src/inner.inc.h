/* The inner loops in GCC's vector extensions, compiled once for each instruction set.
 *
 * The including file sets the compiler's target and KVC_WIDTH, the floats of one vector. It may set
 * KVC_INTS_OF_BYTES(p), KVC_INTS_OF_HALVES(p), KVC_FLOATS_OF_HALVES(p) and KVC_FLOATS_OF_FP8S(p), which
 * load and widen that many numbers, where the compiler does not find the instruction by itself, and
 * KVC_FLOATS_OF_LEVELS, which widens a row of levels or gives 0.
 */
#include <math.h>
#include <string.h>

#include "kvc.h"

#define W KVC_WIDTH
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint8_t vb __attribute__((vector_size(W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

static inline vf load(const float *p) { vf x; memcpy(&x, p, sizeof x); return x; }
static inline void store(float *p, vf x) { memcpy(p, &x, sizeof x); }
static inline vi load_i(const int32_t *p) { vi x; memcpy(&x, p, sizeof x); return x; }
static inline vf all(float x) { vf v; for (int i = 0; i < W; i++) v[i] = x; return v; }
static inline vi all_i(int32_t x) { vi v; for (int i = 0; i < W; i++) v[i] = x; return v; }
static inline vf as_float(vi x) { vf y; memcpy(&y, &x, sizeof y); return y; }
static inline vi as_int(vf x) { vi y; memcpy(&y, &x, sizeof y); return y; }
static inline vf choose(vi mask, vf yes, vf no) { return as_float((mask & as_int(yes)) | (~mask & as_int(no))); }
static inline vf larger(vf x, vf y) { return choose(x > y, x, y); }
static inline vi larger_i(vi x, vi y) { vi m = x > y; return (m & x) | (~m & y); }

static inline float total(vf x) {
#if defined(__clang__)
    for (int width = W / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
#else
    for (int width = W / 2; width; width /= 2) {
        vi order;
        for (int i = 0; i < W; i++) order[i] = (i + width) % W;
        x += __builtin_shuffle(x, order);
    }
#endif
    return x[0];
}

/* The sums of 4 vectors. */
static inline void totals(vf a, vf b, vf c, vf d, float *out) {
#if defined(__clang__)
    out[0] = total(a), out[1] = total(b), out[2] = total(c), out[3] = total(d);
#else
    vi even, odd, low, high; /* two vectors become one of half as many terms of each, twice */
    for (int i = 0; i < W; i++) {
        even[i] = i / 2 * 2 + i % 2 * W;
        odd[i] = even[i] + 1;
        low[i] = i / 4 * 4 + i % 2 + i / 2 % 2 * W;
        high[i] = low[i] + 2;
    }
    const vf ab = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
    const vf cd = __builtin_shuffle(c, d, even) + __builtin_shuffle(c, d, odd);
    vf all_four = __builtin_shuffle(ab, cd, low) + __builtin_shuffle(ab, cd, high);
    for (int width = W / 2; width >= 4; width /= 2) {
        vi order;
        for (int i = 0; i < W; i++) order[i] = (i + width) % W;
        all_four += __builtin_shuffle(all_four, order);
    }
    memcpy(out, &all_four, 16);
#endif
}

static inline vi ints_of_bytes(const uint8_t *p) {
#ifdef KVC_INTS_OF_BYTES
    return (vi)KVC_INTS_OF_BYTES(p);
#else
    vb b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(b, vi);
#endif
}

static inline vi ints_of_halves(const uint16_t *p) {
#ifdef KVC_INTS_OF_HALVES
    return (vi)KVC_INTS_OF_HALVES(p);
#else
    vh h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, vi);
#endif
}

static inline vf from_bf16(const uint16_t *p) { return as_float(ints_of_halves(p) << 16); }

static inline vf from_half(const uint16_t *p) {
#ifdef KVC_FLOATS_OF_HALVES
    return (vf)KVC_FLOATS_OF_HALVES(p);
#else
    const vi x = ints_of_halves(p), sign = (x & 0x8000) << 16, size = (x & 0x7fff) << 13;
    const vf scaled = as_float(size) * all(0x1p112f); /* the exponents' biases differ by 112 */
    const vi special = size >= all_i(0x7c00 << 13);   /* infinity and NaN keep their largest exponent */
    return as_float(sign | as_int(choose(special, as_float(size | all_i(0x7f800000)), scaled)));
#endif
}

static inline vf from_bytes(const uint8_t *p) { return __builtin_convertvector(ints_of_bytes(p), vf); }

/* e^x with a relative error below 2e-7; 0 for −inf, NaN for NaN. x ≤ 0 is all that softmax asks for. */
static inline vf exponential(vf x) {
    const vi tiny = x < all(-87.0f);
    const vf nothing = x - x; /* or NaN, which the next line drops */
    x = larger(x, all(-87.0f));
    vf n = x * all(1.44269504f) + all(12582912.0f); /* rounds to an integer in the low bits */
    vi power = as_int(n) - all_i(0x4b400000);
    n -= all(12582912.0f);
    vf f = x - n * all(0.693145752f);
    f = f - n * all(1.42860677e-6f);
    vf p = all(1.98756915e-4f); /* Cephes' minimax polynomial on ±ln 2 / 2 */
    p = p * f + all(1.39819995e-3f);
    p = p * f + all(8.33345191e-3f);
    p = p * f + all(4.16657959e-2f);
    p = p * f + all(1.66666655e-1f);
    p = p * f + all(5.00000012e-1f);
    p = p * f * f + f + all(1.0f);
    vf y = as_float(as_int(p) + (power << 23));
    return choose(tiny, all(0.0f), y + nothing);
}

/* ---- vectors of any kind as floats */
/* e4m3: its exponent's bias is 7, a float's 127 */
static inline vf from_fp8s(const uint8_t *p) {
#ifdef KVC_FLOATS_OF_FP8S
    return (vf)KVC_FLOATS_OF_FP8S(p);
#else
    const vi x = ints_of_bytes(p), sign = (x & 0x80) << 24, size = (x & 0x7f) << 20;
    const vf scaled = choose((x & 0x7f) == 0x7f, all(NAN), as_float(size) * all(0x1p120f));
    return as_float(sign | as_int(scaled));
#endif
}

static float half_to_float(uint16_t h) {
    uint16_t padded[W] = {h};
    return from_half(padded)[0];
}

/* ---- levels of rotated vectors */
typedef uint8_t v16 __attribute__((vector_size(16)));

static inline v16 load_16(const uint8_t *p) { v16 x; memcpy(&x, p, sizeof x); return x; }

/* Places in a table of 16 bytes as the table has them. */
static inline v16 look_up(v16 table, v16 place) {
#if defined(__clang__)
    for (int i = 0; i < 16; i++) place[i] = table[place[i]];
    return place;
#else
    return __builtin_shuffle(table, place);
#endif
}

/* Channels low to low + 15 have their third bits in two bytes; 4 where it is set. */
static inline v16 third_bits(const uint8_t *p) {
    const v16 bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const v16 byte = {p[0], p[0], p[0], p[0], p[0], p[0], p[0], p[0],
                      p[1], p[1], p[1], p[1], p[1], p[1], p[1], p[1]};
    return (v16)((byte & bit) == bit) & 4;
}

/* A row of levels in rows of `wide` bits and, of rot3, a third one, as the bytes of `kvc_levels`. */
static inline __attribute__((always_inline)) void levels_in(const uint8_t *row, const uint8_t *levels, int dim,
                                                            int wide, int third, uint8_t *restrict out) {
    const v16 table = load_16(levels), mask = {0};
    const int part = dim * wide / 8, most = (1 << wide) - 1;
    int i = 0;
    for (; (!third || part % 16 == 0) && i + 16 <= part; i += 16) {
        const v16 x = load_16(row + i);
#pragma GCC unroll 4
        for (int k = 0; k * wide < 8; k++) {
            v16 place = (x >> (uint8_t)(wide * k)) & (mask + (uint8_t)most);
            if (third) place |= third_bits(row + part + (k * part + i) / 8);
            const v16 level = look_up(table, place);
            memcpy(out + k * part + i, &level, 16);
        }
    }
    for (; i < part; i++)
        for (int k = 0; k * wide < 8; k++) {
            const int channel = k * part + i, high = third ? row[part + channel / 8] >> channel % 8 & 1 : 0;
            out[channel] = levels[(row[i] >> wide * k & most) | high << 2];
        }
}

static inline void levels_of(const kvc_codes *c, const uint8_t *row, uint8_t *restrict out) {
    const uint8_t *levels = kvc_levels[c->dtype - KVC_ROT4];
    if (c->dtype == KVC_ROT4) levels_in(row, levels, c->dim, 4, 0, out);
    else if (c->dtype == KVC_ROT3) levels_in(row, levels, c->dim, 2, 1, out);
    else levels_in(row, levels, c->dim, 2, 0, out);
}

static inline void widen_levels(const kvc_codes *c, const uint8_t *row, float *restrict out) {
#ifdef KVC_FLOATS_OF_LEVELS
    if (KVC_FLOATS_OF_LEVELS(c, row, out)) return;
#endif
    uint8_t level[KVC_MAX_DIM];
    int i = 0;
    levels_of(c, row, level);
    for (; i + W <= c->dim; i += W) store(out + i, from_bytes(level + i) - all(128.0f));
    for (; i < c->dim; i++) out[i] = (float)level[i] - 128.0f;
}

/* Row `slot` of uncoded vectors or of codes, without scale and minimum. */
static void widen(const kvc_codes *c, int64_t slot, float *restrict out) {
    const uint8_t *row = (const uint8_t *)c->data + slot * c->row_bytes;
    const uint16_t *half = (const uint16_t *)row;
    const int dim = c->dim, part = dim / 2;
    int i = 0;
    switch (c->dtype) {
    case KVC_F32:
        memcpy(out, row, (size_t)dim * 4);
        break;
    case KVC_BF16:
        for (; i + W <= dim; i += W) store(out + i, from_bf16(half + i));
        for (; i < dim; i++) {
            uint32_t bits = (uint32_t)half[i] << 16;
            memcpy(out + i, &bits, 4);
        }
        break;
    case KVC_F16:
        for (; i + W <= dim; i += W) store(out + i, from_half(half + i));
        for (; i < dim; i++) out[i] = half_to_float(half[i]);
        break;
    case KVC_INT8:
        for (; i + W <= dim; i += W) store(out + i, from_bytes(row + i));
        for (; i < dim; i++) out[i] = row[i];
        break;
    case KVC_INT4:
        for (; i < part; i++) out[i] = (float)(row[i] & 15);
        for (i = 0; i < part; i++) out[part + i] = (float)(row[i] >> 4);
        break;
    case KVC_ROT4:
    case KVC_ROT3:
    case KVC_ROT2:
        widen_levels(c, row, out);
        break;
    default:
        for (; i + W <= dim; i += W) store(out + i, from_fp8s(row + i));
        for (; i < dim; i++) {
            uint8_t padded[W] = {row[i]};
            out[i] = from_fp8s(padded)[0];
        }
    }
}

/* `count` rows from `first` on as floats: themselves, or widened into `tile`. */
static const float *rows_of(const kvc_codes *c, int64_t first, int64_t count, uint8_t *tile) {
    if (c->dtype == KVC_F32) return (const float *)c->data + first * c->dim;
    float *out = (float *)tile;
    for (int64_t t = 0; t < count; t++) widen(c, first + t, out + t * c->dim);
    return out;
}

static inline float dot_of(const float *x, const float *y, int64_t n) {
    vf sum = all(0.0f);
    int64_t i = 0;
    for (; i + W <= n; i += W) sum += load(x + i) * load(y + i);
    float rest = total(sum);
    for (; i < n; i++) rest += x[i] * y[i];
    return rest;
}

/* One or two queries, `dim` apart, over `count` rows. */
static inline __attribute__((always_inline)) void dots_of_rows(const float *rows, int64_t count, int dim,
                                                               const float *query, int pair, float *out,
                                                               int64_t stride) {
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) { /* four rows at once hide the latency of an addition */
        const float *k = rows + t * dim;
        vf sum[2][4];
        float s[4];
        for (int r = 0; r <= pair; r++)
            for (int j = 0; j < 4; j++) sum[r][j] = all(0.0f);
        int i = 0;
        for (; i + W <= dim; i += W)
            for (int j = 0; j < 4; j++) {
                const vf x = load(k + j * dim + i);
                for (int r = 0; r <= pair; r++) sum[r][j] += x * load(query + r * dim + i);
            }
        for (int r = 0; r <= pair; r++) {
            totals(sum[r][0], sum[r][1], sum[r][2], sum[r][3], s);
            for (int rest = i; rest < dim; rest++)
                for (int j = 0; j < 4; j++) s[j] += query[r * dim + rest] * k[j * dim + rest];
            memcpy(out + r * stride + t, s, sizeof s);
        }
    }
    for (; t < count; t++)
        for (int r = 0; r <= pair; r++) out[r * stride + t] = dot_of(query + r * dim, rows + t * dim, dim);
}

static void dots(const kvc_codes *c, int64_t first, int64_t n, const kvc_query *q, float *out,
                 int64_t stride, uint8_t *tile) {
    const int dim = c->dim;
    for (int64_t low = 0; low < n; low += KVC_TILE) {
        const int64_t count = n - low < KVC_TILE ? n - low : KVC_TILE;
        const float *rows = rows_of(c, first + low, count, tile);
        for (int r = 0; r < q->rows; r += 2) {
            const float *query = q->value + (int64_t)r * dim;
            if (r + 1 < q->rows) dots_of_rows(rows, count, dim, query, 1, out + r * stride + low, stride);
            else dots_of_rows(rows, count, dim, query, 0, out + r * stride + low, stride);
        }
    }
}

static inline void add_scaled_to(float *restrict x, const float *restrict y, int64_t n, float factor) {
    vf f = all(factor);
    int64_t i = 0;
    for (; i + W <= n; i += W) store(x + i, load(x + i) + f * load(y + i));
    for (; i < n; i++) x[i] += factor * y[i];
}

static void add_scaled(float *x, const float *y, int64_t n, float factor) { add_scaled_to(x, y, n, factor); }

/* `count` rows of `width` channels into the sums of one or two query rows. */
static inline __attribute__((always_inline)) void weigh_rows(const float *rows, int64_t row_stride,
                                                             int64_t count, int width, const float *weight,
                                                             int64_t stride, int pair, float *sum,
                                                             int64_t sum_stride) {
    int i = 0;
    for (; i + 4 * W <= width; i += 4 * W) {
        vf a[2][4];
        for (int r = 0; r <= pair; r++)
            for (int j = 0; j < 4; j++) a[r][j] = load(sum + r * sum_stride + i + j * W);
        for (int64_t t = 0; t < count; t++) {
            const float *v = rows + t * row_stride + i;
            const vf x = all(weight[t]), y = all(pair ? weight[stride + t] : 0.0f);
            for (int j = 0; j < 4; j++) {
                const vf u = load(v + j * W);
                a[0][j] += x * u;
                if (pair) a[1][j] += y * u;
            }
        }
        for (int r = 0; r <= pair; r++)
            for (int j = 0; j < 4; j++) store(sum + r * sum_stride + i + j * W, a[r][j]);
    }
    for (int64_t t = 0; i < width && t < count; t++)
        for (int r = 0; r <= pair; r++)
            add_scaled_to(sum + r * sum_stride + i, rows + t * row_stride + i, width - i,
                          weight[r * stride + t]);
}

static void weigh(const kvc_codes *c, int64_t first, int64_t n, int32_t low, int32_t width,
                  const float *weight, int64_t stride, int32_t rows, float *sum, int64_t sum_stride,
                  uint8_t *tile) {
    for (int64_t from = 0; from < n; from += KVC_TILE) {
        const int64_t count = n - from < KVC_TILE ? n - from : KVC_TILE;
        const float *wide = rows_of(c, first + from, count, tile) + low;
        for (int r = 0; r < rows; r += 2) {
            const float *w = weight + r * stride + from;
            float *to = sum + r * sum_stride + low;
            if (r + 1 < rows) weigh_rows(wide, c->dim, count, width, w, stride, 1, to, sum_stride);
            else weigh_rows(wide, c->dim, count, width, w, stride, 0, to, sum_stride);
        }
    }
}

static void settle(const kvc_codes *c, int32_t low, int32_t width, int32_t rows, float *sum,
                   int64_t sum_stride) {
    (void)c, (void)low, (void)width, (void)rows, (void)sum, (void)sum_stride;
}

/* ---- the softmax */
static inline vf capped(vf x, float softcap) { /* softcap · tanh(x / softcap) */
    vf y = x * all(1.0f / softcap);
    vi negative = y < all(0.0f);
    vf size = choose(negative, y, -y);
    vf e = exponential(size + size); /* e^(−2|y|) */
    vf bend = (all(1.0f) - e) / (all(1.0f) + e);
    /* near 0 the difference above loses its digits */
    vf square = y * y;
    vf near = -size * (all(1.0f) - square * (all(1.0f / 3) - square * all(2.0f / 15)));
    bend = choose(-size < all(0.03f), near, bend);
    return choose(negative, -bend, bend) * all(softcap);
}

/* The last n < W numbers of an array, with something harmless behind them. */
static inline vf last_floats(const float *x, int64_t n) {
    float padded[W] = {0};
    memcpy(padded, x, (size_t)n * 4);
    return load(padded);
}

static inline vf last_halves(const uint16_t *x, int64_t n) {
    uint16_t padded[W] = {0};
    memcpy(padded, x, (size_t)n * 2);
    return from_half(padded);
}

static inline void store_last(float *x, int64_t n, vf value) { memcpy(x, &value, (size_t)n * 4); }

static inline vf logit(vf x, vf scale, vf minimum, float sum, float offset, float softcap) {
    x = x * scale + minimum * all(sum) + all(offset);
    return softcap > 0 ? capped(x, softcap) : x;
}

static float logits(float *x, int64_t n, const uint16_t *scale, const uint16_t *minimum, float sum,
                    float offset, float softcap, const int32_t *position, int32_t first) {
    const vf one = all(1.0f), zero = all(0.0f), hidden = all(-INFINITY);
    vf top = hidden;
    int64_t i = 0;
    first = first < 0 ? 0 : first;
    for (; i + W <= n; i += W) {
        vf y = logit(load(x + i), scale ? from_half(scale + i) : one, minimum ? from_half(minimum + i) : zero,
                     sum, offset, softcap);
        if (position) y = choose(load_i(position + i) >= all_i(first), y, hidden);
        top = larger(y, top);
        store(x + i, y);
    }
    float best = -INFINITY;
    for (int j = 0; j < W; j++) best = top[j] > best ? top[j] : best;
    if (i < n) {
        const int64_t rest = n - i;
        vf y = logit(last_floats(x + i, rest), scale ? last_halves(scale + i, rest) : one,
                     minimum ? last_halves(minimum + i, rest) : zero, sum, offset, softcap);
        for (int64_t j = 0; j < rest; j++) {
            if (position && position[i + j] < first) y[j] = -INFINITY;
            best = y[j] > best ? y[j] : best;
        }
        store_last(x + i, rest, y);
    }
    return best;
}

static float maximum(const float *x, int64_t n) {
    vf top = all(-INFINITY);
    int64_t i = 0;
    for (; i + W <= n; i += W) top = larger(load(x + i), top);
    float best = -INFINITY;
    for (int j = 0; j < W; j++) best = top[j] > best ? top[j] : best;
    for (; i < n; i++) best = x[i] > best ? x[i] : best;
    return best;
}

static float exponentials(float *x, int64_t n, float top, const uint16_t *scale, const uint16_t *minimum,
                          float *scaled, float *shift) {
    vf sum = all(0.0f), moved = sum;
    const vf at = all(top);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const vf e = exponential(load(x + i) - at);
        store(x + i, e);
        sum += e;
        if (scale) store(scaled + i, e * from_half(scale + i));
        if (minimum) moved += e * from_half(minimum + i);
    }
    float all_of = total(sum), all_moved = total(moved);
    if (i < n) {
        const int64_t rest = n - i;
        const vf e = exponential(last_floats(x + i, rest) - at);
        store_last(x + i, rest, e);
        if (scale) store_last(scaled + i, rest, e * last_halves(scale + i, rest));
        const vf m = minimum ? e * last_halves(minimum + i, rest) : all(0.0f);
        for (int64_t j = 0; j < rest; j++) all_of += e[j], all_moved += m[j];
    }
    if (minimum) *shift = all_moved;
    return all_of;
}

static void scale_by(const float *x, const uint16_t *factor, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, load(x + i) * from_half(factor + i));
    if (i < n) store_last(out + i, n - i, last_floats(x + i, n - i) * last_halves(factor + i, n - i));
}

static float dot(const float *x, const uint16_t *y, int64_t n) {
    vf sum = all(0.0f);
    int64_t i = 0;
    for (; i + W <= n; i += W) sum += load(x + i) * from_half(y + i);
    if (i < n) sum += last_floats(x + i, n - i) * last_halves(y + i, n - i);
    return total(sum);
}

/* ---- codes and softmax */
static void keys(const kvc_codes *c, int64_t first, int64_t n, const kvc_query *q, const kvc_sight *s,
                 float *out, int64_t stride, const kvc_part *m, uint8_t *tile) {
    dots(c, first, n, q, out, stride, tile);
    for (int r = 0; r < q->rows; r++)
        m->top[r] = logits(out + r * stride, n, s->scale, s->minimum, q->sum[r], s->offset[r], s->softcap,
                           s->position, s->first);
}

static void values(const kvc_codes *c, int64_t first, int64_t n, int32_t width, const kvc_sight *s,
                   float *weight, int64_t stride, int32_t rows, const kvc_part *m, float *sum,
                   int64_t sum_stride, uint8_t *tile) {
    for (int r = 0; r < rows; r++)
        m->total[r] = exponentials(weight + r * stride, n, m->top[r] == -INFINITY ? 0 : m->top[r], s->scale,
                                   s->minimum, m->scaled + r * KVC_CHUNK, m->shift + r);
    weigh(c, first, n, 0, width, s->scale ? m->scaled : weight, s->scale ? KVC_CHUNK : stride, rows, sum,
          sum_stride, tile);
}

/* ---- the rank */
#define PUNCT_SCORE 0x1p110f
#define SPECIAL_SCORE 0x1p120f

static inline vf rank_of(vi position, vf score, int has_score, const kvc_rules *u) {
    vf at = __builtin_convertvector(position, vf);
    vf recency = all(1.0f) + at * all(0x1p-23f);
    vf value = at;
    vi punct = all_i(0), special = punct;
    if (has_score) {
        vf plain = choose(score >= all(PUNCT_SCORE / 2), all(0.0f), score);
        if (u->by_score && u->per_vote) {
            vi from = all_i((int32_t)(u->first_vote > u->now ? u->now : u->first_vote));
            vi votes = all_i((int32_t)u->now + 1) - larger_i(position, from);
            votes = larger_i(votes, all_i(1));
            plain = plain / __builtin_convertvector(votes, vf);
        }
        if (u->by_score) value = plain;
        special = score >= all(SPECIAL_SCORE / 2);
        punct = (score >= all(PUNCT_SCORE / 2)) & ~special;
    }
    value = choose(position >= all_i(u->local_from), all(0x1p66f) * recency, value);
    if (!u->keeps_rest) value = all(-INFINITY);
    if (has_score) {
        value = choose(punct, larger(value, all(0x1p40f) * recency), value);
        value = choose(special, all(0x1p100f) * recency, value);
    } else if (u->in_class) {
        value = all(0x1p100f) * recency;
    }
    return choose(position < all_i(u->first < 0 ? 0 : u->first), all(-INFINITY), value);
}

static int64_t victim(const int32_t *position, const float *score, int64_t n, const kvc_rules *u,
                      float *rank) {
    vf lowest = all(INFINITY);
    vi place = all_i(0), here;
    for (int j = 0; j < W; j++) here[j] = j;
    int64_t i = 0;
    int any = 0;
    for (; i + W <= n; i += W, here += W) {
        vf value = rank_of(load_i(position + i), score ? load(score + i) : all(0.0f), score != NULL, u);
        vi lower = value < lowest;
        lowest = choose(lower, value, lowest);
        place = (lower & here) | (~lower & place);
        any = 1;
    }
    float best = INFINITY;
    int64_t at = 0;
    for (int j = 0; any && j < W; j++)
        if (lowest[j] < best || (lowest[j] == best && place[j] < at)) best = lowest[j], at = place[j];
    for (; i < n; i++) {
        float value = rank_of(all_i(position[i]), all(score ? score[i] : 0.0f), score != NULL, u)[0];
        if (value < best) best = value, at = i;
    }
    *rank = best;
    return at;
}

/* ---- int8 weights */
static void linear8(const int8_t *w, int64_t first, int64_t stop, int64_t inner, const float *scale,
                    const int32_t *row_sum, const float *x, const uint8_t *high, const uint8_t *low,
                    const float *unit, const float *shift, int64_t m, float *y, int64_t y_stride) {
    (void)row_sum, (void)high, (void)low, (void)unit, (void)shift;
    for (int64_t n = first; n < stop; n++) {
        const int8_t *row = w + n * inner;
        for (int64_t from = 0; from < m; from += 4) {
            const int rows = m - from < 4 ? (int)(m - from) : 4;
            vf sum[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
            float rest[4] = {0};
            int64_t k = 0;
            for (; k + W <= inner; k += W) {
                int8_t bytes[W];
                memcpy(bytes, row + k, W);
                vf wide;
                for (int j = 0; j < W; j++) wide[j] = (float)bytes[j];
                for (int r = 0; r < rows; r++) sum[r] += wide * load(x + (from + r) * inner + k);
            }
            for (; k < inner; k++)
                for (int r = 0; r < rows; r++) rest[r] += (float)row[k] * x[(from + r) * inner + k];
            for (int r = 0; r < rows; r++)
                y[(from + r) * y_stride + n] = scale[n] * (total(sum[r]) + rest[r]);
        }
    }
}

/* ---- 16-bit weights */
static void linear16(const uint16_t *w, int32_t dtype, int64_t first, int64_t stop, int64_t inner,
                     const float *x, const float *even, const float *odd, const uint16_t *narrow,
                     int64_t half_stride, int64_t m, float *y, int64_t y_stride) {
    (void)even, (void)odd, (void)narrow, (void)half_stride;
    for (int64_t n = first; n < stop; n++) {
        const uint16_t *row = w + n * inner;
        for (int64_t from = 0; from < m; from += 4) {
            const int rows = m - from < 4 ? (int)(m - from) : 4;
            vf sum[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
            float rest[4] = {0};
            int64_t k = 0;
            for (; k + W <= inner; k += W) {
                const vf wide = dtype == KVC_BF16 ? from_bf16(row + k) : from_half(row + k);
                for (int r = 0; r < rows; r++) sum[r] += wide * load(x + (from + r) * inner + k);
            }
            for (; k < inner; k++) {
                uint16_t padded[W] = {row[k]};
                const float one = dtype == KVC_BF16 ? from_bf16(padded)[0] : from_half(padded)[0];
                for (int r = 0; r < rows; r++) rest[r] += one * x[(from + r) * inner + k];
            }
            for (int r = 0; r < rows; r++) y[(from + r) * y_stride + n] = total(sum[r]) + rest[r];
        }
    }
}
