/* Codes of single vectors, bit for bit as quant/codec.py makes them. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "encode.h"

/* To the nearest integer, ties to even, for |x| < 2^22; a call of nearbyintf costs as much as all else. */
static inline float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

uint16_t kvc_to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and above round to infinity */
    if (bits < 0x38800000) {                                  /* subnormal: a multiple of 2^-24 */
        float size;
        memcpy(&size, &bits, 4);
        return (uint16_t)(sign | (uint32_t)nearest(size * 0x1p24f));
    }
    const uint32_t odd = bits >> 13 & 1;
    return (uint16_t)(sign | ((bits - 0x38000000 + 0xfff + odd) >> 13));
}

float kvc_from_half(uint16_t half) {
    const uint32_t size = (uint32_t)(half & 0x7fff) << 13;
    uint32_t bits = size;
    float x;
    if (size >= 0x7c00u << 13) {
        bits = size | 0x7f800000;
        memcpy(&x, &bits, 4);
    } else {
        memcpy(&x, &bits, 4);
        x *= 0x1p112f;
    }
    return half & 0x8000 ? -x : x;
}

static uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void kvc_from_model(const void *from, int32_t dtype, int64_t n, float *out) {
    const uint16_t *half = from;
    if (dtype == KVC_F32) {
        memcpy(out, from, (size_t)n * 4);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)half[i] << 16;
        if (dtype == KVC_BF16)
            memcpy(out + i, &bits, 4);
        else
            out[i] = kvc_from_half(half[i]);
    }
}

void kvc_to_model(const float *from, int32_t dtype, int64_t n, void *out) {
    uint16_t *half = out;
    if (dtype == KVC_F32) memcpy(out, from, (size_t)n * 4);
    for (int64_t i = 0; dtype != KVC_F32 && i < n; i++)
        half[i] = dtype == KVC_BF16 ? to_bf16(from[i]) : kvc_to_half(from[i]);
}

/* e4m3 of |x| ≤ 448, ties to even */
static uint8_t to_fp8(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint8_t sign = (uint8_t)(bits >> 24 & 0x80);
    const float size = fabsf(x);
    int32_t exponent = (int32_t)(bits >> 23 & 0xff) - 127;
    if (isnan(x)) return sign | 0x7f;
    if (exponent < -6) exponent = -6;
    int32_t eighths = (int32_t)nearest(ldexpf(size, 3 - exponent));
    if (eighths == 16) eighths = 8, exponent++;
    if (eighths < 8) return sign | (uint8_t)eighths;
    return sign | (uint8_t)((exponent + 7) << 3 | (eighths - 8));
}

/* A scale as float16, never zero. */
static uint16_t scale_of(float x) {
    return kvc_to_half(x < 0x1p-14f ? 0x1p-14f : x > 65504.0f ? 65504.0f : x);
}

enum { NOT_A_NUMBER = 0x7e00 }; /* in float16 */

/* Whether all numbers are finite: infinity and NaN times zero are NaN. */
static int sound(const float *x, int32_t n) {
    float zeros[8] = {0}, rest = 0;
    int32_t i = 0;
    for (; i + 8 <= n; i += 8) /* sums that wait for themselves alone */
        for (int k = 0; k < 8; k++) zeros[k] += x[i + k] * 0.0f;
    for (; i < n; i++) rest += x[i] * 0.0f;
    for (int k = 0; k < 8; k++) rest += zeros[k];
    return rest == 0;
}

