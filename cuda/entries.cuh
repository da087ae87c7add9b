// The macros that make entry points of the device functions, for one ELEMENT with one SUFFIX.
//
// `norm_<function>_<suffix>` moves 16 bytes an access, `.._scalar` one element, for what is not aligned
// to 16 bytes or no multiple of them. Row kernels take the cluster size as a third template argument.

#define NORM_NAME_(kernel, suffix, tail) norm_##kernel##_##suffix##tail
#define NORM_NAME(kernel, suffix, tail) NORM_NAME_(kernel, suffix, tail)
#define NORM_VECTOR int(16 / sizeof(ELEMENT))

#define NORM_BOTH(kernel, threads, ...) \
    NORM_ENTRY(NORM_NAME(kernel, SUFFIX, ), threads, 1) { kernel<ELEMENT, NORM_VECTOR __VA_OPT__(,) __VA_ARGS__>(p); } \
    NORM_ENTRY(NORM_NAME(kernel, SUFFIX, _scalar), threads, 1) { kernel<ELEMENT, 1 __VA_OPT__(,) __VA_ARGS__>(p); }

#define NORM_CLUSTER(name, kernel, threads, size) \
    NORM_CLUSTER_ENTRY(NORM_NAME(name, SUFFIX, ), threads, size) { kernel<ELEMENT, NORM_VECTOR, size>(p); }
#define NORM_CLUSTER_SCALAR(name, kernel, threads, size) \
    NORM_CLUSTER_ENTRY(NORM_NAME(name, SUFFIX, _scalar), threads, size) { kernel<ELEMENT, 1, size>(p); }
