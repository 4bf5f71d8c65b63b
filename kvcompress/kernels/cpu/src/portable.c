/* The inner loops for any processor, 8 floats at a time as the compiler can. */
#define KVC_WIDTH 8
#include "inner.inc.h"

const kvc_isa kvc_portable = {
    "portable", 0,      dots,     weigh,    settle,     halves, logits, maximum,
    exponentials, scale_by, dot, add_scaled, seen, victim, linear8, linear16,
};
