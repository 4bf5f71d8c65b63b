/* Shared by the CPU kernels: how they work on vectors, and what one instruction set offers. Plain C11
 * without headers of torch or Python. */
#ifndef KVC_H
#define KVC_H

#include <stddef.h>
#include <stdint.h>

#include "view.h"

#if defined(_WIN32)
#define KVC_EXPORT __declspec(dllexport)
#else
#define KVC_EXPORT __attribute__((visibility("default")))
#endif

enum { KVC_F32, KVC_BF16, KVC_F16, KVC_INT8, KVC_INT4, KVC_FP8, KVC_ROT4, KVC_ROT3, KVC_ROT2 };

enum {
    KVC_MAX_ROWS = 64,   /* query heads that share a KV head */
    KVC_MAX_DIM = 512,   /* channels of a vector */
    KVC_TILE = 64,       /* tokens widened, or weighted with one integer scale, at a time */
    KVC_CHUNK = 1024     /* tokens of a segment that one work item takes */
};

/* Compile what follows, in one file, for a processor that has these features. */
#define KVC_TEXT(x) #x
#if defined(__clang__)
#define KVC_TARGET(features) \
    _Pragma(KVC_TEXT(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define KVC_TARGET_END _Pragma("clang attribute pop")
#else
#define KVC_TARGET(features) _Pragma(KVC_TEXT(GCC target(features)))
#define KVC_TARGET_END
#endif

/* Built with KVC_CHECKED, the kernels ask whether what they are told lies inside of its arrays, as
 * layout.py has made sure; for tests. */
#ifdef KVC_CHECKED
#include <stdio.h>
#include <stdlib.h>
#define KVC_CHECK(holds) \
    ((holds) ? (void)0 : (fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #holds), abort()))
#else
#define KVC_CHECK(holds) ((void)0)
#endif

/* The number that codes lie around: a rounded factor is off by its rounding error times what codes
 * deviate from it, once the errors' sum times it has been added. */
static inline float kvc_middle(const kvc_codes *c) { return c->dtype == KVC_INT4 ? 8.0f : 128.0f; }

/* Codes of levels lie in rotated vectors, see quant/codes/rotated.py: a query is rotated before it
 * meets them, and so is a sum of them. A level is a byte of `kvc_levels` less `kvc_middle`. */
static inline int kvc_rotated(const kvc_codes *c) { return c->dtype >= KVC_ROT4; }
extern const uint8_t kvc_levels[3][16]; /* of rot4, rot3 and rot2; small tables repeat themselves */

/* Some query rows, ready to be multiplied with rows of codes. */
typedef struct {
    int32_t rows, dim, padded; /* `padded`: dim rounded up to 64 */
    const float *value;        /* [rows, dim] */
    const int8_t *high, *low;  /* [rows, 4 padded] value ≈ unit (256 high + low), see kvc_place */
    float unit[KVC_MAX_ROWS];
    float rest[KVC_MAX_ROWS];  /* the sum of what the 16 bits leave out, times `kvc_middle`; of levels
                                * the sum of the 16 bits, times −`kvc_middle` */
    float sum[KVC_MAX_ROWS];   /* of `value` over the channels */
} kvc_query;

/* Where the first of 4 copies of channel i of a query's part lies, 4 bytes apart: what `dpbusd` meets
 * in avx512.c. */
static inline int32_t kvc_place(int32_t i) {
    return i / 64 * 256 + i / 4 % 4 * 64 + i / 16 % 4 * 16 + i % 4;
}

/* How the tokens of one (row, head) rank against each other; see evict/keepset.py. */
typedef struct {
    int32_t first;      /* earlier positions are out of the architecture's sight */
    int32_t local_from; /* positions from here on are in the local window */
    int64_t now, first_vote;
    int32_t by_score, per_vote, keeps_rest, in_class;
} kvc_rules;

/* What some codes are scaled by, and which of them a query sees. */
typedef struct {
    const uint16_t *scale, *minimum; /* [n] float16, or NULL */
    const int32_t *position;         /* [n] */
    int32_t first;                   /* earlier positions are not seen */
    float softcap;                   /* 0: none */
    const float *offset;             /* [rows] added to a query's logits */
} kvc_sight;

/* The softmax of some tokens for itself: of each query row the largest logit, the sum of the weights
 * e^(logit − top), and what the minima of the values add to every channel. */
typedef struct {
    float *top, *total, *shift; /* [rows] */
    float *scaled;              /* [rows, KVC_CHUNK] room for weights times scales */
} kvc_part;

typedef struct {
    const char *name;
    int32_t integer_dots; /* reads int8 codes as integers, and so needs high and low */
    /* out[r * stride + t] = query r · row first + t, without scale and minimum */
    void (*dots)(const kvc_codes *, int64_t first, int64_t n, const kvc_query *, float *out,
                 int64_t stride, uint8_t *tile);
    /* logits of n ≤ KVC_CHUNK tokens, −inf where a token is not seen, and softmax.top */
    void (*keys)(const kvc_codes *, int64_t first, int64_t n, const kvc_query *, const kvc_sight *,
                 float *logits, int64_t stride, const kvc_part *, uint8_t *tile);
    /* weight = e^(logit − top), softmax.total and .shift, and what `weigh` gives of the first `width`
     * channels, whose scales and minima `sight` has */
    void (*values)(const kvc_codes *, int64_t first, int64_t n, int32_t width, const kvc_sight *,
                   float *weight, int64_t stride, int32_t rows, const kvc_part *, float *sum,
                   int64_t sum_stride, uint8_t *tile);
    /* sum[r * sum_stride + channel] += Σ_t weight[r * stride + t] · code (first + t, channel), for the
     * channels low ≤ channel < low + width, in an order that only `settle` knows */
    void (*weigh)(const kvc_codes *, int64_t first, int64_t n, int32_t low, int32_t width,
                  const float *weight, int64_t stride, int32_t rows, float *sum, int64_t sum_stride,
                  uint8_t *tile);
    /* `sum` of `weigh` in the order of the channels */
    void (*settle)(const kvc_codes *, int32_t low, int32_t width, int32_t rows, float *sum,
                   int64_t sum_stride);
    /* x = scale · x + minimum · sum + offset, softcap, and −inf for positions before `first`; gives
     * the largest. scale, minimum: float16 or NULL; position: NULL where every token is seen */
    float (*logits)(float *x, int64_t n, const uint16_t *scale, const uint16_t *minimum, float sum,
                    float offset, float softcap, const int32_t *position, int32_t first);
    float (*maximum)(const float *x, int64_t n);
    /* x = e^(x − top); gives their sum. With `scale`, scaled = x · scale, and with `minimum` *shift is
     * the sum of x · minimum */
    float (*exponentials)(float *x, int64_t n, float top, const uint16_t *scale, const uint16_t *minimum,
                          float *scaled, float *shift);
    void (*scale_by)(const float *x, const uint16_t *factor, int64_t n, float *out);
    float (*dot)(const float *x, const uint16_t *y, int64_t n);
    void (*add_scaled)(float *x, const float *y, int64_t n, float factor); /* x += factor · y */
    /* Place of the lowest rank among n tokens, the first one of equals; 0 for n = 0 */
    int64_t (*victim)(const int32_t *position, const float *score, int64_t n, const kvc_rules *,
                      float *rank);
    /* y[m, n] = scale[n] Σ_k x[m, k] w[n, k] for the rows first ≤ n < stop of w */
    void (*linear8)(const int8_t *w, int64_t first, int64_t stop, int64_t inner, const float *scale,
                    const int32_t *row_sum, const float *x, const uint8_t *high, const uint8_t *low,
                    const float *unit, const float *shift, int64_t m, float *y, int64_t y_stride);
    /* The same for rows of KVC_BF16 or KVC_F16, without a scale. narrow [m, 2 half_stride] is x in the
     * dtype of w, each row with zeros at its end. x [m, inner], and its even and odd channels, each
     * [m, half_stride], are there where kvc_multiplies_in_pairs does not hold */
    void (*linear16)(const uint16_t *w, int32_t dtype, int64_t first, int64_t stop, int64_t inner,
                     const float *x, const float *even, const float *odd, const uint16_t *narrow,
                     int64_t half_stride, int64_t m, float *y, int64_t y_stride);
} kvc_isa;

extern const kvc_isa kvc_portable;
#if defined(__x86_64__)
extern const kvc_isa kvc_avx2, kvc_avx512;
#endif

/* Whether the instruction set in use has products of bfloat16 numbers, and whether so many rows of
 * activations are multiplied by them: fewer wait for memory, not for the processor. */
KVC_EXPORT int32_t kvc_multiplies_bf16(void);
static inline int kvc_multiplies_in_pairs(int32_t dtype, int64_t rows) {
    return dtype == KVC_BF16 && rows > 2 && kvc_multiplies_bf16();
}

/* The instruction set in use. */
const kvc_isa *kvc_current(void);

/* Call work(context, item) for 0 ≤ item < items on up to `threads` threads. */
typedef void (*kvc_work)(void *context, int64_t item);
int32_t kvc_has_threads(void);
void kvc_parallel(int64_t items, int32_t threads, kvc_work work, void *context);

/* Memory of the calling thread that lives on between calls, 64-byte aligned: 0 for a call, 1 for one
 * of its work items. NULL if there is none. */
void *kvc_scratch(int32_t which, size_t bytes);

#endif
