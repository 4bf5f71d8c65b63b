/* One decode step of one layer; mirrored in kvcompress/kernels/cpu/layout.py. */
#ifndef KVC_DECODE_H
#define KVC_DECODE_H

#include "kvc.h"

/* Heads that share storage; M of them. */
typedef struct {
    kvc_codes keys, values;
    int32_t *position;      /* [slots], −1 where empty */
    float *score;           /* [slots], NULL where heads do not rank by score */
    float *recent_score;    /* [B, M, recent], NULL likewise */
    const int32_t *windows; /* [B, M] local window in tokens */
    const int64_t *classes; /* [B or 1, M] class bits */
    const uint8_t *by_score, *keeps_rest; /* [B or 1, M] */
    int64_t rules_stride;   /* from one row's rules to the next: 0 or M */
    int64_t members;
} kvc_group;

/* Where the codes of one (row, head) lie. */
typedef struct {
    int32_t group, row, head, member; /* `member`: place of the head in its group */
    int64_t start, capacity;
} kvc_segment;

typedef struct {
    int32_t batch, heads, queries, dim, value_dim; /* `queries`: of each KV head */
    int32_t sinks, exact, dtype;  /* uncoded slots, the sinks first; dtype of the model */
    void *exact_k, *exact_v;      /* [B, heads, exact, …] */
    int32_t *exact_position;      /* [B, exact] */
    uint8_t *exact_class;         /* [B, exact] or NULL */
    const int32_t *start;         /* [B] position of the first real token */
    const float *center, *scale;  /* [heads, dim] key constants */
    int64_t window, block;        /* of the architecture; 0: none */
    const kvc_group *groups;
    const kvc_segment *segments;  /* one for each (row, head), the largest first */
    int64_t segment_count;
} kvc_layer;

enum { KVC_ATTEND = 1, KVC_STORE = 2 };
enum { KVC_NO_VOTE, KVC_VOTE, KVC_LIFT };

typedef struct {
    const void *query, *key, *value; /* [B, heads · queries, dim], [B, heads, …] */
    int64_t query_row, query_head, key_row, key_head, value_row, value_head; /* strides, in elements */
    void *out;                    /* [B, heads · queries, value_dim] */
    const uint8_t *flags;         /* [B] class flags of the token, or NULL */
    const float *sinks;           /* [heads · queries] logits without a value, or NULL */
    int64_t position, first_vote;
    float scaling, softcap;       /* softcap 0: none */
    int32_t vote;                 /* what a query row's attention counts */
    int32_t per_vote;             /* whether a score ranks per vote */
    int32_t newest;               /* whether a new token's score is its age, else 0 */
    int32_t what;                 /* KVC_ATTEND, KVC_STORE or both */
    int32_t threads;
    int64_t *victim;              /* [segments] flat slot that is overwritten, or −1 */
    float *own_score;             /* [segments] score of the token itself */
} kvc_step;

#endif
