// Column walks, f32: a module of its own, so that a program compiles only the dtypes it uses.
#include "columns.cuh"
#define ELEMENT float
#define SUFFIX f32
#include "entries.cuh"

NORM_BOTH(column_moments, 256, 3)
NORM_BOTH(column_forward, 256, 3)
NORM_BOTH(column_sums, 256, 2)
NORM_BOTH(column_backward, 256, 2)
