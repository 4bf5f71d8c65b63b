/* One decoded token per row through one layer: attention over [exact ; codes ; the token itself] in
 * one softmax, scores, eviction, and the leaving token encoded over its victim.
 *
 * The rules are those of runtime/store/attend.py and runtime/step/store_token.py. A segment is the work of one
 * thread, or, where there are few of them, in chunks that are merged at the end.
 */
#include <math.h>
#include <string.h>

#include "encode.h"

#define PUNCT_SCORE 0x1p110f
#define SPECIAL_SCORE 0x1p120f
#define NEWEST_SCORE 0x1p30f
enum { SPECIAL_FLAG = 1, PUNCT_FLAG = 2, SMALL = 1 << 13, FEW = 8 };

/* What is known of a segment's attention so far; all arrays lie in scratch memory. */
typedef struct {
    float *exact_query, *code_query; /* [G, D] */
    int8_t *high, *low;              /* [G, 4 padded] parts of code_query */
    kvc_query query;                 /* in the codes' space */
    float *offset;                   /* [G] query · key centre */
    float *weight;                   /* [G, stride] logits, then their exponentials */
    int64_t stride, chunks;
    float *top, *total;              /* [chunks, G] */
    float *factor;                   /* [chunks] what makes a chunk's weights probabilities */
    float *sum;                      /* [chunks, G, sum_stride] */
} partial;

typedef struct {
    const kvc_layer *layer;
    const kvc_step *step;
    const kvc_isa *isa;
    const int32_t *place; /* [B] exact slot that each row's token takes */
    int64_t sum_stride;
    partial *partials;    /* of every segment, where chunks are shared out; else NULL */
    const int64_t *first_chunk;
    int failed;
} job;

static int64_t up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

static void *take(uint8_t **memory, int64_t bytes) {
    void *p = *memory;
    *memory += up(bytes, 64);
    return p;
}

static int64_t chunks_of(int64_t capacity) { return (capacity + KVC_CHUNK - 1) / KVC_CHUNK; }

/* Lay a segment's arrays out from `memory`; with NULL, only count the bytes. */
static int64_t lay_out(const job *j, int64_t capacity, uint8_t *memory, partial *p) {
    const kvc_layer *y = j->layer;
    const int64_t g = y->queries, vectors = g * y->dim * 4, parts = 4 * g * up(y->dim, 64);
    uint8_t *at = memory;
    p->chunks = chunks_of(capacity);
    p->stride = up(capacity, 16);
    p->exact_query = take(&at, vectors);
    p->code_query = take(&at, vectors);
    p->high = take(&at, parts);
    p->low = take(&at, parts);
    p->offset = take(&at, g * 4);
    p->weight = take(&at, g * p->stride * 4);
    p->top = take(&at, p->chunks * g * 4);
    p->total = take(&at, p->chunks * g * 4);
    p->factor = take(&at, p->chunks * 4);
    p->sum = take(&at, p->chunks * g * j->sum_stride * 4);
    return at - memory;
}