static void encode_fp8(const float *x, uint8_t *row, uint16_t *scale, int32_t dim) {
    float most = 0;
    if (!sound(x, dim)) {
        *scale = NOT_A_NUMBER;
        memset(row, 0, (size_t)dim);
        return;
    }
    for (int32_t i = 0; i < dim; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    *scale = scale_of(most / 448.0f);
    const float unit = kvc_from_half(*scale);
    for (int32_t i = 0; i < dim; i++) {
        const float scaled = x[i] / unit;
        row[i] = to_fp8(scaled < -448.0f ? -448.0f : scaled > 448.0f ? 448.0f : scaled);
    }
}

/* Numbers of the model's dtype; none that is finite becomes infinite. */
static void encode_plain(const float *x, int32_t dtype, int32_t dim, uint8_t *row) {
    const float most = dtype == KVC_F16 ? 65504.0f : dtype == KVC_BF16 ? 0x1.fep127f : FLT_MAX;
    float within[KVC_MAX_DIM];
    for (int32_t i = 0; i < dim; i++) {
        const float size = fabsf(x[i]);
        within[i] = size > most && size <= FLT_MAX ? copysignf(most, x[i]) : x[i];
    }
    kvc_to_model(within, dtype, dim, row);
}

/* ---- levels of rotated vectors */
const uint8_t kvc_levels[3][16] = {
    {5, 34, 55, 71, 85, 98, 110, 122, 134, 146, 158, 171, 185, 201, 222, 251},
    {5, 52, 85, 114, 142, 171, 204, 251, 5, 52, 85, 114, 142, 171, 204, 251},
    {8, 92, 164, 248, 8, 92, 164, 248, 8, 92, 164, 248, 8, 92, 164, 248},
};
static const double UNITS[3] = {45.192, 57.020, 79.452};

void kvc_rotate(float *x, int32_t dim) {
    const int32_t size = dim & -dim, runs = dim / size;
    float y[KVC_MAX_DIM], sign[KVC_MAX_DIM];
    for (int32_t i = 0; i < dim; i++) {
        uint32_t number = (uint32_t)i * 0x9E3779B1u;
        number = (number ^ number >> 15) * 0x85EBCA77u;
        sign[i] = number >> 31 ? -1.0f : 1.0f;
        x[i] *= sign[i];
    }
    for (int32_t step = 1; step < size; step *= 2)
        for (int32_t low = 0; low < dim; low += 2 * step)
            for (int32_t i = low; i < low + step; i++) {
                const float a = x[i], b = x[i + step];
                x[i] = a + b;
                x[i + step] = a - b;
            }
    const float unit = (float)(1.0 / sqrt(size));
    for (int32_t i = 0; i < dim; i++) x[i] *= runs == 1 ? unit * sign[i] : unit;
    if (runs == 1) return;
    double wave[KVC_MAX_DIM];
    for (int32_t k = 0; k < runs; k++) {
        const double angle = 6.283185307179586 * k / runs;
        wave[k] = (cos(angle) + sin(angle)) / sqrt(runs);
    }
    for (int32_t i = 0; i < dim; i++) {
        double sum = 0;
        for (int32_t k = 0; k < runs; k++) sum += wave[i / size * k % runs] * (double)x[k * size + i % size];
        y[i] = (float)sum;
    }
    for (int32_t i = 0; i < dim; i++) x[i] = y[i] * sign[i];
}

/* Codes of one vector as bytes with `bits` of each, see quant/codes/rotated.py. */
static void pack_levels(const uint8_t *code, int32_t dim, int32_t bits, uint8_t *row) {
    const int32_t per_byte = bits == 4 ? 2 : 4, part = dim / per_byte;
    for (int32_t i = 0; i < part; i++) {
        uint8_t byte = 0;
        for (int32_t k = 0; k < per_byte; k++)
            byte |= (uint8_t)((code[k * part + i] & (bits == 4 ? 15 : 3)) << 8 / per_byte * k);
        row[i] = byte;
    }
    for (int32_t i = 0; bits == 3 && i < dim / 8; i++) {
        uint8_t byte = 0;
        for (int32_t k = 0; k < 8; k++) byte |= (uint8_t)(code[8 * i + k] >> 2 << k);
        row[part + i] = byte;
    }
}

static void encode_levels(const float *x, int32_t dim, int32_t dtype, uint8_t *row, uint16_t *scale) {
    const int32_t bits = 4 - (dtype - KVC_ROT4), count = 1 << bits;
    const uint8_t *levels = kvc_levels[dtype - KVC_ROT4];
    uint8_t code[KVC_MAX_DIM] = {0};
    float y[KVC_MAX_DIM], middle[16];
    if (!sound(x, dim)) {
        *scale = NOT_A_NUMBER;
        pack_levels(code, dim, bits, row);
        return;
    }
    for (int32_t i = 0; i < dim; i++) y[i] = x[i] < -0x1p60f ? -0x1p60f : x[i] > 0x1p60f ? 0x1p60f : x[i];
    kvc_rotate(y, dim);
    double square = 0, product = 0, size = 0;
    for (int32_t i = 0; i < dim; i++) square += (double)y[i] * y[i];
    const double spread = sqrt(square / dim);
    const float factor = spread < 0x1p-100 ? 0 : (float)(UNITS[dtype - KVC_ROT4] / spread);
    for (int32_t k = 0; k + 1 < count; k++) middle[k] = (float)(levels[k] + levels[k + 1]) / 2 - 128.0f;
    for (int32_t k = 0; k + 1 < count; k++)
        for (int32_t i = 0; i < dim; i++) code[i] += y[i] * factor > middle[k];
    for (int32_t i = 0; i < dim; i++) {
        const double level = levels[code[i]] - 128;
        product += y[i] * level;
        size += level * level;
    }
    const float fitted = (float)(product / size);
    *scale = kvc_to_half(fitted > 65504.0f ? 65504.0f : fitted);
    pack_levels(code, dim, bits, row);
}

void kvc_encode(const kvc_codes *c, int64_t slot, const float *x, int32_t model_dtype) {
    KVC_CHECK(slot >= 0 && slot < c->slots && c->dim <= KVC_MAX_DIM);
    uint8_t *row = (uint8_t *)c->data + slot * c->row_bytes;
    if (c->dtype < KVC_INT8) {
        encode_plain(x, model_dtype, c->dim, row);
        return;
    }
    uint16_t *scale = c->scale + slot * c->groups;
    if (c->dtype == KVC_FP8) {
        encode_fp8(x, row, scale, c->dim);
        return;
    }
    if (kvc_rotated(c)) {
        encode_levels(x, c->dim, c->dtype, row, scale);
        return;
    }
    const float levels = c->dtype == KVC_INT8 ? 255.0f : 15.0f;
    const int32_t width = c->dim / c->groups, part = c->dim / 2;
    uint8_t codes[KVC_MAX_DIM];
    for (int32_t g = 0; g < c->groups; g++) {
        const float *own = x + g * width;
        float low = own[0], high = own[0], lows[4], highs[4];
        for (int k = 0; k < 4; k++) lows[k] = highs[k] = own[0];
        int32_t i = 0;
        for (; i + 4 <= width; i += 4) /* four chains of comparisons, which wait for themselves alone */
            for (int k = 0; k < 4; k++) {
                lows[k] = own[i + k] < lows[k] ? own[i + k] : lows[k];
                highs[k] = own[i + k] > highs[k] ? own[i + k] : highs[k];
            }
        for (int k = 0; k < 4; k++) {
            low = lows[k] < low ? lows[k] : low;
            high = highs[k] > high ? highs[k] : high;
        }
        for (; i < width; i++) {
            low = own[i] < low ? own[i] : low;
            high = own[i] > high ? own[i] : high;
        }
        const int whole = sound(own, width);
        const uint16_t minimum = kvc_to_half(low < -65504.0f ? -65504.0f : low > 65504.0f ? 65504.0f : low);
        low = kvc_from_half(minimum);
        scale[g] = whole ? scale_of((high - low) / levels) : NOT_A_NUMBER;
        c->minimum[slot * c->groups + g] = whole ? minimum : NOT_A_NUMBER;
        const float unit = kvc_from_half(scale[g]);
        if (!whole) memset(codes, 0, (size_t)width);
        for (i = 0; whole && i < width; i++) {
            const float code = nearest((own[i] - low) / unit);
            codes[i] = (uint8_t)(int32_t)(code < 0 ? 0 : code > levels ? levels : code);
        }
        if (c->dtype == KVC_INT8) {
            memcpy(row + g * width, codes, (size_t)width);
            continue;
        }
        for (i = 0; i < width; i++) {
            const int32_t channel = g * width + i;
            if (channel < part)
                row[channel] = (uint8_t)((row[channel] & 0xf0) | codes[i]);
            else
                row[channel - part] = (uint8_t)((row[channel - part] & 15) | codes[i] << 4);
        }
    }
}
