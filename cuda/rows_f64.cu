// Sets on chip, f64: a module of its own, so that a program compiles only the dtypes it uses.
#include "held_backward.cuh"
#define ELEMENT double
#define SUFFIX f64
#include "entries.cuh"

NORM_BOTH(forward_held, 512, 2, 1)
NORM_BOTH(backward_rows, 512, 1, 1)
NORM_BOTH(backward_sets, 512, 1, 1)