/* The query in the codes' space, and its 16 bits where they are multiplied as integers. */
static void prepare(const job *j, const kvc_segment *s, partial *p) {
    const kvc_layer *y = j->layer;
    const kvc_step *step = j->step;
    const int g = y->queries, dim = y->dim, size = y->dtype == KVC_F32 ? 4 : 2;
    const float *center = y->constants.center + (int64_t)s->head * dim, *scale = y->constants.scale + (int64_t)s->head * dim;
    const int rotated = kvc_rotated(&y->groups[s->group].k);
    kvc_query *q = &p->query;
    q->rows = g, q->dim = dim, q->padded = (int32_t)up(dim, 64);
    q->value = p->code_query, q->high = p->high, q->low = p->low;
    memset(p->high, 0, (size_t)(4 * g * q->padded));
    memset(p->low, 0, (size_t)(4 * g * q->padded));
    for (int r = 0; r < g; r++) {
        const int64_t at = s->row * step->token.query.row + ((int64_t)s->head * g + r) * step->token.query.head;
        float *exact = p->exact_query + r * dim, *code = p->code_query + r * dim, most = 0;
        kvc_from_model((const char *)step->token.query.data + at * size, y->dtype, dim, exact);
        float offset = 0, sum = 0;
        for (int i = 0; i < dim; i++) {
            exact[i] *= step->softmax.scaling;
            offset += exact[i] * center[i];
            code[i] = exact[i] * scale[i];
        }
        if (rotated) kvc_rotate(code, dim);
        for (int i = 0; i < dim; i++) {
            sum += code[i];
            most = fabsf(code[i]) > most ? fabsf(code[i]) : most;
        }
        p->offset[r] = offset;
        q->sum[r] = sum;
        if (!j->isa->integer_dots) continue;
        int64_t held = 0;
        const int usable = most < INFINITY && sum == sum; /* else logits are NaN or infinite by `sum` */
        const float factor = most > 0 ? 32639.0f / most : 0;
        q->unit[r] = most / 32639.0f;
        for (int i = 0; i < dim; i++) {
            /* any rounding will do: what it leaves out is added back in sum */
            const int32_t v = usable ? (int32_t)(code[i] * factor + (code[i] < 0 ? -0.5f : 0.5f)) : 0;
            const int32_t h = (v + 128) >> 8;
            int8_t *high = p->high + (int64_t)4 * r * q->padded + kvc_place(i);
            int8_t *low = p->low + (int64_t)4 * r * q->padded + kvc_place(i);
            for (int t = 0; t < 16; t += 4) high[t] = (int8_t)h, low[t] = (int8_t)(v - h * 256);
            held += v;
        }
        const double kept = (double)q->unit[r] * (double)held;
        q->rest[r] = kvc_middle(&y->groups[s->group].k) * (float)((rotated ? 0 : (double)sum) - kept);
    }
}

/* First position that a query at `now` of a row can see. */
static int32_t first_seen(const kvc_layer *y, int32_t row, int64_t now) {
    int64_t first = 0;
    if (y->reach.window > 0) first = now - y->reach.window + 1;
    if (y->reach.block > 0) first = y->start[row] + (now - y->start[row]) / y->reach.block * y->reach.block;
    return (int32_t)(first < 0 ? 0 : first);
}

/* Scales or minima of one group of channels, side by side: themselves, or gathered in `room`. */
static const uint16_t *meta_of(const kvc_codes *c, const uint16_t *meta, int64_t slot, int64_t n, int group,
                               uint16_t *room) {
    if (!meta || c->groups == 1) return meta ? meta + slot : NULL;
    const uint16_t *from = meta + slot * c->groups + group;
    for (int64_t t = 0; t < n; t++) room[t] = from[t * c->groups];
    return room;
}

typedef struct {
    uint16_t *scale, *minimum; /* [KVC_CHUNK] */
    float *scaled;             /* [G, KVC_CHUNK] */
    float *logits;             /* [G, exact + 1] */
    float *sum;                /* [G, value_dim] */
    uint8_t *tile;             /* KVC_TILE rows as floats */
} workspace;

static int workspace_of(const kvc_layer *y, uint8_t *memory, workspace *w, int64_t *bytes) {
    uint8_t *at = memory;
    const int64_t widest = y->dim > y->value_dim ? y->dim : y->value_dim;
    w->scale = take(&at, KVC_CHUNK * 2);
    w->minimum = take(&at, KVC_CHUNK * 2);
    w->scaled = take(&at, (int64_t)y->queries * KVC_CHUNK * 4);
    w->logits = take(&at, (int64_t)y->queries * (y->held + 1) * 4);
    w->sum = take(&at, (int64_t)y->queries * y->value_dim * 4);
    w->tile = take(&at, KVC_TILE * widest * 4);
    *bytes = at - memory;
    return memory != NULL;
}

