// Sets beyond the chip, f64: a module of its own, so that a program compiles only the dtypes it uses.
#include "split.cuh"
#define ELEMENT double
#define SUFFIX f64
#include "entries.cuh"

NORM_BOTH(split_moments, 256, 4)
NORM_BOTH(split_forward, 256, 4)
NORM_BOTH(split_sums, 256, 4)
NORM_BOTH(split_column_sums, 128, 4)
NORM_BOTH(split_backward, 256, 3)
