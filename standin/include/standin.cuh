// The host's half of `kernels/ptx.cuh`: the vocabulary of CUDA C++ and a counterpart for every instruction.
//
// A kernel compiled against this file is an ordinary function that the stand-in GPU calls once per thread, each call on
// its own stack. Plain loads and stores reach the runtime through the hooks of `-fsanitize=thread`; instructions that
// the host lacks are functions declared here. Barriers and collectives remember the line of their call.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#include "site.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) alignas(n)

namespace standin {

struct Dim3 {
  uint32_t x, y, z;
};

// ---- registration -----------------------------------------------------------------------------------------

struct Bound {
  const char* name;
  uint32_t max_threads, min_blocks;
  bool hot;
  Site site;
};

struct Argument {
  uint32_t size, align;
};

// A kernel as the driver finds it by name.
struct Kernel {
  Bound bound;
  uint32_t argument_count;
  const Argument* arguments;
  void (*function)();
  void (*call)(void (*function)(), void* const* arguments);
};

void register_kernel(const Kernel& kernel);

// Reads the arguments without hooks: they are in the launch's memory, not in device memory.
template <class... A, size_t... I>
__attribute__((no_sanitize_thread)) void call_with(void (*f)(A...), void* const* arguments,
                                                   std::index_sequence<I...>) {
  f(*static_cast<A*>(arguments[I])...);
}
template <class... A>
__attribute__((no_sanitize_thread)) void call_kernel(void (*function)(), void* const* arguments) {
  call_with(reinterpret_cast<void (*)(A...)>(function), arguments, std::index_sequence_for<A...>());
}

template <class... A>
struct Registrar {
  Registrar(const Bound& bound, void (*function)(A...)) {
    static const Argument list[sizeof...(A) + 1] = {{sizeof(A), alignof(A)}..., {0, 0}};
    register_kernel({bound, sizeof...(A), list, reinterpret_cast<void (*)()>(function), call_kernel<A...>});
  }
};

template <int>
struct Declared;

}  // namespace standin

// KERNEL(name, …) ends in the name of a macro that consumes the parameter list after it, so that the function can be
// declared, registered under its name with the types of its arguments, and then defined.
#define KERNEL(name, max_threads, min_blocks) \
  STANDIN_BOUND(__COUNTER__, name, max_threads, min_blocks, false) STANDIN_KERNEL
#define ARGS(...) const __VA_ARGS__ args
#define HOT_KERNEL(name, max_threads, min_blocks) \
  STANDIN_BOUND(__COUNTER__, name, max_threads, min_blocks, true) STANDIN_KERNEL
#define STANDIN_BOUND(n, name, max_threads, min_blocks, hot) \
  STANDIN_BOUND_(n, name, max_threads, min_blocks, hot)