/* The channels of a further scale. */
static void weigh_part(const kvc_isa *isa, const kvc_codes *values, int64_t slot, int64_t n, int low,
                       int width, const kvc_sight *sight, const float *weight, const partial *p,
                       const kvc_part *m, float *sum, int64_t sum_stride, uint8_t *tile) {
    const int rows = p->query.rows;
    for (int r = 0; r < rows; r++) {
        const float *x = weight + r * p->stride;
        if (sight->scale) isa->scale_by(x, sight->scale, n, m->scaled + r * KVC_CHUNK);
        m->shift[r] = sight->minimum ? isa->dot(x, sight->minimum, n) : 0;
    }
    isa->weigh(values, slot, n, low, width, sight->scale ? m->scaled : weight,
               sight->scale ? KVC_CHUNK : p->stride, rows, sum, sum_stride, tile);
}

static void check_segment(const kvc_layer *y, const kvc_segment *s) {
    const kvc_group *g = y->groups + s->group;
    KVC_CHECK(s->group >= 0 && s->row >= 0 && s->row < y->batch && s->head >= 0 && s->head < y->heads);
    KVC_CHECK(s->member >= 0 && s->member < y->keeps[s->group].members);
    KVC_CHECK(s->start >= 0 && s->capacity >= 0 && s->start + s->capacity <= g->k.slots);
    KVC_CHECK(g->k.slots == g->v.slots && g->k.dim == y->dim && g->v.dim == y->value_dim);
    KVC_CHECK(y->queries <= KVC_MAX_ROWS && y->dim <= KVC_MAX_DIM && y->value_dim <= KVC_MAX_DIM);
    KVC_CHECK(y->exact.sinks >= 0 && y->exact.sinks < y->held);
    (void)g;
}

/* One chunk of a segment's codes: its softmax for itself. */
static void attend_chunk(const job *j, const kvc_segment *s, partial *p, int64_t chunk, workspace *w) {
    const kvc_layer *y = j->layer;
    const kvc_group *group = y->groups + s->group;
    const kvc_codes *keys = &group->k, *values = &group->v;
    const kvc_isa *isa = j->isa;
    const int64_t low = chunk * KVC_CHUNK, slot = s->start + low;
    const int64_t n = s->capacity - low < KVC_CHUNK ? s->capacity - low : KVC_CHUNK;
    const int g = y->queries;
    float *weight = p->weight + low, *sum = p->sum + chunk * g * j->sum_stride;
    float shift[KVC_MAX_ROWS] = {0};
    const kvc_part softmax = {p->top + chunk * g, p->total + chunk * g, shift, w->scaled};
    kvc_sight sight = {meta_of(keys, keys->scale, slot, n, 0, w->scale),
                       meta_of(keys, keys->minimum, slot, n, 0, w->minimum),
                       group->position + slot,
                       first_seen(y, s->row, j->step->position),
                       j->step->softmax.softcap,
                       p->offset};
    isa->keys(keys, slot, n, &p->query, &sight, weight, p->stride, &softmax, w->tile);
    memset(sum, 0, (size_t)(g * j->sum_stride) * 4);
    const int width = values->dim / values->groups;
    for (int part = 0; part < values->groups; part++) {
        sight.scale = meta_of(values, values->scale, slot, n, part, w->scale);
        sight.minimum = meta_of(values, values->minimum, slot, n, part, w->minimum);
        if (part == 0)
            isa->values(values, slot, n, width, &sight, weight, p->stride, g, &softmax, sum, j->sum_stride,
                        w->tile);
        else
            weigh_part(isa, values, slot, n, part * width, width, &sight, weight, p, &softmax, sum,
                       j->sum_stride, w->tile);
        isa->settle(values, part * width, width, g, sum, j->sum_stride);
        for (int r = 0; r < g; r++) {
            float *to = sum + r * j->sum_stride + part * width;
            for (int i = 0; shift[r] != 0 && i < width; i++) to[i] += shift[r];
        }
    }
}

