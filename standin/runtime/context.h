// Switching between stacks: a few nanoseconds in assembly on x86-64, `ucontext` elsewhere.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if !defined(__x86_64__) || defined(STANDIN_UCONTEXT)
#include <ucontext.h>
#endif

namespace standin {

#if defined(__x86_64__) && !defined(STANDIN_UCONTEXT)

struct Context {
  void* stack_pointer = nullptr;
};

// Saves the callee-saved registers and the stack pointer in `from`, and loads them from `to`.
extern "C" void standin_switch(void** from, void* to);

inline void switch_to(Context& from, Context& to) {
  standin_switch(&from.stack_pointer, to.stack_pointer);
}

// Prepares `context` so that the first switch to it calls `entry` on the stack that ends at `top`.
inline void prepare(Context& context, uint8_t* low, uint8_t* top, void (*entry)()) {
  (void)low;
  // At a function's entry the return address is at 16 n + 8.
  auto* slot = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15}) - 1;
  *slot = nullptr;  // `entry` never returns
  *--slot = reinterpret_cast<void*>(entry);
  for (int r = 0; r < 6; ++r) *--slot = nullptr;
  context.stack_pointer = slot;
}

#else

struct Context {
  ucontext_t state;
};

inline void switch_to(Context& from, Context& to) {
  swapcontext(&from.state, &to.state);
}

inline void prepare(Context& context, uint8_t* low, uint8_t* top, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = low;
  context.state.uc_stack.ss_size = static_cast<size_t>(top - low);
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

#endif

}  // namespace standin
