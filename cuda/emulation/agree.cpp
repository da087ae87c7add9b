// The kernels' side of what src/cuda states too, as a table of names and numbers: where the fields of
// `Params` lie, its flags, the codes of activations and dtypes, what the plan counts of threads and of
// shared memory. A test compares it with Rust's (src/cuda/emulation/agree.rs).
//
// Kept separate from the kernels: it is compiled for the host alone.
#include "../split.cuh"

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

struct Fact {
    const char* name;
    uint64_t value, bytes; // of a field: where it lies, and its size
};

constexpr uint32_t CODES = 4;

// The code under which `load_param` reads a three: each dtype's three is no other one's.
uint64_t code_of(const void* three) {
    for (uint32_t code = 0; code < CODES; ++code) {
        if (load_param<double>(three, code, 0) == 3.0) return code;
    }
    return CODES;
}

// As long as the widest dtype.
const double THREE_F64[1] = {3};
const float THREE_F32[2] = {3, 0};
const uint16_t THREE_F16[4] = {0x4200}, THREE_BF16[4] = {0x4040};
const struct {
    const char* name;
    const void* value;
} THREES[] = {{"f32", THREE_F32}, {"f16", THREE_F16}, {"bf16", THREE_BF16}, {"f64", THREE_F64}};

#define ARGUMENT(name) {"Arguments." #name, offsetof(Arguments, name), sizeof(Arguments::name)}
#define SHAPE(name) {"Shape." #name, offsetof(Shape, name), sizeof(Shape::name)}
#define SCHEDULE(name) {"Schedule." #name, offsetof(Schedule, name), sizeof(Schedule::name)}
#define DIVISOR(name) {"Divisor." #name, offsetof(Divisor, name), sizeof(Divisor::name)}
#define CONSTANT(name) {#name, uint64_t(name), 0}

