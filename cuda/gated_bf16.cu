// RMS norm with a gate before it, bf16: a module of its own, which programs without one never load.
#include "gated.cuh"
#define ELEMENT __nv_bfloat16
#define SUFFIX bf16
#include "entries.cuh"

NORM_BOTH(gated_forward, 512, 1)
NORM_BOTH(gated_backward, 512, 1)