#define STANDIN_BOUND_(n, name, max_threads, min_blocks, hot)             \
  template <>                                                             \
  struct standin::Declared<n> {                                           \
    static constexpr standin::Bound bound() {                             \
      return {#name, max_threads, min_blocks, hot, {__FILE__, __LINE__}}; \
    }                                                                     \
  };
#define STANDIN_KERNEL(...) STANDIN_KERNEL_(__COUNTER__, (__VA_ARGS__))
#define STANDIN_KERNEL_(n, parameters) STANDIN_KERNEL__(n, parameters)
#define STANDIN_KERNEL__(n, parameters)                                                    \
  static void standin_kernel_##n parameters;                                               \
  static const standin::Registrar standin_registrar_##n(standin::Declared<n - 1>::bound(), \
                                                        &standin_kernel_##n);              \
  static void standin_kernel_##n parameters

// ---- where a thread is ------------------------------------------------------------------------------------

namespace standin {
// Constant while a kernel's function runs.
__attribute__((const)) Dim3 thread_index();
__attribute__((const)) Dim3 block_index();
__attribute__((const)) Dim3 block_size();
__attribute__((const)) Dim3 grid_size();
__attribute__((const)) uint8_t* shared_memory();
}  // namespace standin

#define threadIdx (::standin::thread_index())
#define blockIdx (::standin::block_index())
#define blockDim (::standin::block_size())
#define gridDim (::standin::grid_size())

inline u8* smem_base() {
  return standin::shared_memory();
}

// ---- loads and stores -------------------------------------------------------------------------------------

// One access of the full width, from the view of the hooks: the compiler would split a struct copy.
namespace standin {
typedef uint32_t Wide4 __attribute__((vector_size(16), may_alias));
typedef uint32_t Wide2 __attribute__((vector_size(8), may_alias));
typedef uint32_t Word __attribute__((may_alias));
}  // namespace standin

__forceinline__ vec4 ld16(const void* p) {
  standin::Wide4 v = *static_cast<const volatile standin::Wide4*>(p);
  return {v[0], v[1], v[2], v[3]};
}
__forceinline__ void st16(void* p, vec4 v) {
  standin::Wide4 w = {v.x, v.y, v.z, v.w};
  *static_cast<volatile standin::Wide4*>(p) = w;
}
__forceinline__ vec2 ld8(const void* p) {
  standin::Wide2 v = *static_cast<const volatile standin::Wide2*>(p);
  return {v[0], v[1]};
}
__forceinline__ void st8(void* p, vec2 v) {
  standin::Wide2 w = {v.x, v.y};
  *static_cast<volatile standin::Wide2*>(p) = w;
}
__forceinline__ u32 ld4(const void* p) {
  return *static_cast<const volatile standin::Word*>(p);
}
__forceinline__ void st4(void* p, u32 v) {
  *static_cast<volatile standin::Word*>(p) = v;
}
__forceinline__ vec4 ld16_stream(const void* p) {
  return ld16(p);
}

// ---- asynchronous copies, matrices, barriers, collectives, atomics ----------------------------------------

namespace standin {
void copy_async16(void* shared, const void* global, bool valid, Site site);
void copy_async_commit();
void copy_async_wait(uint32_t newest, Site site);
void ldmatrix(uint32_t* registers, const void* row, uint32_t matrices, bool transposed, Site site);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Site site);
void barrier(uint32_t id, uint32_t threads, Site site);  // threads = 0: the whole block
void sync_warp(Site site);
uint32_t shuffle_xor(uint32_t v, uint32_t mask, Site site);
uint32_t shuffle_index(uint32_t v, uint32_t lane, Site site);
uint32_t vote(bool v, Site site);
uint32_t atomic_add(uint32_t* p, uint32_t v, Site site);
void fence();
}  // namespace standin

inline void cp_async16(void* smem, const void* gmem, bool valid, standin::Site site = standin::Site::here()) {
  standin::copy_async16(smem, gmem, valid, site);
}
inline void cp_async_commit() {
  standin::copy_async_commit();
}
template <int N>
inline void cp_async_wait(standin::Site site = standin::Site::here()) {
  standin::copy_async_wait(N, site);
}

inline void ldmatrix_x4(u32 (&r)[4], const void* row, standin::Site site = standin::Site::here()) {
  standin::ldmatrix(r, row, 4, false, site);
}
inline void ldmatrix_x4_trans(u32 (&r)[4], const void* row, standin::Site site = standin::Site::here()) {
  standin::ldmatrix(r, row, 4, true, site);
}
inline void ldmatrix_x2(u32 (&r)[2], const void* row, standin::Site site = standin::Site::here()) {
  standin::ldmatrix(r, row, 2, false, site);
}
inline void ldmatrix_x2_trans(u32 (&r)[2], const void* row, standin::Site site = standin::Site::here()) {
  standin::ldmatrix(r, row, 2, true, site);
}
inline void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2],
                     standin::Site site = standin::Site::here()) {
  standin::mma_m16n8k16(d, a, b, site);
}

inline void block_sync(standin::Site site = standin::Site::here()) {
  standin::barrier(0, 0, site);
}
inline void warp_sync(standin::Site site = standin::Site::here()) {
  standin::sync_warp(site);
}
inline void named_sync(u32 id, u32 threads, standin::Site site = standin::Site::here()) {
  standin::barrier(id, threads, site);
}

// ---- CUDA's names for bits and numbers --------------------------------------------------------------------

