// Column walks, bf16: a module of its own, so that a program compiles only the dtypes it uses.
#include "columns.cuh"
#define ELEMENT __nv_bfloat16
#define SUFFIX bf16
#include "entries.cuh"

NORM_HALVES(column_moments, 256, 3)
NORM_HALVES(column_forward, 256, 3)
NORM_HALVES(column_sums, 256, 2)
NORM_HALVES(column_backward, 256, 2)
