/* Products with int8 and 16-bit weights, for few rows of activations. */
#include <math.h>
#include <string.h>

#include "encode.h"

enum { BLOCK = 64 }; /* output channels of a work item */

typedef struct {
    const kvc_isa *isa;
    const int8_t *weight;
    const float *scale;
    const int32_t *row_sum;
    int64_t outer, inner, rows;
    const float *x;
    const uint8_t *high, *low;
    const float *unit, *shift;
    float *y;
} job;

static void one_block(void *context, int64_t item) {
    const job *j = context;
    const int64_t first = item * BLOCK, stop = first + BLOCK < j->outer ? first + BLOCK : j->outer;
    j->isa->linear8(j->weight, first, stop, j->inner, j->scale, j->row_sum, j->x, j->high, j->low,
                    j->unit, j->shift, j->rows, j->y, j->outer);
}

/* x ≈ unit · (256 high + low − 32768) + shift, which keeps 16 bits of the range of a row. */
static void split(const float *x, int64_t n, uint8_t *high, uint8_t *low, float *unit, float *shift) {
    float least = x[0], most = x[0], odd = 0; /* infinity and NaN times zero are NaN */
    for (int64_t i = 0; i < n; i++) {
        least = x[i] < least ? x[i] : least;
        most = x[i] > most ? x[i] : most;
        odd += x[i] * 0.0f;
    }
    if (odd != 0) {
        memset(high, 0, (size_t)n);
        memset(low, 0, (size_t)n);
        *unit = *shift = NAN;
        return;
    }
    *unit = (most - least) / 65535.0f;
    const float factor = most > least ? 65535.0f / (most - least) : 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t v = (int32_t)((x[i] - least) * factor + 0.5f);
        high[i] = (uint8_t)(v >> 8);
        low[i] = (uint8_t)v;
    }
    *shift = least + 32768.0f * *unit;
}

/* y = x Wᵀ · scale, all rows dense.
 *
 * weight [outer, inner] int8, scale [outer] float, row_sum [outer] sums of the weights' codes;
 * x [rows, inner] and y [rows, outer] of dtype KVC_F32, KVC_BF16 or KVC_F16; bias [outer] or NULL.
 * Returns −1 if there is no memory. */
KVC_EXPORT int32_t kvc_linear8(const int8_t *weight, int64_t outer, int64_t inner, const float *scale,
                               const int32_t *row_sum, const void *x, int32_t dtype, int64_t rows,
                               int64_t x_stride, const float *bias, void *y, int64_t y_stride,
                               int32_t threads) {
    const int64_t padded = (inner + 63) / 64 * 64, size = dtype == KVC_F32 ? 4 : 2;
    uint8_t *memory = kvc_scratch(0, (size_t)(rows * (padded * 6 + 8 + outer * 4) + 256));
    if (!memory) return -1;
    uint8_t *high = memory, *low = high + rows * padded;
    float *wide = (float *)(low + rows * padded), *unit = wide + rows * padded, *shift = unit + rows;
    float *out = shift + rows;
    job j = {kvc_current(), weight, scale, row_sum, outer, inner, rows, wide, high, low, unit, shift, out};
    for (int64_t r = 0; r < rows; r++) {
        kvc_from_model((const char *)x + r * x_stride * size, dtype, inner, wide + r * inner);
        if (j.isa->integer_dots) {
            memset(high + r * padded + inner, 0, (size_t)(padded - inner));
            memset(low + r * padded + inner, 0, (size_t)(padded - inner));
            split(wide + r * inner, inner, high + r * padded, low + r * padded, unit + r, shift + r);
        }
    }
    kvc_parallel((outer + BLOCK - 1) / BLOCK, outer * inner > (1 << 16) ? threads : 1, one_block, &j);
    for (int64_t r = 0; r < rows; r++) {
        float *own = out + r * outer;
        for (int64_t n = 0; bias && n < outer; n++) own[n] += bias[n];
        kvc_to_model(own, dtype, outer, (char *)y + r * y_stride * size);
    }
    return 0;
}

typedef struct {
    const kvc_isa *isa;
    const uint16_t *weight;
    int32_t dtype;
    int64_t outer, inner, rows, half_stride;
    const float *x, *even, *odd;
    const uint16_t *narrow;
    float *y;
} job16;

static void one_block16(void *context, int64_t item) {
    const job16 *j = context;
    const int64_t first = item * BLOCK, stop = first + BLOCK < j->outer ? first + BLOCK : j->outer;
    j->isa->linear16(j->weight, j->dtype, first, stop, j->inner, j->x, j->even, j->odd, j->narrow,
                     j->half_stride, j->rows, j->y, j->outer);
}

/* y = x Wᵀ with weights, activations and results of one dtype, KVC_BF16 or KVC_F16, and sums of
 * floats; arguments as above. */
KVC_EXPORT int32_t kvc_linear16(const uint16_t *weight, int64_t outer, int64_t inner, const void *x,
                                int32_t dtype, int64_t rows, int64_t x_stride, const float *bias, void *y,
                                int64_t y_stride, int32_t threads) {
    const int64_t half = (inner + 31) / 32 * 16;
    uint8_t *memory = kvc_scratch(0, (size_t)(rows * (inner + 3 * half + outer) * 4 + 256));
    if (!memory) return -1;
    float *even = (float *)memory, *odd = even + rows * half, *wide = odd + rows * half;
    float *out = wide + rows * inner;
    uint16_t *narrow = (uint16_t *)(out + rows * outer);
    job16 j = {kvc_current(), weight, dtype, outer, inner, rows, half, wide, even, odd, narrow, out};
    memset(narrow, 0, (size_t)(2 * rows * half) * 2);
    for (int64_t r = 0; r < rows; r++)
        memcpy(narrow + 2 * r * half, (const char *)x + r * x_stride * 2, (size_t)inner * 2);
    const int as_floats = !kvc_multiplies_in_pairs(dtype, rows);
    if (as_floats) memset(even, 0, (size_t)(2 * rows * half) * 4);
    for (int64_t r = 0; as_floats && r < rows; r++) {
        float *own = wide + r * inner;
        kvc_from_model((const char *)x + r * x_stride * 2, dtype, inner, own);
        for (int64_t k = 0; k < inner; k++) (k % 2 ? odd : even)[r * half + k / 2] = own[k];
    }
    kvc_parallel((outer + BLOCK - 1) / BLOCK, outer * inner > (1 << 16) ? threads : 1, one_block16, &j);
    for (int64_t r = 0; r < rows; r++) {
        float *own = out + r * outer;
        for (int64_t n = 0; bias && n < outer; n++) own[n] += bias[n];
        kvc_to_model(own, dtype, outer, (char *)y + r * y_stride * 2);
    }
    return 0;
}
