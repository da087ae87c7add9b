// Merging of parts accumulated in f64.
#include "combine.cuh"

NORM_ENTRY(norm_combine_moments_f64, 256, 2) { combine_moments<double>(p); }
NORM_ENTRY(norm_combine_sums_f64, 256, 2) { combine_sums<double>(p); }
NORM_ENTRY(norm_reduce_params_f64, 256, 2) { reduce_params<double>(p); }
NORM_ENTRY(norm_move_running_f64, 256, 2) { move_running_averages<double>(p); }
