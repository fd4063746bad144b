// Storage types and the access from which all row kernels are built: eight neighbouring elements.
//
// A kernel is a template over T, float or bf16: the type of a matrix in memory. Arithmetic is f32. Eight elements are
// one 16-byte access of bf16 or two of f32. At the right end of a row fewer are valid: loads return 0 for the others,
// stores leave them unchanged. Loads of bf16 may extend into the row's padding, whose values are dropped.
//
// Alignment: bf16 rows start at multiples of 16 bytes. f32 rows that do not (a row stride that is not a multiple of 4:
// small test shapes) are read and written element by element.
#pragma once

#include "ptx.cuh"

// Elements of one access, and lanes of a warp.
constexpr u32 VEC = 8;
constexpr u32 WARP = 32;

// ---- bits -------------------------------------------------------------------------------------------------

union Bits32 {
  float f;
  u32 u;
};
__device__ __forceinline__ float as_f32(u32 bits) {
  Bits32 v;
  v.u = bits;
  return v.f;
}
__device__ __forceinline__ u32 as_u32(float value) {
  Bits32 v;
  v.f = value;
  return v.u;
}

__device__ __forceinline__ u32 min_u32(u32 a, u32 b) {
  return a < b ? a : b;
}
__device__ __forceinline__ u32 ceil_div(u32 a, u32 b) {
  return (a + b - 1) / b;
}
// How many of the eight elements from `column` on exist in a row of `columns`.
__device__ __forceinline__ u32 valid8(u32 column, u32 columns) {
  return column < columns ? min_u32(VEC, columns - column) : 0;
}
__device__ __forceinline__ bool is_aligned16(const void* p) {
  return (reinterpret_cast<u64>(p) & 15) == 0;
}

// ---- single values ----------------------------------------------------------------------------------------

__device__ __forceinline__ float load1(const float* p) {
  return *p;
}
__device__ __forceinline__ float load1(const bf16* p) {
  return bf16_lo(p->bits);
}
__device__ __forceinline__ void store1(float* p, float v) {
  *p = v;
}
__device__ __forceinline__ void store1(bf16* p, float v) {
  p->bits = static_cast<u16>(pack_bf16(v, 0.0f));
}

// The value that a later load returns for a value stored as T.
template <typename T>
__device__ __forceinline__ float as_stored(float v);
template <>
__device__ __forceinline__ float as_stored<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ float as_stored<bf16>(float v) {
  return bf16_lo(pack_bf16(v, 0.0f));
}

// ---- eight values as they were loaded ---------------------------------------------------------------------

// Eight elements in registers, not yet unpacked: 4 registers of bf16, 8 of f32. Used for loads long before the values
// are needed.
template <typename T>
struct Raw8;
template <>
struct Raw8<bf16> {
  vec4 a;
};
template <>
struct Raw8<float> {
  vec4 a, b;
};

// Drops the elements of a packed pair that are past the `n` valid ones.
__device__ __forceinline__ u32 keep_pair(u32 pair, u32 first, u32 n) {
  return n >= first + 2 ? pair : (n == first + 1 ? pair & 0xffffu : 0u);
}
__device__ __forceinline__ vec4 keep8(vec4 v, u32 n) {
  return {keep_pair(v.x, 0, n), keep_pair(v.y, 2, n), keep_pair(v.z, 4, n), keep_pair(v.w, 6, n)};
}
__device__ __forceinline__ u32 bits_or_zero(const float* p, u32 i, u32 n) {
  return i < n ? as_u32(p[i]) : 0u;
}

// Loads eight elements of which the first `n` (0 to 8) are valid; with n = 0 nothing is read.
__device__ __forceinline__ Raw8<bf16> fetch8(const bf16* p, u32 n) {
  Raw8<bf16> r = {{0, 0, 0, 0}};
  if (n > 0) r.a = ld16(p);
  if (n < VEC) r.a = keep8(r.a, n);
  return r;
}
__device__ __forceinline__ Raw8<float> fetch8(const float* p, u32 n) {
  if (n == VEC && is_aligned16(p)) return {ld16(p), ld16(p + 4)};
  return {{bits_or_zero(p, 0, n), bits_or_zero(p, 1, n), bits_or_zero(p, 2, n), bits_or_zero(p, 3, n)},
          {bits_or_zero(p, 4, n), bits_or_zero(p, 5, n), bits_or_zero(p, 6, n), bits_or_zero(p, 7, n)}};
}

// The same, bypassing L1, for memory that is not written during the kernel and is read once.
__device__ __forceinline__ Raw8<bf16> fetch8_stream(const bf16* p, u32 n) {
  Raw8<bf16> r = {{0, 0, 0, 0}};
  if (n > 0) r.a = ld16_stream(p);
  if (n < VEC) r.a = keep8(r.a, n);
  return r;
}
__device__ __forceinline__ Raw8<float> fetch8_stream(const float* p, u32 n) {
  if (n == VEC && is_aligned16(p)) return {ld16_stream(p), ld16_stream(p + 4)};
  return fetch8(p, n);
}