/* Logits [G, exact + 1] of the uncoded tokens and, last, of the token itself. */
static void attend_exact(const job *j, const kvc_segment *s, const partial *p, workspace *w) {
    const kvc_layer *y = j->layer;
    const kvc_step *step = j->step;
    const int g = y->queries, dim = y->dim, size = y->dtype == KVC_F32 ? 4 : 2;
    const int64_t head = (int64_t)s->row * y->heads + s->head, stride = y->held + 1;
    const int32_t first = first_seen(y, s->row, step->position);
    const int32_t *position = y->exact.position + (int64_t)s->row * y->held;
    kvc_codes exact = {(char *)y->exact.k + head * y->held * dim * size, NULL, NULL, y->dtype, dim, 1,
                       dim * size, y->held};
    kvc_codes own = exact;
    own.slots = 1;
    own.data = (char *)step->token.key.data + (s->row * step->token.key.row + s->head * step->token.key.head) * size;
    kvc_query q = p->query;
    q.value = p->exact_query;
    j->isa->dots(&exact, 0, y->held, &q, w->logits, stride, w->tile);
    j->isa->dots(&own, 0, 1, &q, w->logits + y->held, stride, w->tile);
    for (int r = 0; r < g; r++) {
        float *x = w->logits + r * stride;
        j->isa->logits(x, y->held, NULL, NULL, 0, 0, step->softmax.softcap, position, first);
        j->isa->logits(x + y->held, 1, NULL, NULL, 0, 0, step->softmax.softcap, NULL, 0);
    }
}

/* Merge everything that a query row sees; leaves p->factor, and in w->logits the probabilities of the
 * exact tokens. */
static void merge(const job *j, const kvc_segment *s, partial *p, int r, workspace *w) {
    const kvc_layer *y = j->layer;
    const kvc_step *step = j->step;
    const int g = y->queries, dim = y->value_dim, size = y->dtype == KVC_F32 ? 4 : 2;
    const int64_t head = (int64_t)s->row * y->heads + s->head, query = (int64_t)s->head * g + r;
    float *x = w->logits + r * (y->held + 1), *out = w->sum + r * dim;
    float *factor = p->factor, top = j->isa->maximum(x, y->held + 1);
    for (int64_t c = 0; c < p->chunks; c++) top = p->top[c * g + r] > top ? p->top[c * g + r] : top;
    if (step->softmax.sinks && step->softmax.sinks[query] > top) top = step->softmax.sinks[query];
    float total = j->isa->exponentials(x, y->held + 1, top, NULL, NULL, NULL, NULL);
    if (step->softmax.sinks) total += expf(step->softmax.sinks[query] - top);
    for (int64_t c = 0; c < p->chunks; c++) {
        factor[c] = p->top[c * g + r] == -INFINITY ? 0 : expf(p->top[c * g + r] - top);
        total += factor[c] * p->total[c * g + r];
    }
    for (int i = 0; i <= y->held; i++) x[i] /= total;
    memset(out, 0, (size_t)dim * 4);
    for (int64_t c = 0; c < p->chunks; c++) {
        factor[c] /= total;
        j->isa->add_scaled(out, p->sum + (c * g + r) * j->sum_stride, dim, factor[c]);
    }
    if (kvc_rotated(&y->groups[s->group].v)) kvc_rotate(out, dim);
    kvc_codes exact = {(char *)y->exact.v + head * y->held * dim * size, NULL, NULL, y->dtype, dim, 1,
                       dim * size, y->held};
    kvc_codes own = exact;
    own.slots = 1;
    own.data = (char *)step->token.value.data + (s->row * step->token.value.row + s->head * step->token.value.head) * size;
    j->isa->weigh(&exact, 0, y->held, 0, dim, x, y->held + 1, 1, out, dim, w->tile);
    j->isa->weigh(&own, 0, 1, 0, dim, x + y->held, 1, 1, out, dim, w->tile);
    const int64_t to = (s->row * (int64_t)y->heads * g + query) * dim;
    kvc_to_model(out, y->dtype, dim, (char *)step->out + to * size);
}

static float *recent_scores(const kvc_layer *y, const kvc_segment *s) {
    const kvc_group *group = y->groups + s->group;
    const int64_t members = y->keeps[s->group].members;
    if (!group->recent_score) return NULL;
    return group->recent_score + (s->row * members + s->member) * (y->held - y->exact.sinks);
}