// What the plan counts of a dtype.
#define ELEMENT(name, type) \
    {#name " bytes", sizeof(type), 0}, {#name " backward_elements", uint64_t(BACKWARD_ELEMENTS<type>), 0}, \
    {#name " gradient_step", HeldGradient<type, 1>::WIDE, 0}, {#name " held 1", held_bytes<type>(1), 0}, \
    {#name " held 1001", held_bytes<type>(1001), 0}, {#name " apart 101", apart<type>(101), 0}
#define ACCUMULATOR(name, type) \
    {#name " slots", Group<type, 1>::BYTES, 0}, {#name " slots of a cluster", Group<type, 8>::BYTES, 0}

// Where a part of `Params` begins.
template <class Part> uint64_t part() {
    static const Params params{};
    return reinterpret_cast<const char*>(static_cast<const Part*>(&params)) - reinterpret_cast<const char*>(&params);
}

const Fact FACTS[] = {
    {"Params.arguments", part<Arguments>(), sizeof(Arguments)},
    {"Params.shape", part<Shape>(), sizeof(Shape)},
    {"Params.schedule", part<Schedule>(), sizeof(Schedule)},
    ARGUMENT(x), ARGUMENT(dy), ARGUMENT(out), ARGUMENT(weight), ARGUMENT(bias), ARGUMENT(residual), ARGUMENT(skip),
    ARGUMENT(gate), ARGUMENT(sum), ARGUMENT(dskip), ARGUMENT(dgate), ARGUMENT(stats), ARGUMENT(sums),
    ARGUMENT(part_moments), ARGUMENT(part_sums), ARGUMENT(param_parts), ARGUMENT(given_mean), ARGUMENT(given_low),
    ARGUMENT(given_var), ARGUMENT(running_mean), ARGUMENT(running_var), ARGUMENT(dweight), ARGUMENT(dbias),
    ARGUMENT(weight_dtype), ARGUMENT(bias_dtype), ARGUMENT(given_mean_dtype), ARGUMENT(given_var_dtype),
    ARGUMENT(running_mean_dtype), ARGUMENT(running_var_dtype), ARGUMENT(dweight_dtype), ARGUMENT(dbias_dtype),
    SHAPE(outer), SHAPE(rows), SHAPE(width), SHAPE(run), SHAPE(span), SHAPE(sets), SHAPE(sets_per_outer),
    SHAPE(set_len), SHAPE(params), SHAPE(set_params), SHAPE(tokens), SHAPE(block_dims), SHAPE(block_strides),
    SHAPE(eps), SHAPE(momentum), SHAPE(count), SHAPE(weight_offset), SHAPE(slope), SHAPE(by_span), SHAPE(by_sets),
    SHAPE(flags), SHAPE(activation),
    SCHEDULE(segs), SCHEDULE(seg_len), SCHEDULE(seg_stride), SCHEDULE(chunk_len), SCHEDULE(pieces),
    SCHEDULE(segs_per_chunk), SCHEDULE(chunks), SCHEDULE(chunk_rows), SCHEDULE(part_chunks), SCHEDULE(part_width),
    SCHEDULE(part_run), SCHEDULE(part_span), SCHEDULE(copies), SCHEDULE(param_width), SCHEDULE(param_span),
    SCHEDULE(by_seg), SCHEDULE(by_chunks), SCHEDULE(by_pieces), SCHEDULE(lanes), SCHEDULE(segment_lanes),
    SCHEDULE(combine_lanes), SCHEDULE(reduce_columns), SCHEDULE(stages),
    DIVISOR(divisor), DIVISOR(magic), DIVISOR(shift),
    CONSTANT(CENTER), CONSTANT(FIXED), CONSTANT(PER_SET), CONSTANT(PER_COLUMN), CONSTANT(PER_ROW),
    CONSTANT(UNWEIGHTED), CONSTANT(PART_WEIGHTED), CONSTANT(WANT_PARAMS), CONSTANT(FUSED), CONSTANT(BLOCKS),
    CONSTANT(SUMS_WRITE), CONSTANT(PLAIN_NORM),
    CONSTANT(NONE), CONSTANT(RELU), CONSTANT(RELU6), CONSTANT(LEAKY_RELU), CONSTANT(SILU), CONSTANT(SIGMOID),
    CONSTANT(HARD_SWISH), CONSTANT(GELU), CONSTANT(GELU_TANH),
    ELEMENT(f32, float), ELEMENT(f16, __half), ELEMENT(bf16, __nv_bfloat16), ELEMENT(f64, double),
    ACCUMULATOR(f32, float), ACCUMULATOR(f64, double),
    {"threads of a group", 32 * Group<float, 1>::WARPS, 0},
    {"bytes that a thread keeps", KEPT_BYTES<__nv_bfloat16, 4>, 0},
    {"bytes in packs of 16 that a thread keeps", KEPT_BYTES<__nv_bfloat16, 8>, 0},
    {"bytes in packs of 16 that a thread of a cluster keeps", KEPT_BYTES<__nv_bfloat16, 8, 8>, 0},
    {"bytes of single elements that a thread keeps", KEPT_BYTES<__nv_bfloat16, 1>, 0},
    {"bytes of a chunk", CHUNK_BYTES * 256, 0},
    {"blocks of a cluster", Exchange<float, 8>::VALUES / 3, 0},
};

} // namespace

// The n-th fact; false behind the last one.
extern "C" bool norm_emulation_fact(size_t n, const char** name, uint64_t* value, uint64_t* bytes) {
    constexpr size_t COUNT = sizeof(FACTS) / sizeof(FACTS[0]);
    if (n < COUNT) *name = FACTS[n].name, *value = FACTS[n].value, *bytes = FACTS[n].bytes;
    return n < COUNT;
}

// 16-bit floats as the emulation converts them.
extern "C" uint16_t norm_emulation_to_f16(float v) { return __float2half_rn(v).bits; }
extern "C" uint16_t norm_emulation_to_bf16(float v) { return __float2bfloat16_rn(v).bits; }
extern "C" float norm_emulation_of_f16(uint16_t bits) { return __half2float({bits}); }
extern "C" float norm_emulation_of_bf16(uint16_t bits) { return __bfloat162float({bits}); }

// The code by which the kernels know a dtype of this name, as they read it.
extern "C" uint64_t norm_emulation_code(const char* dtype) {
    for (const auto& three : THREES) {
        if (std::strcmp(three.name, dtype) == 0) return code_of(three.value);
    }
    return CODES;
}