__device__ __forceinline__ void unpack8(const Raw8<bf16>& r, float (&v)[VEC]) {
  v[0] = bf16_lo(r.a.x), v[1] = bf16_hi(r.a.x), v[2] = bf16_lo(r.a.y), v[3] = bf16_hi(r.a.y);
  v[4] = bf16_lo(r.a.z), v[5] = bf16_hi(r.a.z), v[6] = bf16_lo(r.a.w), v[7] = bf16_hi(r.a.w);
}
__device__ __forceinline__ void unpack8(const Raw8<float>& r, float (&v)[VEC]) {
  v[0] = as_f32(r.a.x), v[1] = as_f32(r.a.y), v[2] = as_f32(r.a.z), v[3] = as_f32(r.a.w);
  v[4] = as_f32(r.b.x), v[5] = as_f32(r.b.y), v[6] = as_f32(r.b.z), v[7] = as_f32(r.b.w);
}

// Frees the registers in which the compiler would keep the unpacked values: the next pass unpacks again.
__device__ __forceinline__ void forget_unpacked(vec4& v) {
  opaque(v.x), opaque(v.y), opaque(v.z), opaque(v.w);
}
__device__ __forceinline__ void forget_unpacked(Raw8<bf16>& r) {
  forget_unpacked(r.a);
}
// f32 is kept as loaded.
__device__ __forceinline__ void forget_unpacked(Raw8<float>&) {}

__device__ __forceinline__ vec4 pack8(const float (&v)[VEC]) {
  return {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
}

// ---- eight values in f32 ----------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ void load8(const T* p, u32 n, float (&v)[VEC]) {
  unpack8(fetch8(p, n), v);
}
template <typename T>
__device__ __forceinline__ void load8_stream(const T* p, u32 n, float (&v)[VEC]) {
  unpack8(fetch8_stream(p, n), v);
}

// Stores the first `n` of eight values.
__device__ __forceinline__ void store8(bf16* p, u32 n, const float (&v)[VEC]) {
  if (n == VEC) {
    st16(p, pack8(v));
  } else {
#pragma unroll
    for (u32 i = 0; i < VEC; ++i)
      if (i < n) store1(p + i, v[i]);
  }
}
__device__ __forceinline__ void store8(float* p, u32 n, const float (&v)[VEC]) {
  if (n == VEC && is_aligned16(p)) {
    st16(p, {as_u32(v[0]), as_u32(v[1]), as_u32(v[2]), as_u32(v[3])});
    st16(p + 4, {as_u32(v[4]), as_u32(v[5]), as_u32(v[6]), as_u32(v[7])});
  } else {
#pragma unroll
    for (u32 i = 0; i < VEC; ++i)
      if (i < n) p[i] = v[i];
  }
}

// The same at any address: nothing past the `n` values is read or written.
template <typename T>
__device__ __forceinline__ void load8_anywhere(const T* p, u32 n, float (&v)[VEC]) {
  if (n == VEC && is_aligned16(p)) return load8(p, n, v);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] = i < n ? load1(p + i) : 0.0f;
}
template <typename T>
__device__ __forceinline__ void store8_anywhere(T* p, u32 n, const float (&v)[VEC]) {
  if (n == VEC && is_aligned16(p)) return store8(p, n, v);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i)
    if (i < n) store1(p + i, v[i]);
}

// Stores the first `n` (0 to 8) of eight values that `pack8` has rounded.
__device__ __forceinline__ void store8_packed(bf16* p, u32 n, vec4 v) {
  if (n == VEC) {
    st16(p, v);
  } else {
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (u32 i = 0; i < VEC; ++i)
      if (i < n) p[i].bits = static_cast<u16>(pairs[i / 2] >> i % 2 * 16);
  }
}

// Rounds eight values as a store would.
template <typename T>
__device__ __forceinline__ void round8(float (&v)[VEC]) {
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] = as_stored<T>(v[i]);
}

// ---- where a thread works ---------------------------------------------------------------------------------

// Elementwise kernels give each thread eight neighbouring elements of one row; blocks follow the rows.
struct Place {
  u32 row, column;
  u32 n;  // valid elements; 0: the thread has nothing to do
};
__device__ __forceinline__ Place place_of_thread(u32 rows, u32 columns) {
  u32 per_row = ceil_div(columns, VEC);
  u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  u32 row = index / per_row;
  u32 column = (index - row * per_row) * VEC;
  return {row, column, row < rows ? valid8(column, columns) : 0};
}
// The start of row `row`.
template <typename T>
__device__ __forceinline__ T* row_of(T* p, u32 row, u32 ld) {
  return p + static_cast<u64>(row) * ld;
}

// A matrix as the host passes it: rows start `ld` elements apart. Without a matrix `at` is null.
template <typename T>
struct View {
  T* at;
  u32 ld;
  u32 rows, cols;
};
template <typename T>
__device__ __forceinline__ T* row_of(const View<T>& m, u32 row) {
  return row_of(m.at, row, m.ld);
}
// Eight neighbouring elements of the row of a thread's place.
template <typename T>
__device__ __forceinline__ T* at_place(const View<T>& m, const Place& at) {
  return row_of(m, at.row) + at.column;
}
