#ifndef KVC_ENCODE_H
#define KVC_ENCODE_H

#include "kvc.h"

uint16_t kvc_to_half(float x);
float kvc_from_half(uint16_t half);

/* n numbers of the model's dtype (KVC_F32, KVC_BF16, KVC_F16) as floats, and back. */
void kvc_from_model(const void *from, int32_t dtype, int64_t n, float *out);
void kvc_to_model(const float *from, int32_t dtype, int64_t n, void *out);

/* x times a symmetric orthogonal matrix, as `rotated` in quant/codes/rotated.py. */
void kvc_rotate(float *x, int32_t dim);

/* Write a vector over `slot`. */
void kvc_encode(const kvc_codes *c, int64_t slot, const float *x, int32_t model_dtype);

#endif
