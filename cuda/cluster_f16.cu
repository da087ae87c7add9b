// Sets over a cluster of blocks, f16: sm_90 and up, a module of its own because older devices cannot load it.
#include "rows_backward.cuh"
#define ELEMENT __half
#define SUFFIX f16
#include "entries.cuh"

#if NORM_HAS_CLUSTERS
NORM_CLUSTER(forward_cluster2, forward_registers, 512, 2)
NORM_CLUSTER(forward_cluster4, forward_registers, 512, 4)
NORM_CLUSTER(forward_cluster8, forward_registers, 512, 8)
NORM_CLUSTER(forward_cluster_shared, forward_shared, 512, 8)
NORM_CLUSTER_SCALAR(forward_cluster_shared, forward_shared, 512, 8)
NORM_CLUSTER(backward_cluster2, backward_registers, 512, 2)
NORM_CLUSTER(backward_cluster4, backward_registers, 512, 4)
NORM_CLUSTER(backward_cluster8, backward_registers, 512, 8)
NORM_CLUSTER(backward_cluster_shared, backward_shared, 512, 8)
NORM_CLUSTER_SCALAR(backward_cluster_shared, backward_shared, 512, 8)
#endif
