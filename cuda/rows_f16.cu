// Sets on chip, f16: a module of its own, so that a program compiles only the dtypes it uses.
#include "rows_backward.cuh"
#define ELEMENT __half
#define SUFFIX f16
#include "entries.cuh"

NORM_BOTH(forward_registers, 512, 1)
NORM_BOTH(forward_shared, 512, 1)
NORM_BOTH(backward_registers, 512, 1)
NORM_BOTH(backward_shared, 512, 1)
