// Sums as tensor cores form them: aligned to the largest term, and cut off.
//
// What is published of them (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer
// Science 7:e330, 2021): products are exact; those of a block and the sum so far are aligned to the largest exponent
// among them, what falls below the last place is dropped, and so is what does not fit into the result. Ampere adds 8
// products at a time and keeps one more bit than f32 has, later GPUs more of both. This is a GPU that keeps none.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

namespace standin {

constexpr size_t kTruncatedBlock = 8;

// `sum` plus at most `kTruncatedBlock` exact products.
inline float truncated_sum(float sum, const double* products, size_t count) {
  double most = fabs(double{sum});
  for (size_t i = 0; i < count; ++i) most = fmax(most, fabs(products[i]));
  double plain = sum;
  for (size_t i = 0; i < count; ++i) plain += products[i];
  if (most == 0 || !(fabs(plain) <= 3e38)) return static_cast<float>(plain);  // also infinities and NaN
  // The last place of an f32 with the largest term's exponent, and its reciprocal.
  int exponent = static_cast<int>(__builtin_bit_cast(uint64_t, most) >> 52 & 0x7ff) - 23;
  double place = __builtin_bit_cast(double, static_cast<uint64_t>(exponent) << 52);
  double places = __builtin_bit_cast(double, static_cast<uint64_t>(2046 - exponent) << 52);
  int64_t whole = static_cast<int64_t>(sum * places);
  for (size_t i = 0; i < count; ++i) whole += static_cast<int64_t>(products[i] * places);
  double exact = static_cast<double>(whole) * place;
  constexpr uint64_t kBelowF32 = (uint64_t{1} << 29) - 1;
  return static_cast<float>(__builtin_bit_cast(double, __builtin_bit_cast(uint64_t, exact) & ~kBelowF32));
}

}  // namespace standin
