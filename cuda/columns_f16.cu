// Column walks, f16: a module of its own, so that a program compiles only the dtypes it uses.
#include "columns.cuh"
#define ELEMENT __half
#define SUFFIX f16
#include "entries.cuh"

NORM_HALVES(column_moments, 256, 3)
NORM_HALVES(column_forward, 256, 3)
NORM_HALVES(column_sums, 256, 2)
NORM_HALVES(column_backward, 256, 2)
