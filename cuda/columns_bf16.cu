// Column walks, bf16: a module of its own, so that a program compiles only the dtypes it uses.
#include "columns.cuh"
#define ELEMENT __nv_bfloat16
#define SUFFIX bf16
#include "entries.cuh"

NORM_BOTH(column_moments, 256)
NORM_BOTH(column_forward, 256)
NORM_BOTH(column_sums, 256)
NORM_BOTH(column_backward, 256)
