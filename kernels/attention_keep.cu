// Dropout of attention's probabilities: which are kept, one bit each, drawn once for all kernels that need them.
//
// Math      bit (head·T + query)·T + key of a sample: philox.cuh, where the CPU's draw is the same.
// Tensors   keep: u32 [B, H, T, ceil(T / 32)]; bit i of word w belongs to key 32·w + i. Bits past the last key are
//           drawn as if they belonged to the next query's first keys, and are ignored.
// Design    A draw gives four neighbouring elements, and with an odd T a draw can span two rows. In the kernels that
//           use the probabilities, neighbouring lanes have elements of different draws. So a thread draws a word of 32
//           once, at 1/8 byte per probability and use, instead of every lane drawing per pair in three kernels.
// Launch    one thread per word, 256 per block.
// Source    Salmon et al. 2011 (Philox).
#include "philox.cuh"

struct AttentionKeepArgs {
  u32* keep;
  const StepParams* params;
  MaskArgs dropout;
  u32 images, heads, tokens;
};

KERNEL(attention_keep, 256, 1)(ARGS(AttentionKeepArgs)) {
  const u32 heads = args.heads, tokens = args.tokens;
  const u32 words = ceil_div(tokens, 32), i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= args.images * heads * tokens * words) return;
  const Mask bound = bind_mask(args.dropout, args.params);
  const u32 row = i / words, sample = row / (heads * tokens);
  const u32 element = row % (heads * tokens) * tokens + i % words * 32, skew = element % 4;
  u32 bits = 0;
  for (u32 draw = 0; draw < (skew == 0 ? 8 : 9); ++draw) {
    float factors[4];
    mask_factors4(bound, sample, element / 4 + draw, factors);
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
      // Wraps above 32 for elements before the word's first.
      const u32 bit = 4 * draw + j - skew;
      if (bit < 32 && factors[j] != 0.0f) bits |= 1u << bit;
    }
  }
  args.keep[i] = bits;
}
