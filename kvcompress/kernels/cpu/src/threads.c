/* Work on several threads, through the OpenMP runtime that torch has loaded.
 *
 * Threads of a second pool would wait for the first one's, which spin for a while after each of
 * torch's own operations; so `kvc_use_openmp` is given the entry point of the runtime that is there.
 */
#include <stdlib.h>

#include "kvc.h"

typedef void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);

static gomp_parallel parallel_entry;

/* The address of GOMP_parallel; NULL: work stays on the calling thread. */
KVC_EXPORT void kvc_use_openmp(void *parallel) { parallel_entry = (gomp_parallel)parallel; }

KVC_EXPORT int32_t kvc_has_threads(void) { return parallel_entry != NULL; }

typedef struct {
    kvc_work work;
    void *context;
    int64_t items, next;
} job;

static void take_items(void *given) {
    job *j = given;
    for (;;) {
        const int64_t item = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED);
        if (item >= j->items) return;
        j->work(j->context, item);
    }
}

void kvc_parallel(int64_t items, int32_t threads, kvc_work work, void *context) {
    if (threads > items) threads = (int32_t)items;
    if (threads < 2 || !kvc_has_threads()) {
        for (int64_t i = 0; i < items; i++) work(context, i);
        return;
    }
    job j = {work, context, items, 0};
    parallel_entry(take_items, &j, (unsigned)threads, 0);
}

typedef struct {
    void *memory;
    size_t bytes;
} arena;

static _Thread_local arena arenas[2];

void *kvc_scratch(int32_t which, size_t bytes) {
    arena *own = arenas + which;
    if (bytes > own->bytes) {
        free(own->memory);
        own->bytes = (bytes + (bytes >> 2) + 4095) / 4096 * 4096;
        own->memory = aligned_alloc(64, own->bytes);
        if (!own->memory) own->bytes = 0;
    }
    return own->memory;
}