/* Add the attention of query row r to the scores of everything that it saw; gives the token's own. */
static float vote(const job *j, const kvc_segment *s, const partial *p, int r, workspace *w) {
    const kvc_layer *y = j->layer;
    const kvc_step *step = j->step;
    const kvc_group *group = y->groups + s->group;
    if (!group->recent_score || step->vote == KVC_NO_VOTE || step->position < step->first_vote) return 0;
    const float *exact = w->logits + r * (y->held + 1);
    float count = 1.0f / (float)y->queries;
    if (step->vote == KVC_LIFT) count *= (float)(step->position - y->start[s->row]) + 1.0f;
    for (int64_t c = 0; c < p->chunks; c++) {
        const int64_t low = c * KVC_CHUNK;
        const int64_t n = s->capacity - low < KVC_CHUNK ? s->capacity - low : KVC_CHUNK;
        if (p->factor[c] > 0)
            j->isa->add_scaled(group->score + s->start + low, p->weight + r * p->stride + low, n,
                               p->factor[c] * count);
    }
    j->isa->add_scaled(recent_scores(y, s), exact + y->exact.sinks, y->held - y->exact.sinks, count);
    return exact[y->held] * count;
}

static kvc_rules rules_of(const job *j, const kvc_segment *s) {
    const kvc_layer *y = j->layer;
    const kvc_keep *keep = y->keeps + s->group;
    const int64_t now = j->step->position, at = s->row * keep->stride + s->member;
    const int64_t window = keep->windows[s->row * keep->members + s->member];
    kvc_rules u;
    u.first = first_seen(y, s->row, now + 1);
    u.local_from = (int32_t)(now + 1 - window > 0 ? now + 1 - window : 0);
    u.now = now;
    u.first_vote = j->step->first_vote;
    u.by_score = keep->by_score[at];
    u.per_vote = j->step->per_vote;
    u.keeps_rest = keep->keeps_rest[at];
    u.in_class = keep->classes[at] != 0 && !keep->keeps_rest[at];
    return u;
}

/* The score of the token that leaves the exact ones, as `class_score` raises it. */
static float leaving_score(const job *j, const kvc_segment *s) {
    const kvc_layer *y = j->layer;
    const kvc_keep *keep = y->keeps + s->group;
    const int32_t place = j->place[s->row];
    float score = recent_scores(y, s)[place - y->exact.sinks];
    if (!y->exact.flags) return score;
    const int64_t flags = y->exact.flags[s->row * y->held + place] &
                          keep->classes[s->row * keep->stride + s->member];
    return flags & SPECIAL_FLAG ? SPECIAL_SCORE : flags & PUNCT_FLAG ? PUNCT_SCORE : score;
}

/* The flat slot that the leaving token takes; −1 where nothing leaves, or it ranks lowest. */
static int64_t choose_victim(const job *j, const kvc_segment *s) {
    const kvc_layer *y = j->layer;
    const kvc_group *group = y->groups + s->group;
    const int32_t place = j->place[s->row];
    const int32_t position = y->exact.position[s->row * y->held + place];
    if (position < 0 || !s->capacity) return -1;
    kvc_rules u = rules_of(j, s);
    float held, own, score = group->score ? leaving_score(j, s) : 0;
    const int64_t slot =
        s->start + j->isa->victim(group->position + s->start, group->score ? group->score + s->start : NULL,
                                  s->capacity, &u, &held);
    const kvc_keep *keep = y->keeps + s->group;
    const int64_t classes = keep->classes[s->row * keep->stride + s->member];
    u.in_class = y->exact.flags && (y->exact.flags[s->row * y->held + place] & classes) != 0;
    j->isa->victim(&position, group->score ? &score : NULL, 1, &u, &own);
    return own >= held && own > -INFINITY ? slot : -1;
}

/* Attention, scores and the choice of a victim, once every chunk is done. */
static void finish(const job *j, int64_t number, partial *p, workspace *w) {
    const kvc_layer *y = j->layer;
    const kvc_step *step = j->step;
    const kvc_segment *s = y->segments + number;
    float score = step->newest ? NEWEST_SCORE * (1.0f + (float)step->position * 0x1p-23f) : 0;
    attend_exact(j, s, p, w);
    for (int r = 0; r < y->queries; r++) {
        merge(j, s, p, r, w);
        score += vote(j, s, p, r, w);
    }
    step->own_score[number] = score;
    step->victim[number] = choose_victim(j, s);
}

