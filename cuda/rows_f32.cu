// Sets on chip, f32: a module of its own, so that a program compiles only the dtypes it uses.
#include "plain_backward.cuh"
#define ELEMENT float
#define SUFFIX f32
#include "entries.cuh"

NORM_BOTH(forward_held, 512, 2, 1)
NORM_ONE(forward_kept, , NORM_VECTOR, 512, 2, 1)
NORM_ONE(forward_kept, _scalar, 1, 256, 3, 1)
NORM_ONE(forward_several, , NORM_VECTOR, 256, 5)
NORM_BOTH(backward_rows, 512, 1, 1)
NORM_BOTH(backward_sets, 512, 2, 1)
NORM_ONE(backward_plain, _scalar, 1, 512, 1, 1, 16)
