// Sets on chip, bf16: a module of its own, so that a program compiles only the dtypes it uses.
#include "rows_backward.cuh"
#define ELEMENT __nv_bfloat16
#define SUFFIX bf16
#include "entries.cuh"

NORM_BOTH(forward_registers, 512, 1)
NORM_BOTH(forward_shared, 512, 1)
NORM_BOTH(backward_registers, 512, 1)
NORM_BOTH(backward_shared, 512, 1)
