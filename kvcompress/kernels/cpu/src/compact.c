/* The kept tokens of a prompt as codes, straight from its keys and values; see
 * kernels/compact_quantize/reference.py. */
#include "encode.h"

enum { BLOCK = 128 }; /* tokens of one work item */

typedef struct {
    const kvc_codes *keys, *values;
    const kvc_compaction *told;
} job;

static void one_block(void *context, int64_t item) {
    const job *j = context;
    const kvc_compaction *c = j->told;
    const kvc_prompt *p = &c->prompt;
    const int64_t *row = p->kept, *head = row + c->count, *token = head + c->count;
    const int64_t size = c->dtype == KVC_F32 ? 4 : 2, first = item * BLOCK;
    const int64_t stop = first + BLOCK < c->count ? first + BLOCK : c->count;
    const int32_t dim = j->keys->dim;
    float x[KVC_MAX_DIM];
    for (int64_t t = first; t < stop; t++) {
        KVC_CHECK(row[t] >= 0 && row[t] < c->batch && head[t] >= 0 && head[t] < c->heads);
        KVC_CHECK(token[t] >= 0 && token[t] < c->tokens);
        const int64_t key = row[t] * p->key.row + head[t] * p->key.head + token[t] * p->key.token;
        const int64_t value = row[t] * p->value.row + head[t] * p->value.head + token[t] * p->value.token;
        const float *center = c->constants.center + head[t] * dim, *scale = c->constants.scale + head[t] * dim;
        kvc_from_model((const char *)p->key.data + key * size, c->dtype, dim, x);
        for (int32_t i = 0; i < dim; i++) x[i] = (x[i] - center[i]) / scale[i];
        kvc_encode(j->keys, p->slot[t], x, c->dtype);
        kvc_from_model((const char *)p->value.data + value * size, c->dtype, j->values->dim, x);
        kvc_encode(j->values, p->slot[t], x, c->dtype);
    }
}

KVC_EXPORT void kvc_compact(const kvc_codes *keys, const kvc_codes *values, const kvc_compaction *c) {
    job j = {keys, values, c};
    kvc_parallel((c->count + BLOCK - 1) / BLOCK, c->threads, one_block, &j);
}
