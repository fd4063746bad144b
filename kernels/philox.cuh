// Dropout masks that are drawn and never stored: Philox4x32-10 (Salmon et al. 2011), with the same draws as
// `src/rng.rs` and `src/backend/mask.rs` on the CPU.
//
// One block of four words decides four neighbouring elements of one sample. Counter: (element / 4, sample,
// site, step low); key: (seed low, seed high ^ step high ^ domain). An element keeps its value if its word's
// top 24 bits, read as a number in [0, 1), are at least `rate`; kept values are divided by 1 - rate.
#pragma once

#include "step.cuh"
#include "types.cuh"

// A mask as the host passes it: by value, the same in every step. `rate` 0 draws nothing.
struct MaskArgs {
  float rate;
  u32 site;
  u32 first_sample;  // index in the global batch of the micro-batch's first sample, its low 32 bits
};

// A mask bound to the current step.
struct Mask {
  float rate, scale;
  u32 site, step, first_sample;
  u32 key0, key1;
};

__device__ __forceinline__ Mask bind_mask(MaskArgs args, const StepParams* params) {
  Mask m = {args.rate, 1.0f, args.site, 0, args.first_sample, 0, 0};
  if (args.rate != 0.0f) {
    constexpr u32 MASK_DOMAIN = 2u << 28;
    u64 seed = params->seed, step = params->step;
    m.scale = 1.0f / (1.0f - args.rate);
    m.step = static_cast<u32>(step);
    m.key0 = static_cast<u32>(seed);
    m.key1 = static_cast<u32>(seed >> 32) ^ static_cast<u32>(step >> 32) ^ MASK_DOMAIN;
  }
  return m;
}

__device__ __forceinline__ void philox(u32 (&c)[4], u32 key0, u32 key1) {
#pragma unroll
  for (u32 round = 0; round < 10; ++round) {
    u64 p0 = static_cast<u64>(c[0]) * 0xD2511F53u;
    u64 p1 = static_cast<u64>(c[2]) * 0xCD9E8D57u;
    u32 c0 = static_cast<u32>(p1 >> 32) ^ c[1] ^ key0;
    u32 c2 = static_cast<u32>(p0 >> 32) ^ c[3] ^ key1;
    c[0] = c0, c[1] = static_cast<u32>(p1), c[2] = c2, c[3] = static_cast<u32>(p0);
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
}

// The words of elements 4·block to 4·block + 3 of a sample of the micro-batch.
__device__ __forceinline__ void mask_words4(const Mask& m, u32 sample, u32 block, u32 (&words)[4]) {
  words[0] = block, words[1] = m.first_sample + sample, words[2] = m.site, words[3] = m.step;
  philox(words, m.key0, m.key1);
}
// 0 or the scale of kept values.
__device__ __forceinline__ float mask_of_word(const Mask& m, u32 word) {
  float unit = static_cast<float>(word >> 8) * (1.0f / 16777216.0f);
  return unit < m.rate ? 0.0f : m.scale;
}

// The factors of elements 4·block to 4·block + 3.
__device__ __forceinline__ void mask_factors4(const Mask& m, u32 sample, u32 block, float (&f)[4]) {
  u32 words[4];
  mask_words4(m, sample, block, words);
#pragma unroll
  for (u32 i = 0; i < 4; ++i) f[i] = mask_of_word(m, words[i]);
}

// The factor of one element; drop-path uses element 0.
__device__ __forceinline__ float mask_factor(const Mask& m, u32 sample, u32 element) {
  u32 words[4];
  mask_words4(m, sample, element / 4, words);
  u32 i = element % 4;
  return mask_of_word(m, i == 0 ? words[0] : i == 1 ? words[1] : i == 2 ? words[2] : words[3]);
}

// The factors of eight elements starting at `element`. If `element` is a multiple of 4 (false only for odd widths),
// this takes two draws.
__device__ __forceinline__ void mask_factors8(const Mask& m, u32 sample, u32 element, float (&f)[VEC]) {
  u32 a[4], b[4];
  mask_words4(m, sample, element / 4, a);
  mask_words4(m, sample, element / 4 + 1, b);
  u32 w[11] = {a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], 0, 0, 0};
  if (element % 4 != 0) {
    u32 c[4];
    mask_words4(m, sample, element / 4 + 2, c);
    w[8] = c[0], w[9] = c[1], w[10] = c[2];
    // Shifts by selects, because registers cannot be indexed.
    if (element & 1) {
#pragma unroll
      for (u32 i = 0; i < 10; ++i) w[i] = w[i + 1];
    }
    if (element & 2) {
#pragma unroll
      for (u32 i = 0; i < 9; ++i) w[i] = w[i + 2];
    }
  }
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) f[i] = mask_of_word(m, w[i]);
}