__forceinline__ float __uint_as_float(u32 bits) {
  return __builtin_bit_cast(float, bits);
}
__forceinline__ u32 __float_as_uint(float value) {
  return __builtin_bit_cast(u32, value);
}
__forceinline__ float __int_as_float(i32 bits) {
  return __builtin_bit_cast(float, bits);
}
__forceinline__ i32 __float_as_int(float value) {
  return __builtin_bit_cast(i32, value);
}
__forceinline__ u32 __umulhi(u32 a, u32 b) {
  return static_cast<u32>((static_cast<u64>(a) * b) >> 32);
}
__forceinline__ i32 __popc(u32 v) {
  return __builtin_popcount(v);
}
__forceinline__ i32 __clz(i32 v) {
  return v == 0 ? 32 : __builtin_clz(static_cast<u32>(v));
}
__forceinline__ i32 __ffs(i32 v) {
  return __builtin_ffs(v);
}
__forceinline__ float __fmaf_rn(float a, float b, float c) {
  return fmaf(a, b, c);
}
__forceinline__ float __fadd_rn(float a, float b) {
  return a + b;
}
__forceinline__ float __fsub_rn(float a, float b) {
  return a - b;
}
__forceinline__ float __fmul_rn(float a, float b) {
  return a * b;
}
__forceinline__ float __fdiv_rn(float a, float b) {
  return a / b;
}
__forceinline__ float __frcp_rn(float a) {
  return 1.0f / a;
}
__forceinline__ float __fsqrt_rn(float a) {
  return sqrtf(a);
}
__forceinline__ float rsqrtf(float a) {
  return 1.0f / sqrtf(a);
}
__forceinline__ double rsqrt(double a) {
  return 1.0 / sqrt(a);
}
#define STANDIN_MIN_MAX(type)                \
  __forceinline__ type min(type a, type b) { \
    return b < a ? b : a;                    \
  }                                          \
  __forceinline__ type max(type a, type b) { \
    return a < b ? b : a;                    \
  }
STANDIN_MIN_MAX(int)
STANDIN_MIN_MAX(unsigned)
STANDIN_MIN_MAX(long)
STANDIN_MIN_MAX(unsigned long)
STANDIN_MIN_MAX(long long)
STANDIN_MIN_MAX(unsigned long long)
#undef STANDIN_MIN_MAX
__forceinline__ float min(float a, float b) {
  return fminf(a, b);
}
__forceinline__ float max(float a, float b) {
  return fmaxf(a, b);
}
__forceinline__ double min(double a, double b) {
  return fmin(a, b);
}
__forceinline__ double max(double a, double b) {
  return fmax(a, b);
}

// ---- shuffles, approximations, bf16 -----------------------------------------------------------------------

inline u32 shfl_xor(u32 v, u32 mask, standin::Site site = standin::Site::here()) {
  return standin::shuffle_xor(v, mask, site);
}
inline float shfl_xor(float v, u32 mask, standin::Site site = standin::Site::here()) {
  return __uint_as_float(standin::shuffle_xor(__float_as_uint(v), mask, site));
}
inline u32 shfl_idx(u32 v, u32 lane, standin::Site site = standin::Site::here()) {
  return standin::shuffle_index(v, lane, site);
}
inline float shfl_idx(float v, u32 lane, standin::Site site = standin::Site::here()) {
  return __uint_as_float(standin::shuffle_index(__float_as_uint(v), lane, site));
}
inline u32 warp_ballot(bool v, standin::Site site = standin::Site::here()) {
  return standin::vote(v, site);
}

namespace standin {
// Subnormals become zero, as `.ftz` says.
__forceinline__ float flushed(float x) {
  return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x;
}
}  // namespace standin

__forceinline__ float exp2_approx(float x) {
  return standin::flushed(exp2f(standin::flushed(x)));
}
__forceinline__ float log2_approx(float x) {
  return standin::flushed(log2f(standin::flushed(x)));
}
__forceinline__ float rcp_approx(float x) {
  return standin::flushed(1.0f / standin::flushed(x));
}
__forceinline__ float rsqrt_approx(float x) {
  return standin::flushed(1.0f / sqrtf(standin::flushed(x)));
}

namespace standin {
__forceinline__ u32 rounded_bf16(float x) {
  u32 bits = __float_as_uint(x);
  return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
}  // namespace standin

__forceinline__ u32 pack_bf16(float lo, float hi) {
  return standin::rounded_bf16(lo) | standin::rounded_bf16(hi) << 16;
}
__forceinline__ float bf16_lo(u32 packed) {
  return __uint_as_float(packed << 16);
}
__forceinline__ float bf16_hi(u32 packed) {
  return __uint_as_float(packed & 0xffff0000u);
}

inline u32 atomic_add(u32* p, u32 v, standin::Site site = standin::Site::here()) {
  return standin::atomic_add(p, v, site);
}
inline void fence_device() {
  standin::fence();
}
