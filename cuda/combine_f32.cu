// Merging of parts accumulated in f32.
#include "combine.cuh"

NORM_ENTRY(norm_combine_moments_f32, 256, 2) { combine_moments<float>(p); }
NORM_ENTRY(norm_combine_sums_f32, 256, 2) { combine_sums<float>(p); }
NORM_ENTRY(norm_reduce_params_f32, 256, 4) { reduce_params<float>(p); }
NORM_ENTRY(norm_move_running_f32, 256, 2) { move_running_averages<float>(p); }
