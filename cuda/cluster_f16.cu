// Sets over a cluster of blocks, f16: sm_90 and up, a module of its own because older devices cannot load it.
#include "plain_backward.cuh"
#define ELEMENT __half
#define SUFFIX f16
#include "entries.cuh"

#if NORM_HAS_CLUSTERS
NORM_CLUSTERS_HALF(forward_cluster, forward_held, 256, 4)
NORM_CLUSTER(forward_kept_cluster, , forward_kept, NORM_VECTOR, 256, 4)
NORM_CLUSTER(forward_kept_cluster, _half, forward_kept, 4, 256, 4)
NORM_CLUSTER(backward_rows_cluster, , backward_rows, NORM_VECTOR, 512, 1)
NORM_CLUSTERS_HALF(backward_sets_cluster, backward_sets, 256, 2)
NORM_CLUSTER(backward_plain_cluster, , backward_plain, NORM_VECTOR, 256, 2, 32)
#endif
