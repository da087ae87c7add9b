// The macros that make entry points of the device functions, for one ELEMENT with one SUFFIX.
//
// `norm_<function>_<suffix>` moves 16 bytes an access, `.._scalar` one element, for what is not aligned
// or no multiple. 16-bit elements have `.._half` between them: 8 bytes, for 14x14 images and the like.
// Threads and blocks a multiprocessor are launch bounds: what the registers have to leave room for.

#define NORM_NAME_(kernel, suffix, tail) norm_##kernel##_##suffix##tail
#define NORM_NAME(kernel, suffix, tail) NORM_NAME_(kernel, suffix, tail)
#define NORM_VECTOR int(16 / sizeof(ELEMENT))

#define NORM_NAMED(name, tail, kernel, vector, threads, blocks, ...) \
    NORM_ENTRY(NORM_NAME(name, SUFFIX, tail), threads, blocks) { kernel<ELEMENT, vector __VA_OPT__(,) __VA_ARGS__>(p); }
#define NORM_ONE(kernel, tail, vector, threads, blocks, ...) \
    NORM_NAMED(kernel, tail, kernel, vector, threads, blocks __VA_OPT__(,) __VA_ARGS__)
#define NORM_BOTH(kernel, threads, blocks, ...) \
    NORM_ONE(kernel, , NORM_VECTOR, threads, blocks __VA_OPT__(,) __VA_ARGS__) \
    NORM_ONE(kernel, _scalar, 1, threads, blocks __VA_OPT__(,) __VA_ARGS__)
// Four elements an access, where a thread has registers for every column of its own.
#define NORM_HALVES(kernel, threads, blocks) \
    NORM_ONE(kernel, _half, 4, threads, blocks) \
    NORM_ONE(kernel, _scalar, 1, threads, blocks)
#ifdef HALVES
#define NORM_ALL(kernel, threads, blocks, ...) \
    NORM_BOTH(kernel, threads, blocks __VA_OPT__(,) __VA_ARGS__) \
    NORM_ONE(kernel, _half, 4, threads, blocks __VA_OPT__(,) __VA_ARGS__)
#else
#define NORM_ALL NORM_BOTH
#endif

// Clusters of 8 blocks, the most that every device with clusters takes.
#define NORM_CLUSTER(name, tail, kernel, vector, threads, blocks, ...) \
    NORM_CLUSTER_ENTRY(NORM_NAME(name, SUFFIX, tail), threads, blocks, 8) { kernel<ELEMENT, vector, 8 __VA_OPT__(,) __VA_ARGS__>(p); }
#define NORM_CLUSTERS(name, kernel, threads, blocks) \
    NORM_CLUSTER(name, , kernel, NORM_VECTOR, threads, blocks) \
    NORM_CLUSTER(name, _scalar, kernel, 1, threads, blocks)
#define NORM_CLUSTERS_HALF(name, kernel, threads, blocks) \
    NORM_CLUSTERS(name, kernel, threads, blocks) \
    NORM_CLUSTER(name, _half, kernel, 4, threads, blocks)