/* Encode the leaving token over its victim; the new one takes its exact slot. */
static void put(const job *j, int64_t number) {
    const kvc_layer *y = j->layer;
    const kvc_step *step = j->step;
    const kvc_segment *s = y->segments + number;
    const kvc_group *group = y->groups + s->group;
    const int32_t place = j->place[s->row];
    const int size = y->dtype == KVC_F32 ? 4 : 2;
    const int64_t at = ((int64_t)s->row * y->heads + s->head) * y->held + place;
    char *key = (char *)y->exact.k + at * y->dim * size, *value = (char *)y->exact.v + at * y->value_dim * size;
    const int64_t slot = step->victim[number];
    if (slot >= 0) {
        KVC_CHECK(slot >= s->start && slot < s->start + s->capacity);
        float x[KVC_MAX_DIM];
        const float *center = y->constants.center + (int64_t)s->head * y->dim, *scale = y->constants.scale + (int64_t)s->head * y->dim;
        kvc_from_model(key, y->dtype, y->dim, x);
        for (int i = 0; i < y->dim; i++) x[i] = (x[i] - center[i]) / scale[i];
        kvc_encode(&group->k, slot, x, y->dtype);
        kvc_from_model(value, y->dtype, y->value_dim, x);
        kvc_encode(&group->v, slot, x, y->dtype);
        group->position[slot] = y->exact.position[(int64_t)s->row * y->held + place];
        if (group->score) group->score[slot] = leaving_score(j, s);
    }
    memcpy(key, (const char *)step->token.key.data + (s->row * step->token.key.row + s->head * step->token.key.head) * size,
           (size_t)(y->dim * size));
    memcpy(value, (const char *)step->token.value.data + (s->row * step->token.value.row + s->head * step->token.value.head) * size,
           (size_t)(y->value_dim * size));
    float *recent = recent_scores(y, s);
    if (recent) recent[place - y->exact.sinks] = step->own_score[number];
}

/* ---- work items */
static uint8_t *own_memory(job *j, int64_t bytes, workspace *w) {
    int64_t fixed = 0;
    workspace_of(j->layer, NULL, w, &fixed);
    uint8_t *memory = kvc_scratch(1, (size_t)(fixed + bytes));
    if (!memory) {
        j->failed = 1;
        return NULL;
    }
    workspace_of(j->layer, memory, w, &fixed);
    return memory + fixed;
}

static void whole_segment(void *context, int64_t number) {
    job *j = context;
    const kvc_segment *s = j->layer->segments + number;
    workspace w;
    if (j->step->what & KVC_ATTEND) {
        partial p;
        uint8_t *memory = own_memory(j, lay_out(j, s->capacity, NULL, &p), &w);
        if (!memory) return;
        lay_out(j, s->capacity, memory, &p);
        prepare(j, s, &p);
        for (int64_t c = 0; c < p.chunks; c++) attend_chunk(j, s, &p, c, &w);
        finish(j, number, &p, &w);
    }
    if (j->step->what & KVC_STORE) put(j, number);
}

static int64_t segment_of(const job *j, int64_t item) {
    int64_t low = 0, high = j->layer->segment_count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (j->first_chunk[middle] <= item) low = middle;
        else high = middle;
    }
    return low;
}

static void one_chunk(void *context, int64_t item) {
    job *j = context;
    const int64_t number = segment_of(j, item);
    workspace w;
    if (own_memory(j, 0, &w))
        attend_chunk(j, j->layer->segments + number, j->partials + number, item - j->first_chunk[number], &w);
}

static void end_of_segment(void *context, int64_t number) {
    job *j = context;
    workspace w;
    if (!own_memory(j, 0, &w)) return;
    finish(j, number, j->partials + number, &w);
    if (j->step->what & KVC_STORE) put(j, number);
}

