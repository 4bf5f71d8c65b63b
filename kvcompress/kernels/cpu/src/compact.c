/* The kept tokens of a prompt as codes, straight from its keys and values; see
 * kernels/compact_quantize/reference.py. */
#include "encode.h"

enum { BLOCK = 128 }; /* tokens of one work item */

typedef struct {
    const void *key, *value; /* [B, heads, tokens, …], dense vectors of the model's dtype */
    int64_t key_row, key_head, key_token, value_row, value_head, value_token; /* strides, in elements */
    const int64_t *row, *head, *token, *slot; /* [count] */
    int64_t count;
    const float *center, *scale; /* [heads, dim] key constants */
    int32_t dtype, threads;
    int64_t batch, heads, tokens;
} kvc_prompt;

typedef struct {
    const kvc_codes *keys, *values;
    const kvc_prompt *prompt;
} job;

static void one_block(void *context, int64_t item) {
    const job *j = context;
    const kvc_prompt *p = j->prompt;
    const int64_t size = p->dtype == KVC_F32 ? 4 : 2, first = item * BLOCK;
    const int64_t stop = first + BLOCK < p->count ? first + BLOCK : p->count;
    const int32_t dim = j->keys->dim;
    float x[KVC_MAX_DIM];
    for (int64_t t = first; t < stop; t++) {
        KVC_CHECK(p->row[t] >= 0 && p->row[t] < p->batch && p->head[t] >= 0 && p->head[t] < p->heads);
        KVC_CHECK(p->token[t] >= 0 && p->token[t] < p->tokens);
        const int64_t key = p->row[t] * p->key_row + p->head[t] * p->key_head + p->token[t] * p->key_token;
        const int64_t value =
            p->row[t] * p->value_row + p->head[t] * p->value_head + p->token[t] * p->value_token;
        const float *center = p->center + p->head[t] * dim, *scale = p->scale + p->head[t] * dim;
        kvc_from_model((const char *)p->key + key * size, p->dtype, dim, x);
        for (int32_t i = 0; i < dim; i++) x[i] = (x[i] - center[i]) / scale[i];
        kvc_encode(j->keys, p->slot[t], x, p->dtype);
        kvc_from_model((const char *)p->value + value * size, p->dtype, j->values->dim, x);
        kvc_encode(j->values, p->slot[t], x, p->dtype);
    }
}

/* Slots are all different. */
KVC_EXPORT void kvc_compact(const kvc_codes *keys, const kvc_codes *values, const kvc_prompt *p) {
    job j = {keys, values, p};
    kvc_parallel((p->count + BLOCK - 1) / BLOCK, p->threads, one_block, &j);
}

KVC_EXPORT int64_t kvc_prompt_size(void) { return sizeof(kvc_prompt); }
