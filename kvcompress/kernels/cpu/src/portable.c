/* The inner loops for any processor, 8 floats at a time as the compiler can. */
#define KVC_WIDTH 8
#include "inner.inc.h"

const kvc_isa kvc_portable = {
    "portable", 0, dots, keys, values, weigh, settle, logits, maximum, exponentials, scale_by,
    dot, add_scaled, victim, linear8, linear16,
};
