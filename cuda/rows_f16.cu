// Sets on chip, f16: a module of its own, so that a program compiles only the dtypes it uses.
#include "plain_backward.cuh"
#define HALVES
#define ELEMENT __half
#define SUFFIX f16
#include "entries.cuh"

NORM_ALL(forward_held, 512, 2, 1)
NORM_ONE(forward_kept, , NORM_VECTOR, 512, 2, 1)
NORM_ONE(forward_kept, _scalar, 1, 256, 3, 1)
NORM_ONE(forward_several, , NORM_VECTOR, 256, 5)
NORM_ONE(forward_kept, _half, 4, 256, 3, 1)
NORM_ONE(forward_several, _half, 4, 256, 3)
NORM_ALL(backward_rows, 512, 1, 1)
NORM_ALL(backward_sets, 512, 2, 1)
NORM_ONE(backward_plain, _scalar, 1, 512, 1, 1, 16)
NORM_NAMED(backward_plain_wide, , backward_plain, NORM_VECTOR, 512, 1, 1, 32)
