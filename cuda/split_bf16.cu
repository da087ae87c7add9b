// Sets beyond the chip, bf16: a module of its own, so that a program compiles only the dtypes it uses.
#include "split.cuh"
#define HALVES
#define ELEMENT __nv_bfloat16
#define SUFFIX bf16
#include "entries.cuh"

NORM_ALL(split_moments, 256, 4)
NORM_ALL(split_forward, 256, 4)
NORM_ALL(split_sums, 256, 4)
NORM_BOTH(split_column_sums, 128, 4)
NORM_ALL(split_backward, 256, 4)
