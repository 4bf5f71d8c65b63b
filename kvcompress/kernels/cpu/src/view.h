/* What Python hands over: the views of kvcompress/kernels/view.py and the structures of
 * kvcompress/kernels/cpu/layout.py, field by field. tests/kernels/test_view.py holds this file against
 * them, and `kvc_sizes` lets layout.py check what was built. */
#ifndef KVC_VIEW_H
#define KVC_VIEW_H

#include <stdint.h>

/* Vectors of one kind, a row of `row_bytes` for each slot; see quant/codec.py. */
typedef struct {
    void *data;
    uint16_t *scale;   /* [slots, groups] float16; NULL for uncoded vectors */
    uint16_t *minimum; /* [slots, groups] float16; NULL without */
    int32_t dtype, dim, groups, row_bytes;
    int64_t slots;
} kvc_codes;

/* Vectors of a tensor [B, heads, tokens, …], each dense; strides in elements. */
typedef struct {
    const void *data;
    int64_t row, head, token;
} kvc_vectors;

/* What heads that share storage hold. */
typedef struct {
    kvc_codes k, v;
    int32_t *position;   /* [slots], −1 where empty */
    float *score;        /* [slots], NULL where heads do not rank by score */
    float *recent_score; /* [B, M, recent], NULL likewise */
} kvc_group;

/* How these heads rank; M of them. */
typedef struct {
    const int32_t *windows; /* [B, M] local window in tokens */
    const int64_t *classes; /* [B or 1, M] class bits */
    const uint8_t *by_score, *keeps_rest; /* [B or 1, M] */
    int64_t stride;         /* from one row's rules to the next: 0 or M */
    int64_t members;
} kvc_keep;

/* Where the codes of one (row, head) lie. */
typedef struct {
    int32_t group, row, head, member; /* `member`: place of the head in its group */
    int64_t start, capacity;
} kvc_segment;

/* The uncoded tokens, the sinks first. */
typedef struct {
    void *k, *v;       /* [B, heads, held, …] */
    int32_t *position; /* [B, held] */
    uint8_t *flags;    /* [B, held] class flags, or NULL */
    int32_t sinks;
} kvc_exact;

typedef struct {
    const float *center, *scale; /* [heads, dim] */
} kvc_constants;

typedef struct {
    int64_t window, block; /* of the architecture; 0: none */
} kvc_reach;

typedef struct {
    int32_t batch, heads, queries, dim, value_dim; /* `queries`: of each KV head */
    int32_t held, dtype;          /* uncoded slots; dtype of the model */
    kvc_exact exact;
    kvc_constants constants;
    kvc_reach reach;
    const int32_t *start;         /* [B] position of the first real token */
    const kvc_group *groups;
    const kvc_keep *keeps;        /* one for each group */
    const kvc_segment *segments;  /* one for each (row, head), the largest first */
    int64_t segment_count;
} kvc_layer;

/* The token of each row that arrives. */
typedef struct {
    kvc_vectors query, key, value;
    const uint8_t *flags; /* [B] class flags, or NULL */
} kvc_token;

typedef struct {
    float scaling, softcap; /* softcap 0: none */
    const float *sinks;     /* [heads · queries] logits without a value, or NULL */
} kvc_softmax;

enum { KVC_ATTEND = 1, KVC_STORE = 2 };
enum { KVC_NO_VOTE, KVC_VOTE, KVC_LIFT };

typedef struct {
    kvc_token token;
    kvc_softmax softmax;
    void *out;         /* [B, heads · queries, value_dim] */
    int64_t position, first_vote;
    int32_t vote;      /* what a query row's attention counts */
    int32_t per_vote;  /* whether a score ranks per vote */
    int32_t newest;    /* whether a new token's score is its age, else 0 */
    int32_t what;      /* KVC_ATTEND, KVC_STORE or both */
    int32_t threads;
    int64_t *victim;   /* [segments] flat slot that is overwritten, or −1 */
    float *own_score;  /* [segments] score of the token itself */
} kvc_step;

/* A prompt, and which of its tokens are kept where. */
typedef struct {
    kvc_vectors key, value;
    const int64_t *kept; /* [3, count] row, head and token */
    const int64_t *slot; /* [count], all different */
} kvc_prompt;

typedef struct {
    kvc_prompt prompt;
    kvc_constants constants;
    int64_t count, batch, heads, tokens;
    int32_t dtype, threads;
} kvc_compaction;

#endif