/* Chunks of all segments side by side. */
static void share_out(job *j, uint8_t *memory) {
    const kvc_layer *y = j->layer;
    const int64_t count = y->segment_count;
    int64_t *first = take(&memory, (count + 1) * 8);
    j->partials = take(&memory, count * (int64_t)sizeof(partial));
    first[0] = 0;
    for (int64_t i = 0; i < count; i++) {
        const kvc_segment *s = y->segments + i;
        memory += lay_out(j, s->capacity, memory, j->partials + i);
        first[i + 1] = first[i] + j->partials[i].chunks;
        prepare(j, s, j->partials + i);
    }
    j->first_chunk = first;
    kvc_parallel(first[count], j->step->threads, one_chunk, j);
    if (!j->failed) kvc_parallel(count, j->step->threads, end_of_segment, j);
}

/* The exact slot of each row's token: that of the oldest one behind the sinks. */
static void find_places(const kvc_layer *y, int32_t *place) {
    for (int32_t b = 0; b < y->batch; b++) {
        const int32_t *position = y->exact.position + (int64_t)b * y->held;
        place[b] = y->exact.sinks;
        for (int32_t i = y->exact.sinks + 1; i < y->held; i++)
            if (position[i] < position[place[b]]) place[b] = i;
    }
}

/* Position and class flags [B] of the tokens that the next one pushes out; −1 and 0 if none. */
KVC_EXPORT int32_t kvc_leaving(const kvc_layer *y, int32_t *position, int32_t *flags) {
    int32_t *place = kvc_scratch(0, (size_t)y->batch * 4);
    if (!place) return -1;
    find_places(y, place);
    for (int32_t b = 0; b < y->batch; b++) {
        const int64_t at = (int64_t)b * y->held + place[b];
        position[b] = y->exact.position[at];
        flags[b] = y->exact.flags && position[b] >= 0 ? y->exact.flags[at] : 0;
    }
    return 0;
}

/* 0, or −1 if there is no memory for it; nothing is changed then. */
KVC_EXPORT int32_t kvc_decode(const kvc_layer *y, const kvc_step *step) {
    const int64_t count = y->segment_count;
    job j = {y, step, kvc_current(), NULL, up(2 * (int64_t)y->value_dim, 64) + 64, NULL, NULL, 0};
    int64_t slots = 0, bytes = up((int64_t)y->batch * 4, 64) + up((count + 1) * 8, 64);
    for (int64_t i = 0; i < count; i++) {
        check_segment(y, y->segments + i);
        slots += y->segments[i].capacity;
    }
    const int shared = step->threads > 1 && kvc_has_threads() && count < FEW * step->threads &&
                       slots > SMALL && (step->what & KVC_ATTEND);
    if (shared) {
        partial p;
        bytes += up(count * (int64_t)sizeof p, 64);
        for (int64_t i = 0; i < count; i++) bytes += lay_out(&j, y->segments[i].capacity, NULL, &p);
    }
    uint8_t *memory = kvc_scratch(0, (size_t)bytes);
    if (!memory) return -1;
    int32_t *place = take(&memory, (int64_t)y->batch * 4);
    find_places(y, place);
    j.place = place;
    if (shared)
        share_out(&j, memory);
    else
        kvc_parallel(count, slots > SMALL / 4 ? step->threads : 1, whole_segment, &j);
    if (j.failed) return -1;
    for (int32_t b = 0; b < y->batch && (step->what & KVC_STORE); b++) {
        const int64_t at = (int64_t)b * y->held + place[b];
        y->exact.position[at] = (int32_t)step->position;
        if (y->exact.flags) y->exact.flags[at] = step->token.flags ? step->token.flags[b] : 0;
    }
    return 0;
}

/* Sizes of the structures in view.h, in its order, for whoever mirrors them. */
KVC_EXPORT void kvc_sizes(int64_t *out) {
    const size_t sizes[] = {sizeof(kvc_codes),     sizeof(kvc_vectors), sizeof(kvc_group),   sizeof(kvc_keep),
                            sizeof(kvc_segment),   sizeof(kvc_exact),   sizeof(kvc_constants), sizeof(kvc_reach),
                            sizeof(kvc_layer),     sizeof(kvc_token),   sizeof(kvc_softmax), sizeof(kvc_step),
                            sizeof(kvc_prompt),    sizeof(kvc_compaction)};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) out[i] = (int64_t)sizes[i];
}
