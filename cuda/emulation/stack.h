// Stacks of fibers: the switch from one to another, in assembly, and a stack that has yet to run.
//
// Kept apart from run.cpp because it is all that depends on the processor.
#pragma once
#include <cstddef>

// switch_stack(from, to): saves the callee's registers on this stack and its pointer in *from, and goes
// on where `to` was left.
extern "C" void norm_switch_stack(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl norm_switch_stack
.type norm_switch_stack,@function
norm_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size norm_switch_stack,.-norm_switch_stack
)");
constexpr int SAVED = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl norm_switch_stack
.type norm_switch_stack,%function
norm_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size norm_switch_stack,.-norm_switch_stack
)");
#else
#error "the emulation switches fibers on x86-64 and aarch64 only"
#endif

namespace emulation {

// A stack that ends at `end`, on which switch_stack returns into `enter`.
inline void* fresh_stack(char* end, void (*enter)()) {
    void** top = reinterpret_cast<void**>(end);
#if defined(__x86_64__)
    // `enter` finds the stack as after a call: 8 beyond a multiple of 16.
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(enter);
    for (int i = 0; i < SAVED; ++i) *--top = nullptr;
#else
    top -= 20;
    for (int i = 0; i < 20; ++i) top[i] = nullptr;
    top[11] = reinterpret_cast<void*>(enter); // x30
#endif
    return top;
}

} // namespace emulation
